"""examples/convert_open_clip.py: names and bits both ways; embeddings as from a forward pass written out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from examples import convert_open_clip
from examples.convert_open_clip import build, to_open_clip, to_transformers
from tests.conftest import run_script
from tests.published_layouts import RandomWeights, text_forward, vit_forward
from tests.small_models import photos
from utils.errors import UserError

VOCABULARY = 529  # the small CLIP's, its end of text last
KINDS = ("vit", "convnext")
SETTINGS = {
    "vit": {"vision_heads": 2, "text_heads": 4, "activation": "quick_gelu"},
    "convnext": {"text_heads": 4, "activation": "gelu", "image_size": 64},
}


def open_clip_state(kind: str, text_prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    """Random weights under open_clip's names."""
    weights = RandomWeights(seed)
    if kind == "vit":
        weights.vit(width=48, depth=3, hidden=100, image_size=32, patch_size=8, embed_dim=20)
    else:
        sizes, depths = (8, 12, 16, 24), (1, 2, 1, 1)
        weights.linear("visual.trunk.stem.0", 8, 3, 4, 4)
        weights.norm("visual.trunk.stem.1", 8)
        for stage, (size, depth) in enumerate(zip(sizes, depths)):
            if stage:
                weights.norm(f"visual.trunk.stages.{stage}.downsample.0", sizes[stage - 1])
                weights.linear(f"visual.trunk.stages.{stage}.downsample.1", size, sizes[stage - 1], 2, 2)
            for number in range(depth):
                block = f"visual.trunk.stages.{stage}.blocks.{number}"
                weights.draw(f"{block}.gamma", size, scale=0.3, mean=0.5)
                weights.linear(f"{block}.conv_dw", size, 1, 7, 7)
                weights.norm(f"{block}.norm", size)
                weights.linear(f"{block}.mlp.fc1", 4 * size, size)
                weights.linear(f"{block}.mlp.fc2", size, 4 * size)
        weights.norm("visual.trunk.head.norm", 24)
        weights.draw("visual.head.proj.weight", 20, 24)
    weights.text(text_prefix, vocab_size=VOCABULARY, width=32, depth=2, hidden=128, embed_dim=20)
    weights.state["logit_scale"] = torch.tensor(3.21)
    return weights.state


def convnext_forward(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """open_clip's ConvNeXt tower, from its state dict and torch alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
        return x.movedim(-1, 1)

    def both(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    trunk = "visual.trunk"
    x = norm(F.conv2d(images, *both(f"{trunk}.stem.0"), stride=4), f"{trunk}.stem.1")
    for stage in range(4):
        if stage:
            x = norm(x, f"{trunk}.stages.{stage}.downsample.0")
            x = F.conv2d(x, *both(f"{trunk}.stages.{stage}.downsample.1"), stride=2)
        number = 0
        while f"{trunk}.stages.{stage}.blocks.{number}.gamma" in state:
            block = f"{trunk}.stages.{stage}.blocks.{number}"
            y = norm(F.conv2d(x, *both(f"{block}.conv_dw"), padding=3, groups=x.shape[1]), f"{block}.norm").movedim(
                1, -1
            )
            y = F.linear(F.gelu(F.linear(y, *both(f"{block}.mlp.fc1"))), *both(f"{block}.mlp.fc2"))
            x = x + (state[f"{block}.gamma"] * y).movedim(-1, 1)
            number += 1
        assert number > 0
    return F.linear(norm(x.mean(dim=(2, 3)), f"{trunk}.head.norm"), state["visual.head.proj.weight"])


def call(*arguments: object) -> None:
    """The script's main() in this process, as if called with ``arguments``: the imports are paid for once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_open_clip.py", *map(str, arguments)])
        convert_open_clip.main()


def token_ids() -> Tensor:
    """Four texts of different length in open_clip's manner: start, words, end of text, then zeros."""
    ids = torch.zeros(4, 77, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    for row, length in enumerate((1, 5, 30, 75)):
        ids[row, 1 : 1 + length] = torch.randint(1, VOCABULARY - 2, (length,), generator=generator)
        ids[row, 0], ids[row, 1 + length] = VOCABULARY - 2, VOCABULARY - 1
    return ids


def check_forward(model: CLIPModel, state: dict[str, Tensor], kind: str, prefix: str = "") -> None:
    settings = SETTINGS[kind]
    images = 2 * photos(3, settings.get("image_size", 32)) - 1
    with torch.no_grad():
        image_embeds = model.get_image_features(images).pooler_output
        text_embeds = model.get_text_features(token_ids()).pooler_output
    if kind == "vit":
        expected = vit_forward(state, images, settings["vision_heads"], settings["activation"])
    else:
        expected = convnext_forward(state, images)
    expected_text = text_forward(state, token_ids(), settings["text_heads"], settings["activation"], prefix)
    assert (image_embeds - expected).norm() < 1e-5 * expected.norm()
    assert (text_embeds - expected_text).norm() < 1e-5 * expected_text.norm()
    assert model.logit_scale.item() == state["logit_scale"].item()


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mapping_and_its_inverse_keep_every_bit(kind, prefix):
    state = open_clip_state(kind, prefix)
    config, converted = to_transformers(state, **SETTINGS[kind])
    model = build(config, converted)
    assert sorted(converted) == sorted(model.state_dict())
    back = to_open_clip(model.state_dict(), text_prefix=prefix)
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    again, converted_again = to_transformers(back, **SETTINGS[kind])
    assert again.to_dict() == config.to_dict()
    assert all(torch.equal(converted_again[name], converted[name]) for name in converted)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_kept_and_buffers_are_left_out(kind):
    state = {name: tensor.half() for name, tensor in open_clip_state(kind).items()}
    buffers = {"attn_mask": torch.zeros(77, 77), "input_resolution": torch.tensor(32), "vocab_size": torch.tensor(9)}
    _, converted = to_transformers(state | buffers, **SETTINGS[kind])
    assert {tensor.dtype for tensor in converted.values()} == {torch.float16}
    back = to_open_clip(converted)
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_embeds_as_open_clip_does(kind, prefix):
    state = open_clip_state(kind, prefix)
    check_forward(build(*to_transformers(state, **SETTINGS[kind])), state, kind, prefix)


def test_sizes_come_from_the_weights():
    config, _ = to_transformers(open_clip_state("vit"), **SETTINGS["vit"])
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (32, 8, 48, 3)
    assert (vision.intermediate_size, config.projection_dim, text.max_position_embeddings) == (100, 20, 77)
    assert (text.vocab_size, text.eos_token_id, text.num_hidden_layers) == (VOCABULARY, VOCABULARY - 1, 2)


@pytest.mark.parametrize(
    ("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16), (1792, 16)], ids=str
)
def test_heads_of_open_clips_towers(width, heads):
    state = open_clip_state("vit")
    for name, tensor in state.items():
        if name.startswith("visual.") and not name.endswith(("mlp.c_fc.bias", "positional_embedding")):
            shape = [width if size == 48 else 3 * width if size == 144 else size for size in tensor.shape]
            state[name] = torch.zeros(shape)
    state["visual.positional_embedding"] = torch.zeros(17, width)
    config, _ = to_transformers(state, activation="gelu", text_heads=4)
    assert config.vision_config.num_attention_heads == heads


@pytest.mark.parametrize(
    ("kind", "change", "settings", "words"),
    [
        ("vit", {"visual.ln_pre.bias": None}, {}, "lacks visual.ln_pre.bias"),
        ("vit", {"visual.transformer.resblocks.1.ln_2.weight": None}, {},
         "lacks visual.transformer.resblocks.1.ln_2.weight"),
        ("vit", {"visual.transformer.resblocks.0.ls_1.gamma": (48,)}, {},
         "holds visual.transformer.resblocks.0.ls_1.gamma"),
        ("vit", {"logit_bias": ()}, {}, "holds logit_bias"),
        ("vit", {"visual.transformer.resblocks.2.attn.out_proj.weight": (48, 47)}, {},
         "layers.2.self_attn.out_proj.weight"),
        ("vit", {"visual.positional_embedding": (16, 48)}, {}, "square of patches"),
        ("vit", {"visual.conv1.weight": (48, 192)}, {}, "shapes of the state dict"),
        ("vit", {}, {"vision_heads": None}, "--vision_heads: missing"),
        ("vit", {}, {"text_heads": 5}, "--text_heads 5"),
        ("vit", {}, {"image_size": 40}, "--image_size 40"),
        ("vit", {}, {"eos_token_id": 2}, "pooled at id 2"),
        ("convnext", {}, {"image_size": None}, "--image_size: missing"),
        ("convnext", {"visual.head.proj.weight": None, "visual.head.mlp.fc1.weight": (9, 9)}, {},
         "lacks visual.head.proj.weight"),
        ("convnext", {"visual.trunk.stages.1.blocks.1.gamma": None}, {}, "lacks visual.trunk.stages.1.blocks.1.gamma"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)  # fmt: skip
def test_what_is_not_converted_is_named(kind, change, settings, words):
    state = open_clip_state(kind)
    for name, shape in change.items():
        if shape is None:
            state.pop(name, None)
        else:
            state[name] = torch.zeros(shape)
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        to_transformers(state, **SETTINGS[kind] | settings)


def test_a_trained_directory_becomes_open_clips_and_comes_back(small_clip, tmp_path):
    call("--to", "open_clip", "--input", small_clip, "--output_dir", tmp_path / "oc")
    described = json.loads((tmp_path / "oc/open_clip_config.json").read_text())
    assert described["model_cfg"]["vision_cfg"]["head_width"] == 16
    assert described["model_cfg"]["quick_gelu"] is True
    state = load_file(tmp_path / "oc/open_clip_model.safetensors")
    # Heads, activation, mean and std come from the config that lies beside the weights.
    call(
        "--to", "transformers", "--input", tmp_path / "oc", "--tokenizer", small_clip, "--output_dir", tmp_path / "back"
    )
    before, after = load_file(small_clip / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    clip, processor = CLIPModel.from_pretrained(tmp_path / "back"), CLIPProcessor.from_pretrained(tmp_path / "back")
    original = CLIPProcessor.from_pretrained(small_clip)
    assert processor.image_processor.image_mean == original.image_processor.image_mean
    assert clip.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    ids = processor.tokenizer(["a photo of the number zero.", "x"], padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embeds = clip.get_text_features(ids).pooler_output
    torch.testing.assert_close(embeds, text_forward(state, ids, 2, "quick_gelu", ""), rtol=1e-4, atol=1e-5)


def test_a_convnext_checkpoint_becomes_a_directory_and_comes_back(small_clip, tmp_path, capsys):
    state = open_clip_state("convnext")
    # As open_clip's training writes it: under DDP, with other things beside.
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pt"
    )
    call(
        "--to", "transformers", "--input", tmp_path / "a.pt", "--tokenizer", small_clip, "--text_heads", 4,
        "--activation", "gelu", "--image_size", 64, "--output_dir", tmp_path / "dual",
    )  # fmt: skip
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "dual").eval()
    check_forward(model, state, "convnext")
    processor = VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "dual")
    assert processor.image_processor.crop_size["height"] == 64
    call("--to", "open_clip", "--input", tmp_path / "dual", "--custom_text", "--output_dir", tmp_path / "back")
    assert "none of timm's" in capsys.readouterr().out
    back = load_file(tmp_path / "back/open_clip_model.safetensors")
    expected = open_clip_state("convnext", "text.")
    assert sorted(back) == sorted(expected)
    names = {name: name if name in state else name.removeprefix("text.") for name in expected}
    assert all(torch.equal(back[name], state[names[name]]) for name in expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--to", "torch", "--input", "x", "--output_dir", "y"], "--to torch: expected transformers or open_clip"),
        (["--to", "transformers", "--input", "x", "--output_dir", "y", "--activation", "gelu"], "no such file"),
        (["--to", "open_clip", "--input", "x", "--output_dir", "y", "--activation", "gelu"],
         "--activation: has no meaning"),
        (["--to", "transformers", "--input", "x", "--output_dir", "y", "--custom_text"],
         "--custom_text: has no meaning"),
        (["--to", "transformers", "--input", "x", "--output_dir", "y", "--image_std", "1", "0", "1"], "above 0"),
        (["--to", "transformers", "--input", "x", "--output_dir", "y", "--image_mean", "1", "0"], "expected three"),
        (["--to", "transformers", "--input", "{state}", "--output_dir", "y"], "--activation: missing"),
        (["--to", "transformers", "--input", "{broken}", "--output_dir", "y", "--activation", "gelu"],
         "cannot be read"),
        (["--to", "transformers", "--input", "{state}", "--output_dir", "{full}", "--activation", "gelu"],
         "not an empty"),
        (["--to", "transformers", "--input", "{state}", "--output_dir", "y", "--activation", "gelu",
          "--vision_heads", "2", "--text_heads", "4", "--tokenizer", "nobody/nothing"],
         "--tokenizer nobody/nothing: cannot be had"),
        (["--to", "open_clip", "--input", "{full}", "--output_dir", "y"], "config.json"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_ends_in_one_line(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(open_clip_state("vit"), tmp_path / "state.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").write_text("here first")
    names = {"state": "state.safetensors", "broken": "broken.pt", "full": "full"}
    with pytest.raises(UserError) as caught:
        call(*(word.format(**names) for word in words))
    assert expected in str(caught.value)
    assert not Path("y").exists()
    assert (tmp_path / "full/something").read_text() == "here first"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"state_dict": open_clip_state("vit"), "epoch": Touch(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        call(
            "--to",
            "transformers",
            "--input",
            tmp_path / "bad.pt",
            "--activation",
            "gelu",
            "--output_dir",
            tmp_path / "out",
        )
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(small_clip, tmp_path):
    state = open_clip_state("vit")
    state["token_embedding.weight"] = torch.zeros(VOCABULARY + 1, 32)
    save_file(state, tmp_path / "state.safetensors")
    output = run_script(
        "examples/convert_open_clip.py", "--to", "transformers", "--input", tmp_path / "state.safetensors",
        "--activation", "gelu", "--vision_heads", 2, "--text_heads", 4, "--tokenizer", small_clip,
        "--output_dir", tmp_path / "out", status=2,
    )  # fmt: skip
    assert f"{len(AutoTokenizer.from_pretrained(small_clip))} tokens" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
