"""examples/swap_vision_tower.py: in every layout only the tower's bytes change, and the model loads."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from examples import swap_vision_tower
from tests.published_layouts import FARE, GELU, OPENAI, Published, save_layouts, transformers_state
from tests.small_models import photos, save_small_clip
from utils.errors import UserError

TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}


def save_llava(
    directory: Path, kind: str = "llava", dtype: torch.dtype = torch.float32, shards: str = "5GB", **tower
) -> None:
    """A LLaVA with random weights. ``shards``: size of a file at most."""
    config_class, model_class = CLASSES[kind]
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 100,
    }
    torch.manual_seed(1)
    config = config_class(
        vision_config=CLIPVisionConfig(**TOWER | tower),
        text_config=LlamaConfig(**text, num_key_value_heads=2), image_token_index=99,
    )  # fmt: skip
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=shards)
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor of all safetensors files."""
    return {key: tensor for file in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def swap(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["swap_vision_tower.py", *map(str, arguments)])
        swap_vision_tower.main()


def old_names(directory: Path) -> None:
    """Renames the tower as transformers 4 wrote it, with the buffer that was in files then."""
    state = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in tensors(directory).items()
    }
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def model_names(directory: Path) -> None:
    """Renames all as they are called inside of transformers 5."""
    state = {f"model.{key}" if "vision_tower" in key else key: value for key, value in tensors(directory).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "dtype", "shards", "rename"),
    [
        ("llava", torch.float32, "5GB", None),
        ("llava", torch.float16, "20KB", None),
        ("llava_next", torch.bfloat16, "20KB", None),
        ("llava", torch.float32, "5GB", old_names),
        ("llava", torch.float16, "5GB", model_names),
    ],
    ids=["one file", "sharded, float16", "llava-next, bfloat16", "names of transformers 4", "names with model."],
)
def test_the_tower_alone_changes(small_clip, tmp_path, kind, dtype, shards, rename):
    llava, swapped = tmp_path / "llava", tmp_path / "swapped"
    save_llava(llava, kind, dtype, shards)
    if rename:
        rename(llava)
    (llava / "pytorch_model.bin").write_bytes(b"the same weights again")
    before_bytes = {path.name: path.read_bytes() for path in llava.iterdir()}
    swap("--llava", llava, "--model", small_clip, "--output_dir", swapped)
    assert {path.name: path.read_bytes() for path in llava.iterdir()} == before_bytes
    assert {path.name for path in swapped.iterdir()} == {name for name in before_bytes if name != "pytorch_model.bin"}

    robust = CLIPVisionModel.from_pretrained(small_clip).eval()
    before, after, expected = tensors(llava), tensors(swapped), robust.state_dict()
    assert list(before) == list(after)
    replaced = 0
    for key in before:
        name = key.partition("vision_tower.")[2].removeprefix("vision_model.")
        if name in expected:
            assert torch.equal(after[key], expected[name].to(dtype))
            replaced += not torch.equal(after[key], before[key])
        else:
            assert torch.equal(after[key], before[key]), key
    assert replaced == len(expected)
    # Everything but the weights' own bytes: headers, metadata, other files.
    for file in swapped.iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == before_bytes[file.name]
            continue
        with safe_open(file, "pt") as new, safe_open(llava / file.name, "pt") as old:
            assert new.metadata() == old.metadata()
        assert file.stat().st_size == len(before_bytes[file.name])
        if not any("vision_tower" in key for key in load_file(file)):
            assert file.read_bytes() == before_bytes[file.name]
    if shards != "5GB":
        assert len(list(swapped.glob("*.safetensors"))) > 3

    model, found = CLASSES[kind][1].from_pretrained(swapped, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    rounded = robust.to(dtype).float()
    images = 2 * photos(2) - 1
    with torch.no_grad():
        seen = model.eval().model.vision_tower(images, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(seen, rounded(images, output_hidden_states=True).hidden_states[-2])


def test_linked_files_are_the_same_file_and_the_tower_is_not(small_clip, tmp_path):
    save_llava(tmp_path / "llava", shards="20KB")
    swap("--llava", tmp_path / "llava", "--model", small_clip, "--output_dir", tmp_path / "new", "--hard_links", "true")
    index = json.loads((tmp_path / "llava/model.safetensors.index.json").read_text())["weight_map"]
    changed = {file for key, file in index.items() if "vision_tower" in key}
    assert changed < set(index.values())
    for file in set(index.values()):
        same = os.path.samefile(tmp_path / "llava" / file, tmp_path / "new" / file)
        assert same == (file not in changed)


def test_the_image_half_alone_will_do(small_clip, tmp_path):
    CLIPModel.from_pretrained(small_clip).vision_model.save_pretrained(tmp_path / "half")
    save_llava(tmp_path / "llava")
    swap("--llava", tmp_path / "llava", "--model", tmp_path / "half", "--output_dir", tmp_path / "a")
    swap("--llava", tmp_path / "llava", "--model", small_clip, "--output_dir", tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


# The towers of tests/published_layouts.py with quick_gelu.
PUBLISHED = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 1, "image_size": 32, "patch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    return save_layouts(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("name", ["robustvlm_visual", "tecoa_vision_encoder", FARE, "leaf_clip_model", OPENAI])
def test_a_published_tower_goes_into_a_llava(layouts, tmp_path, name):
    """RobustVLM's file with the CLIP that LLaVA's tower is of, as NAME@BASE or by --base_model, and whole CLIPs."""
    one = layouts[name]
    save_llava(tmp_path / "llava", **PUBLISHED)
    base = [] if one.base_model is None else ["--base_model", one.base_model]
    swap("--llava", tmp_path / "llava", "--model", one.path, *base, "--output_dir", tmp_path / "new")
    written = one.state
    if base:
        written = {f"visual.{key}": value for key, value in one.state.items()}
        named = f"{one.path}@{one.base_model}"
        swap("--llava", tmp_path / "llava", "--model", named, "--output_dir", tmp_path / "again")
        assert (tmp_path / "new/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    state = written if name == "leaf_clip_model" else transformers_state(written)
    before, after, replaced = tensors(tmp_path / "llava"), tensors(tmp_path / "new"), 0
    for key, tensor in after.items():
        place = key.partition("vision_tower.")[2]
        if place:
            expected = state[f"vision_model.{place.removeprefix('vision_model.')}"]
            assert torch.equal(tensor, expected.float()), key
            replaced += not torch.equal(tensor, before[key])
        else:
            assert torch.equal(tensor, before[key]), key
    assert replaced == sum(key.startswith("vision_model.") for key in state)


def test_a_published_tower_of_another_clip_is_refused(layouts, tmp_path):
    tower = layouts["robustvlm_visual"]

    def refused(model: object, words: str, **changes: object) -> None:
        save_llava(tmp_path / "llava", **PUBLISHED | changes)
        with pytest.raises(UserError, match=words):
            swap("--llava", tmp_path / "llava", "--model", model, "--output_dir", tmp_path / "new")
        assert not (tmp_path / "new").exists()

    based = f"{tower.path}@{tower.base_model}"
    refused(based, f"^--model {re.escape(based)}: image_size is 32, LLaVA's image tower has 48", image_size=48)
    refused(based, "hidden_act is quick_gelu, LLaVA's image tower has gelu", hidden_act="gelu")
    refused(tower.path, "an image tower alone, and nothing in it says its text tower, activation and heads")
    refused(layouts[GELU].path, "image_size is 64")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "llava/preprocessor_config.json").write_text(json.dumps(processor))
    refused(based, "normalises with")  # open_clip_config.json of the base says how


@pytest.mark.parametrize(
    ("tower", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 32, LLaVA's image tower has 64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2"),
        ({"patch_size": 16}, "patch_size is 8"),
        ({"image_size": 64}, "image_size is 32"),
        ({"hidden_act": "gelu"}, "hidden_act is quick_gelu"),
        ({"num_attention_heads": 4}, "num_attention_heads is 2"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_another_architecture_is_refused(small_clip, tmp_path, tower, words):
    save_llava(tmp_path / "llava", **tower)
    with pytest.raises(UserError, match=words):
        swap("--llava", tmp_path / "llava", "--model", small_clip, "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_done_is_said_in_one_line(small_clip, tmp_path):
    save_llava(tmp_path / "llava", shards="20KB")

    def refused(words: str, llava: Path = tmp_path / "llava", model: Path = small_clip) -> None:
        with pytest.raises(UserError, match=words):
            swap("--llava", llava, "--model", model, "--output_dir", tmp_path / "new")
        assert not (tmp_path / "new").exists()

    refused("no such directory", tmp_path / "nothing")
    refused("model type 'clip'; expected llava", small_clip)
    first = next(iter(sorted((tmp_path / "llava").glob("*.safetensors"))))
    whole = first.read_bytes()
    first.write_bytes(whole[:-5])
    refused("no whole safetensors file")
    first.write_bytes(b"\xff" * 200)
    refused("no whole safetensors file")
    first.unlink()
    refused("of its index is not there")
    first.write_bytes(whole)
    (tmp_path / "llava/preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    refused("normalises with")
    (tmp_path / "llava/preprocessor_config.json").unlink()
    large = tmp_path / "large"
    save_small_clip(large)
    clip = CLIPModel.from_pretrained(large)
    with torch.no_grad():
        clip.vision_model.post_layernorm.weight[0] = 1e6
    clip.save_pretrained(large)
    save_llava(tmp_path / "half", dtype=torch.float16)
    refused("more than the torch.float16", tmp_path / "half", large)
