"""report.html and benchmark.csv, from directories that were filled through ``Results`` with made-up figures."""

import csv
import html
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from utils.errors import UserError
from utils.evaluation import figures
from utils.evaluation.figures import (
    LINES,
    bar_style,
    clean_robust_front,
    figure_of,
    inline_svg,
    line_style,
    pareto_front,
)
from utils.evaluation.report import (
    CSV_COLUMNS,
    mark_best,
    point_names,
    record_figures,
    short_names,
    thinned,
    variants,
    write_report,
)
from utils.evaluation.results import Results, cell_name, column_name, wilson_interval

ATTACK = "<script>alert(1)</script>"
VOID = {"meta", "br", "img", "link", "input", "hr"}
SETS = ("clip-benchmark/wds_cifar10", f"data/birds{ATTACK}")
NUM_IMAGES = 40


def cell(model: str, dataset: str = SETS[0], measure: str = "accuracy", attack: str = "clean", **more) -> dict:
    where = {name: more.pop(name, None) for name in ("eps", "corruption", "severity", "sigma")}
    settings = {"split": "test", "num_samples": None, "model_revision": None} | more
    return {
        "model": model,
        "dataset": dataset,
        "measure": measure,
        "attack": attack,
        "seed": 0,
        "settings": settings,
    } | where


def add_accuracy(results: Results, of_cell: dict, share: float, draw: random.Random) -> None:
    rows = []
    for position in range(NUM_IMAGES):
        label, right = position % 10, draw.random() < share
        predicted = label if right else (label + 1) % 10
        row = {"position": position, "key": f"{position:06d}", "label": label, "predicted": predicted, "correct": right}
        rows.append(row | {"top5": [predicted, *((predicted + k) % 10 for k in (2, 3, 9, 5))]})
        if of_cell["attack"] == "apgd":
            rows[-1] |= {
                "broken_by": None if right else ("clean", "cross-entropy", "target 2")[position % 3],
                "forwards": 9,
            }
    right = sum(row["correct"] for row in rows)
    results.add(of_cell, right / NUM_IMAGES, wilson_interval(right, NUM_IMAGES), NUM_IMAGES)
    results.write_records(of_cell, rows)


def add_pictures(results: Results, of_cell: dict, names: tuple[str, str] = ("cat", ATTACK)) -> None:
    clean = torch.linspace(0, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    caption = {"label": names[0], "predicted_clean": names[0], "predicted": names[1]}
    results.write_pictures(of_cell, clean, (clean + 0.01).clamp(0, 1), [caption, caption])


def add_values(results: Results, of_cell: dict, draw: random.Random) -> None:
    values = [draw.gauss(0.3, 0.1) for _ in range(NUM_IMAGES)]
    results.add(of_cell, sum(values) / NUM_IMAGES, None, NUM_IMAGES)
    rows = [{"position": position, "value": value, "cosine": 1 - value} for position, value in enumerate(values)]
    results.write_records(of_cell, rows)


def add_sweep(results: Results, model: str, dataset: str) -> None:
    for t in (-0.5, 0.0, 0.5, 1.0):
        results.add(cell(model, dataset, "pair_accuracy", "typographic", t=t), 0.5 + t / 4, [0.1, 0.9], 10)
        results.add(cell(model, dataset, t=t), 0.9, [0.8, 0.95], 10)
    results.add(cell(model, dataset, "neutral_t", "typographic", candidates=[0.0, 1.0]), 0.5, None, 10)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """3 models on 2 sets under many attacks, and a head on pairs; names that try to get out of their place."""
    root = tmp_path_factory.mktemp("full")
    trained = root / "runs" / "lore$4$"
    trained.mkdir(parents=True)
    rows = [{"step": step, "samples": step, "multiplier_mean": 1 / (step + 1)} for step in range(0, 900)]
    rows[0] |= {"eval_accuracy_clean": 0.5, "eval_accuracy_pgd": 0.1}
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    models = ("openai/clip", str(trained), f"runs/{ATTACK} & _^{{x}}")
    results, draw = Results(root / "eval"), random.Random(0)
    for place, model in enumerate(models):
        for dataset in SETS:
            clean = cell(model, dataset)
            add_accuracy(results, clean, 0.9 - place / 10, draw)
            for attack in ("pgd", "apgd"):
                for eps in (1.0, 2.0, 4.0):
                    attacked = cell(model, dataset, attack=attack, eps=eps, attack_steps=10, attack_step_size=eps / 4)
                    add_accuracy(results, attacked, (0.6 + place / 10) / eps, draw)
                    add_pictures(results, attacked)
            for sigma in (8.0, 64.0):
                noisy = cell(model, dataset, attack="gaussian_noise", sigma=sigma)
                add_accuracy(results, noisy, 0.5, draw)
                add_pictures(results, noisy)
            for corruption in ("fog", "glass_blur"):
                for severity in (1, 5):
                    corrupted = cell(model, dataset, attack="corruptions", corruption=corruption, severity=severity)
                    add_accuracy(results, corrupted, 0.4, draw)
                    add_pictures(results, corrupted)
            words = cell(model, dataset, attack="typographic", words={"kind": "outlined", "fonts": ["A", "B"]})
            add_accuracy(results, words, 0.3, draw)
            add_pictures(results, words)
            results.add(words | {"measure": "follows_word"}, 0.25, [0.2, 0.3], NUM_IMAGES)
            add_values(results, cell(model, dataset, "interpretability"), draw)
            add_values(results, cell(model, dataset, "fidelity", reference="openai/clip"), draw)
    add_sweep(results, "runs/head", "data/pairs")
    results.warn(cell(models[2], eps=2.0, attack="apgd"), f"zero gradients {ATTACK}")
    results.compare()
    results.write()
    Image.new("RGB", (20, 10)).save(results.output_dir / "retrieval_cifar10.png")
    write_report(results.output_dir)
    return results.output_dir


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects attributes, text, tables and the sections' ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.tables: list[list[list[list[str]]]] = []  # table, row, cell, its pieces of text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if data.strip() and any(tag in ("td", "th") for tag in self.open):
            self.tables[-1][-1][-1].append(data.strip())

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]

    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def page_of(output_dir: Path) -> Page:
    return Page((output_dir / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_needs_nothing_from_outside(full: Path) -> None:
    text, page = (full / "report.html").read_text(encoding="utf-8"), page_of(full)
    for reference in (*page.values("src"), *page.values("href")):
        assert reference.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in text
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text
    assert set(re.findall(r"url\(.", text)) == {"url(#"}
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}


def test_ids_are_unique_and_every_reference_leads_somewhere(full: Path) -> None:
    text, page = (full / "report.html").read_text(encoding="utf-8"), page_of(full)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    wanted = {reference[1:] for reference in page.values("href")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted | set(page.values("aria-labelledby")) <= set(ids)
    assert "<style" not in "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))  # it would act on the whole page


def test_names_stay_text(full: Path) -> None:
    text, page = (full / "report.html").read_text(encoding="utf-8"), page_of(full)
    assert ATTACK not in text
    shown = "".join(page.text)
    results = Results(full)
    for name in {result[key] for result in results.results for key in ("model", "dataset")}:
        assert name in shown
    assert f"zero gradients {ATTACK}" in shown
    assert f"→ {ATTACK}" in re.sub(r"\s+", " ", shown)  # the class in a caption
    assert "lore$4$" in "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))  # no mathematics
    points = {0: (ATTACK, (0, 0.5, 0.4, 0.6), (0, 0.5, None, None))}
    figure = figure_of({"": lambda axis: clean_robust_front(axis, points, ATTACK)})
    assert html.escape(ATTACK) in inline_svg(figure, "a", ATTACK)
    assert ATTACK not in inline_svg(figure, "a", ATTACK)


def test_headings_and_tables_and_figures_can_be_read_out(full: Path) -> None:
    page = page_of(full)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    names = [tag for tag, _ in page.tags]
    assert names.count("caption") == names.count("table") == len(page.tables) == 5
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-labelledby" in attrs]
    assert all(attrs["role"] == "img" for attrs in plots)


def test_the_table_says_what_results_json_says(full: Path) -> None:
    summary = page_of(full).tables[0]
    results = Results(full).results
    columns = [" ".join(pieces) for pieces in summary[0]]
    assert columns[:3] == ["model", "images", "clean"]
    rows = [row for row in summary[1:] if len(row) == len(columns)]
    models = list(dict.fromkeys(r["model"] for r in results))[:3]
    assert len(rows) == len(models) * len(SETS)
    checked = 0
    for n, row in enumerate(rows):
        dataset, model = SETS[n // 3], models[n % 3]
        own = [r for r in results if (r["model"], r["dataset"]) == (model, dataset)]
        for r in own:
            if r["measure"] in ("accuracy", "follows_word") and r["corruption"] is None:
                shown = row[columns.index(column_name(r).replace("_", " "))]
                assert shown == [f"{100 * r['value']:.1f}", "[{:.1f}, {:.1f}]".format(*(100 * x for x in r["ci95"]))]
                checked += 1
        corrupted = [r["value"] for r in own if r["corruption"]]
        mean = sum(corrupted) / len(corrupted)
        clean = next(r["value"] for r in own if r["attack"] == "clean" and r["measure"] == "accuracy")
        assert row[columns.index("corruptions, mean")] == [f"{100 * mean:.1f}", "of 4"]
        assert row[columns.index("corruptions, drop")] == [f"{100 * (mean - clean):+.1f}", "points"]
    assert checked == 6 * 11


def test_other_tables_say_what_results_json_says(full: Path) -> None:
    _, others, tests, broken, corruptions = page_of(full).tables
    report = json.loads((full / "results.json").read_text())
    values = [f"{r['value']:.4g}" for r in report["results"] if r["measure"] in ("interpretability", "fidelity")]
    assert set(values) <= {cell[0] for row in others for cell in row[1:] if cell}
    shown = [pieces for row in tests[1:] for pieces in row[1:] if len(pieces) == 2]
    counts = [f"b {test['only_first']}, c {test['only_second']}" for test in report["comparisons"]]
    assert sorted(pieces[0] for pieces in shown) == sorted(counts)
    shares = [[float(pieces[0]) for pieces in row[1:5]] for row in broken[1:] if len(row) == 6]
    assert len(shares) == 18
    assert all(sum(row) == pytest.approx(100, abs=0.2) for row in shares)
    assert [row[0] for row in corruptions if len(row) == 4][1:] == [["fog"], ["glass blur"]] * 2


def test_two_writes_give_equal_bytes(full: Path) -> None:
    names = ("report.html", "benchmark.csv")
    before = [(full / name).read_bytes() for name in names]
    write_report(full)
    assert before == [(full / name).read_bytes() for name in names]
    assert not list(full.glob(".*.part"))


def test_everything_shows_where_everything_was_measured(full: Path) -> None:
    sections = [
        *("warnings", "summary", "others", "tests", "robustness", "front", "noise", "corruptions", "interpretability"),
        *("fidelity", "training", "strength", "pictures", "retrieval", "methods"),
    ]
    assert page_of(full).sections() == sections
    text = "".join(page_of(full).text)
    assert "magnified 31.9 times" in text  # 255 / (2 * 4)
    assert re.search(r"attack_step_size\s+0.25 / 0.5 / 1", text)


@pytest.mark.parametrize(
    "kind", ["pgd", "noise", "corruptions", "interpretability", "fidelity", "strength", "training"]
)
def test_a_figure_appears_where_its_data_exist_and_only_there(tmp_path: Path, kind: str) -> None:
    results, draw, model = Results(tmp_path / "eval"), random.Random(0), str(tmp_path / "model")
    add_accuracy(results, cell(model), 0.9, draw)
    if kind == "pgd":
        add_accuracy(results, cell(model, attack="pgd", eps=4.0), 0.4, draw)
    elif kind == "noise":
        add_accuracy(results, cell(model, attack="gaussian_noise", sigma=8.0), 0.4, draw)
    elif kind == "corruptions":
        add_accuracy(results, cell(model, attack="corruptions", corruption="fog", severity=3), 0.4, draw)
    elif kind == "strength":
        add_sweep(results, model, "data/pairs")
    elif kind == "training":
        Path(model).mkdir()
        (Path(model) / "metrics.jsonl").write_text('{"step": 1, "multiplier_mean": 0.5}\n{"step": 2, "loss": 1}\n')
    else:
        add_values(results, cell(model, measure=kind), draw)
    results.compare()
    results.write()
    write_report(results.output_dir)
    others = {"others"} if kind in ("interpretability", "fidelity", "strength") else set()
    shown = {"pgd": "robustness"}.get(kind, kind)
    page = page_of(results.output_dir)
    assert set(page.sections()) == {"summary", "methods", shown} | others
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-labelledby" in attrs]
    assert len(plots) == {"fidelity": 2}.get(kind, 1)


def test_one_cell_makes_a_report(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(cell("openai/clip"), 0.5, wilson_interval(1, 2), 2)  # no records, as in earlier versions
    results.compare()
    results.write()
    assert write_report(tmp_path) == tmp_path / "report.html"
    page = page_of(tmp_path)
    assert page.sections() == ["summary", "methods"]
    assert page.tables[0][2] == [["clip"], ["2"], ["50.0", "[9.5, 90.5]"]]
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").open(newline="")))
    assert [(row["acc1"], row["acc5"], row["mean_per_class_recall"]) for row in rows] == [("0.5", "", "")]


def test_pairs_have_records_without_labels(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for model, right in (("a/clip", [True, False, True]), ("b/clip", [False, False, True])):
        words = cell(model, "data/scam", attack="typographic")
        for of_cell in (cell(model, "data/scam"), words):
            results.add(of_cell, sum(right) / 3, wilson_interval(sum(right), 3), 3)
            results.write_records(of_cell, [{"position": n, "correct": one} for n, one in enumerate(right)])
        results.add(words | {"measure": "follows_word"}, 0.5, [0.1, 0.9], 3)
        add_pictures(results, words)
    results.compare()
    results.write()
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert page.sections() == ["summary", "tests", "front", "pictures", "methods"]
    assert page.tables[0][2][0] == ["a/clip"]
    row = next(csv.DictReader((tmp_path / "benchmark.csv").open(newline="")))
    assert row["mean_per_class_recall"] == ""


def test_without_results_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_csv_rows_are_the_accuracies(full: Path) -> None:
    with (full / "benchmark.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == CSV_COLUMNS
    assert CSV_COLUMNS[:3] == ("acc1", "acc5", "mean_per_class_recall")
    accuracies = [r for r in Results(full).results if r["measure"] == "accuracy"]
    assert len(rows) == len(accuracies)
    for row, r in zip(rows, accuracies):
        assert float(row["acc1"]) == r["value"]
        assert [float(row["ci95_low"]), float(row["ci95_high"])] == r["ci95"]
        for name in ("model", "dataset", "attack", "eps", "sigma", "corruption", "severity", "n", "seed"):
            assert row[name] == ("" if r[name] is None else str(r[name]))
        assert row["t"] == str(r["settings"].get("t", ""))
        assert row["task"] == "zeroshot_classification"
        if "t" not in r["settings"]:  # four images of each of ten classes: recall and accuracy are the same
            assert float(row["mean_per_class_recall"]) == pytest.approx(r["value"])
            assert float(row["acc5"]) >= r["value"]


def test_recall_and_five_likeliest_by_hand() -> None:
    """Class 0: 3 of 4 right, class 1: 0 of 1. Recall (3/4 + 0) / 2, accuracy 3/5; one label is not among the five."""
    labels, right = [0, 0, 0, 0, 1], [True, True, True, False, False]
    likeliest = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 5, 2, 3, 4], [1, 2, 3, 4, 5], [0, 2, 3, 4, 1]]
    rows = [{"label": a, "correct": b, "top5": c} for a, b, c in zip(labels, right, likeliest)]
    assert record_figures(rows)["mean_per_class_recall"] == pytest.approx(0.375)
    assert record_figures(rows)["acc5"] == pytest.approx(0.8)
    assert record_figures([row | {"top5": row["top5"][:3]} for row in rows])["acc5"] is None  # fewer than five classes
    assert record_figures([])["acc5"] is record_figures([])["mean_per_class_recall"] is None


def test_names_are_as_short_as_they_can_be_told_apart() -> None:
    names = ["runs/a/best", "runs/b/best", "openai/clip", "best", "runs/lore4/", "runs/lore4"]
    assert list(short_names(names).values()) == ["a/best", "b/best", "clip", "best", "runs/lore4/", "runs/lore4"]


CLIP = "openai/clip-vit-large-patch14"


@pytest.mark.parametrize(
    "names",
    [
        {f"models/fare_eps_2.pt@{CLIP}": "fare_eps_2.pt", "hf-hub:chs20/fare2-clip": "fare2-clip", CLIP: CLIP[7:]},
        {f"a/fare.pt@{CLIP}": "a/fare.pt", f"b/fare.pt@{CLIP}": "b/fare.pt"},
        {f"a/fare.pt@{CLIP}": f"fare.pt@{CLIP}", "a/fare.pt@base": "fare.pt@base"},
        {f"a/fare.pt@{CLIP}": f"fare.pt@{CLIP}", "a/fare.pt": "fare.pt", "runs/lore4": "lore4"},
        {"a/fare.pt@x": "a/fare.pt@x", "a/fare.pt@y": "fare.pt@y", "b/fare.pt@x": "b/fare.pt"},
        {"hf-hub:chs20/fare2-clip": "hf-hub:chs20/fare2-clip", "chs20/fare2-clip": "chs20/fare2-clip"},
        {"hf-hub:fare2": "hf-hub:fare2", "runs/fare2/": "runs/fare2"},
    ],
    ids=str,
)
def test_short_names_of_models_are_without_what_completes_them(names: dict[str, str]) -> None:
    """Of models whose files are gone, as in a report that is drawn again later."""
    assert short_names(names, of_models=True) == names


def test_an_at_sign_in_the_name_of_a_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs@lab/lore4@2").mkdir(parents=True)
    assert short_names(["runs@lab/lore4@2"], of_models=True) == {"runs@lab/lore4@2": "lore4@2"}
    assert short_names(["data/digits@32"]) == {"data/digits@32": "digits@32"}  # a set has no base


def test_names_beside_points_keep_what_differs() -> None:
    assert point_names(["clip", "fare"]) == ["clip", "fare"]
    long = [f"vit-l14-imagenet-lore4-rho{rho}-network" for rho in ("0.1", "0.02")]
    assert point_names(long) == ["…rho0.1-network", "…rho0.02-network"]
    assert point_names(["a" * 40, "b"]) == ["a" * 10 + "…" + "a" * 11, "b"]
    assert point_names(["clip-of-a-very-long-name"]) == ["clip-of-a-…y-long-name"]


def test_equal_cells_with_other_settings_get_columns_of_their_own(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for steps in (10, 50):
        for eps in (2.0, 4.0):
            of_cell = cell("m", attack="pgd", eps=eps, attack_steps=steps, attack_step_size=eps / 4)
            results.add(of_cell, 1 / (steps * eps), [0.0, 0.1], 100)
    assert variants(results.results) == ["attack_steps 10"] * 2 + ["attack_steps 50"] * 2
    results.compare()
    results.write()
    write_report(tmp_path)
    header = page_of(tmp_path).tables[0][0]
    expected = [f"pgd {eps}/255, attack_steps {steps}" for steps in (10, 50) for eps in (2, 4)]
    assert [" ".join(pieces) for pieces in header][2:] == expected


@pytest.mark.parametrize(
    ("p_values", "best"),
    [
        ({("a", "b"): 0.3, ("a", "c"): 0.01}, [True, True, False]),
        ({("a", "b"): 0.01, ("c", "a"): 0.01}, [True, False, False]),
        ({("a", "b"): 0.3, ("a", "c"): 0.3}, [False] * 3),  # nothing is told apart
        ({("a", "b"): 0.3}, [False] * 3),  # a test is missing
    ],
)
def test_bold_is_what_the_test_does_not_tell_from_the_best(p_values: dict, best: list[bool]) -> None:
    cells = [{"result": cell(model) | {"value": value}} for model, value in (("a", 0.9), ("b", 0.8), ("c", 0.1))]
    names = {one["result"]["model"]: cell_name(one["result"]) for one in cells}
    mark_best(cells, [{"records": [names[a], names[b]], "p_value": p} for (a, b), p in p_values.items()])
    assert [one.get("best", False) for one in cells] == best


def test_the_front_is_what_no_other_point_beats() -> None:
    assert pareto_front([(0.9, 0.1), (0.8, 0.5), (0.7, 0.4), (0.8, 0.3), (0.9, 0.1)]) == [(0.8, 0.5), (0.9, 0.1)]


def test_long_curves_are_averaged_in_pieces() -> None:
    assert thinned([(0, 1), (1, 3)]) == [(0, 1), (1, 3)]
    points = thinned([(step, 2 * step) for step in range(1000)])
    assert len(points) <= 400
    assert points[0] == (1, 2)


def test_models_are_told_apart_without_colour() -> None:
    styles = [line_style(place) for place in range(42)]
    assert len({tuple(style.values()) for style in styles}) == 42
    assert len({tuple(bar_style(place).values()) for place in range(42)}) == 42
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == len(LINES)


def test_the_curves_of_a_head_are_drawn_into_a_file_too(tmp_path: Path, monkeypatch) -> None:
    drawn, save = {}, figures.save_figure
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, file, **more: drawn.update({file: figure}) or save(figure, file, **more)
    )
    results = Results(tmp_path)
    add_sweep(results, "runs/head", "data/pairs")
    results.write()
    write_report(tmp_path)
    path = tmp_path / "head_t_head.png"
    assert min(Image.open(path).size) > 300
    (axis,) = drawn[path].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert curves["chosen text over rejected"] == [[-0.5, 37.5], [0.0, 50.0], [0.5, 62.5], [1.0, 75.0]]
    assert [line.get_xdata()[0] for line in axis.lines[2:]] == [0.0, 1.0, 0.5]
    texts = {text.get_text() for text in drawn[path].findobj(Text)}
    assert {"pairs, shares", "share, %", "original", "trained", "t* = 0.5"} <= texts
    assert "What the strength of the head changes: head" in texts
