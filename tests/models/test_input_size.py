"""--image_size: every kind of model at another size, what is saved of it, what it is refused for, and the scripts."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)

import evaluate
import train_lore
import train_po
from tests.conftest import flags, run_script
from tests.models.test_encoders import embed_plainly, load_plainly
from tests.published_layouts import CLIPS, FARE, OPENAI, open_clip_outputs
from tests.small_models import KINDS, photos, save_small_model
from utils.data.images import CROP_ROUNDING, ImageTransform, resized_processor
from utils.errors import UserError
from utils.evaluation.report import write_report
from utils.evaluation.results import Results, cell_name, read_alike
from utils.models.encoders import make_encoder
from utils.models.hub import find_config, find_model, load
from utils.models.published import (
    FIXED_POSITIONS,
    export_open_clip,
    image_tower,
    image_transform,
    interpolate_positions,
    load_model,
    model_name,
    save_model,
)


def pillow_positions(table, grid):
    """``interpolate_positions`` of a table (T + P * P, D), one dimension at a time, by Pillow's bicubic filter."""
    before = int(len(table) ** 0.5)
    others, patches = table[: len(table) - before**2], table[len(table) - before**2 :]
    planes = patches.T.reshape(-1, before, before).numpy().astype(np.float32)
    resized = [np.array(Image.fromarray(plane).resize((grid, grid), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.cat([others, torch.from_numpy(np.stack(resized)).flatten(1).T])


@pytest.mark.parametrize(("before", "after"), [(14, 8), (4, 7), (7, 2), (2, 1), (1, 3), (5, 5)])
@pytest.mark.parametrize("others", [0, 1])
def test_positions_are_resized_as_a_picture_and_the_class_token_keeps_its_own(before, after, others):
    table = torch.randn(others + before**2, 6, generator=torch.Generator().manual_seed(before))
    found = interpolate_positions(table, after)
    assert found.shape == (others + after**2, 6)
    assert torch.equal(found[:others], table[:others])
    torch.testing.assert_close(found, pillow_positions(table, after), rtol=1e-5, atol=1e-5)


def side_of(kind, large):
    """Another size than 32 px, smaller or larger; a ConvNeXt's stride is 32 px, the others' patch 8 px."""
    return (96 if large else 64) if kind == "convnext" else (56 if large else 16)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(kind, directory) of every supported kind of model, all for 32 px."""
    directory = tmp_path_factory.mktemp("kinds") / request.param
    save_small_model(directory, request.param)
    return request.param, directory


@pytest.mark.parametrize("large", [False, True])
def test_every_kind_embeds_as_transformers_does_at_another_size(kind, tmp_path, large):
    """transformers' own model and processor, from the saved directory alone; nothing but the size has changed."""
    kind, directory = kind
    side = side_of(kind, large)
    model, processor = load_model(model_name(str(directory), image_size=side))
    encoder = make_encoder(model, processor)
    assert encoder.image_size == side
    save_model(tmp_path, model, processor, encoder.state_dict())

    image_processor = getattr(processor, "image_processor", processor)
    photo = photos(3, size=70) if kind == "siglip2" else photos(3, size=70)[:, :, :61]
    pictures = [Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()) for image in photo]
    saved_processor = type(image_processor).from_pretrained(tmp_path)
    inputs = saved_processor(pictures, return_tensors="pt")
    pixel_values = torch.stack([image_transform(processor)(picture) for picture in pictures]).float() / 255
    assert pixel_values.shape == (3, 3, side, side)
    with torch.no_grad():
        found = encoder(pixel_values)
    torch.testing.assert_close(found, embed_plainly(kind, load_plainly(tmp_path), inputs), rtol=1e-4, atol=1e-4)

    plain = load_plainly(tmp_path)
    before, after, tower = load_plainly(directory).state_dict(), plain.state_dict(), image_tower(plain)[0].config
    fixed = tower.model_type in FIXED_POSITIONS
    if tower.model_type != "siglip2_vision_model":  # its processor alone says it, as DINOv2's does
        assert tower.image_size == (64 if "dinov2" in kind else side)
    ends = ("position_embedding.weight", "position_embeddings")  # a ViT's is (1, T, D)
    tables = {name for name in before if fixed and name.endswith(ends) and "text" not in name}
    assert {name for name in before if not before[name].equal(after[name])} == tables
    for name in tables:
        expected = pillow_positions(before[name].squeeze(0), side // 8)
        torch.testing.assert_close(after[name].squeeze(0), expected, rtol=1e-5, atol=1e-5)


def test_a_saved_directory_needs_no_flag_and_the_flag_changes_nothing_there(kind, tmp_path, caplog):
    kind, directory = kind
    side = side_of(kind, large=False)
    model, processor = load_model(model_name(str(directory), image_size=side))
    save_model(tmp_path / "saved", model, processor, {})
    caplog.clear()
    again = [load_model(model_name(str(tmp_path / "saved"), image_size=flag)) for flag in (None, side)]
    assert "interpolated" not in caplog.text
    for other, its_processor in again:
        assert image_transform(its_processor) == image_transform(processor)
        assert other.config.to_dict() == again[0][0].config.to_dict()
        assert all(tensor.equal(model.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_the_way_back_and_forth_is_that_of_the_processor_alone(kind):
    """The size a model has already: nothing is touched, no number drawn, nothing said."""
    kind, directory = kind
    states, found = [], []
    for flag in (None, 32, side_of(kind, large=True)):
        torch.manual_seed(0)
        model, processor = load_model(model_name(str(directory), image_size=flag))
        states.append(torch.get_rng_state())
        found.append((model.state_dict(), getattr(processor, "image_processor", processor).to_dict()))
    assert states[0].equal(states[1])
    assert states[0].equal(states[2])  # the multiplier starts alike at every size
    assert found[0][1] == found[1][1]
    assert all(tensor.equal(found[1][0][name]) for name, tensor in found[0][0].items())


def test_it_is_said_what_becomes_of_positions(tmp_path, caplog):
    fixed, free = ("clip", "siglip_vision_model", "vit_roberta"), ("dinov2", "siglip2", "dinov2_bert")
    for kind, said in (*((kind, True) for kind in fixed), *((kind, False) for kind in free)):
        save_small_model(tmp_path / kind, kind)
        load_model(model_name(str(tmp_path / kind), image_size=64))
        line = f"{kind}: positions interpolated from 4 x 4 to 8 x 8 patches, by --image_size"
        assert caplog.text.count(line) == said


def test_a_size_that_is_no_multiple_stays_where_a_model_has_it(tmp_path, caplog):
    """SigLIP so400m: 384 px in patches of 14 px leaves 6 px out."""
    save_small_model(tmp_path, "siglip_vision_model")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 36}))
    model, processor = load_model(model_name(str(tmp_path), image_size=36))  # its processor gives 32 px
    assert image_transform(processor).output_size == (36, 36)
    smaller, processor = load_model(model_name(str(tmp_path), image_size=32))
    assert "interpolated" not in caplog.text  # 4 x 4 patches as before
    assert make_encoder(smaller, processor)(photos(1, size=32)).shape == (1, 32)
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in smaller.state_dict().items())
    with pytest.raises(
        UserError, match=r"gives 32 px, the model takes 36 px; correct its crop_size, or give --image_s"
    ):
        load_model(str(tmp_path))


SQUARE = {"height": 224, "width": 224}
PROPORTIONS = [
    (BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=SQUARE), 56, (64, (56, 56))),
    (BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=SQUARE), 98, (112, (98, 98))),
    (CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=SQUARE), 336, (336, (336, 336))),
    (CLIPImageProcessorPil(size={"height": 256, "width": 240}, crop_size=SQUARE), 112, ((128, 120), (112, 112))),
    (CLIPImageProcessorPil(size={"shortest_edge": 200}, crop_size=SQUARE), 112, (100, (112, 112))),  # a black frame
    (SiglipImageProcessorPil(size=SQUARE), 64, ((64, 64), None)),
    (ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875), 64, (73, (64, 64))),
    (ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875), 384, ((384, 384), None)),
    (
        ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.8, do_center_crop=True, crop_size=SQUARE),
        96,
        (120, (96, 96)),
    ),
    (Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256), 128, (128, (128, 128))),
]


@pytest.mark.parametrize(("image_processor", "side", "expected"), PROPORTIONS)
def test_a_processor_keeps_its_proportions_and_all_else(image_processor, side, expected):
    setattr(image_processor, CROP_ROUNDING, "even")
    before, fields = ImageTransform.from_processor(image_processor), image_processor.to_dict()
    resized = resized_processor(image_processor, side)
    resize, crop = expected
    assert ImageTransform.from_processor(resized) == replace(before, resize=resize, crop=crop)
    changed = {name for name, value in resized.to_dict().items() if fields[name] != value}
    assert changed <= {"size", "crop_size", "max_num_patches"}
    assert resized.to_dict().keys() == fields.keys()
    assert image_processor.to_dict() == fields  # a copy was changed
    back = resized_processor(resized, 224 if name_of(image_processor) != "Siglip2" else 256)
    if expected[0] != 73:  # 64 / 0.875 is no whole number
        assert ImageTransform.from_processor(back) == before


def name_of(image_processor):
    return type(image_processor).__name__.removesuffix("ImageProcessorPil")


def test_a_size_that_does_not_fit_is_one_line_before_weights_are_read(kind):
    """N below one patch, between two multiples; found by the config alone, whoever asks."""
    kind, directory = kind
    patch, word = (32, "stride") if kind == "convnext" else (8, "patch")
    for side, near in ((patch - 1, f"{patch}"), (100, "96 or 128" if kind == "convnext" else "96 or 104")):
        name = model_name(str(directory), image_size=side)
        message = rf"^--model {directory}: --image_size {side}: expected a multiple of {patch} px, the {word} of its "
        for ask in (find_config, find_model, load, load_model):
            with pytest.raises(UserError, match=message + rf"\w+, such as {near}$"):
                ask(name, "--model")


def test_a_processor_that_does_not_resize_is_refused(tmp_path):
    save_small_model(tmp_path, "dinov2")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_resize": False}))
    load_model(str(tmp_path))
    with pytest.raises(UserError, match=r"--image_size 64: BitImageProcessorPil: do_resize is false, so 64 px would"):
        load_model(model_name(str(tmp_path), image_size=64))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_resize": True, "size": {"shortest_edge": 48}}))
    with pytest.raises(UserError, match=r"--image_size 4096: .*size 6144 and crop \(4096, 4096\); expected 1 to 4096"):
        load_model(model_name(str(tmp_path), image_size=4096))


def unsaveable(self, *words, **more):
    raise NotImplementedError("this tokenizer cannot be saved")


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_files_that_stand_in_for_a_processor_have_the_size_too(tmp_path, monkeypatch, kind):
    save_small_model(tmp_path / "start", kind)
    model, processor = load_model(model_name(str(tmp_path / "start"), image_size=16))
    monkeypatch.setattr(type(processor), "save_pretrained", unsaveable)
    save_model(tmp_path / "saved", model, processor, {})
    _, again = load_model(str(tmp_path / "saved"))
    assert image_transform(again) == image_transform(processor)
    assert image_transform(again).output_size == (16, 16)


@pytest.mark.parametrize("name", [FARE, OPENAI, "robustvlm_visual"])
def test_published_layouts_compute_what_open_clip_does_at_another_size(layouts, tmp_path, name):
    """From files of weights and bases; and back in open_clip's names, in the dtypes that the tensors came with."""
    layout, whole = layouts[name], layouts[OPENAI if name == OPENAI else FARE]
    named = model_name(layout.path, layout.base_model, layout.processor, image_size=64)  # 2 x 2 patches at 32 px
    model, processor = load(named, "--model")
    prefix = "visual." if name == "robustvlm_visual" else ""
    state = {key: tensor.float() for key, tensor in whole.state.items()}
    state |= {prefix + key: tensor.float() for key, tensor in layout.state.items()}
    key = "visual.positional_embedding"
    state[key] = pillow_positions(state[key], 4)
    images = photos(4, size=64)
    expected = open_clip_outputs(state, images, layout.token_ids, CLIPS[OPENAI if name == OPENAI else FARE])
    with torch.no_grad():
        found = make_encoder(model, processor)(images)
    error = (found - expected["image_features"]).norm(dim=1) / expected["image_features"].norm(dim=1)
    assert error.max() < 1e-5

    save_model(tmp_path / "saved", model, processor, {})
    export_open_clip(tmp_path / "exported", tmp_path / "saved", "--export open_clip", model.open_clip_form)
    config = json.loads((tmp_path / "exported/open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 64
    exported = load_file(tmp_path / "exported/open_clip_model.safetensors")
    came_as = layout.state[key.removeprefix(prefix)]
    assert (exported[key].shape, exported[key].dtype) == ((17, came_as.shape[1]), came_as.dtype)
    again, its_processor = load(model_name(f"hf-hub:{tmp_path}/exported", processor=layout.processor), "--model")
    with torch.no_grad():
        of_export = make_encoder(again, its_processor)(images)
    torch.testing.assert_close(of_export, found, rtol=0, atol=2e-3 if name == OPENAI else 0)


# ------------------------------------------------------------------------------------------------------ in the scripts


SCRIPTED = ("clip", "dinov2_head")


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """kind -> directory of a model for 32 px; DINOv2 has a head of ten classes."""
    directory = tmp_path_factory.mktemp("starts")
    for kind in SCRIPTED:
        save_small_model(directory / kind, kind)
    return {kind: directory / kind for kind in SCRIPTED}


@pytest.fixture
def training(starts, digits, tmp_path):
    def make(kind="clip", **changes):
        settings = {
            "model_name_or_path": starts[kind], "train_shards": digits / "train", "output_dir": tmp_path / "run",
            "cache_dir": tmp_path / "cache", "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1,
            "num_workers": 0, "report_to": "none",
        }  # fmt: skip
        return flags({name: value for name, value in (settings | changes).items() if value is not None})

    return make


LORE = {"attack_steps": 2, "primal_steps": 2, "eps": 8}


def evaluated(model, kind, digits, output_dir, **changes):
    """Value and records of every figure."""
    settings = {
        "model": model, "data": digits, "attack": ["clean", "pgd"], "eps": 2, "attack_steps": 2, "num_samples": 24,
        "num_workers": 0, "output_dir": output_dir, "cache_dir": output_dir.parent / "cache",
        "classifier": "zero_shot" if kind == "clip" else "linear_head",
    }  # fmt: skip
    evaluate.main(flags(settings | changes))
    results = Results(output_dir)
    return [(cell["value"], results.records(cell)) for cell in results.current()]


@pytest.mark.parametrize("kind", SCRIPTED)
def test_a_trained_directory_is_the_start_model_at_that_size(starts, training, digits, tmp_path, kind, caplog):
    """A step of learning rate 0 changes no weight: without the flag it gives the start model's figures with the flag.

    Image by image, clean and attacked. A run from it without the flag is the run from the start model with the flag.
    """
    train_lore.main(training(kind, image_size=16, output_dir=tmp_path / "still", learning_rate=0, **LORE))
    assert ("4 x 4 to 2 x 2 patches" in caplog.text) == (kind == "clip")
    assert "| image_size | 16 |" in (tmp_path / "still/README.md").read_text()
    saved = evaluated(tmp_path / "still", kind, digits, tmp_path / "eval-saved")
    start = evaluated(starts[kind], kind, digits, tmp_path / "eval-start", image_size=16)
    whole = evaluated(starts[kind], kind, digits, tmp_path / "eval-whole")
    assert saved == start
    assert saved != whole

    train_lore.main(training(kind, image_size=16, output_dir=tmp_path / "one", learning_rate=1e-3, **LORE))
    still = {"model_name_or_path": tmp_path / "still"}
    train_lore.main(training(kind, output_dir=tmp_path / "two", learning_rate=1e-3, **LORE, **still))
    one, two, before = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "still"))
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    assert not all(tensor.equal(before[name]) for name, tensor in one.items())


def test_figures_at_two_sizes_are_two_figures(starts, digits, tmp_path):
    """In one directory: none takes the other's place. A figure without the flag is what it was before there was one."""
    out = tmp_path / "eval"
    evaluated(starts["clip"], "clip", digits, out)
    before = json.loads((out / "results.json").read_text())["results"]
    assert not any("image_size" in json.dumps(cell) for cell in before)
    evaluated(starts["clip"], "clip", digits, out, image_size=16)
    evaluated(starts["clip"], "clip", digits, out, image_size=32)  # its own size, but it was asked for
    times = {path.name: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    evaluated(starts["clip"], "clip", digits, out)  # known
    assert times == {path.name: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    results = Results(out)
    assert results.results[:2] == before
    assert [cell["settings"].get("image_size") for cell in results.current()] == [None, None, 16, 16, 32, 32]
    own, small, same = (results.results[place] for place in (0, 2, 4))
    assert len({read_alike(cell) for cell in (own, small, same)}) == 3  # no warning compares sizes
    assert results.records(own) == results.records(same) != results.records(small)
    assert len({cell_name(cell) for cell in results.results}) == 6
    page = write_report(out).read_text()
    for variant in ("image_size default", "image_size 16", "image_size 32"):
        assert variant in page
    with (out / "benchmark.csv").open(newline="") as file:
        assert [row["image_size"] for row in csv.DictReader(file)] == ["", "", "16", "16", "32", "32"]


def test_one_model_that_cannot_ends_the_evaluation_before_any_is_loaded(starts, digits, tmp_path, monkeypatch):
    save_small_model(tmp_path / "convnext", "convnext")
    monkeypatch.setattr(evaluate, "load_model", lambda *names: pytest.fail("loaded"))
    convnext = str(tmp_path / "convnext")
    message = (
        rf"^--model {convnext}: --image_size 16: expected a multiple of 32 px, the stride of its convnext, such as "
    )
    for more in ({}, {"prefetch": "true"}):
        with pytest.raises(UserError, match=message):
            evaluated([str(starts["clip"]), convnext], "clip", digits, tmp_path / "eval", image_size=16, **more)
    assert not (tmp_path / "eval").exists()
    reference = {"measure": "fidelity", "reference_model_name_or_path": convnext, "image_size": 16}
    with pytest.raises(UserError, match=r"^--reference_model_name_or_path .*convnext: --image_size 16: expected a mu"):
        evaluated(starts["clip"], "clip", digits, tmp_path / "eval", **reference)


def test_a_reference_is_measured_at_the_same_size(starts, digits, tmp_path):
    compared = {"measure": "fidelity", "reference_model_name_or_path": starts["clip"], "image_size": 16}
    values = evaluated(starts["clip"], "clip", digits, tmp_path / "eval", **compared)
    assert [value for value, _ in values] == pytest.approx([0, 0, 0, 0, 1])


@pytest.mark.parametrize("trainer", [train_lore, train_po])
def test_sizes_that_do_not_fit_end_a_run_before_it_leaves_anything(training, tmp_path, trainer):
    wrong = [
        (20, r"^--model_name_or_path .*clip: --image_size 20: expected a multiple of 8 px, .*, such as 16 or 24$"),
        (4, r"--image_size 4: expected a multiple of 8 px, the patch of its clip_vision_model, such as 8$"),
        (0, r"^--image_size: 0 is too small; expected at least 1$"),
        (4104, r"^--image_size: 4104 is too large; expected at most 4096$"),
        ("56px", r"^--image_size: .*56px"),
    ]
    for side, message in wrong:
        with pytest.raises(UserError, match=message):
            trainer.main(training(image_size=side))
        assert {path.name for path in (tmp_path / "run").glob("*")} <= {".lock"}
    words = training(image_size=20, output_dir=tmp_path / "other")
    output = run_script(f"{trainer.__name__}.py", *words, status=2)
    assert re.search(r"^train_\w+\.py: error: .*--image_size 20: ", output.splitlines()[-1])
    assert "Traceback" not in output


def test_a_reference_gets_the_size_of_the_flag_and_needs_it(starts, training, tmp_path):
    train_lore.main(training(image_size=16, output_dir=tmp_path / "still", learning_rate=0, **LORE))
    on = {"model_name_or_path": tmp_path / "still", "reference_model_name_or_path": starts["clip"]}
    message = r"embeds 32 px into 24 dimensions, the encoder 16 px into 24; .* both the same size by --image_size$"
    for trainer, more in ((train_lore, LORE), (train_po, {})):
        with pytest.raises(UserError, match=message):
            trainer.main(training(output_dir=tmp_path / "on", **on, **more))
        shutil.rmtree(tmp_path / "on", ignore_errors=True)
    train_lore.main(training(output_dir=tmp_path / "on", image_size=16, **on, **LORE))
    (row,) = [json.loads(line) for line in (tmp_path / "on/metrics.jsonl").read_text().splitlines()]
    assert row["distance_clean"] == 0  # both were interpolated alike


def test_a_run_goes_on_at_its_size_alone(training, tmp_path):
    run = {"image_size": 16, "checkpoint_steps": 1, "max_steps": 2} | LORE
    train_lore.main(training(**run))
    whole = load_file(tmp_path / "run/model.safetensors")
    first = tmp_path / "run/checkpoints/step-1"
    for side, was, now in ((24, "16", "24"), (None, "16", "None")):
        with pytest.raises(UserError, match=rf"other settings \(image_size was {was}, is {now}\)"):
            train_lore.main(training(**run | {"image_size": side}, resume_from_checkpoint=first))
    train_lore.main(training(**run, resume_from_checkpoint=first))
    again = load_file(tmp_path / "run/model.safetensors")
    assert all(tensor.equal(whole[name]) for name, tensor in again.items())

    state = json.loads((first / "trainer_state.json").read_text())
    del state["settings"]["image_size"]  # of an earlier version
    (first / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"other settings \(image_size was None, is 16\)"):
        train_lore.main(training(**run, resume_from_checkpoint=first))


def test_kept_embeddings_are_those_of_a_size(training, tmp_path, capfd):
    head = {"trainable": "head", "train_num_samples": 16}
    for number, (side, expected) in enumerate([(None, "done"), (16, "done"), (16, "kept"), (None, "kept")]):
        sized = {"image_size": side, "output_dir": tmp_path / str(number)}
        train_po.main(training(**head, **sized))
        assert f"embeddings {expected}" in capfd.readouterr().err, number
    sides = [image_transform(load_model(str(tmp_path / name))[1]).output_size for name in ("1", "3")]
    assert sides == [(16, 16), (32, 32)]


def test_preference_optimisation_and_its_export_have_the_size(training, tmp_path):
    train_po.main(training(image_size=16, export="open_clip", train_num_samples=16))
    config = json.loads((tmp_path / "run/open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 16
    encoders = [make_encoder(*load(name, "--model")) for name in (str(tmp_path / "run"), f"hf-hub:{tmp_path}/run")]
    with torch.no_grad():
        trained, exported = (encoder(photos(2, size=16)) for encoder in encoders)
    assert trained.equal(exported)


def test_memory_is_estimated_for_the_size(training, monkeypatch):
    found = []
    monkeypatch.setattr(train_lore, "print_estimate", lambda model, *layout, **options: found.append(model))
    for side in (None, 64):
        train_lore.main(training(image_size=side, estimate_memory="true"))
    (name, own), (sized, larger) = found
    assert (name, own.image_size, sized, larger.image_size) == ("clip", 32, "clip, 64 px", 64)
    with pytest.raises(UserError, match=r"--image_size 60: expected a multiple of 8 px"):
        train_lore.main(training(image_size=60, estimate_memory="true"))
    with pytest.raises(UserError, match=r"--image_size 64: of which model\? name it with --model_name_or_path"):
        train_lore.main(["--estimate_memory", "--image_size", "64"])
