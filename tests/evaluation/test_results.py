"""results.json, records and what follows from them: comparisons of models, warnings, figures that are told apart."""

import itertools
import json
import math

import pytest
import torch

from utils.errors import UserError
from utils.evaluation.report import write_report
from utils.evaluation.results import (
    Results,
    cell_name,
    column_name,
    file_name,
    mcnemar,
    model_revision,
    refuse_unwritable,
    sanity_warnings,
    wilson_interval,
)


def cell(model="runs/a", attack="clean", eps=None, **more):
    settings = {"split": "test", "num_samples": None, "model_revision": model} | more.pop("settings", {})
    fixed = {
        "dataset": "data/set",
        "measure": "accuracy",
        "seed": 0,
        "corruption": None,
        "severity": None,
        "sigma": None,
    }
    return fixed | {"model": model, "attack": attack, "eps": eps, "settings": settings} | more  # fmt: skip


def filled(results, entry, correct):
    rows = [{"position": i, "correct": right} for i, right in enumerate(correct)]
    results.add(entry, sum(correct) / len(correct), (0.0, 1.0), len(correct))
    results.write_records(entry, rows)


def test_mcnemar_is_the_exact_binomial_test():
    first = [True] * 9 + [False] * 2 + [True] * 30 + [False] * 5
    second = [False] * 9 + [True] * 2 + [True] * 30 + [False] * 5
    tail = sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11
    assert mcnemar(first, second) == (9, 2, pytest.approx(2 * tail))
    assert mcnemar(second, first) == (2, 9, pytest.approx(2 * tail))
    assert mcnemar(first, first) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="shorter"):
        mcnemar(first, second[:-1])


def test_wilson_interval_agrees_with_its_formula_and_stays_in_range():
    low, high = wilson_interval(37, 50)
    z, n, p = 1.959964, 50, 0.74
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (low, high) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), rel=1e-5
    )
    assert wilson_interval(0, 5)[0] == 0
    assert wilson_interval(5, 5)[1] == 1


def test_models_are_compared_on_the_images_that_both_saw(tmp_path):
    results = Results(tmp_path)
    filled(results, cell("a"), [True, True, True, False, True])
    filled(results, cell("b"), [True, False, False, True, True])
    filled(results, cell("b", "apgd", 4.0), [False] * 5)  # only b: nothing to compare
    filled(results, cell("c"), [True, True])  # fewer images
    filled(results, cell("a", "corruptions", corruption="fog", severity=1), [True] * 5)
    filled(results, cell("b", "corruptions", corruption="fog", severity=1), [False] * 5)
    results.compare()
    results.write()
    found = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert [comparison["models"] for comparison in found] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert (found[0]["n"], found[0]["only_first"], found[0]["only_second"]) == (5, 2, 1)
    assert found[0]["p_value"] == 1.0
    assert [comparison["n"] for comparison in found] == [5, 2, 2]


def test_what_is_written_is_read_back(tmp_path):
    results = Results(tmp_path)
    entry = cell("a", "apgd", 2.0)
    filled(results, entry, [True, False])
    caption = {"label": "a <b>", "predicted_clean": "a <b>", "predicted": "c"}
    pictures = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), [caption] * 2
    results.write_pictures(entry, *pictures)
    results.warn(entry, "doubtful")
    results.warn(entry, "doubtful")
    results.write()
    again = Results(tmp_path)
    assert again.find(entry)["value"] == 0.5
    assert again.find(entry | {"eps": 3.0}) is None
    assert again.records(entry) == [{"position": 0, "correct": True}, {"position": 1, "correct": False}]
    assert again.records(entry | {"eps": 3.0}) == []
    clean, attacked, captions = again.pictures(entry)
    assert torch.equal(clean, pictures[0])
    assert torch.equal(attacked, pictures[1])
    assert captions == pictures[2]
    assert [warning["text"] for warning in again.warnings] == ["doubtful"]
    (tmp_path / "results.json").write_text('{"schema_version": 9, "results": []}')
    with pytest.raises(UserError, match="schema version 9"):
        Results(tmp_path)


def test_names_of_cells_tell_them_apart_and_can_be_read():
    cells = [
        cell(),
        cell("runs/b"),
        cell(attack="apgd", eps=2.0),
        cell(attack="apgd", eps=4.0),
        cell(attack="gaussian_noise", sigma=8.0),
        cell(attack="corruptions", corruption="fog", severity=3),
        cell(seed=1),
        cell(settings={"split": "val"}),
    ]
    names = [cell_name(entry) for entry in cells]
    assert len(set(names)) == len(names)
    assert names[2].startswith("a_set_accuracy_apgd_eps2_")
    assert names[5].startswith("a_set_accuracy_corruptions_fog_severity3_")
    assert all(len(name) < 200 and "/" not in name for name in names)
    assert cell_name(cell("runs/a.pt@openai/clip")).startswith("a.pt-clip_set_accuracy_clean_")  # of model and base
    assert cell_name(cell("x" * 300 + "/" + "y" * 300)) != cell_name(cell("x" * 300 + "/" + "y" * 301))
    assert [column_name(entry) for entry in cells[2:6]] == [
        "apgd 2/255", "apgd 4/255", "gaussian_noise 8/255", "fog 3",
    ]  # fmt: skip


def test_a_revision_changes_with_all_that_is_loaded_and_with_that_alone(tmp_path):
    """lm-evaluation-harness#4063: a figure depends on processor, tokenizer and head as much as on weights."""
    model, cache = tmp_path / "model", str(tmp_path / "cache")
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "clip"}')
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "parts/a.safetensors"}}')
    known = {model_revision(str(model), cache)}
    loaded = ["model.safetensors", "head.safetensors", "preprocessor_config.json", "tokenizer.json", "vocab.txt"]
    for name in [*loaded, "spiece.model", "chat_template.jinja", "parts/a.safetensors"]:
        for content in (b"one", b"two"):
            (model / name).parent.mkdir(exist_ok=True)
            (model / name).write_bytes(content)
            revision = model_revision(str(model), cache)
            assert revision not in known, name
            known.add(revision)
    for name in ("metrics.jsonl", "README.md", "results.json", "report.html", "run.json", "train.log"):
        (model / name).write_text("{}")
    assert model_revision(str(model), cache) == revision


def test_what_was_read_before_is_history_until_it_is_read_again(tmp_path):
    """datasets#2956. Two contents of one set, then the first again; another set; a cell of an earlier version."""
    results = Results(tmp_path)

    def of(content, dataset="data/set"):
        settings = {"shards": {"test": content}, "prompts": "p", "digests": "sha256", "classnames": None}
        return cell("a", settings=settings, dataset=dataset)

    earlier = cell("a", settings={"shards": {"test": "0123456789ab"}, "prompts": "p"})
    for entry, right in ((earlier, 1), (of("old"), 2), (of("other", "data/other"), 5)):
        filled(results, entry, [i < right for i in range(5)])
    assert results.ask([of("old")]) == []
    (line,) = results.ask([of("new")])
    assert line == "--data data/set: has changed; 1 figure measured again, the old ones stay in results.json"
    filled(results, of("new"), [True] * 3 + [False] * 2)
    assert [result["value"] for result in results.current()] == [1.0, 0.6]
    assert results.ask([of("old")]) == []
    assert [result["value"] for result in results.current()] == [1.0, 0.4]
    assert len(results.results) == 4
    results.results = results.results[:1]
    (line,) = results.ask([of("new")])
    assert "of an earlier version, which did not look into the files; 1 figure measured again" in line


@pytest.mark.parametrize(
    "text",
    ["set", "a/b", "ö 字", "x" * 100],
)
def test_ordinary_names_stay_as_they_are_in_files(text):
    assert file_name(text) == text.replace("/", "-")


def test_names_that_no_file_can_have_are_told_apart():
    names = ["x" * 300, "x" * 301, "é" * 200, "a\udcff", "a\udcfe", "a\n", "a\x00"]
    files = list(map(file_name, names))
    assert len(set(files)) == len(names)
    assert all(len(name.encode()) < 130 and name.isprintable() for name in files)


@pytest.mark.parametrize(
    ("prepare", "name", "message"),
    [
        (lambda path: path.write_text("a file"), "out", "is a file; give a directory"),
        (lambda path: path.write_text("a file"), "out/below/it", "out is a file; give a directory"),
        (lambda path: (path.mkdir(), (path / "records").write_text("")), "out", "records is a file; give a directory"),
        (lambda path: (path / "results.json").mkdir(parents=True), "out", "results.json there is a directory"),
        (lambda path: None, "x" * 300, "files in it cannot be named .File name too long.; give a shorter path"),
        (lambda path: None, "/".join(["x" * 100] * 40), "files in it cannot be named .File name too long."),
        (lambda path: None, "locked", "cannot be written; name a directory that can"),
    ],
)
def test_what_cannot_be_written_later_is_refused_at_once(tmp_path, monkeypatch, prepare, name, message):
    prepare(tmp_path / "out")
    if name == "locked":  # root may write anywhere
        monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"--output_dir .*{message}"):
        refuse_unwritable(str(tmp_path / name))
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def accuracy(attack, eps, value, model="a", **settings):
    return cell(model, attack, eps, settings=settings) | {"value": value, "n": 100}


STEPS = {"attack_steps": 10}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([accuracy("apgd", 2.0, 0.3), accuracy("apgd", 4.0, 0.4)], "rises from 30.0 % at eps 2/255 to 40.0 % at eps 4"),
        ([accuracy("clean", None, 0.3), accuracy("pgd", 4.0, 0.4, **STEPS)], "rises from 30.0 % at eps 0/255"),
        ([accuracy("apgd", 4.0, 0.3), accuracy("pgd", 4.0, 0.2, **STEPS)], "PGD with 10 steps only 20.0 %"),
        ([accuracy("apgd", 4.0, 0.3), accuracy("square", 4.0, 0.29)], "the black-box Square attack leaves 29.0 %"),
    ],
)
def test_signs_of_a_weak_attack_are_named(results, message):
    for order in itertools.permutations(results):
        ((_, text),) = sanity_warnings(order)
        assert message in text


def test_sound_results_are_left_in_peace():
    sound = [
        accuracy("clean", None, 0.9),
        accuracy("pgd", 2.0, 0.5, **STEPS),
        accuracy("apgd", 2.0, 0.4),
        accuracy("square", 2.0, 0.4 - 0.001),
        accuracy("apgd", 4.0, 0.4),
        accuracy("apgd", 8.0, 0.95, model="b"),  # another model
        accuracy("square", 4.0, 0.3985),
        accuracy("clean", None, 0.1, t=-0.5),  # a head turned the other way
        accuracy("clean", None, 0.1, classifier="knn"),
    ]
    assert list(sanity_warnings(sound)) == []


def test_weights_that_a_model_had_before_are_history(tmp_path):
    results = Results(tmp_path)
    for revision, right in (("old", 2), ("new", 4)):
        for model in ("a", "b"):
            entry = cell(model, settings={"model_revision": f"{model}-{revision}"})
            filled(results, entry, [i < right for i in range(5)])
            results.warn(entry, f"of {revision}")
    results.compare()
    results.write()
    again = Results(tmp_path)
    assert len(again.results) == 4
    assert [result["value"] for result in again.current()] == [0.8, 0.8]
    assert [comparison["models"] for comparison in again.compared] == [["a", "b"]]
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "of new" in page
    assert "of old" not in page
    assert "a-old" not in page
    assert (tmp_path / "benchmark.csv").read_text().count("\n") == 3
