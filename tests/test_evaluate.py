"""evaluate.py: the report's format, equal figures for any number of processes and batch size, cells measured once."""

import html
import io
import json
import os
import re
import shutil
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import evaluate
import train_po
from tests.conftest import flags, run_script, two_processes
from tests.published_layouts import save_layouts
from tests.shard_maker import image_bytes, make_shards, relabelled, rewrite, write_shard
from tests.small_models import save_scaled, save_small_clip
from utils.errors import UserError
from utils.evaluation import figures
from utils.evaluation.measures import FIDELITY
from utils.evaluation.report import write_report
from utils.evaluation.results import Results
from utils.evaluation.trial import Model
from utils.models import classifiers


@pytest.fixture
def arguments(small_clip, digits, tmp_path):
    def make(**changes):
        defaults = {
            "model": small_clip,
            "data": digits,
            "attack": ["clean", "pgd"],
            "eps": [1, 4],
            "attack_steps": 3,
            "num_samples": 50,
            "num_workers": 0,
            "output_dir": tmp_path / "eval",
            "cache_dir": tmp_path / "cache",
        }
        return flags(defaults | changes)

    return make


def results(directory):
    return json.loads((directory / "results.json").read_text())["results"]


def test_report_follows_its_schema(arguments, small_clip, digits, tmp_path, capsys):
    evaluate.main(arguments())
    report = json.loads((tmp_path / "eval/results.json").read_text())
    assert report["schema_version"] == 1
    assert {"python", "torch", "transformers", "device"} <= report["environment"].keys()
    assert report["environment"]["device"].startswith("CPU, ")
    assert (report["environment"]["num_processes"], report["environment"]["precision"]) == ("1", "float32")
    assert [(cell["attack"], cell["eps"]) for cell in report["results"]] == [("clean", None), ("pgd", 1), ("pgd", 4)]
    for cell in report["results"]:
        assert cell.keys() == {
            "model", "dataset", "measure", "attack", "eps", "value", "ci95", "n", "seed", "corruption", "severity",
            "sigma", "settings",
        }  # fmt: skip
        assert (cell["model"], cell["dataset"], cell["measure"]) == (str(small_clip), str(digits), "accuracy")
        assert cell["n"] == 50
        assert 0 <= cell["ci95"][0] <= cell["value"] <= cell["ci95"][1] <= 1
    clean, weak, strong = (cell["value"] for cell in report["results"])
    assert clean >= weak >= strong
    printed = capsys.readouterr().out
    assert f"{100 * clean:.1f} [" in printed


@pytest.mark.parametrize(
    "changes",
    [
        {"attack": ["clean"]}, {"attack": ["apgd"], "eps": 1}, {"attack": ["typographic"]},
        {"measure": ["interpretability"]}, {"measure": ["fidelity"]}, {"measure": ["retention"]},
        {"classifier": "knn"}, {"classifier": "linear_probe"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("factor", [1e25, 1e38])  # lengths beyond float32, which became zeros; and infinity
def test_embeddings_that_overflow_end_the_cell_with_the_image(arguments, small_clip, digits, tmp_path, changes, factor):
    """ace#1040: 10.0 %, which is chance, and a warning about something else."""
    save_scaled(small_clip, tmp_path / "scaled", "visual_projection", factor)
    if changes.keys() & {"measure"}:
        changes = changes | {"reference_model_name_or_path": small_clip}
    message = rf"^--model {tmp_path}/scaled, --data {digits}: [\w-]*\d+: its (embeddings.*|logits) are not finite"
    with pytest.raises(UserError, match=message):
        evaluate.main(arguments(model=tmp_path / "scaled", num_samples=8, **({"attack": ["clean"]} | changes)))
    assert results(tmp_path / "eval") == [] if (tmp_path / "eval/results.json").exists() else True


def test_text_embeddings_that_overflow_are_named_by_the_text(arguments, small_clip, tmp_path):
    save_scaled(small_clip, tmp_path / "scaled", "text_projection", 1e25)
    with pytest.raises(UserError, match=r"--data \S+: text '.*': its embeddings are not finite"):
        evaluate.main(arguments(model=tmp_path / "scaled", attack="clean", num_samples=8))


def test_many_attacks_are_lines_of_the_table_so_that_no_figure_is_broken(arguments, tmp_path, capsys):
    evaluate.main(arguments(attack=["clean", "gaussian_noise"], sigma=[4, 8, 12, 16, 24, 32, 64], num_samples=8))
    printed = capsys.readouterr().out
    for cell in results(tmp_path / "eval"):
        title = "clean" if cell["sigma"] is None else f"gaussian noise {cell['sigma']:g}/255"
        (line,) = [line for line in printed.splitlines() if f" {title} " in line]
        low, high = cell["ci95"]
        assert f" {100 * cell['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}] " in re.sub(" +", " ", line)


def test_finished_cells_are_not_measured_again(arguments, tmp_path, monkeypatch):
    evaluate.main(arguments(eps=[4]))
    first = results(tmp_path / "eval")
    measured = []
    real = evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda trial, job: measured.extend(cell["eps"] for cell in job.cells) or real(trial, job)
    )
    evaluate.main(arguments(eps=[4, 8]))
    assert measured == [8]
    assert results(tmp_path / "eval")[:2] == first
    evaluate.main(arguments(eps=[4], seed=1))
    assert measured == [8, None, 4]


def test_figures_do_not_depend_on_processes_or_batch_size(arguments, tmp_path):
    evaluate.main(arguments(output_dir=tmp_path / "one"))
    evaluate.main(arguments(output_dir=tmp_path / "small", batch_size=7))
    run_script("evaluate.py", *arguments(output_dir=tmp_path / "two", batch_size=16), launcher=two_processes())
    one, small, two = ([cell["value"] for cell in results(tmp_path / name)] for name in ("one", "small", "two"))
    assert one == small == two
    environment = json.loads((tmp_path / "two/results.json").read_text())["environment"]
    assert (environment["num_processes"], environment["num_machines"]) == ("2", "1")


def test_mistakes_are_one_line(arguments, digits, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/results.json").write_text('{"schema_version": 9, "results": []}')
    (tmp_path / "three.txt").write_text("zero\none\ntwo\n")
    wrong = [
        ({"data": tmp_path / "none"}, r"--data .*none: no such directory"),
        ({"split": "val"}, r"--data .*: no split 'val'; found test, train; name one with --split"),
        ({"model": "no/such"}, r"--model no/such: neither a local model directory"),
        ({"eps": 0}, r"--eps: 0.0 is too small"),
        ({"attack": "pdg"}, r"--attack: 'pdg' is not one of clean, pgd, .*, did you mean pgd\?"),
        ({"output_dir": tmp_path / "old"}, r"results.json has schema version 9, this program writes 1"),
        ({"classnames": tmp_path / "three.txt"}, r"--max_bad_fraction 0.01: .*bad label"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments(**changes))


@pytest.mark.parametrize(("name", "beside"), [("x[1]", "x1"), ("x{a,b}", "xa"), ("pipe:x", "y"), ("a b#?%20", "ab")])
def test_the_set_that_exists_as_written_is_measured(arguments, tmp_path, monkeypatch, name, beside):
    """datasets#7468: the folder was once more read as a pattern, and the labels were those of the set beside it."""
    for folder, size in ((name, 5), (beside, 3)):
        make_shards(tmp_path / folder / "test", [size])
        (tmp_path / folder / "classnames.txt").write_text("a\nb\nc\nd\ne\n")
    monkeypatch.chdir(tmp_path)
    evaluate.main(arguments(data=name, attack="clean", num_samples=9, classnames=f"{name}/classnames.txt"))
    (cell,) = results(tmp_path / "eval")
    assert (cell["dataset"], cell["n"]) == (name, 5)


PAIR_KEYS = ("accuracy", "follows_word")


def value(directory, measure, attack="clean", **settings):
    """The one figure of this kind."""
    found = [
        cell
        for cell in results(directory)
        if (cell["measure"], cell["attack"]) == (measure, attack) and settings.items() <= cell["settings"].items()
    ]
    assert len(found) == 1, found
    return found[0]["value"]


def test_words_and_retention_do_not_depend_on_processes_or_batch_size(arguments, small_clip, tmp_path):
    save_small_clip(tmp_path / "other", seed=1)
    common = {
        "model": [small_clip, tmp_path / "other"], "attack": ["clean", "typographic"],
        "eps": 4, "measure": ["accuracy", "retention"],
        "reference_model_name_or_path": small_clip, "word_size_min": 40, "word_size_max": 60,
    }  # fmt: skip
    evaluate.main(arguments(output_dir=tmp_path / "one", **common))
    run_script("evaluate.py", *arguments(output_dir=tmp_path / "two", batch_size=7, **common), launcher=two_processes())
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert [(cell["measure"], cell["attack"]) for cell in one[:4]] == [
        ("accuracy", "clean"), ("accuracy", "typographic"), ("follows_word", "typographic"), ("retention", "clean"),
    ]  # fmt: skip
    assert [cell["value"] for cell in two] == pytest.approx([cell["value"] for cell in one], rel=1e-5)
    assert one[3]["value"] == pytest.approx(0, abs=1e-6)  # to itself
    assert one[7]["value"] > 0.1
    assert all(cell["n"] == 50 for cell in one)


def test_pairs_in_two_splits_in_one_and_in_a_folder(arguments, small_clip, tmp_path):
    """The same pictures and texts, three ways to lay them down: the same two-way accuracy."""
    names = ["cat", "dog", "car", "zebra"]
    pairs = [(names[number % 4], names[(number + 1 + number // 4) % 4]) for number in range(12)]
    pairs = [(chosen, rejected) for chosen, rejected in pairs if chosen != rejected]
    texts = [tuple(f"a photo of a {name}." for name in pair) for pair in pairs]
    samples = [
        (f"p{number}", {
            "png": image_bytes(number, (32, 32), "PNG"),
            "json": json.dumps({"chosen": chosen, "rejected": [rejected]}).encode(),
        })
        for number, (chosen, rejected) in enumerate(texts)
    ]  # fmt: skip
    write_shard(tmp_path / "two/attack/0.tar", samples)
    write_shard(tmp_path / "two/clean/0.tar", samples)
    write_shard(tmp_path / "one/test/0.tar", samples)
    (tmp_path / "folder").mkdir()
    for number, (chosen, rejected) in enumerate(pairs):
        name = f"label={chosen}_text={rejected}{'_' * (number // 4)}.png"
        (tmp_path / "folder" / name).write_bytes(image_bytes(number, (32, 32), "PNG"))
    found = {}
    for name, attack in (("two", ["clean", "typographic"]), ("one", "typographic"), ("folder", "typographic")):
        evaluate.main(
            arguments(data=tmp_path / name, attack=attack, num_samples=100, output_dir=tmp_path / f"eval-{name}")
        )
        found[name] = [value(tmp_path / f"eval-{name}", key, "typographic") for key in PAIR_KEYS]
    assert found["one"] == found["two"] == found["folder"]
    assert sum(found["one"]) == pytest.approx(1)  # two candidates: the chosen one or the rejected
    assert value(tmp_path / "eval-two", "accuracy", "clean") == found["two"][0]


@pytest.fixture(scope="module")
def head_run(small_clip, attribute_digits, tmp_path_factory):
    """A head that was trained to exchange red and blue."""
    directory = tmp_path_factory.mktemp("runs") / "head"
    train_po.main(
        [
            "--model_name_or_path", str(small_clip), "--train_shards", str(attribute_digits / "pairs/train"),
            "--task", "pairs", "--trainable", "head", "--max_steps", "150", "--learning_rate", "0.02",
            "--num_workers", "0", "--report_to", "none", "--per_device_train_batch_size", "64",
            "--cache_dir", str(directory.parent / "cache"), "--output_dir", str(directory),
        ]
    )  # fmt: skip
    return directory


def test_the_dial_from_the_original_to_the_trained_head(
    arguments, head_run, small_clip, attribute_digits, tmp_path, capsys, monkeypatch
):
    drawn = {}
    save = figures.save_figure
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, file, **more: drawn.update({file: figure}) or save(figure, file, **more)
    )
    common = {"num_samples": 200, "top_k": 20, "split": "test"}
    evaluate.main(
        arguments(
            model=head_run, data=[attribute_digits / "pairs", attribute_digits], measure=["head_t", "fairness"],
            t=[0.0, 0.5, 1.0], query=["a photo of the red digit seven."], **common,
        )
    )  # fmt: skip
    swept = tmp_path / "eval"
    pairs = str(attribute_digits / "pairs")
    accuracies = {
        cell["settings"]["t"]: cell["value"]
        for cell in results(swept)
        if cell["dataset"] == pairs and cell["measure"] == "pair_accuracy"
    }
    assert accuracies[1.0] > accuracies[0.5] > accuracies[0.0]
    assert accuracies[1.0] > 0.95  # what was trained
    dial = drawn[swept / "head_t_head.png"]
    curves = {axis.get_title(): {line.get_label(): line.get_xydata() for line in axis.lines} for axis in dial.axes}
    shares = dict(curves["pairs, shares"]["chosen text over rejected"].tolist())
    assert {t: share / 100 for t, share in shares.items()} == pytest.approx(accuracies)
    assert "demographic parity difference" in curves[f"{attribute_digits.name}, fairness"]
    grid = drawn[swept / f"retrieval_{attribute_digits.name}.png"]
    assert all(axis.images for axis in grid.axes)  # a row for each strength
    star = next(cell["value"] for cell in results(swept) if cell["measure"] == "neutral_t")
    rows = {"head\nt = 0", "head\nt = 1", f"head\nt* = {star:g}", "a photo of the red digit seven."}
    for figure, texts in ((dial, {f"t* = {star:g}"}), (grid, rows - {f"head\nt = {star:g}"})):
        assert texts <= {text.get_text() for text in figure.findobj(Text)}
    first = results(swept)
    evaluate.main(
        arguments(
            model=head_run, data=attribute_digits / "pairs", measure="head_t", t=[0.25], **common | {"top_k": 100}
        )
    )  # fmt: skip
    added = results(swept)[len(first) :]
    assert results(swept)[: len(first)] == first  # kept; t = 0 and 1 are not there twice
    assert [(cell["measure"], cell["settings"].get("t")) for cell in added] == [
        ("accuracy", 0.25), ("pair_accuracy", 0.25), ("neutral_t", None),
    ]  # fmt: skip
    neutral = next(cell for cell in results(swept) if cell["measure"] == "neutral_t")
    assert neutral["value"] in (0.0, 0.5, 1.0)
    assert neutral["n"] == 100  # the preferences among 200 validation samples
    printed = capsys.readouterr().out
    assert f"t* = {neutral['value']:g}" in printed
    assert {"head_t_head.png", f"retrieval_{attribute_digits.name}.png"} <= {path.name for path in swept.iterdir()}

    # t = 0 measures what the original measures, t = 1 what the exported model measures.
    for name, model, t in (("original", small_clip, 0.0), ("exported", head_run, 1.0)):
        evaluate.main(
            arguments(
                model=model, data=attribute_digits, measure=["accuracy", "fairness"], attack=["clean", "typographic"],
                output_dir=tmp_path / name, **common,
            )
        )  # fmt: skip
        by_t = [
            cell
            for cell in results(swept)
            if cell["dataset"] == str(attribute_digits) and cell["settings"].get("t") == t
        ]
        for cell in results(tmp_path / name):
            same = [other for other in by_t if (other["measure"], other["attack"]) == (cell["measure"], cell["attack"])]
            assert len(same) == 1
            assert same[0]["value"] == pytest.approx(cell["value"], abs=0.011), cell[
                "measure"
            ]  # two of 200 may tip over


def test_a_set_of_attacks_has_no_dial(arguments, head_run, tmp_path, capsys):
    """attack/ and clean/ hold no validation pairs: asked for alone a mistake, beside other measures left out."""
    sample = {"png": image_bytes(0, (32, 32), "PNG"), "json": b'{"chosen": "a cat", "rejected": ["a dog"]}'}
    for split in ("attack", "clean"):
        write_shard(tmp_path / "set" / split / "0.tar", [("p0", sample)])
    common = {"model": head_run, "data": tmp_path / "set", "attack": ["clean", "typographic"]}
    with pytest.raises(
        UserError, match=r"--data .*set: preference pairs, .* for pairs in test/ and val/, --measure head_t"
    ):
        evaluate.main(arguments(measure="head_t", **common))
    evaluate.main(arguments(measure=["accuracy", "head_t"], **common))
    assert len(results(tmp_path / "eval")) == 3


def test_mistakes_about_measures_are_one_line(arguments, small_clip, digits, attribute_digits, tmp_path):
    wrong = [
        ({"measure": "retention"}, "--measure retention: compared with what"),
        ({"measure": "head_t"}, r"--model .*: no readable head.safetensors"),
        ({"measure": "fairness"}, r"--max_bad_fraction 0.01: .*missing attribute"),
        ({"measure": "fairness", "data": attribute_digits, "top_k": 50}, r"--top_k 50: .* holds 50 images; K must be"),
        ({"data": attribute_digits / "pairs", "attack": "pgd"}, r"--data .*pairs: preference pairs, for which nothing"),
        ({"attack": "typographic", "fonts": "Times"}, r"--fonts Times: neither"),
        ({"attack": "typographic", "word_size_min": 80}, r"--word_size_min 80: larger than --word_size_max 40"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments(**changes))


# Stored figures follow what they were computed from


@pytest.fixture
def tiny(small_clip, tmp_path, monkeypatch):
    """A set of 6 images in 3 classes, a model of its own, and their results; each page costs a second."""
    samples = [(f"s{i}", {"jpg": image_bytes(i, (32, 32)), "cls": str(i % 3).encode()}) for i in range(6)]
    for split in ("train", "test"):
        write_shard(tmp_path / "set" / split / "0.tar", samples)
    (tmp_path / "set/classnames.txt").write_text("cat\ndog\nship\n")
    (tmp_path / "set/zeroshot_classification_templates.txt").write_text("a {c}\n")
    for name in ("model", "reference"):
        shutil.copytree(small_clip, tmp_path / name)
    shutil.copy(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", tmp_path / "words.ttf")
    monkeypatch.setattr("utils.evaluation.report.write_report", lambda *arguments: None)
    measured = []
    real = evaluate.measure
    monkeypatch.setattr(
        evaluate,
        "measure",
        lambda trial, job: measured.append(job.cells[0]["attack"]) or real(trial, job),
    )

    def call(**changes):
        """Attacks that were measured, of the figures asked for."""
        measured.clear()
        common = {"model": tmp_path / "model", "data": tmp_path / "set", "attack": ["clean"], "num_workers": 0}
        evaluate.main(flags(common | {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"} | changes))
        return list(measured)

    return call


def test_figures_follow_what_they_were_computed_from(tiny, tmp_path, caplog):
    """datasets#2956, lm-evaluation-harness#4063: one thing after the other changes, sizes and dates stay."""
    asked = {
        "attack": ["clean", "typographic"], "measure": ["accuracy", "fidelity"], "fonts": tmp_path / "words.ttf",
        "reference_model_name_or_path": tmp_path / "reference",
    }  # fmt: skip
    everything = ["clean", "typographic", "clean"]  # the last one is fidelity
    shard, first = tmp_path / "set/test/0.tar", (tmp_path / "set/test/0.tar").read_bytes()
    assert tiny(**asked) == everything
    value_then = results(tmp_path / "out")[0]["value"]
    (records,) = (tmp_path / "out/records").glob("*accuracy_clean*")
    predicted = [json.loads(line)["predicted"] for line in records.read_text().splitlines()]

    def replaced(name, old, new):
        path = tmp_path / name
        data = path.read_bytes()
        assert old in data
        rewrite(path, data.replace(old, new))

    def other_weights():
        save_small_clip(tmp_path / "other", seed=1)
        rewrite(tmp_path / "reference/model.safetensors", (tmp_path / "other/model.safetensors").read_bytes())

    (processor,) = (tmp_path / "model").glob("*processor_config.json")
    steps = [
        (lambda: rewrite(shard, relabelled(shard, predicted)), everything, "--data .*set: has changed; 8 figures"),
        (lambda: None, [], None),
        (lambda: replaced("set/classnames.txt", b"cat", b"cow"), everything[:2],
         "the class names or templates of --data"),
        (lambda: replaced("set/zeroshot_classification_templates.txt", b"a {c}", b"A {c}"), everything[:2],
         "the class names or templates"),
        (lambda: replaced(f"model/{processor.name}", b"0.48", b"0.18"), everything, "--model .*model: has changed; 8"),
        (other_weights, ["clean"], "--reference_model_name_or_path: has changed; 5 figures"),
        (lambda: replaced("words.ttf", b"Version", b"version"), ["typographic"], "--fonts: has changed; 2 figures"),
        (lambda: rewrite(shard, first), everything, "--data .*set: has changed; 8 figures"),
    ]  # fmt: skip
    for number, (change, again, line) in enumerate(steps):
        before = len(results(tmp_path / "out"))
        caplog.clear()
        change()
        assert tiny(**asked) == again, number
        if line is None:
            assert "measured again" not in caplog.text
        else:
            assert re.search(line, caplog.text), (number, caplog.text)
        if number == 0:
            assert results(tmp_path / "out")[before]["value"] == 1.0 != value_then
    # The last of each is what the report shows; the others stay in the file.
    current = Results(tmp_path / "out").current()
    assert [cell["measure"] for cell in current] == ["accuracy", "accuracy", "follows_word", *FIDELITY]
    assert len(results(tmp_path / "out")) > 3 * len(current)


def test_a_probe_follows_its_training_shards_and_a_head_its_file(tiny, tmp_path, caplog):
    probe = {"classifier": "linear_probe"}
    shard = tmp_path / "set/train/0.tar"
    tiny(**probe)
    rewrite(shard, relabelled(shard, [1, 2, 0, 1, 2, 0]))
    assert tiny(**probe) == ["clean"]
    assert [cell["value"] for cell in results(tmp_path / "out")] == [
        1.0,
        0.0,
    ]  # learnt from the test images, then shifted
    first, second = sorted((tmp_path / "out/probes").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    shutil.copy(first, tmp_path / "head.safetensors")
    head = {"classifier": "linear_head", "linear_head": tmp_path / "head.safetensors", "output_dir": tmp_path / "head"}
    tiny(**head)
    rewrite(tmp_path / "head.safetensors", second.read_bytes())
    caplog.clear()
    assert tiny(**head) == ["clean"]
    assert [cell["value"] for cell in results(tmp_path / "head")] == [1.0, 0.0]
    assert "--linear_head: has changed; 1 figure" in caplog.text


@pytest.fixture
def embedded(monkeypatch):
    """How many training images have been embedded so far, one number for every batch."""
    counts = []
    real = Model.embed_images
    monkeypatch.setattr(
        Model, "embed_images", lambda self, batch: counts.append(len(batch["images"])) or real(self, batch)
    )
    return counts


def test_training_images_are_embedded_once(arguments, tmp_path, monkeypatch, capsys, caplog, embedded):
    learnt = {"attack": "clean", "num_samples": 40, "train_num_samples": 200}
    probe, knn = learnt | {"classifier": "linear_probe"}, learnt | {"classifier": "knn"}

    def killed(*anything, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(classifiers, "fit_linear_probe", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(arguments(**probe))
    assert sum(embedded) == 200
    assert not (tmp_path / "eval/probes").exists()
    (kept,) = (tmp_path / "eval/features").iterdir()
    capsys.readouterr()
    evaluate.main(arguments(**probe))
    evaluate.main(arguments(**knn))
    assert sum(embedded) == 200
    printed = capsys.readouterr().err
    assert len(re.findall(rf"features  train 200/200  kept from before, in {re.escape(str(kept))}", printed)) == 2
    assert re.search(r"linear probe  train 100/100  iteration \d+  evaluations \d+  loss [\d.]+", printed)
    by_probe, by_knn = (cell["value"] for cell in results(tmp_path / "eval"))
    evaluate.main(arguments(output_dir=tmp_path / "anew", **knn))
    assert sum(embedded) == 400
    assert results(tmp_path / "anew")[0]["value"] == by_knn < by_probe

    # Other images and damaged files are not taken for them.
    evaluate.main(arguments(**knn | {"train_num_samples": 150}))
    assert sum(embedded) == 550
    assert len(list((tmp_path / "eval/features").iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:-8])
    (tmp_path / "eval/results.json").unlink()
    caplog.clear()
    evaluate.main(arguments(**knn))
    assert sum(embedded) == 750
    assert re.search(r"kept features that cannot be used \(.*\); the images are embedded again", caplog.text)
    assert results(tmp_path / "eval")[0]["value"] == by_knn


def test_several_processes_keep_and_read_the_features(arguments, tmp_path):
    common = {"attack": "clean", "num_samples": 40, "train_num_samples": 100, "batch_size": 16}
    lines = []
    for classifier in ("linear_probe", "knn"):
        lines.append(
            run_script(
                "evaluate.py", *arguments(classifier=classifier, **common), launcher=two_processes(), timeout=120
            )
        )
    assert "kept from before" not in lines[0]
    assert lines[1].count("features  train 100/100  kept from before") == 1
    evaluate.main(arguments(classifier="knn", output_dir=tmp_path / "one", **common))
    assert results(tmp_path / "eval")[1]["value"] == results(tmp_path / "one")[0]["value"]


def test_the_number_of_training_images_is_part_of_a_figure(arguments, digits, tmp_path, embedded):
    common = {"attack": "clean", "classifier": "knn", "num_samples": 40}
    for number in (100, 300, 100, 99_999, None):
        evaluate.main(arguments(**common | ({} if number is None else {"train_num_samples": number})))
    found = results(tmp_path / "eval")
    assert [cell["settings"].get("train_num_samples") for cell in found] == [100, 300, 99_999, None]
    assert found[2]["value"] == found[3]["value"]  # all images, embedded once
    assert sum(embedded) == 100 + 300 + 1437
    assert len(Results(tmp_path / "eval").current()) == 4
    with pytest.raises(
        UserError,
        match=r"--train_num_samples 5: --classifier zero_shot learns from no images; give --classifier linear",
    ):
        evaluate.main(arguments(train_num_samples=5))


def test_training_images_that_lack_a_class_are_refused(tiny, tmp_path, embedded):
    """Of a set sorted by class the first N hold few classes."""
    order = [0, 0, 1, 1, 2, 2]
    samples = [(f"s{i}", {"jpg": image_bytes(i, (32, 32)), "cls": b"%d" % label}) for i, label in enumerate(order)]
    write_shard(tmp_path / "set/train/0.tar", samples[:3])
    write_shard(tmp_path / "set/train/1.tar", samples[3:])
    line = (
        r"--train_num_samples {0}: of 6 samples in train of --data \S+ the first {0} have none of {1} of 3 classes, "
        r"the first is '{2}'; give a larger number, or leave it out"
    )
    for number, lacking, first in ((1, 2, "dog"), (4, 1, "ship")):
        with pytest.raises(UserError, match=line.format(number, lacking, first)):
            tiny(classifier="linear_probe", train_num_samples=number)
    assert not embedded
    assert not (tmp_path / "out").exists()
    tiny(classifier="linear_probe", train_num_samples=5)
    assert sum(embedded) == 5
    tiny(classifier="linear_probe", train_num_samples=6)  # of the same shards
    assert sum(embedded) == 11


def test_probes_by_an_earlier_rule_are_measured_again(tiny, tmp_path, caplog):
    probe = {"classifier": "linear_probe"}
    tiny(**probe)
    written = tmp_path / "out/results.json"
    report = json.loads(written.read_text())
    assert report["results"][0]["settings"].pop("probe_tolerance") == classifiers.PROBE_TOLERANCE
    written.write_text(json.dumps(report))
    assert tiny(**probe) == ["clean"]
    assert "the stopping rule of linear probes: has changed; 1 figure measured again" in caplog.text
    (current,) = Results(tmp_path / "out").current()
    assert current["settings"]["probe_tolerance"] == classifiers.PROBE_TOLERANCE


def test_only_the_shards_that_are_read_count(tiny, tmp_path):
    samples = [(f"t{i}", {"jpg": image_bytes(9 + i, (32, 32)), "cls": b"0"}) for i in range(4)]
    second = tmp_path / "set/test/1.tar"
    write_shard(second, samples)
    assert tiny(num_samples=6) == ["clean"]
    rewrite(second, relabelled(second, [1] * 4))
    assert tiny(num_samples=6) == []
    assert tiny(num_samples=7) == ["clean"]
    rewrite(second, relabelled(second, [2] * 4))
    assert tiny(num_samples=7) == ["clean"]


def test_published_files_and_packed_pictures_are_looked_into(tiny, tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    (folder / "classnames.txt").write_text("cat\ndog\nship\n")
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    for name, array in (("labels", np.tile(np.arange(6) % 3, 5)), ("fog", images), ("snow", images)):
        np.save(folder / f"{name}.npy", array)
    asked = {"data": folder, "attack": "corruptions", "severities": 1}
    assert tiny(**asked) == ["corruptions"] * 2
    assert tiny(**asked) == []
    fog = (folder / "fog.npy").read_bytes()
    rewrite(folder / "fog.npy", fog[:-1] + bytes([fog[-1] ^ 1]))
    assert tiny(**asked) == ["corruptions"]
    labels = (folder / "labels.npy").read_bytes()
    rewrite(folder / "labels.npy", labels[:-240] + np.tile(np.arange(6)[::-1] % 3, 5).tobytes())
    assert tiny(**asked) == ["corruptions"] * 2
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, word in enumerate(("cat", "dog")):
        (pictures / f"label={word}_text=ship.png").write_bytes(image_bytes(number, (32, 32), "PNG"))
    asked = {"data": pictures, "attack": "typographic"}
    assert tiny(**asked) == ["typographic"]
    one = pictures / "label=cat_text=ship.png"
    rewrite(one, one.read_bytes()[:-20] + bytes(20))
    with pytest.raises(UserError, match="undecodable image"):  # the picture as it is now, not as it was packed
        tiny(**asked)


# What is shown must not cost what was measured


NASTY = "lo$\\frac$ <b>x</b>|[bold][red]:heart:\x1b[31m 😀\u200d" + "é" * 40


def test_names_of_any_kind_are_shown_and_cost_no_figure(small_clip, tmp_path, monkeypatch):
    """nine-or-null#14, ownphotos#112, scarches#25, fertilizer#47: dollars, markup, no UTF-8, ASCII stdout."""
    model, data = tmp_path / NASTY, tmp_path / (os.fsdecode(b"set\xff$_$|") + "x" * 200)
    out = tmp_path / os.fsdecode(b"out\xff|$\\frac$")
    samples = [(f"s{i}", {"jpg": image_bytes(i, (32, 32)), "cls": str(i % 3).encode()}) for i in range(6)]
    write_shard(data / "test/0.tar", samples)
    names = ["$\\frac$", "<b>|[/b]", "wörd" * 60]
    (data / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    shutil.copytree(small_clip, model)
    shutil.copytree(small_clip, tmp_path / "plain")
    stdout = io.TextIOWrapper(
        io.BytesIO(), encoding="ascii", errors="backslashreplace"
    )  # as ``outlive_streams`` makes it
    monkeypatch.setattr(sys, "stdout", stdout)
    queries = ["$\\frac$", "[/b]<i>é😀" + "q" * 500]
    evaluate.main(
        flags({
            "model": [model, tmp_path / "plain"], "data": data, "attack": ["clean", "gaussian_noise", "typographic"],
            "sigma": 8, "query": queries, "num_workers": 0, "output_dir": out, "cache_dir": tmp_path / "cache",
        })
    )  # fmt: skip
    stdout.flush()
    printed = stdout.buffer.getvalue().decode("ascii")
    found = results(out)
    assert [cell["model"] for cell in found] == [str(model)] * 4 + [str(tmp_path / "plain")] * 4
    assert {cell["dataset"] for cell in found} == {str(data)}
    assert [cell["value"] for cell in found[:4]] == [cell["value"] for cell in found[4:]]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert html.escape(NASTY.replace("\x1b", "\\x1b")) in page
    assert "set\\udcff$_$|" in page
    assert "<b>x</b>" not in page
    assert "Not drawn" not in page
    assert [path.name.startswith("retrieval_") for path in out.glob("*.png")] == [True]
    assert page.count("data:image/png") > 4
    assert "\x1b[31m" not in printed
    assert f"{100 * found[0]['value']:.1f} [" in printed


def test_a_file_and_its_base_are_shown_by_the_files_name(arguments, tmp_path, monkeypatch):
    """In the grid of a query, in file names and in the report, also when it is drawn again and the model is gone."""
    drawn, save = [], figures.save_figure
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, *rest, **more: drawn.append(figure) or save(figure, *rest, **more)
    )
    one = save_layouts(tmp_path / "published")["robustvlm_visual"]
    name = f"{one.path}@{one.base_model}"
    evaluate.main(arguments(model=name, attack="clean", num_samples=6, query="a digit"))
    out = tmp_path / "eval"
    assert {cell["model"] for cell in results(out)} == {name}
    assert [path.name.startswith("fare_eps_2.pt-") for path in (out / "records").iterdir()] == [True]
    assert "fare_eps_2.pt" in {text.get_text() for figure in drawn for text in figure.findobj(Text)}
    shutil.rmtree(tmp_path / "published")
    write_report(out)
    shown = re.findall(r">\s*([^<>]*fare_eps_2\.pt[^<>]*)<", (out / "report.html").read_text())
    assert {text.strip() for text in shown} >= {"fare_eps_2.pt"}


def test_a_picture_that_fails_is_named_and_the_run_ends_with_its_figures(
    small_clip, arguments, tmp_path, monkeypatch, caplog
):
    order = []
    real = Results.write
    monkeypatch.setattr(Results, "write", lambda self: order.append("results") or real(self))
    monkeypatch.setattr(
        "utils.evaluation.report.print_tables",
        lambda *arguments: order.append((tmp_path / "eval/report.html").exists()),
    )
    for name in ("inline_svg", "draw_grid"):
        monkeypatch.setattr(figures, name, lambda *arguments, **more: 1 / 0)
    monkeypatch.setattr("utils.evaluation.results.save", lambda *arguments, **more: 1 / 0)
    evaluate.main(arguments(eps=8, num_samples=6, query="a digit"))
    assert order == ["results", "results", "results", True]
    assert [cell["attack"] for cell in results(tmp_path / "eval")] == ["clean", "pgd"]
    page = (tmp_path / "eval/report.html").read_text()
    for what in ("robustness in report.html", "the legend", "retrieval_digits.png"):
        assert f"<li>{what} (ZeroDivisionError division by zero)</li>" in page
        assert f"not drawn: {what} (ZeroDivisionError" in caplog.text


def test_what_no_tokenizer_and_no_file_can_take_is_refused_before_a_model_is_loaded(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *arguments: pytest.fail("loaded"))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/pictures").write_text("a file")
    for changes, line in (
        ({"query": os.fsdecode(b"caf\xe9")}, r"--query caf\\udce9: not UTF-8, which no tokenizer takes"),
        ({"model": os.fsdecode(b"mod\xff")}, r"--model mod\\udcff: not UTF-8, which safetensors does not open"),
        ({}, r"--output_dir .*pictures is a file; give a directory"),
    ):
        with pytest.raises(UserError, match=line):
            evaluate.main(arguments(**changes))


def test_splits_with_lists_of_their_own_are_compared_by_name(arguments, small_clip, tmp_path):
    """A probe learnt from labels of another order measured them by number (dmvr#6)."""
    for name, lists in {
        "same": {"train": ["red", "blue"], "test": ["red", "blue"]},
        "other": {"train": ["blue", "red"], "test": ["red", "blue"]},
        "lacking": {"train": ["blue", "green"], "test": ["red", "blue"]},
    }.items():
        for split, names in lists.items():
            samples = [
                (
                    f"{n}",
                    {
                        "png": coloured(("red", "blue")[n % 2], n),
                        "cls": b"%d" % (n % 2 if names[0] == "red" else 1 - n % 2),
                    },
                )
                for n in range(30)
            ]
            write_shard(tmp_path / name / split / "0.tar", samples)
            (tmp_path / name / split / "classnames.txt").write_text("\n".join(names) + "\n")
    common = {"attack": "clean", "classifier": "knn", "num_samples": 30}
    found = {}
    for name in ("same", "other"):
        evaluate.main(arguments(data=tmp_path / name, output_dir=tmp_path / f"eval-{name}", **common))
        (found[name],) = results(tmp_path / f"eval-{name}")
    assert found["other"]["value"] == found["same"]["value"] > 0.9
    with pytest.raises(UserError, match=r"class names of train and test differ \('green' is in one list alone\)"):
        evaluate.main(arguments(data=tmp_path / "lacking", output_dir=tmp_path / "eval-lacking", **common))


def coloured(colour, seed):
    pixels = np.random.default_rng(seed).integers(0, 60, (32, 32, 3), dtype=np.uint8)
    pixels[..., 0 if colour == "red" else 2] += 150
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
