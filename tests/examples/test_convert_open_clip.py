"""examples/convert_open_clip.py: any layout becomes transformers' or open_clip's, whole or not at all.

The mapping itself is tested in tests/models/test_open_clip.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, VisionTextDualEncoderModel

from examples import convert_open_clip
from tests.conftest import run_script
from tests.models.test_open_clip import MODELS, convnext_forward, random_state, tiny_convnext  # noqa: F401
from tests.published_layouts import CHECKPOINT, FARE, GELU, IMAGE_TOWERS, OPENAI, Published, save_layouts, text_forward
from tests.small_models import photos, save_small_model
from utils.data.images import CROP_ROUNDING
from utils.errors import UserError
from utils.models.published import load_model, model_name

OF_OPEN_CLIP = (FARE, GELU, CHECKPOINT, OPENAI, *IMAGE_TOWERS)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    return save_layouts(tmp_path_factory.mktemp("published"))


def call(*arguments: object) -> None:
    """The script's main() in this process, as if called with ``arguments``: the imports are paid for once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_open_clip.py", *map(str, arguments)])
        convert_open_clip.main()


def convert(to: str, one: Published, output_dir: Path) -> None:
    """NAME@BASE where there is a base, else the name."""
    name = one.path if one.base_model is None else f"{one.path}@{one.base_model}"
    processor = [] if one.processor is None else ["--processor", one.processor]
    call("--to", to, "--input", name, *processor, "--output_dir", output_dir)


@pytest.mark.parametrize("name", [*OF_OPEN_CLIP, "leaf_clip_model", "leaf_open_clip_sharded"])
def test_every_layout_becomes_transformers(layouts: dict[str, Published], name: str, tmp_path: Path) -> None:
    """What transformers alone loads embeds as open_clip embeds the original."""
    one = layouts[name]
    convert("transformers", one, tmp_path / "out")
    model = CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    mean, std = (
        torch.tensor(value).view(3, 1, 1)
        for value in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    ids = processor.tokenizer(one.texts, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        images = model.get_image_features((one.images - mean) / std).pooler_output
        texts = model.get_text_features(ids).pooler_output
    for found, expected in ((images, one.expected["image_features"]), (texts, one.expected["text_features"])):
        assert ((found - expected).norm(dim=1) < 2e-6 * expected.norm(dim=1)).all()
    assert model.logit_scale.exp().item() == pytest.approx(one.expected["logit_scale"].item())
    # Where the crop goes is kept with the processor: half a pixel is rounded as where the model comes from.
    _, again = load_model(str(tmp_path / "out"))
    rounding = getattr(again.image_processor, CROP_ROUNDING, "floor")
    assert rounding == ("even" if name in OF_OPEN_CLIP else "floor")


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_what_came_in_open_clips_layout_has_its_names_shapes_and_dtypes_again(
    layouts: dict[str, Published], name: str, tmp_path: Path
) -> None:
    one = layouts[name]
    convert("open_clip", one, tmp_path / "out")
    written = load_file(tmp_path / "out/open_clip_model.safetensors")
    expected = one.state
    if name in IMAGE_TOWERS:
        expected = layouts[FARE].state | {f"visual.{key}": value for key, value in one.state.items()}
    assert sorted(written) == sorted(expected)
    for key, tensor in expected.items():
        assert written[key].dtype == tensor.dtype, key
        assert torch.equal(written[key], tensor), key
    # It is a model of the same outputs, in a directory that needs nothing else.
    before, _ = load_model(model_name(one.path, one.base_model, one.processor))
    again, _ = load_model(str(tmp_path / "out"))
    assert again.config.to_dict() == before.config.to_dict()
    after = again.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.state_dict().items())


def test_a_trained_directory_becomes_open_clips_and_comes_back(small_clip, tmp_path, capsys):
    call("--to", "open_clip", "--input", small_clip, "--output_dir", tmp_path / "oc")
    described = json.loads((tmp_path / "oc/open_clip_config.json").read_text())
    assert described["model_cfg"]["vision_cfg"]["head_width"] == 16
    assert described["model_cfg"]["quick_gelu"] is True
    assert "custom_text" not in described["model_cfg"]
    # Its tokenizer is its own: it lies beside, and open_clip has to be told.
    assert ".incomplete" not in json.dumps(described)
    assert "open_clip: its tokenizer is not open_clip's own" in capsys.readouterr().out
    original = CLIPProcessor.from_pretrained(small_clip)
    assert AutoTokenizer.from_pretrained(tmp_path / "oc").get_vocab() == original.tokenizer.get_vocab()
    state = load_file(tmp_path / "oc/open_clip_model.safetensors")
    call("--to", "transformers", "--input", tmp_path / "oc", "--output_dir", tmp_path / "back")
    assert "back: CLIPModel, " in capsys.readouterr().out
    before, after = load_file(small_clip / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    clip, processor = CLIPModel.from_pretrained(tmp_path / "back"), CLIPProcessor.from_pretrained(tmp_path / "back")
    assert processor.image_processor.image_mean == original.image_processor.image_mean
    assert clip.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    ids = processor.tokenizer(["a photo of the number zero.", "x"], padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embeds = clip.get_text_features(ids).pooler_output
    torch.testing.assert_close(embeds, text_forward(state, ids, 2, "quick_gelu", ""), rtol=1e-4, atol=1e-5)


def test_ids_of_the_hub_are_taken_from_the_cache(layouts, tmp_path, monkeypatch):
    """As the model, with and without open_clip's prefix, and as the base of a file."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache/models--chs20--fare2-clip"
    shutil.copytree(layouts[FARE].path, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    tower = layouts["robustvlm_visual"]
    for name, local in (
        ("chs20/fare2-clip", layouts[FARE].path),
        ("hf-hub:chs20/fare2-clip", layouts[FARE].path),
        (f"{tower.path}@chs20/fare2-clip", f"{tower.path}@{tower.base_model}"),
    ):
        for number, one in enumerate((name, local)):
            call("--to", "transformers", "--input", one, "--output_dir", tmp_path / f"out{number}")
        weights = [load_file(tmp_path / f"out{number}/model.safetensors") for number in (0, 1)]
        assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
        for number in (0, 1):
            shutil.rmtree(tmp_path / f"out{number}")


def test_custom_text_moves_the_text_tower_and_leaves_all_else(layouts, tmp_path):
    """Also for a model with a form of its own: halves stay halves."""
    one = layouts[OPENAI]
    call(
        "--to", "open_clip", "--input", one.path, "--processor", one.processor, "--custom_text",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    written = load_file(tmp_path / "out/open_clip_model.safetensors")
    expected = {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": tensor
        for name, tensor in one.state.items()
    }
    assert sorted(written) == sorted(expected)
    assert all(
        written[name].dtype == tensor.dtype and torch.equal(written[name], tensor) for name, tensor in expected.items()
    )
    assert json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"]["custom_text"] is True
    assert load_model(str(tmp_path / "out"))[0].open_clip_form.keys() == expected.keys()


@pytest.mark.usefixtures("tiny_convnext")
def test_a_convnext_becomes_a_dual_encoder_and_comes_back(small_clip, tmp_path):
    """A checkpoint of open_clip's training, under DDP, with other things beside, and a config of open_clip's own."""
    state = random_state("convnext")
    checkpoint = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(checkpoint, tmp_path / "a.pt")
    (tmp_path / "config.json").write_text(json.dumps(MODELS["convnext"]))
    call(
        "--to", "transformers", "--input", tmp_path / "a.pt", "--base_model", tmp_path / "config.json",
        "--processor", small_clip, "--output_dir", tmp_path / "dual",
    )  # fmt: skip
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "dual").eval()
    images = 2 * photos(3, 64) - 1
    with torch.no_grad():
        found, expected = model.get_image_features(images).pooler_output, convnext_forward(state, images)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    call("--to", "open_clip", "--input", tmp_path / "dual", "--output_dir", tmp_path / "back")
    back = load_file(tmp_path / "back/open_clip_model.safetensors")
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_other_models_go_to_transformers_alone(tmp_path):
    save_small_model(tmp_path / "siglip", "siglip")
    call("--to", "transformers", "--input", tmp_path / "siglip", "--output_dir", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("siglip", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match=r"^--input .*siglip: model type 'siglip'; supported: clip, vision-text"):
        call("--to", "open_clip", "--input", tmp_path / "siglip", "--output_dir", tmp_path / "oc")
    save_small_model(tmp_path / "convnext", "convnext")
    with pytest.raises(UserError, match=r"^--input .*of which timm has none; it has no place in open_clip's layout"):
        call("--to", "open_clip", "--input", tmp_path / "convnext", "--output_dir", tmp_path / "oc")
    assert not (tmp_path / "oc").exists()


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--to", "torch", "--input", "clip"], "--to: 'torch' is not one of transformers, open_clip"),
        (["--input", "clip"], "--to: missing"),
        (["--to", "transformers", "--input", "x.pt"], "--input x.pt: no such file"),
        (["--to", "transformers", "--input", "clip", "--custom_text"], "--custom_text: has no meaning"),
        (["--to", "transformers", "--input", "clip", "--activation", "gelu"], "--activation: no such flag"),
        (["--to", "transformers", "--input", "state.safetensors"], "nothing in it says its activation and heads"),
        (["--to", "transformers", "--input", "broken.pt@clip"], "broken.pt: cannot be read as tensors alone"),
        (["--to", "transformers", "--input", "state.safetensors@clip"],
         "which is not in a CLIP with a ViT of clip (the base model)"),
        (["--to", "transformers", "--input", "clip", "--output_dir", "full"],
         "--output_dir full: exists and is not an empty directory"),
        (["--to", "open_clip", "--input", "clip", "--output_dir", "full/something"], "not an empty directory"),
        (["--to", "transformers", "--input", "state.safetensors@fields.json", "--processor", "nobody/nothing"],
         "--processor nobody/nothing: neither a local model directory nor a model in the cache"),
        (["--to", "open_clip", "--input", "full"], "--input full: holds no config.json"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_ends_in_one_line(words, expected, small_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").symlink_to(small_clip)
    save_file(random_state("vit"), tmp_path / "state.safetensors")
    (tmp_path / "fields.json").write_text(json.dumps(MODELS["vit"]))
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").write_text("here first")
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        call(*words, *([] if "--output_dir" in words else ["--output_dir", "y"]))
    assert expected in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == there
    assert (tmp_path / "full/something").read_text() == "here first"


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_a_model_is_written_whole_or_not_at_all(small_clip, tmp_path, monkeypatch, to):
    out = tmp_path / "out"
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete/of_a_killed_run").write_text("")

    def fail(directory: Path, *rest: object) -> None:
        (directory / "half").write_text("")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        for name in ("save_model", "write_open_clip"):
            patch.setattr(convert_open_clip, name, fail)
        with pytest.raises(UserError, match=r"^--output_dir .*out: cannot be written \(No space left on device\)"):
            call("--to", to, "--input", small_clip, "--output_dir", out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()  # an empty one may be there
    call("--to", to, "--input", small_clip, "--output_dir", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.glob("*killed*"))
    load_model(str(out))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(small_clip, tmp_path):
    torch.save({"state_dict": random_state("vit"), "epoch": Touch(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        call("--to", "transformers", "--input", f"{tmp_path}/bad.pt@{small_clip}", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(small_clip, tmp_path):
    state = random_state("vit")
    state["token_embedding.weight"] = torch.zeros(528, 32)
    save_file(state, tmp_path / "state.safetensors")
    fields = MODELS["vit"] | {"text_cfg": MODELS["vit"]["text_cfg"] | {"vocab_size": 528}}
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    output = run_script(
        "examples/convert_open_clip.py", "--to", "transformers", "--input", tmp_path / "state.safetensors",
        "--base_model", tmp_path / "fields.json", "--processor", small_clip, "--output_dir", tmp_path / "out", status=2,
    )  # fmt: skip
    assert f"{small_clip}: " in output
    assert "528" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
