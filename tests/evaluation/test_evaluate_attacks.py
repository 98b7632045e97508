"""evaluate.py: strong attacks, noise, corruptions, other classifiers, doubtful figures, killed runs."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

import evaluate
from tests.conftest import ROOT, flags, run_script, two_processes
from tests.shard_maker import image_bytes, write_shard
from tests.small_models import save_small_clip, save_small_model
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, index_shards
from utils.errors import UserError
from utils.evaluation import measures
from utils.evaluation.attacks import ATTACKS
from utils.evaluation.fairness import fairness_figures
from utils.evaluation.results import Results
from utils.models.encoders import ImageEncoder

READING_CLIP = ROOT / "examples" / "reading_clip"  # classifies digits: robust figures of random weights say little


@pytest.fixture
def arguments(attribute_digits, tmp_path):
    def make(**changes):
        defaults = {
            "model": READING_CLIP,
            "data": attribute_digits,
            "attack": "apgd",
            "eps": 8,
            "apgd_steps": 12,
            "apgd_targets": 3,
            "num_samples": 24,
            "num_workers": 0,
            "output_dir": tmp_path / "eval",
            "cache_dir": tmp_path / "cache",
        }
        return flags(defaults | changes)

    return make


def results(directory):
    return json.loads((directory / "results.json").read_text())["results"]


def warnings(directory):
    return [warning["text"] for warning in json.loads((directory / "results.json").read_text())["warnings"]]


def records(directory, part):
    """The records of the one cell whose file name holds ``part``."""
    (path,) = [path for path in (directory / "records").iterdir() if part in path.name]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_masks_do_not_depend_on_processes_or_batch_size(arguments, tmp_path):
    common = {"attack": ["clean", "apgd", "gaussian_noise"], "sigma": 64, "eps": 1, "num_samples": 16, "apgd_steps": 8}
    for size in (1, 7, 64):
        evaluate.main(arguments(output_dir=tmp_path / f"batch{size}", batch_size=size, **common))
    run_script("evaluate.py", *arguments(output_dir=tmp_path / "two", batch_size=7, **common), launcher=two_processes())
    for part in ("_clean_", "_apgd_eps1_", "gaussian_noise_sigma64"):
        found = [records(tmp_path / name, part) for name in ("batch1", "batch7", "batch64", "two")]
        masks = [[(row["position"], row["key"], row["correct"]) for row in rows] for rows in found]
        assert masks[0] == masks[1] == masks[2] == masks[3]
        assert [position for position, _, _ in masks[0]] == list(range(16))
    broken = [row for row in records(tmp_path / "two", "_apgd_") if not row["correct"]]
    assert 0 < len(broken) < 16
    assert {row["broken_by"] for row in broken} <= {"clean", "cross-entropy", "target 1", "target 2", "target 3"}
    pictures = [next((tmp_path / name / "pictures").glob("*_apgd_*")) for name in ("batch7", "two")]
    assert pictures[0].name == pictures[1].name


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_changes_images_by_its_own_strength_whatever_the_batch(arguments, tmp_path, attack):
    """Verdicts are the same for two batch sizes, the report says what the attack is, and something does change."""
    for name in {"square": ["pyautoattack"], "corruptions": ["imagecorruptions"]}.get(attack, []):
        pytest.importorskip(name)
    common = {
        "attack": attack,
        "num_samples": 10,
        "corruptions": "pixelate",
        "severities": 5,
        "sigma": 64,
        "square_queries": 20,
    }
    for size in (3, 10):
        evaluate.main(arguments(output_dir=tmp_path / str(size), batch_size=size, **common))
    assert results(tmp_path / "3") == results(tmp_path / "10")
    masks = [[row["correct"] for row in records(tmp_path / size, f"accuracy_{attack}")] for size in ("3", "10")]
    assert masks[0] == masks[1]
    assert len(masks[0]) == 10
    page = (tmp_path / "3/report.html").read_text()
    assert ATTACKS[attack].about in html.unescape(page)
    assert all(masks[0]) == (attack == "clean")


def test_apgd_is_at_least_as_strong_as_pgd_and_a_bfloat16_attack_is_judged_in_float32(arguments, tmp_path):
    evaluate.main(arguments(attack=["clean", "pgd", "apgd"], num_samples=48))
    clean, pgd, apgd = (cell["value"] for cell in results(tmp_path / "eval"))
    assert clean > 0.9
    assert apgd <= pgd <= clean
    evaluate.main(arguments(attack="apgd", attack_dtype="bfloat16", num_samples=48, output_dir=tmp_path / "half"))
    (half,) = results(tmp_path / "half")
    assert half["value"] == pytest.approx(apgd, abs=0.05)
    assert half["settings"]["attack_dtype"] == "bfloat16"
    assert warnings(tmp_path / "eval") == []


def test_few_classes_are_attacked_by_the_margin(tmp_path, arguments):
    samples = [(str(i), {"png": image_bytes(i, (32, 32), "PNG"), "cls": str(i % 2).encode()}) for i in range(8)]
    write_shard(tmp_path / "two/test/0.tar", samples)
    (tmp_path / "two/classnames.txt").write_text("cat\ndog\n")
    evaluate.main(arguments(data=tmp_path / "two", attack=["clean", "apgd"]))
    settings = results(tmp_path / "eval")[1]["settings"]
    assert settings["apgd_targets"] == 1
    assert settings["targeted_loss"].startswith("margin, for fewer than 4")
    assert results(tmp_path / "eval")[1]["value"] <= results(tmp_path / "eval")[0]["value"]
    (tmp_path / "two/classnames.txt").write_text("cat\n")
    with pytest.raises(UserError, match="--attack apgd: the set has one class only"):
        evaluate.main(arguments(data=tmp_path / "two", attack="apgd"))


def test_corruptions_noise_and_embeddings_beside_a_reference(arguments, small_clip, tmp_path):
    pytest.importorskip("imagecorruptions", reason="needs the extra imagecorruptions-imaug")
    save_small_clip(tmp_path / "other", seed=1)
    evaluate.main(
        arguments(
            model=[small_clip, tmp_path / "other"],
            attack=["clean", "gaussian_noise", "corruptions"],
            measure=["accuracy", "interpretability", "fidelity"],
            corruptions=["impulse_noise", "pixelate"],
            severities=[1, 5],
            sigma=[8, 64],
            reference_model_name_or_path=small_clip,
        )
    )
    found = results(tmp_path / "eval")
    assert len(found) == 2 * (1 + 2 + 4 + 1 + 5)
    corrupted = [cell for cell in found if cell["attack"] == "corruptions"]
    assert [(cell["corruption"], cell["severity"]) for cell in corrupted[:4]] == [
        ("impulse_noise", 1), ("impulse_noise", 5), ("pixelate", 1), ("pixelate", 5),
    ]  # fmt: skip
    assert {cell["sigma"] for cell in found if cell["attack"] == "gaussian_noise"} == {8, 64}
    own = {cell["measure"]: cell["value"] for cell in found if cell["model"] == str(small_clip)}
    other = {cell["measure"]: cell["value"] for cell in found if cell["model"] != str(small_clip)}
    assert own["fidelity"] == own["fidelity_max"] == 0
    assert own["fidelity_cosine"] == pytest.approx(1, abs=1e-6)
    assert 0 < other["fidelity_median"] <= other["fidelity_p95"] <= other["fidelity_max"]
    assert other["fidelity_cosine"] < 0.9
    rows = records(tmp_path / "eval", "other_attribute-digits_interpretability")
    assert sum(row["value"] for row in rows) / len(rows) == pytest.approx(other["interpretability"], abs=1e-6)
    assert all(-1 <= row["value"] <= 1 for row in rows)
    report = json.loads((tmp_path / "eval/results.json").read_text())
    assert {(c["attack"], c["sigma"]) for c in report["comparisons"]} == {
        ("clean", None), ("gaussian_noise", 8), ("gaussian_noise", 64),
    }  # fmt: skip
    assert all(c["n"] == 24 and 0 <= c["p_value"] <= 1 for c in report["comparisons"])
    page = (tmp_path / "eval/report.html").read_text()
    assert "impulse" in page
    # Noise and corruptions are shown on the same image at every strength, beside the clean one.
    found = Results(tmp_path / "eval")
    shown = [found.pictures(cell) for cell in found.results if cell["model"] == str(small_clip)]
    noise, corruptions = (
        [kept for kept in shown if kept and len(kept[0]) > 1],
        [kept for kept in shown if kept and len(kept[0]) == 1],
    )
    assert (len(noise), len(corruptions)) == (2, 2)  # of corruptions the highest severity
    assert torch.equal(noise[0][0], noise[1][0])
    assert all(torch.equal(kept[0][0], noise[0][0][0]) for kept in corruptions)
    assert all((kept[0] - kept[1]).abs().amax() > 0.02 for kept in [*noise, *corruptions])
    assert (tmp_path / "eval/benchmark.csv").read_text().count("\n") == 1 + 2 * 7


def test_interpretability_is_the_mean_cosine_to_the_descriptions_of_the_true_class(
    arguments, attribute_digits, tmp_path
):
    """Against CLIPModel's own features, image by image."""
    from utils.data.images import ImageTransform
    from utils.evaluation.trial import Model, Trial
    from utils.models.published import load_model
    from utils.sets.labelled import interpretability_templates

    evaluate.main(arguments(measure="interpretability", num_samples=3))
    clip, processor = load_model(str(READING_CLIP))
    settings = evaluate.parse_settings(evaluate.Settings, arguments())
    data = evaluate.open_data(settings, str(attribute_digits), attribute_digits)
    model = Model("", None, ImageTransform.from_processor(processor.image_processor), torch.device("cpu"))
    dataset = Trial(settings, None, model, data).labelled_images()
    for row in records(tmp_path / "eval", "interpretability"):
        item = dataset[0, row["position"], row["position"]]
        texts = [template.replace("{c}", data.classnames[item["label"]]) for template in interpretability_templates()]
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        pixels = torch.tensor(processor.image_processor.image_mean), torch.tensor(processor.image_processor.image_std)
        normalised = (item["image"][None] / 255 - pixels[0].view(3, 1, 1)) / pixels[1].view(3, 1, 1)
        with torch.no_grad():
            image = clip(pixel_values=normalised, input_ids=tokens["input_ids"]).image_embeds
            text = clip(pixel_values=normalised, input_ids=tokens["input_ids"]).text_embeds
        assert row["value"] == pytest.approx(float((text @ image[0]).mean()), abs=1e-5)


def test_published_corruptions_are_read_as_they_are(arguments, tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    labels = np.arange(6) % 3
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "labels.npy", np.tile(labels, 5))
    np.save(folder / "fog.npy", images)
    np.save(folder / "snow.npy", images[::-1])
    with pytest.raises(UserError, match=r"--data .*CIFAR-10-C: published corruptions of 3 classes without names"):
        evaluate.main(arguments(data=folder, attack="corruptions"))
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"3 classes in the files, 2 names"):
        evaluate.main(arguments(data=folder, attack="corruptions", classnames=tmp_path / "two.txt"))
    (folder / "classnames.txt").write_text("cat\ndog\nship\n")
    with pytest.raises(UserError, match=r"published corruptions \(of .*fog.*\), for which only --attack corruptions"):
        evaluate.main(arguments(data=folder, attack="apgd"))
    with pytest.raises(UserError, match=r"for which only --attack corruptions"):
        evaluate.main(arguments(data=folder, attack="corruptions", measure="interpretability"))
    with pytest.raises(UserError, match=r"published corruptions hold no training images for --classifier knn"):
        evaluate.main(arguments(data=folder, attack="corruptions", classifier="knn"))
    evaluate.main(arguments(data=folder, attack=["clean", "corruptions"]))
    found = results(tmp_path / "eval")
    assert len(found) == 10
    assert {cell["corruption"] for cell in found} == {"fog", "snow"}
    assert all(cell["n"] == 6 for cell in found)
    assert [row["label"] for row in records(tmp_path / "eval", "fog_severity3")] == labels.tolist()


@pytest.fixture
def dinov2(tmp_path):
    """A small encoder without a text tower."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, mlp_ratio=2
    )
    torch.manual_seed(0)
    model = Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / parameter[0].numel() ** 0.5)
    model.save_pretrained(tmp_path / "dinov2")
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3)
    processor.save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_encoders_without_text_are_measured_by_what_is_learnt_on_top(arguments, dinov2, digits, tmp_path):
    with pytest.raises(UserError, match=r"--model .*: a dinov2 has no text tower, which --classifier zero_shot needs"):
        evaluate.main(arguments(model=dinov2))
    with pytest.raises(
        UserError, match=r"--classifier knn: interpretability goes by texts; measure it in a call of its"
    ):
        evaluate.main(arguments(model=dinov2, classifier="knn", attack="clean", measure="interpretability"))
    with pytest.raises(UserError, match=r"--classifier knn: --query goes by texts"):
        evaluate.main(arguments(model=dinov2, classifier="knn", attack="clean", query="a digit"))
    with pytest.raises(UserError, match=r"--reference_model_name_or_path .*: model type 'dinov2'; supported: clip"):
        evaluate.main(arguments(measure="retention", reference_model_name_or_path=dinov2))
    with pytest.raises(UserError, match=r"--reference_model_name_or_path no/such: neither a local model directory"):
        evaluate.main(arguments(measure="fidelity", reference_model_name_or_path="no/such"))
    with pytest.raises(UserError, match=r"--linear_head head: no such file; expected safetensors"):
        evaluate.main(arguments(classifier="linear_head", linear_head="head"))
    with pytest.raises(UserError, match=r"--attack apgd: nearest neighbours have no gradient worth following"):
        evaluate.main(arguments(model=dinov2, classifier="knn"))
    with pytest.raises(UserError, match=r"--classifier zero_shot and --linear_head head do not go together"):
        evaluate.main(arguments(linear_head="head"))
    with pytest.raises(
        UserError, match=r"no split 'training'; found .*, test, train, val; name one with --train_split"
    ):
        evaluate.main(arguments(model=dinov2, attack="clean", classifier="knn", train_split="training"))
    common = {"model": dinov2, "data": digits, "num_samples": 40}
    evaluate.main(arguments(classifier="knn", attack="clean", output_dir=tmp_path / "knn", **common))
    attacked = {"attack": ["clean", "apgd"], "eps": 2}
    evaluate.main(arguments(classifier="linear_probe", output_dir=tmp_path / "probe", **attacked, **common))
    (knn,), (probe, robust) = results(tmp_path / "knn"), results(tmp_path / "probe")
    assert knn["value"] > 0.2  # ten classes, random features
    assert probe["value"] > knn["value"]
    assert robust["value"] < probe["value"]
    (head,) = (tmp_path / "probe/probes").iterdir()
    by_file = {"classifier": "linear_head", "linear_head": head, "output_dir": tmp_path / "file"}
    evaluate.main(arguments(**by_file, **attacked, **common))
    assert [cell["value"] for cell in results(tmp_path / "file")] == [probe["value"], robust["value"]]
    run_script(
        "evaluate.py",
        *arguments(classifier="linear_probe", output_dir=tmp_path / "two", **attacked, **common),
        launcher=two_processes(),
    )
    assert results(tmp_path / "two")[0]["value"] == pytest.approx(probe["value"], abs=0.03)
    save_file({"weight": torch.zeros(10, 5)}, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"--linear_head .*: weight is \(10, 5\); expected .* weight \(10, 32\)"):
        evaluate.main(arguments(model=dinov2, classifier="linear_head", linear_head=tmp_path / "narrow.safetensors"))


def test_a_model_with_a_head_of_its_own_is_measured_by_it(arguments, dinov2, digits, tmp_path):
    """DINOv2 saved for image classification: its accuracy is what transformers' own logits give."""
    save_small_model(tmp_path / "headed", "dinov2_head")
    with pytest.raises(UserError, match=r"--classifier linear_head: --model .*, a dinov2, brings no head of its own"):
        evaluate.main(arguments(model=dinov2, classifier="linear_head", attack="clean"))
    names = tmp_path / "three.txt"
    names.write_text("a\nb\nc\n")
    few = arguments(model=tmp_path / "headed", classifier="linear_head", attack="clean", classnames=names)
    with pytest.raises(UserError, match=r"own head has 10 classes, the data set 3"):
        evaluate.main(few)
    evaluate.main(
        arguments(
            model=tmp_path / "headed", data=digits, num_samples=60, classifier="linear_head",
            attack=["clean", "pgd"], eps=1, output_dir=tmp_path / "own",
        )
    )  # fmt: skip
    clean, attacked = results(tmp_path / "own")
    model = Dinov2ForImageClassification.from_pretrained(tmp_path / "headed").eval()
    processor = BitImageProcessorPil.from_pretrained(tmp_path / "headed")
    index = index_shards([str(path) for path in sorted((digits / "test").glob("*.tar"))])
    untouched = ShardDataset(index, ImageTransform(None, None), order="sequential", with_labels=True)
    right = 0
    for place in range(60):
        sample = untouched[0, place, place]
        picture = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
        with torch.no_grad():
            logits = model(**processor(picture, return_tensors="pt")).logits
        right += int(logits.argmax()) == int(sample["label"])
    assert clean["value"] == pytest.approx(right / 60)
    assert attacked["value"] < clean["value"]


def test_a_model_trained_anew_in_the_same_place_is_measured_anew(arguments, tmp_path):
    for seed in (0, 1):
        save_small_clip(tmp_path / "model", seed=seed)
        evaluate.main(arguments(model=tmp_path / "model", attack="clean"))
    first, second = results(tmp_path / "eval")
    assert first["settings"]["model_revision"] != second["settings"]["model_revision"]
    evaluate.main(arguments(model=tmp_path / "model", attack="clean"))
    assert len(results(tmp_path / "eval")) == 2


def test_one_directory_has_one_name_and_what_is_named_twice_is_measured_once(arguments, small_clip, tmp_path):
    link = os.path.relpath(small_clip)
    evaluate.main(arguments(model=[f"{link}/", f"./{link}"], attack=["clean", "pgd", "pgd"], eps=[4, 4.0]))
    assert [(cell["model"], cell["attack"]) for cell in results(tmp_path / "eval")] == [(link, "clean"), (link, "pgd")]


def test_references_that_see_other_images_are_refused(arguments, small_clip, tmp_path):
    save_small_clip(tmp_path / "other")
    config = json.loads((tmp_path / "other/processor_config.json").read_text())
    config["image_processor"]["resample"] = 2
    (tmp_path / "other/processor_config.json").write_text(json.dumps(config))
    for measure in ("retention", "fidelity"):
        with pytest.raises(UserError, match=rf"--measure {measure}: .* sees images of \(32, 32\) px, .*in another way"):
            evaluate.main(
                arguments(
                    model=small_clip, attack="clean", measure=measure,
                    reference_model_name_or_path=tmp_path / "other",
                )
            )  # fmt: skip


def test_a_reference_that_rounds_crops_otherwise_sees_the_pictures_of_the_model(arguments, small_clip, tmp_path):
    """FARE in open_clip's layout beside the CLIP that it was made from, which transformers wrote."""
    shutil.copytree(small_clip, tmp_path / "even")
    config = json.loads((tmp_path / "even/processor_config.json").read_text())
    config["image_processor"]["crop_rounding"] = "even"
    (tmp_path / "even/processor_config.json").write_text(json.dumps(config))
    measure = ["fidelity", "retention"]
    compared = {"attack": "clean", "measure": measure, "reference_model_name_or_path": small_clip}
    evaluate.main(arguments(model=tmp_path / "even", **compared))
    assert {cell["value"] for cell in results(tmp_path / "eval") if cell["measure"] in measure} == {0.0}


def test_figures_without_a_value_are_said_to_be_undefined(arguments, attribute_digits, tmp_path, monkeypatch, capsys):
    """No class with images of two groups: the other fairness figures stand."""
    real = measures.measure_fairness
    monkeypatch.setattr(
        measures,
        "measure_fairness",
        lambda *given: [
            finding._replace(value=None) if finding.cell["measure"] == "opportunity_difference" else finding
            for finding in real(*given)
        ],
    )
    evaluate.main(arguments(attack="clean", measure="fairness", top_k=5))
    assert "undefined" in capsys.readouterr().out
    assert "undefined" in (tmp_path / "eval/report.html").read_text()
    labels, groups = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    figures = fairness_figures(torch.rand(2, 4), labels, groups, 2)
    assert figures["opportunity_difference"] is None
    assert all(value is not None for name, value in figures.items() if name != "opportunity_difference")


def test_a_killed_run_goes_on_with_the_cells_that_are_missing(arguments, tmp_path):
    command = arguments(attack=["clean", "apgd"], eps=[2, 4, 8, 12, 16, 24], num_samples=40, apgd_steps=40)
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "evaluate.py"), *command],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    path = tmp_path / "eval/results.json"
    while not (path.exists() and len(results(tmp_path / "eval")) >= 2):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results(tmp_path / "eval")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "eval/records").iterdir()}
    assert 2 <= len(before) < 7
    evaluate.main(command)
    after = results(tmp_path / "eval")
    assert after[: len(before)] == before
    assert len(after) == 7
    finished = sorted(times, key=times.get)[: len(before)]
    assert all(path.stat().st_mtime_ns == times[path] for path in finished)
    assert (tmp_path / "eval/report.html").exists()


def test_random_answers_are_noticed(arguments, tmp_path, monkeypatch):
    forward = ImageEncoder.forward
    monkeypatch.setattr(
        ImageEncoder, "forward", lambda self, x: forward(self, x) * (1 + 0.05 * torch.rand(len(x), self.embed_dim))
    )
    evaluate.main(arguments(attack=["clean", "apgd"]))
    assert sum("answers the same images differently" in text for text in warnings(tmp_path / "eval")) == 2


class Rounded(torch.autograd.Function):
    """Pixels in 16 steps, and no gradient: a defence that hides."""

    @staticmethod
    def forward(context, pixel_values):
        return (pixel_values * 15).round() / 15

    @staticmethod
    def backward(context, gradient):
        return torch.zeros_like(gradient)


def test_masked_gradients_are_noticed(arguments, tmp_path, monkeypatch):
    """No gradient where the targeted runs start; and Square, which needs none, does better than APGD."""
    forward = ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, x: forward(self, Rounded.apply(x)))
    evaluate.main(arguments(attack=["apgd", "square"], eps=24, square_queries=100))
    texts = warnings(tmp_path / "eval")
    assert any("no gradient at all" in text for text in texts)
    assert any("the black-box Square attack leaves" in text for text in texts)
    page = (tmp_path / "eval/report.html").read_text()
    assert "the black-box Square attack leaves" in page


def test_mistakes_are_one_line_and_leave_nothing(arguments, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(4)))
    bare = tmp_path / "bare"
    write_shard(bare / "test/0.tar", [("0", {"png": image_bytes(0, (32, 32), "PNG"), "cls": b"0"})])
    wrong = [
        ({"data": bare, "attack": "clean"},
         r"--data .*bare: labelled samples without class names; put classnames.txt there"),
        ({"data": bare, "classnames": tmp_path / "none.txt"}, r"none.txt: no such file; expected class names"),
        ({"classnames": tmp_path / "names.txt"},
         r"--max_bad_fraction 0.01: .*bad label.*there are 4 classes \(0 ... 3\)"),
        ({"eps": 0}, r"--eps: 0.0 is too small; expected more than 0"),
        ({"sigma": 0}, r"--sigma: 0.0 is too small"),
        ({"attack": "agpd"}, r"--attack: 'agpd' is not one of .*, did you mean apgd\?"),
        ({"corruptions": "foggy"}, r"--corruptions: 'foggy' is not one of .*, did you mean fog\?"),
        ({"severities": 6}, r"--severities: 6 is too large; expected at most 5"),
        ({"split": "validation"},
         r"--data .*: no split 'validation'; found .*, test, train, val; name one with --split"),
        ({"data": "clip-benchmark/wds_cifar10"},
         r"--data clip-benchmark/wds_cifar10: .*HF_HUB_OFFLINE is set\); download"),
        ({"data": "cifar10"}, r"--data cifar10: no such directory; expected .* or the name of one on the hub"),
        ({"measure": "fidelity"}, r"--measure fidelity: compared with what\? name the original"),
    ]  # fmt: skip
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments(**changes))
        assert not [path for path in (tmp_path / "eval").glob("*") if path.name != ".lock"]
    evaluate.main(arguments(attack="clean"))
    report = tmp_path / "eval/results.json"
    report.write_text(report.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    before = report.read_text()
    with pytest.raises(UserError, match=r"results.json has schema version 2, this program writes 1; give another"):
        evaluate.main(arguments())
    assert report.read_text() == before
    for text in ("[]", '{"schema_version": 1}', "{", '{"schema_version": 1, "environment": {}, "results": [3]}'):
        report.write_text(text)
        with pytest.raises(UserError, match=r"results.json is not a report .*; give another directory"):
            evaluate.main(arguments())


def test_without_the_package_square_says_what_to_install(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(UserError, match="--attack square: needs the package pyautoattack"):
        evaluate.main(arguments(attack="square"))
