"""Models in the layouts in which people publish CLIPs: they load as they are, compute what open_clip does, and go back.

The layouts are those of ``tests/published_layouts.py``; beside the repository there may be some that open_clip wrote.
"""

import dataclasses
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

import evaluate
import train_lore
import train_po
from examples.pretrain_small_clip import make_tokenizer
from tests.conftest import ROOT, flags, run_script
from tests.published_layouts import (
    CLIPS,
    FARE,
    GELU,
    HALVES,
    IMAGE_TOWERS,
    LEAF,
    OPENAI,
    SHARDED,
    TEXTS,
    clip_state,
    model_config,
    open_clip_outputs,
    transformers_state,
    write_json,
)
from tests.shard_maker import image_bytes, write_shard
from tests.small_models import save_small_clip, save_small_model
from utils.data.images import pixel_normalisation
from utils.errors import UserError
from utils.evaluation.results import cell_name, model_revision, short_names
from utils.models import published
from utils.models.encoders import TextEncoder, make_encoder
from utils.models.hub import find_config, find_model, load
from utils.models.published import (
    export_open_clip,
    image_transform,
    load_model,
    logit_scale,
    model_name,
    quiet_transformers,
    save_model,
)
from utils.models.tokens import fill_up, read_prompts

SHARED = ROOT.parent / "shared/data/published_layouts"
TOWER = next(iter(IMAGE_TOWERS))
NAMES = [*CLIPS, *IMAGE_TOWERS]
IN_OPEN_CLIP = [name for name in NAMES if name not in (LEAF, SHARDED)]
TOLERANCE = 1e-6
CLASSES = ["cat", "dog", "number", "whale", "red car", "été", "photo", "drawing"]
PHOTO_SIZES = [(120, 90), (91, 130), (64, 64), (97, 33), (101, 80), (75, 118), (200, 131), (33, 36)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named(layout):
    return model_name(layout.path, layout.base_model, layout.processor)


@torch.no_grad()
def outputs(model, processor, images, texts):
    """What evaluations compute: features of images in [0, 1] and of texts, the scale, and probabilities."""
    rows = read_prompts(processor, model.config, texts)
    image_features = make_encoder(model, processor).eval()(images)
    text_features = TextEncoder(model).eval()(*fill_up(rows, processor, model.config, "cpu"))
    scale = torch.tensor([logit_scale(model)])
    logits = scale * F.normalize(image_features) @ F.normalize(text_features).T
    found = {"image_features": image_features, "text_features": text_features, "logit_scale": scale}
    return found | {"probabilities": logits.softmax(dim=-1)}


def compare(found, expected):
    """Features by the length of their row, probabilities as they are, the scale by itself."""
    for name in ("image_features", "text_features"):
        assert found[name].shape == expected[name].shape
        error = (found[name] - expected[name]).norm(dim=1) / expected[name].norm(dim=1)
        assert error.max() <= TOLERANCE, name
    assert (found["probabilities"] - expected["probabilities"]).abs().max() <= TOLERANCE
    assert (found["logit_scale"] / expected["logit_scale"] - 1).abs() <= TOLERANCE


def all_equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# ---------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_computes_what_open_clip_does(layouts, name):
    layout = layouts[name]
    compare(outputs(*load(named(layout), "--model"), layout.images, layout.texts), layout.expected)


@pytest.mark.skipif(not SHARED.is_dir(), reason="open_clip's own are not beside this repository")
@pytest.mark.parametrize("name", NAMES)
def test_layouts_written_by_open_clip_compute_what_it_does(name):
    folder = SHARED / name
    about = json.loads((folder / "about.json").read_text())
    path, base = folder / about.get("file", "."), about.get("base", about.get("model_config"))
    own_tokenizer = name == FARE or name in IMAGE_TOWERS
    processor = None if own_tokenizer else str(folder / about.get("processor", "../clip_processor"))
    model = model_name(os.path.normpath(path), None if base is None else os.path.normpath(folder / base), processor)
    images, texts = load_file(folder / "inputs.safetensors")["images"], json.loads((folder / "texts.json").read_text())
    compare(outputs(*load(model, "--model"), images, texts), load_file(folder / "expected.safetensors"))


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        ("tower.pt", "visual."), ("tower.pth", "module."), ("tower.bin", "module.visual."), ("tower.safetensors", ""),
        ("model.safetensors", "model.visual."), ("old.pt", "model."), ("folder", ""), ("me@lab/x.pt", "module.model."),
    ],
)  # fmt: skip
def test_an_image_tower_in_any_file_is_the_same(layouts, tmp_path, path, prefix):
    """Also as the only file of a directory, in the format before torch 1.6, and where an @ is in the path."""
    layout, name = layouts[TOWER], str(tmp_path / path)
    state = {prefix + key: tensor for key, tensor in layout.state.items()}
    file = tmp_path / path if path != "folder" else tmp_path / path / "weights.pt"
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=path != "old.pt")
    found = outputs(*load(f"{name}@{layout.base_model}", "--model"), layout.images, layout.texts)
    compare(found, layout.expected)
    by_flag = model_name(name, layout.base_model)
    assert (by_flag.path, by_flag.base_model) == (name, layout.base_model)


@pytest.mark.parametrize("kind", ["whole", "tower", "tower without projection"])
def test_files_of_weights_in_the_names_of_transformers(layouts, tmp_path, kind):
    """A tower saved from a CLIPVisionModel has no projection: the base's is the one that it was trained before."""
    layout = layouts[TOWER]
    whole = load(named(layout), "--model")[0].state_dict()
    begins = {
        "whole": "",
        "tower": ("vision_model.", "visual_projection."),
        "tower without projection": "vision_model.",
    }
    torch.save({key: tensor for key, tensor in whole.items() if key.startswith(begins[kind])}, tmp_path / "x.pt")
    model, processor = load(f"{tmp_path / 'x.pt'}@{layout.base_model}", "--model")
    if kind == "tower without projection":
        model.visual_projection.weight.data = whole["visual_projection.weight"]
        assert not torch.equal(whole["visual_projection.weight"], layouts[FARE].state["visual.proj"].T)
    compare(outputs(model, processor, layout.images, layout.texts), layout.expected)
    assert not image_transform(processor).even  # in the world of transformers crops round down


def test_an_image_tower_in_half_precision_is_loaded_in_float32(layouts, tmp_path):
    layout = layouts[TOWER]
    torch.save({key: tensor.half() for key, tensor in layout.state.items()}, tmp_path / "half.pt")
    model, _ = load(f"{tmp_path / 'half.pt'}@{layout.base_model}", "--model")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert torch.equal(model.vision_model.post_layernorm.bias, layout.state["ln_post.bias"].half().float())


# --------------------------------------------------------------------------------------------------- saved, exported


@pytest.fixture(scope="module")
def saved(layouts, tmp_path_factory):
    """Every layout saved again as a directory of transformers: name -> (directory, its own outputs, open_clip_form)."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for name, layout in layouts.items():
        model, processor = load(named(layout), "--model")
        save_model(folder / name, model, processor, {})
        computed = outputs(model, processor, layout.images, layout.texts)
        found[name] = folder / name, computed, getattr(model, "open_clip_form", None)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_they_are_models_of_transformers(layouts, saved, name):
    """Everything that was somewhere else is in the directory: text tower, tokenizer, image processor, rounding."""
    layout, (folder, computed, _) = layouts[name], saved[name]
    model, processor = load_model(str(folder))
    assert all_equal(outputs(model, processor, layout.images, layout.texts), computed)
    assert image_transform(processor).even == (name in IN_OPEN_CLIP)
    with quiet_transformers():
        plain, its_processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in pixel_normalisation(its_processor.image_processor))
    with torch.no_grad():
        images = plain.get_image_features(pixel_values=(layout.images - mean) / std).pooler_output
        texts = plain.get_text_features(**its_processor.tokenizer(layout.texts, padding=True, return_tensors="pt"))
        logits = plain.logit_scale.exp() * F.normalize(images) @ F.normalize(texts.pooler_output).T
    by_transformers = {"image_features": images, "text_features": texts.pooler_output}
    by_transformers |= {"logit_scale": plain.logit_scale.exp().reshape(1), "probabilities": logits.softmax(dim=-1)}
    compare(by_transformers, layout.expected)


def form_of(layouts, name):
    """Key -> (shape, dtype) of the tensors that open_clip's users expect of a layout."""
    state = layouts[name].state
    if name in (LEAF, SHARDED):  # in open_clip's layout there was none of them
        vocabulary = len(state["text_model.embeddings.token_embedding.weight"])
        state = clip_state(CLIPS[name], vocabulary, seed=0)
    elif name in IMAGE_TOWERS:
        state = layouts[FARE].state | {f"visual.{key}": tensor for key, tensor in state.items()}
    return {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}


def tensors_of(folder):
    return load_file(folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_exported_they_have_the_tensors_that_they_came_with(layouts, saved, tmp_path, name):
    layout, (folder, computed, form) = layouts[name], saved[name]
    export_open_clip(tmp_path, folder, "--export open_clip", form)
    exported = tensors_of(tmp_path)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in exported.items()} == form_of(layouts, name)
    if name in IN_OPEN_CLIP:
        prefix = "visual." if name in IMAGE_TOWERS else ""
        assert all(torch.equal(exported[prefix + key], tensor) for key, tensor in layout.state.items())
    model, processor = load(str(tmp_path), "--model")
    assert all_equal(outputs(model, processor, layout.images, layout.texts), computed)


# ------------------------------------------------------------------------------------------------------ in the scripts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of several shapes, for training and for tests."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    samples = [
        (f"{number:05}", {"jpg": image_bytes(number, size), "cls": str(number % len(CLASSES)).encode()})
        for number, size in enumerate(PHOTO_SIZES)
    ]
    for split in ("train", "test"):
        write_shard(folder / split / "0.tar", samples)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    return folder


def word_of(layout):
    """What a user types."""
    return layout.path if layout.base_model is None else f"{layout.path}@{layout.base_model}"


def evaluation(models, data, output_dir, **more):
    common = {"model": models, "data": data, "num_workers": 0, "output_dir": output_dir, "cache_dir": data / "cache"}
    return flags({name: value for name, value in (common | more).items() if value is not None})


def cells_of(output_dir):
    return json.loads((output_dir / "results.json").read_text())["results"]


def verdicts(output_dir):
    """Model -> accuracy, and the order of the likeliest classes of every image."""
    found = {}
    for cell in cells_of(output_dir):
        lines = (output_dir / "records" / f"{cell_name(cell)}.jsonl").read_text().splitlines()
        found[cell["model"]] = cell["value"], [json.loads(line)["top5"] for line in lines]
    return found


def test_one_evaluation_of_all_nine_equals_that_of_their_directories(layouts, saved, data, tmp_path):
    """Image by image. Crops of photographs are those of the layout's origin; a directory keeps them."""
    words, folders = [word_of(layouts[name]) for name in NAMES], [str(saved[name][0]) for name in NAMES]
    evaluate.main(evaluation(words, data, tmp_path / "own", processor=layouts[LEAF].processor))
    evaluate.main(evaluation(folders, data, tmp_path / "saved"))
    own, again = verdicts(tmp_path / "own"), verdicts(tmp_path / "saved")
    assert [own[word] for word in words] == [again[folder] for folder in folders]
    assert len({str(found) for found in own.values()}) == len(NAMES)  # no model stands in for another
    assert list(short_names(words, of_models=True).values())[-3:] == [*IMAGE_TOWERS.values()]


def training(layout, data, output_dir, **more):
    common = {
        "model_name_or_path": layout.path, "base_model": layout.base_model, "processor": layout.processor,
        "train_shards": data / "train", "output_dir": output_dir, "cache_dir": data / "cache", "max_steps": 1,
        "per_device_train_batch_size": 3, "learning_rate": 1e-3, "num_workers": 0, "report_to": "none",
    }  # fmt: skip
    return flags({name: value for name, value in (common | more).items() if value is not None})


def check_trained(layout, layouts, saved, output_dir, trained):
    """A directory of transformers, and in open_clip's layout the tensors that the start came with.

    ``trained``: how the names of the weights begin that may have changed. All others are the start's, bit by bit.
    """
    with quiet_transformers():
        CLIPModel.from_pretrained(output_dir)
        CLIPProcessor.from_pretrained(output_dir)
    start, end = (load_file(folder / "model.safetensors") for folder in (saved[layout.name][0], output_dir))
    changed = {key for key in start if not torch.equal(start[key], end[key])}
    assert changed
    assert all(key.startswith(trained) for key in changed), changed
    exported = tensors_of(output_dir)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in exported.items()} == form_of(layouts, layout.name)
    (model, processor), (of_open_clip, _) = (
        load(name, "--model") for name in (str(output_dir), f"hf-hub:{output_dir}")
    )
    if layout.name == OPENAI:  # in half precision again
        torch.testing.assert_close(of_open_clip.state_dict(), model.state_dict(), rtol=2**-11, atol=1e-7)
    else:
        assert all_equal(of_open_clip.state_dict(), model.state_dict())
    assert make_encoder(model, processor)(layout.images).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_lore_from_every_layout(layouts, saved, data, tmp_path, name):
    layout, method = layouts[name], {"attack_steps": 1, "primal_steps": 1, "export": "open_clip"}
    train_lore.main(training(layout, data, tmp_path / "run", **method))
    check_trained(layout, layouts, saved, tmp_path / "run", ("vision_model.", "visual_projection."))
    config = json.loads((tmp_path / "run/open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]  # open_clip then takes the tokenizer of the folder
    assert "open_clip loads the same directory" in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_preference_optimisation_from_every_layout(layouts, saved, data, tmp_path, name):
    """Of a text tower too: an image tower has that of its base model."""
    layout = layouts[name]
    train_po.main(training(layout, data, tmp_path / "run", trainable="head", export="open_clip"))
    check_trained(layout, layouts, saved, tmp_path / "run", ("visual_projection.", "text_projection."))


def test_the_best_model_is_exported_too_and_checkpoints_are_not(layouts, data, tmp_path):
    more = {"eval_shards": data / "test", "eval_steps": 1, "keep_best": "eval_accuracy_clean", "checkpoint_steps": 1}
    method = {"attack_steps": 1, "primal_steps": 1, "export": "open_clip"}
    train_lore.main(training(layouts[TOWER], data, tmp_path / "run", max_steps=2, **method, **more))
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("open_clip_config.json"))
    assert found == ["run", "run/best"]


def test_a_run_from_an_image_tower_resumes(layouts, data, tmp_path):
    words = training(layouts[TOWER], data, tmp_path / "run", max_steps=2, checkpoint_steps=1, attack_steps=1)
    train_lore.main(words)
    whole = load_file(tmp_path / "run/model.safetensors")
    train_lore.main([*words, "--resume_from_checkpoint", str(tmp_path / "run/checkpoints/step-1")])
    assert all_equal(load_file(tmp_path / "run/model.safetensors"), whole)


def test_memory_is_estimated_for_what_an_image_tower_completes(layouts, data, tmp_path, monkeypatch):
    """From the config alone, which is the base's."""
    found = []
    monkeypatch.setattr(train_lore, "print_estimate", lambda model, *layout, **options: found.append(model))
    for name in (TOWER, FARE):
        train_lore.main(training(layouts[name], data, tmp_path / "run", estimate_memory="true"))
    (of_tower, tower), (of_whole, whole) = found
    assert (of_tower, of_whole) == ("fare_eps_2.pt", FARE)
    assert (tower.hidden_size, tower.num_hidden_layers, tower.projection_dim) == (64, 2, 32)
    assert tower.to_dict() == whole.to_dict()
    assert not (tmp_path / "run").exists()


def test_a_published_reference_and_a_published_start_may_differ(layouts, data, tmp_path):
    """--base_model and --processor complete both."""
    robust, start = layouts[TOWER], layouts[FARE]
    names = {"base_model": robust.base_model, "reference_model_name_or_path": robust.path}
    train_lore.main(training(start, data, tmp_path / "run", attack_steps=1, **names))
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1:]
    assert row["distance_clean"] > 0


# ----------------------------------------------------------------------------------------------------- what goes wrong


class Cases:
    """Makes wrong files and directories in a folder, beside the right layouts."""

    def __init__(self, layouts, folder):
        self.layouts, self.folder = layouts, folder
        self.tower, self.base, self.processor = layouts[TOWER].path, layouts[TOWER].base_model, layouts[LEAF].processor

    def clip(self, **sizes):
        save_small_clip(self.folder / "clip", **sizes)
        return str(self.folder / "clip")

    def file(self, content, name="wrong.pt"):
        """A file with these bytes, or what torch.save makes of another content."""
        path = self.folder / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return str(path)

    def cut(self, path, name):
        return self.file(Path(path).read_bytes()[:300_000], name)

    def fare(self, change=None, text=None):
        """A copy of the hub's layout whose config has other fields, or another text."""
        folder = self.folder / "fare"
        shutil.copytree(self.base, folder)
        config = folder / "open_clip_config.json"
        fields = json.loads(config.read_text())
        if change is not None:
            change(fields["model_cfg"])
        config.write_text(json.dumps(fields) if text is None else text)
        return folder

    def code(self):
        class Code:
            def __reduce__(that):
                return os.mkdir, (str(self.folder / "ran"),)

        return self.file({"visual.proj": Code()})

    def torchscript(self):
        with warnings.catch_warnings(action="ignore"):  # torch advises against it
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(self.folder / "scripted.pt"))
        return str(self.folder / "scripted.pt")

    def model_config(self):
        write_json(self.folder / "model.json", model_config(CLIPS[FARE], len(tokenizer_like(TEXTS))))
        return str(self.folder / "model.json")

    def pair(self):
        folder = self.folder / "pair"
        folder.mkdir()
        for name in ("a.pt", "b.pt"):
            shutil.copy(self.tower, folder / name)
        return str(folder)

    def processor_with(self, *files, tokenizer=None):
        folder = self.folder / "processor"
        folder.mkdir()
        for file in files:
            shutil.copy(Path(self.processor) / file, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return str(folder)

    def siglip(self):
        save_small_model(self.folder / "siglip", "siglip")
        return str(self.folder / "siglip")

    def tower_in_open_clip_folder(self):
        folder = self.fare()
        state = {f"visual.{key}": tensor for key, tensor in self.layouts[TOWER].state.items()}
        save_file(state, folder / "open_clip_model.safetensors")
        return str(folder)

    def whole(self, change=lambda state: state):
        return self.file(change(dict(self.layouts[FARE].state)), "whole.pt")

    def part_in_transformers_names(self):
        state = transformers_state(self.layouts[FARE].state)
        return self.file({key: value for key, value in state.items() if re.match(r"vision_model(?!.*layers.1)", key)})

    def nan(self):
        return self.file({key: tensor * float("nan") for key, tensor in self.layouts[TOWER].state.items()})


def tokenizer_like(texts, size=600):
    return make_tokenizer(texts[:3], vocab_size=size)


RESNET = {
    "conv1.weight": (64, 3, 7, 7),
    "bn1.weight": (64,),
    "layer1.0.conv1.weight": (64, 64, 1, 1),
    "fc.weight": (9, 64),
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NAME_BASE = "name the CLIP it was made from"
OF_BASE = r"in a CLIP with a ViT of .*clip \(the base model\)"
IN_CONFIG = r"--model .*fare: open_clip_config.json:"
NOT_HERE = (
    r"neither a local model directory nor a model in the cache, which lacks config.json of it, and HF_HUB_OFFLINE"
)

# What is wrong: the words after --model, and the line that it ends in.
WRONG = {
    "base of another width": (
        lambda at: [f"{at.tower}@{at.clip()}"],
        rf"--model {{tower}}@.*clip: visual.conv1.weight is \(64, 3, 16, 16\), \(32, 3, 8, 8\) {OF_BASE}; {NAME_BASE}",
    ),
    "deeper base": (
        lambda at: [at.tower, "--base_model", at.clip(num_layers=3)],
        rf"--model {{tower}}: lacks visual.transformer.resblocks.2.attn.in_proj_bias and 11 more, .*; {NAME_BASE}",
    ),
    "base less deep": (
        lambda at: [f"{at.tower}@{at.clip(num_layers=1)}"],
        rf"holds visual.transformer.resblocks.1.attn.in_proj_bias and 11 more, which is not {OF_BASE}",
    ),
    "base of another kind": (
        lambda at: [f"{at.tower}@{at.siglip()}"],
        "--base_model .*siglip: model type 'siglip'; supported: clip, vision-text-dual-encoder",
    ),
    "ResNet": (
        lambda at: [at.file({name: torch.zeros(shape) for name, shape in RESNET.items()})],
        "--model .*wrong.pt: its 4 tensors are no CLIP's with a ViT .* such as visual.conv1.weight, visual.bn1.weight",
    ),
    "CLIP's ResNet": (
        lambda at: [f"{at.file({f'visual.{name}': torch.zeros(shape) for name, shape in RESNET.items()})}@{at.base}"],
        "its 4 tensors are no CLIP's with a ViT .* visual.layer1.0.conv1.weight; give one",
    ),
    "weights in transformers' names that lack a layer": (
        lambda at: [f"{at.part_in_transformers_names()}@{at.base}"],
        rf"wrong.pt@.*: lacks vision_model.encoder.layers.1.layer_norm1.bias and 15 more, which .*{NAME_BASE}",
    ),
    "a cut .pt": (
        lambda at: [f"{at.cut(at.tower, 'cut.pt')}@{at.base}"],
        r"--model .*cut.pt@.*: cut.pt: cannot be read as tensors alone \(.*\); give the whole file",
    ),
    "a cut .safetensors": (
        lambda at: [f"{at.cut(Path(at.base) / 'open_clip_model.safetensors', 'cut.safetensors')}@{at.base}"],
        "cut.safetensors: cannot be read as tensors alone .*; give the whole file",
    ),
    "a cut file in a folder": (
        lambda at: [at.cut(at.fare() / "open_clip_model.safetensors", "fare/open_clip_model.safetensors")[:-28]],
        "--model .*fare: open_clip_model.safetensors: cannot be read as tensors alone .*; give the whole file",
    ),
    "a cut base": (
        lambda at: [
            f"{at.tower}@{at.cut(at.fare() / 'open_clip_model.safetensors', 'fare/open_clip_model.safetensors')[:-28]}"
        ],
        "--base_model .*fare: open_clip_model.safetensors: cannot be read as tensors alone .*; give the whole file",
    ),
    "code in a pickle": (
        lambda at: [f"{at.code()}@{at.base}"],
        r"--model .*wrong.pt: cannot be read as tensors alone \(it holds posix.mkdir\); give .* a state dict",
    ),
    "numbers beside the tensors": (lambda at: [at.file({"a": 1})], "wrong.pt: a is a int; expected tensors alone"),
    "a tensor alone": (lambda at: [at.file(torch.zeros(3))], "holds Tensor values and no state dict; expected named"),
    "weights that are not finite": (
        lambda at: [f"{at.nan()}@{at.base}"],
        "wrong.pt: its weights: vision_model.embeddings.class_embedding holds what is not finite .*; give whole",
    ),
    "TorchScript": (
        lambda at: [at.torchscript()],
        "--model .*scripted.pt: a TorchScript archive, which holds code; give its state dict",
    ),
    "a pointer of Git LFS": (
        lambda at: [f"{at.file(POINTER)}@{at.base}"],
        "--model .*wrong.pt@.*: wrong.pt is a pointer of Git LFS, not the file itself; run `git lfs pull`",
    ),
    "an image tower without base": (
        lambda at: [at.tower],
        rf"--model {{tower}}: an image tower alone, .*text tower, activation and heads; {NAME_BASE}, as {{tower}}@",
    ),
    "all weights without base": (
        lambda at: [at.whole()],
        rf"--model .*whole.pt: all weights, and nothing in it says its activation and heads; {NAME_BASE}, as .*@",
    ),
    "a config as base of an image tower": (
        lambda at: [f"{at.tower}@{at.model_config()}", "--processor", at.processor],
        r"an image tower alone, and .*model.json \(the base model\) has no weights; name a whole CLIP as base model",
    ),
    "an image tower as open_clip's whole model": (
        lambda at: [at.tower_in_open_clip_folder()],
        "fare: open_clip_model.safetensors: an image tower alone, by open_clip_config.json a whole CLIP; give all",
    ),
    "no such base": (
        lambda at: [f"{at.tower}@{at.base}s"],
        rf"--base_model .*safetensorss: no such directory or file \(did you mean .*{FARE}\?\); expected a directory or",
    ),
    "no such processor": (
        lambda at: [at.layouts[LEAF].path, "--processor", f"{at.folder}/nope"],
        "--processor .*/nope: no such directory or file; expected a directory or a hub id",
    ),
    "a file as processor": (
        lambda at: [at.layouts[LEAF].path, "--processor", at.tower],
        "--processor {tower}: a file; expected a directory of processor files, or a hub id",
    ),
    "a processor without tokenizer": (
        lambda at: [at.layouts[LEAF].path, "--processor", at.processor_with("preprocessor_config.json")],
        f"--model .*{LEAF}: holds no tokenizer, nor does --processor .*/processor; name .* by --processor; most CLIPs",
    ),
    "a processor without image processor": (
        lambda at: [at.layouts[LEAF].path, "--processor", at.processor_with("vocab.json", "merges.txt")],
        f"{LEAF}: preprocessor_config.json: no image processor, nor does --processor .*/processor; name .* by --proc",
    ),
    "two files of weights": (
        lambda at: [f"{at.pair()}@{at.base}"],
        r"--model .*pair@.*: holds no config.json and several files of weights \(a.pt, b.pt\); name one",
    ),
    "no processor": (
        lambda at: [at.layouts[LEAF].path],
        f"--model .*{LEAF}: holds no tokenizer; name the id or directory of one by --processor; most CLIPs take",
    ),
    "a tokenizer of another vocabulary": (
        lambda at: [
            at.layouts[LEAF].path,
            "--processor",
            at.processor_with(
                "preprocessor_config.json", tokenizer=make_tokenizer(["a b c d e f g h"] * 9 + TEXTS, 700)
            ),
        ],
        f"--model .*{LEAF}: the tokenizer of .*/processor: its tokenizer knows .* its text tower .* another model's",
    ),
    "a BERT as text tower": (
        lambda at: [str(at.fare(lambda model: model.update(text_cfg={"hf_model_name": "bert-base-uncased"})))],
        f"{IN_CONFIG} text_cfg.hf_model_name is 'bert-base-uncased', which no CLIPModel does; not a model",
    ),
    "the last token pooled": (
        lambda at: [str(at.fare(lambda model: model["text_cfg"].update(pool_type="last")))],
        f"{IN_CONFIG} text_cfg.pool_type is 'last', which no CLIPModel does; not a model that can be loaded here",
    ),
    "no causal mask": (
        lambda at: [str(at.fare(lambda model: model["text_cfg"].update(no_causal_mask=True)))],
        f"{IN_CONFIG} text_cfg.no_causal_mask is True, which no CLIPModel does",
    ),
    "a ResNet by the config": (
        lambda at: [str(at.fare(lambda model: model["vision_cfg"].update(layers=[3, 4, 6, 3])))],
        rf"{IN_CONFIG} vision_cfg.layers is \[3, 4, 6, 3\], of a ResNet",
    ),
    "an activation that is none": (
        lambda at: [str(at.fare(lambda model: model.update(quick_gelu=3)))],
        f"{IN_CONFIG} quick_gelu is 3; expected true or false",
    ),
    "a config of other sizes": (
        lambda at: [str(at.fare(lambda model: model["vision_cfg"].update(layers=3)))],
        r"fare: open_clip_model.safetensors: lacks visual.transformer.resblocks.2.* give the config of these weights",
    ),
    "a config cut short": (lambda at: [str(at.fare(text='{{"model_cfg": {{'))], f"{IN_CONFIG} Expecting property name"),
    "a list as config": (
        lambda at: [str(at.fare(text="[]"))],
        f"{IN_CONFIG} holds a list, expected an object of fields",
    ),
    "a base config cut short": (
        lambda at: [f"{at.whole()}@{at.file(b'{', 'model.json')}", "--processor", at.processor],
        "--base_model .*model.json: model.json: Expecting property name",
    ),
    "an id that is not in the cache": (lambda at: ["org/none"], f"--model org/none: {NOT_HERE}"),
    "a base that is not in the cache": (lambda at: [f"{at.tower}@org/none"], f"--base_model org/none: {NOT_HERE}"),
    "a processor that is not in the cache": (
        lambda at: [at.layouts[LEAF].path, "--processor", "org/none"],
        f"--processor org/none: {NOT_HERE}",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_written(layouts, data, tmp_path, wrong, recwarn):
    """The flag, the file, what was found and what to do."""
    make, message = WRONG[wrong]
    at = Cases(layouts, tmp_path)
    model, *more = make(at)
    with pytest.raises(UserError, match=message.format(tower=re.escape(at.tower))) as caught:
        evaluate.main([*evaluation(model, data, tmp_path / "eval"), *more])
    assert str(caught.value).startswith(("--model ", "--base_model ", "--processor "))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert [path.name for path in (tmp_path / "eval").glob("*")] in ([], [".lock"])
    assert not [warning for warning in recwarn if "torch.load" in str(warning.message)]  # it would be another line


@pytest.mark.parametrize("wrong", ["deeper base", "TorchScript"])
def test_what_is_wrong_ends_the_command_with_one_line_and_status_2(layouts, data, tmp_path, wrong):
    make, message = WRONG[wrong]
    at = Cases(layouts, tmp_path)
    model, *more = make(at)
    output = run_script("evaluate.py", *evaluation(model, data, tmp_path / "eval"), *more, status=2)
    (line,) = output.splitlines()
    assert re.search("^evaluate.py: error: .*" + message.format(tower=re.escape(at.tower)), line)
    assert not (tmp_path / "eval").exists()
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------- what completes what


@pytest.fixture(scope="module")
def other_processor(layouts, tmp_path_factory):
    """Another tokenizer of the same size, and an image processor with another mean."""
    folder = tmp_path_factory.mktemp("other")
    size = len(tokenizer_like(TEXTS))
    tokenizer = make_tokenizer(["cats, dogs and drawings, whole words of another text"] * 2, vocab_size=size)
    assert len(tokenizer) == size
    tokenizer.save_pretrained(folder)
    fields = json.loads((Path(layouts[LEAF].processor) / "preprocessor_config.json").read_text())
    write_json(folder / "preprocessor_config.json", fields | {"image_mean": HALVES})
    return str(folder)


def ids_of(tokenizer):
    return [tokenizer(text)["input_ids"] for text in ("a photo of a cat", "whole words")]


def test_own_files_go_before_the_processor_and_that_before_the_base(layouts, other_processor):
    """transformers' kind is LEAF, which has none of its own: there too the processor goes before the base."""
    own, other = tokenizer_like(TEXTS), load(model_name(layouts[LEAF].path, None, other_processor), "--model")[1]
    assert ids_of(other.tokenizer) != ids_of(own)
    for name, mean in ((TOWER, HALVES), (LEAF, HALVES), (GELU, CLIPS[GELU].mean)):
        for base in (layouts[FARE].path, None) if name != TOWER else (layouts[FARE].path,):
            _, processor = load(model_name(layouts[name].path, base, other_processor), "--model")
            assert ids_of(processor.tokenizer) == ids_of(other.tokenizer)
            assert processor.image_processor.image_mean == pytest.approx(list(mean))
    _, processor = load(model_name(layouts[LEAF].path, layouts[FARE].path), "--model")
    assert ids_of(processor.tokenizer) == ids_of(own)
    for base in (None, layouts[GELU].path):
        _, processor = load(model_name(layouts[FARE].path, base, other_processor), "--model")
        assert ids_of(processor.tokenizer) == ids_of(own)


def test_a_base_behind_the_name_goes_before_the_flag(layouts, tmp_path, monkeypatch):
    """Only of a name that exists no part is a base."""
    monkeypatch.chdir(tmp_path)
    assert model_name("x.pt@org/a", "org/b").base_model == "org/a"
    assert model_name("x.pt", "org/b").base_model == "org/b"
    assert model_name("org/x@org/a").path == "org/x"
    Path("me@lab").mkdir()
    for file in ("me@lab/x.pt", "me@lab/y@2.pt"):
        shutil.copy(layouts[TOWER].path, file)
        assert model_name(file, "org/b").base_model == "org/b"
        for base in ("org/a", "me@lab", "./base@2"):
            found = model_name(f"{file}@{base}", "org/b")
            assert (found.path, found.base_model) == (file, base)
    assert model_name("hf-hub:org/x@hf-hub:org/a").base_model == "org/a"


@pytest.fixture
def both(layouts, tmp_path):
    """A directory in both layouts: transformers' has another logit scale."""
    folder = tmp_path / "both"
    shutil.copytree(layouts[FARE].path, folder)
    model, processor = load_model(layouts[FARE].path)
    model.logit_scale.data.fill_(1.0)
    save_model(folder, model, processor, {})
    return folder


def test_the_prefix_of_the_hub_prefers_open_clips_files(layouts, both):
    in_open_clip = layouts[FARE].state["logit_scale"]
    assert load(str(both), "--model")[0].logit_scale == 1.0
    assert load(f"hf-hub:{both}", "--model")[0].logit_scale == in_open_clip
    assert load(str(both / "open_clip_model.safetensors"), "--model")[0].logit_scale == in_open_clip
    with pytest.raises(UserError, match=r"model.safetensors: a file of the model in .*both, which is to be named"):
        find_model(str(both / "model.safetensors"), "--model")


def test_a_config_of_timm_leaves_the_folder_to_open_clip(layouts, tmp_path):
    folder = tmp_path / "fare"
    shutil.copytree(layouts[FARE].path, folder)
    write_json(folder / "config.json", {"architecture": "vit_tiny", "num_classes": 0, "pretrained_cfg": {}})
    compare(outputs(*load(str(folder), "--model"), layouts[FARE].images, TEXTS), layouts[FARE].expected)
    tower = layouts[TOWER]
    compare(outputs(*load(f"{tower.path}@{folder}", "--model"), tower.images, TEXTS), tower.expected)


@pytest.mark.parametrize(
    ("written", "activation"),
    [
        (True, "quick_gelu"), ("TRUE", "quick_gelu"), ("True", "quick_gelu"), (False, "gelu"), (None, "gelu"),
        ("FALSE", "gelu"), ("false", "gelu"), ("absent", "gelu"),
    ],
)  # fmt: skip
def test_the_activation_is_what_the_config_means(layouts, tmp_path, caplog, written, activation):
    """open_clip itself takes any text as true. Of a text that says false a line says how it is taken here."""
    folder = Cases(layouts, tmp_path).fare(
        lambda model: model.pop("quick_gelu") if written == "absent" else model.update(quick_gelu=written)
    )
    model, processor = load(str(folder), "--model")
    config = model.config
    assert config.text_config.hidden_act == config.vision_config.hidden_act == activation
    said = f"quick_gelu is the text '{written}': gelu is taken"
    assert (said in caplog.text) == (str(written).lower() == "false" and written is not False)
    sizes = dataclasses.replace(CLIPS[FARE], quick_gelu=activation == "quick_gelu")
    layout = layouts[FARE]
    expected = open_clip_outputs(layout.state, layout.images, layout.token_ids, sizes)
    compare(outputs(model, processor, layout.images, layout.texts), expected)


def test_what_completes_nothing_is_said_once(layouts, other_processor, caplog):
    published.say_once.cache_clear()
    for _ in range(2):
        find_model(model_name(layouts[FARE].path, layouts[GELU].path, other_processor), "--model")
    assert caplog.text.count(f"{layouts[FARE].path}: has tokenizer and image processor of its own: --base_model") == 1
    caplog.clear()
    for name in (LEAF, GELU, TOWER):
        find_model(model_name(layouts[name].path, layouts[FARE].path, other_processor), "--model")
    assert "of its own" not in caplog.text


# ------------------------------------------------------------------------------------------------ what identifies them


@pytest.fixture
def parts(layouts, other_processor, tmp_path):
    """Copies that a test may change: an image tower, the model it belongs to, and a processor."""
    shutil.copytree(layouts[FARE].path, tmp_path / "base")
    shutil.copytree(other_processor, tmp_path / "processor")
    shutil.copy(layouts[TOWER].path, tmp_path / "tower.pt")
    return tmp_path


def changed(state, key):
    return state | {key: state[key] * 1.01}


def test_a_revision_is_that_of_all_parts(layouts, parts):
    """Tower, weights and config and tokenizer of the base, processor: each changes it, wherever they lie."""
    tower, base, processor = parts / "tower.pt", parts / "base", parts / "processor"
    name = model_name(f"{tower}@{base}")
    known = [model_revision(name)]
    assert model_revision(name) == known[0]
    torch.save(changed(layouts[TOWER].state, "proj"), tower)
    known.append(model_revision(name))
    save_file(changed(layouts[FARE].state, "text_projection"), base / "open_clip_model.safetensors")
    known.append(model_revision(name))
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    known.append(model_revision(name))
    name = dataclasses.replace(name, processor=str(processor))
    known.append(model_revision(name))
    write_json(processor / "preprocessor_config.json", {"image_mean": 0.4})
    known.append(model_revision(name))
    assert len(set(known)) == len(known)
    shutil.copytree(parts, parts / "elsewhere/deeper")
    elsewhere = parts / "elsewhere/deeper"
    there = model_name(f"{elsewhere / 'tower.pt'}@{elsewhere / 'base'}", processor=str(elsewhere / "processor"))
    assert model_revision(there) == known[-1]


def test_a_revision_follows_the_only_file_of_a_base(layouts, parts):
    """A directory with OpenAI's weights and nothing else."""
    folder = parts / "openai"
    folder.mkdir()
    torch.save(layouts[OPENAI].state, folder / "ViT-tiny.pt")
    state = {key: value for key, value in layouts[OPENAI].state.items() if key.startswith("visual.")}
    torch.save(state, parts / "tower.pt")
    name = model_name(f"{parts / 'tower.pt'}@{folder}", processor=layouts[LEAF].processor)
    compare(outputs(*load(name, "--model"), layouts[OPENAI].images, TEXTS), layouts[OPENAI].expected)
    before = model_revision(name)
    torch.save(changed(layouts[OPENAI].state, "text_projection"), folder / "ViT-tiny.pt")
    assert model_revision(name) != before


def test_what_completes_nothing_does_not_change_a_revision(layouts, parts, other_processor):
    fare = layouts[FARE].path
    assert model_revision(model_name(fare, str(parts / "base"), other_processor)) == model_revision(fare)
    for name in (GELU, LEAF):
        alone = model_name(layouts[name].path, processor=other_processor)
        with_base = model_name(layouts[name].path, str(parts / "base"), other_processor)
        assert model_revision(alone) == model_revision(with_base)
        assert model_revision(alone) != model_revision(named(layouts[name]))


def test_an_image_tower_is_measured_anew_where_a_part_of_it_is_another(layouts, parts, data, tmp_path):
    """Cells are told apart by the revision. What is the same is not measured again."""

    def measure():
        evaluate.main(evaluation(f"{parts / 'tower.pt'}@{parts / 'base'}", data, tmp_path / "eval"))
        return [cell["settings"]["model_revision"] for cell in cells_of(tmp_path / "eval")]

    first = measure()
    assert measure() == first
    save_file(changed(layouts[FARE].state, "text_projection"), parts / "base/open_clip_model.safetensors")
    second = measure()
    torch.save(changed(layouts[TOWER].state, "proj"), parts / "tower.pt")
    third = measure()
    assert (len(first), len(second), len(third)) == (1, 2, 3)
    assert len(set(third)) == 3


def test_looking_at_a_config_reads_no_weights_of_a_folder(layouts, tmp_path):
    folder = Cases(layouts, tmp_path).fare()
    (folder / "open_clip_model.safetensors").unlink()
    _, config = find_config(str(folder), "--model")
    assert config.vision_config.num_hidden_layers == 2
    with pytest.raises(UserError, match=r"open_clip_model.safetensors: cannot be read"):
        load(str(folder), "--model")
