"""evaluate.py: the report's format, equal figures for any number of processes and batch size, cells measured once."""

import json

import pytest

import evaluate
from tests.conftest import run_script, two_processes
from utils.cli import UserError


@pytest.fixture
def arguments(small_clip, digits, tmp_path):
    def make(**changes):
        settings = {
            "model": small_clip,
            "data": digits,
            "attack": ["clean", "pgd"],
            "eps": [1, 4],
            "attack_steps": 3,
            "num_samples": 50,
            "num_workers": 0,
            "output_dir": tmp_path / "eval",
            "cache_dir": tmp_path / "cache",
        } | changes
        words = []
        for name, value in settings.items():
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return words

    return make


def results(directory):
    return json.loads((directory / "results.json").read_text())["results"]


def test_report_follows_its_schema(arguments, small_clip, digits, tmp_path, capsys):
    evaluate.main(arguments())
    report = json.loads((tmp_path / "eval/results.json").read_text())
    assert report["schema_version"] == 1
    assert {"python", "torch", "transformers", "device"} <= report["environment"].keys()
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


def test_finished_cells_are_not_measured_again(arguments, tmp_path, monkeypatch):
    evaluate.main(arguments(eps=[4]))
    first = results(tmp_path / "eval")
    measured = []
    real = evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda *arguments: measured.extend(c["eps"] for c in arguments[-1]) or real(*arguments)
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


def test_mistakes_are_one_line(arguments, digits, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/results.json").write_text('{"schema_version": 9, "results": []}')
    (tmp_path / "three.txt").write_text("zero\none\ntwo\n")
    wrong = [
        ({"data": tmp_path / "none"}, r"--data .*none: no such directory"),
        ({"split": "val"}, r"--data .*: no split 'val'; found test, train; name one with --split"),
        ({"model": "no/such"}, r"--model no/such: neither a local model directory"),
        ({"eps": 0}, r"--eps: 0.0 is too small"),
        ({"attack": "pdg"}, r"--attack: 'pdg' is not one of clean, pgd, typographic, did you mean pgd\?"),
        ({"output_dir": tmp_path / "old"}, r"results.json has schema version 9, this program writes 1"),
        ({"classnames": tmp_path / "three.txt"}, r"--max_bad_fraction 0.01: .*bad label"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments(**changes))
