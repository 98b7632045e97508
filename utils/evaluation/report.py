"""report.html and benchmark.csv: what an evaluation found, for people and for tables of other projects.

Both are made from the directory of an evaluation and from the metrics.jsonl of models that are local directories, and can
be made again at any time. The page is one file that opens offline: figures and pictures are inside it, it has no script.
Its words stand in report.html.jinja.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.evaluation import figures
from utils.evaluation.attacks import ATTACKS
from utils.evaluation.results import (
    Results,
    attempt,
    cell_name,
    column_name,
    figure_name,
    read_alike,
    replace_file,
)
from utils.redaction import escaped
from utils.training.metrics import MetricsFile

# CLIP_benchmark's columns (`clip_benchmark build`), then what tells our rows apart.
CSV_COLUMNS = (
    *("acc1", "acc5", "mean_per_class_recall", "dataset", "model", "pretrained", "task", "language", "model_fullname"),
    *("classifier", "attack", "eps", "sigma", "corruption", "severity", "t", "ci95_low", "ci95_high", "n", "seed"),
)
TASKS = {"zero_shot": "zeroshot_classification", "linear_head": "linear_probe"}
TITLES = {  # of the sections with figures, in the order of the page
    "robustness": "Accuracy against the size of the perturbation",
    "front": "Clean against robust accuracy",
    "noise": "Gaussian noise",
    "corruptions": "Common corruptions",
    "interpretability": "Interpretability",
    "fidelity": "Fidelity to the reference",
    "training": "Training",
    "strength": "The strength of the head",
}
TRAINING = {  # of metrics.jsonl: title, axis, a share of images?
    "eval_accuracy_clean": ("clean accuracy", "accuracy", True),
    "eval_accuracy_pgd": ("accuracy under PGD, at the run's own eps", "accuracy", True),
    "eval_accuracy_attacked": ("accuracy on attacked images", "accuracy", True),
    "multiplier_mean": ("multiplier, mean", "multiplier", False),
    "violation_ratio_median": ("clean distance / margin, median", "ratio", False),
    "violation_ratio_p95": ("clean distance / margin, 95th percentile", "ratio", False),
    "eval_kl": ("KL to the start model", "nats", False),
}
ON_IMAGES = ("accuracy", "follows_word")  # measures with a column in the table of accuracies
# Measures with an entry of their own under "How it was measured"; all others are fairness.
EXPLAINED = (*ON_IMAGES, "pair_accuracy", "retention", "neutral_t", "interpretability", "fidelity")
PICTURES = 4  # examples of every model and attack
PICTURE_SIDE = 128  # larger pictures are reduced: a page, not an archive
CURVE_POINTS = 400  # of a training curve; longer ones are averaged in pieces
BROKEN = ("wrong before", "cross-entropy", "targets", "standing")  # what became of an image under APGD

# A cell with its figures; on the page also: ``place`` and ``label`` of its model, ``set`` (the short name), ``variant``,
# and ``clean``, the clean accuracy of the same images by the same classifier, or None.
Result = dict[str, Any]
Cells = dict[tuple[str, str, str], list[dict[str, Any]]]  # (set, row, column): what stands there, mostly one thing
Panel = tuple[str, str, Figure, Iterable[int]]  # set, title, what is drawn, places of the models in it


def write_report(output_dir: str | Path, undrawn: Sequence[str] = ()) -> Path:
    """Writes report.html and benchmark.csv into a directory that evaluate.py has filled; returns the page's path.

    The page and the log name every figure that cannot be drawn; the page also names ``undrawn``.
    """
    results = Results(output_dir)
    if not results.results:
        raise UserError(f"{output_dir}: no results.json with results; expected the --output_dir of evaluate.py")
    found = [result | record_figures(results.records(result)) for result in results.current()]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: escaped(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(page_content(results, found, list(undrawn)))
    path = results.output_dir / "report.html"
    for written, text in ((results.output_dir / "benchmark.csv", benchmark_csv(found)), (path, page)):
        replace_file(written, text.encode("utf-8", "backslashreplace"))
    return path


def page_content(results: Results, found: Sequence[Result], undrawn: list[str]) -> dict[str, Any]:
    """Everything that the template shows. ``found``: the current results with their ``record_figures``."""
    models, sets = short_names(r["model"] for r in found), short_names(r["dataset"] for r in found)
    labels = list(models.values())
    every = shown_results(found, models, sets)
    plain = [r for r in every if "t" not in r["settings"]]
    drawings: dict[str, Callable[[], dict[str, Any]]] = {
        "robustness": lambda: section(
            "robustness", (panel for attack in ATTACKS for panel in strength_panels(plain, attack, "eps")), labels
        ),
        "front": lambda: section("front", front_panels(plain, labels), labels),
        "noise": lambda: section("noise", strength_panels(plain, "gaussian_noise", "sigma"), labels),
        "corruptions": lambda: section("corruptions", corruption_panels(plain), labels, bar=True),
        "interpretability": lambda: section("interpretability", interpretability_panels(results, plain), labels),
        "fidelity": lambda: section("fidelity", fidelity_panels(results, plain), labels),
        "training": lambda: section("training", training_panels(models), labels),
        "strength": lambda: strength_section(every, labels),
    }
    sections = []
    for name, draw in drawings.items():
        drawn = attempt(f"{name} in report.html", draw, undrawn)
        if drawn is None or drawn["groups"]:  # one that failed keeps its place: tables stand there too
            sections.append({"id": name, "title": TITLES[name], "legend": [], "groups": []} | (drawn or {}))
    keys = attempt("the legend", lambda: [key(place, f"model-{place}") for place in range(len(models))], undrawn)
    pictures = attempt("pictures", lambda: picture_groups(results, plain), undrawn)
    strips = attempt("strips of pictures", lambda: picture_strips(results, plain, sets.values()), undrawn)
    revisions = {r["model"]: r["settings"].get("model_revision") for r in found}
    read = [(r["model"], r["dataset"], r["settings"].get("shards")) for r in found]
    return {
        "written": results.written[:16].replace("T", " ") + " UTC",
        "environment": results.environment,
        "models": [
            {"key": keys[place] if keys else "", "short": models[name], "full": name, "revision": revisions[name]}
            for place, name in enumerate(models)
        ],
        "sets": [
            {"short": sets[name], "full": name, "images": max(r["n"] for r in found if r["dataset"] == name)}
            for name in sets
        ],
        "warnings": [
            {
                "where": f"{models.get(w['model'], w['model'])}, {sets.get(w['dataset'], w['dataset'])}, {heading(w)}",
                "text": w["text"],
            }
            for w in results.warnings
            if w["model_revision"] == revisions.get(w["model"])
            # Of data that have changed since: history, as its figures are. Earlier versions did not keep that.
            and ("shards" not in w or (w["model"], w["dataset"], w["shards"]) in read)
        ],
        "summary": summary_table(plain, results.compared, sets.values()),
        "others": other_figures(plain, sets.values()),
        "tests": test_table(results.compared, models, sets),
        "num_tests": len(results.compared),
        "broken": broken_table(every, sets.values()),
        "corruptions": corruption_table(plain, sets.values()),
        "sections": sections,
        "pictures": pictures or [],
        "strips": strips or [],
        "undrawn": undrawn,
        "retrieved": [
            {"title": path.stem.removeprefix("retrieval_"), "source": data_uri(path.read_bytes())}
            for path in sorted(results.output_dir.glob("retrieval_*.png"))
        ],
        "methods": methods(every),
    }


# Names and numbers


def shown_results(found: Sequence[Result], models: Mapping[str, str], sets: Mapping[str, str]) -> list[Result]:
    """The results, each with what the page says of it: see ``Result``."""
    plain = [r for r in found if "t" not in r["settings"]]
    variant = dict(zip(map(id, plain), variants(plain)))
    clean: dict[str, Result] = {}
    for r in plain:
        if (r["measure"], r["attack"]) == ("accuracy", "clean"):
            clean.setdefault(read_alike(r), r)
    places = {name: place for place, name in enumerate(models)}
    return [
        r
        | {"place": places[r["model"]], "label": models[r["model"]], "set": sets[r["dataset"]]}
        | {"variant": variant.get(id(r), ""), "clean": clean.get(read_alike(r))}
        for r in found
    ]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """{name: the last parts of its path that tell it from all others}, in the order of first appearance."""
    parts = {name: [part for part in name.split("/") if part] or [name] for name in dict.fromkeys(names)}
    short = {}
    for name, own in parts.items():
        others = [other for of_name, other in parts.items() if of_name != name]
        ends = (own[-length:] for length in range(1, len(own) + 1))
        end = next((end for end in ends if all(other[-len(end) :] != end for other in others)), None)
        short[name] = "/".join(end) if end else name
    return short


def heading(cell: Mapping[str, Any]) -> str:
    """``column_name`` with spaces, so that it can be wrapped; also of a warning or a comparison."""
    return column_name({"measure": "accuracy", "corruption": None, "sigma": None} | dict(cell)).replace("_", " ")


def flat_settings(result: Mapping[str, Any]) -> dict[str, str]:
    """Seed and settings in words, nested ones as group.name; None is left out."""
    found: dict[str, Any] = {"seed": result["seed"]}
    for name, value in result["settings"].items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": of_inner for inner, of_inner in value.items()}
        else:
            found[name] = value
    return {name: in_words(value) for name, value in found.items() if value is not None}


def in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        if len(value) > 12 and all(isinstance(item, int | float) for item in value):
            return f"{len(value)} values from {min(value):g} to {max(value):g}"
        return ", ".join(map(in_words, value))
    return str(value)


def variants(results: Sequence[Result]) -> list[str]:
    """What tells each result from others of the same model, set and attack: "seed 1", "attack_steps 50"; mostly "".

    All results of one attack name the same settings, so that columns and lines hold comparable figures.
    """
    settings = [flat_settings(result) for result in results]
    groups: dict[tuple, list[dict[str, str]]] = {}
    identity = ("measure", "attack", "model", "dataset", "eps", "sigma", "corruption", "severity")
    for result, own in zip(results, settings):
        groups.setdefault(tuple(result[name] for name in identity), []).append(own)
    differing: dict[tuple, set[str]] = {}
    for (measure, attack, *_), group in groups.items():
        names = {name for own in group for name in own if len({other.get(name) for other in group}) > 1}
        differing.setdefault((measure, attack), set()).update(names)
    found = []
    for result, own in zip(results, settings):
        differ = sorted(differing[result["measure"], result["attack"]])
        found.append(", ".join(f"{name} {own.get(name, 'default')}" for name in differ))
    return found


def in_order_of_models(results: Iterable[Result]) -> list[Result]:
    return sorted(results, key=lambda r: r["place"])


def labels_of(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(r["label"] for r in in_order_of_models(results)))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_variant(title: str, variant: str) -> str:
    return f"{title}, {variant}" if variant else title


# Tables: groups of rows, a group per set. What stands in a cell has ``value``, and maybe ``small``, ``best``, ``shade``.


def table(sets: Iterable[str], columns: Sequence[str], cells: Cells) -> dict[str, Any] | None:
    """Rows stand in the order of their first cell; None without any."""
    groups = []
    for name in sets:
        rows = dict.fromkeys(row for of_set, row, _ in cells if of_set == name)
        shown = [{"name": row, "cells": [cells.get((name, row, column)) for column in columns]} for row in rows]
        if shown:
            groups.append({"name": name, "rows": shown})
    return {"columns": columns, "groups": groups} if groups else None


def summary_table(
    results: Sequence[Result], comparisons: Sequence[Result], sets: Iterable[str]
) -> dict[str, Any] | None:
    """Accuracies in %: a row per model, a column per attack; corruptions as their mean."""
    order = {attack: place for place, attack in enumerate(ATTACKS)}
    columns: dict[str, tuple] = {}
    cells: Cells = {}
    corrupted: dict[tuple[str, str, str], list[Result]] = {}
    images: dict[tuple[str, str], list[int]] = {}
    for r in in_order_of_models(results):
        if r["measure"] not in ON_IMAGES:
            continue
        images.setdefault((r["set"], r["label"]), [])
        if r["corruption"] is not None:
            corrupted.setdefault((r["set"], r["label"], r["variant"]), []).append(r)
            continue
        images[r["set"], r["label"]].append(r["n"])
        title = with_variant(heading(r), r["variant"])
        place = order.get(r["attack"], len(order))
        columns[title] = (r["measure"] != "accuracy", place, r["variant"], r["eps"] or r["sigma"] or 0)
        cells[r["set"], r["label"], title] = [{"result": r, "value": percent(r["value"]), "small": interval(r)}]
    for (name, model, variant), group in corrupted.items():
        average, clean = mean([r["value"] for r in group]), group[0]["clean"]
        title, drop = with_variant("corruptions, mean", variant), with_variant("corruptions, drop", variant)
        columns[title] = (False, order["corruptions"], variant, 0)
        cells[name, model, title] = [{"value": percent(average), "small": f"of {len(group)}"}]
        if clean:
            columns[drop] = (False, order["corruptions"], variant, 1)
            cells[name, model, drop] = [{"value": f"{100 * (average - clean['value']):+.1f}", "small": "points"}]
    ordered = sorted(columns, key=columns.__getitem__)
    for name, column in itertools.product(sets, ordered):
        in_column = [cell[0] for (of_set, _, title), cell in cells.items() if (of_set, title) == (name, column)]
        mark_best(in_column, comparisons)
    numbers = {}
    for (name, model), of_row in images.items():
        sizes = sorted({min(of_row), max(of_row)}) if of_row else []
        numbers[name, model, "images"] = [{"value": " to ".join(f"{n:,}" for n in sizes)}]
    return table(sets, ["images", *ordered], numbers | cells)


def interval(result: Result) -> str:
    return "" if result["ci95"] is None else f"[{percent(result['ci95'][0])}, {percent(result['ci95'][1])}]"


def mark_best(cells: Sequence[dict[str, Any]], comparisons: Sequence[Result]) -> None:
    """Sets ``best`` on the highest of a column's cells and on those that McNemar's test does not tell from it (p >= 0.05).

    On none where a test is missing (no records, other images, not an accuracy) or where nothing is told apart.
    """
    rivals = [cell for cell in cells if cell.get("result", {}).get("measure") == "accuracy"]
    if len(rivals) < 2:
        return
    best = max(rivals, key=lambda cell: cell["result"]["value"])
    tied = [best]
    for cell in rivals:
        if cell is best:
            continue
        pair = {cell_name(best["result"]), cell_name(cell["result"])}
        tests = [test for test in comparisons if set(test["records"]) == pair]
        if not tests:
            return
        if tests[0]["p_value"] >= 0.05:
            tied.append(cell)
    if len(tied) < len(rivals):
        for cell in tied:
            cell["best"] = True


def other_figures(results: Sequence[Result], sets: Iterable[str]) -> dict[str, Any] | None:
    """What is not an accuracy: a row per figure, a column per model."""
    shown = [r for r in results if r["measure"] not in ON_IMAGES]
    cells: Cells = {}
    for r in shown:
        small = "" if r["ci95"] is None else "[{:.4g}, {:.4g}]".format(*r["ci95"])
        value = "undefined" if r["value"] is None else f"{r['value']:.4g}"
        title = with_variant(figure_name(r), r["variant"])
        cells[r["set"], title, r["label"]] = [{"value": value, "small": small}]
    return table(sets, labels_of(shown), cells)


def test_table(
    comparisons: Sequence[Result], models: Mapping[str, str], sets: Mapping[str, str]
) -> dict[str, Any] | None:
    """McNemar's tests: a row per pair of models, a column per attack."""
    cells: Cells = {}
    for test in comparisons:
        pair, p = ", ".join(models[name] for name in test["models"]), test["p_value"]
        small = "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"
        counts = f"b {test['only_first']}, c {test['only_second']}"
        cell = cells.setdefault((sets.get(test["dataset"], ""), pair, heading(test)), [])
        cell.append({"value": counts, "small": small, "significant": p < 0.05})
    return table(sets.values(), list(dict.fromkeys(map(heading, comparisons))), cells)


def broken_table(results: Sequence[Result], sets: Iterable[str]) -> dict[str, Any] | None:
    """What broke the images under APGD, in % of all; None where records do not say."""
    cells: Cells = {}
    for r in results:
        if r["attack"] == "apgd" and r["broken"]:
            row = with_variant(f"{r['label']}, {r['eps']:g}/255", r["variant"])
            values = {column: percent(count / r["n"]) for column, count in r["broken"].items()}
            values["forwards"] = "" if r["forwards"] is None else f"{r['forwards']:,.0f}"
            cells |= {(r["set"], row, column): [{"value": value}] for column, value in values.items()}
    return table(sets, [*BROKEN, "forwards"], cells)


def corruption_table(results: Sequence[Result], sets: Iterable[str]) -> dict[str, Any] | None:
    """Accuracy in % per corruption, mean over severities: a row per corruption, a column per model."""
    shown = [r for r in results if r["corruption"] is not None and r["measure"] == "accuracy"]
    values: dict[tuple[str, str, str], list[float]] = {}
    for r in shown:
        title = with_variant(r["corruption"].replace("_", " "), r["variant"])
        values.setdefault((r["set"], title, r["label"]), []).append(r["value"])
    cells = {
        place: [{"value": percent(mean(of_cell)), "shade": f"{mean(of_cell):.2f}"}] for place, of_cell in values.items()
    }
    return table(sets, labels_of(shown), cells)


# Figures: a section has groups of panels and a legend


def section(name: str, panels: Iterable[Panel], labels: Sequence[str], bar: bool = False) -> dict[str, Any]:
    """Panels under one legend. Sets with several panels get a heading each; otherwise the set is the panel's title."""
    by_set: dict[str, list[Panel]] = {}
    for panel in panels:
        by_set.setdefault(panel[0], []).append(panel)
    places = sorted({place for of_set in by_set.values() for *_, drawn in of_set for place in drawn})
    if by_set and all(len(of_set) == 1 for of_set in by_set.values()):
        only = [of_set[0] for of_set in by_set.values()]
        by_set = {"": [(of, with_variant(of, title), figure, drawn) for of, title, figure, drawn in only]}
    groups = [
        {"title": of, "legend": [], "panels": drawn_panels(f"{name}-{n}", TITLES[name], of_set, labels)}
        for n, (of, of_set) in enumerate(by_set.items())
    ]
    return {"legend": legend(name, places, labels, bar), "groups": groups}


def drawn_panels(name: str, about: str, panels: Sequence[Panel], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Titles and markup; the markup says in words what is drawn."""
    drawn = []
    for n, (dataset, title, figure, places) in enumerate(panels):
        subject = title if dataset in title else with_variant(dataset, title)
        alternative = f"{about}: {subject}. Drawn: {', '.join(labels[place] for place in places)}"
        drawn.append({"title": title, "svg": Markup(figures.inline_svg(figure, f"{name}-{n}", alternative))})
    return drawn


def legend(name: str, places: Iterable[int], labels: Sequence[str], bar: bool = False) -> list[dict[str, Any]]:
    return [{"key": key(place, f"{name}-{place}", bar), "label": labels[place]} for place in places]


def key(place: int, name: str, bar: bool = False) -> Markup:
    """The sample of a model's line or bar, for a legend."""
    return Markup(figures.inline_svg(figures.key_figure(place, bar), f"{name}-key", ""))


def by_panel(results: Iterable[Result]) -> dict[tuple[str, str], dict[int, list[Result]]]:
    """{(set, variant): {place of the model: its results}}"""
    panels: dict[tuple[str, str], dict[int, list[Result]]] = {}
    for r in results:
        panels.setdefault((r["set"], r["variant"]), {}).setdefault(r["place"], []).append(r)
    return panels


def point(result: Result, x: float) -> figures.Point:
    return (x, result["value"], *(result["ci95"] or (None, None)))


def strength_panels(results: Sequence[Result], attack: str, unit: str) -> Iterator[Panel]:
    """Accuracy over eps or sigma, in 1/255; 0 is the clean accuracy where it is known."""
    attacked = [r for r in results if (r["measure"], r["attack"]) == ("accuracy", attack) and r[unit] is not None]
    for (name, variant), of_models in by_panel(attacked).items():
        curves = {}
        for place, of_model in of_models.items():
            clean = of_model[0]["clean"]
            curves[place] = [point(clean, 0)] if clean else []
            curves[place] += [point(r, r[unit]) for r in of_model]
        title = variant if unit == "sigma" else with_variant(attack, variant)
        yield name, title, figures.accuracy_curves(curves, f"{unit}, 1/255"), curves


def front_panels(results: Sequence[Result], labels: Sequence[str]) -> Iterator[Panel]:
    """Clean against robust accuracy under the strongest l_inf attack that several models share, and written words."""
    beside = point_names(labels)
    for name in dict.fromkeys(r["set"] for r in results):
        columns: dict[tuple[str, str, float], dict[int, Result]] = {}
        for r in results:
            attacked = r["measure"] == "accuracy" and (r["eps"] is not None or r["attack"] == "typographic")
            if r["set"] == name and attacked and r["clean"]:
                columns.setdefault((r["attack"], r["variant"], r["eps"] or 0), {})[r["place"]] = r
        shared = {column: of_models for column, of_models in sorted(columns.items()) if len(of_models) > 1}
        names = {attack for attack, _, _ in shared}
        strongest = next((attack for attack in ("apgd", *ATTACKS) if attack in names), None)
        for (attack, variant, _), of_models in shared.items():
            if attack in (strongest, "typographic"):
                points = {place: (beside[place], point(r["clean"], 0), point(r, 0)) for place, r in of_models.items()}
                title = with_variant(heading(next(iter(of_models.values()))), variant)
                yield name, title, figures.clean_robust_front(points, f"{attack} accuracy, %"), points


def point_names(labels: Sequence[str], length: int = 22) -> list[str]:
    """Names that fit beside points: long ones lose the words that all begin with, then their middle."""
    if max(map(len, labels)) > length:
        differ = next((n for n, letters in enumerate(zip(*labels)) if len(set(letters)) > 1), 0)
        start = 1 + max(labels[0].rfind(separator, 0, differ) for separator in "-_ /")
        labels = [f"…{label[start:]}" if start > 6 else label for label in labels]
    half = length // 2
    return [label if len(label) <= length else f"{label[: half - 1]}…{label[-half:]}" for label in labels]


def corruption_panels(results: Sequence[Result]) -> Iterator[Panel]:
    """Bars by severity, mean over the corruptions; severity 0 is clean."""
    corrupted = [r for r in results if r["corruption"] is not None and r["measure"] == "accuracy"]
    for (name, variant), of_models in by_panel(corrupted).items():
        bars = {}
        for place, of_model in of_models.items():
            clean = of_model[0]["clean"]
            values: dict[float, list[float]] = {0: [clean["value"]]} if clean else {}
            for r in of_model:
                values.setdefault(r["severity"], []).append(r["value"])
            bars[place] = {severity: mean(of_severity) for severity, of_severity in values.items()}
        yield name, variant, figures.severity_bars(bars), bars


def columns_of_records(
    results: Results, shown: Iterable[Result], column: str
) -> Iterator[tuple[str, str, dict[int, list[float]]]]:
    """(set, variant, {place of the model: a column of its records}) where records have it."""
    for (name, variant), of_models in by_panel(shown).items():
        values = {}
        for place, of_model in of_models.items():
            columns = ([row[column] for row in results.records(r) if row.get(column) is not None] for r in of_model)
            values[place] = next(filter(None, columns), [])
        yield name, variant, {place: of_model for place, of_model in values.items() if of_model}


def interpretability_panels(results: Results, plain: Sequence[Result]) -> Iterator[Panel]:
    shown = [r for r in plain if r["measure"] == "interpretability"]
    for name, variant, values in columns_of_records(results, shown, "value"):
        if values:
            yield name, variant, figures.distributions(values, "cosine"), values


def fidelity_panels(results: Results, plain: Sequence[Result]) -> Iterator[Panel]:
    shown = [r for r in plain if r["measure"].startswith("fidelity")]
    for column, xlabel, same in (("value", "relative squared distance", 0), ("cosine", "cosine to the reference", 1)):
        for name, variant, values in columns_of_records(results, shown, column):
            # Of the reference itself there is nothing to show.
            moved = {place: found for place, found in values.items() if max(abs(x - same) for x in found) > 1e-5}
            if moved:
                yield name, with_variant(xlabel, variant), figures.distributions(moved, xlabel), moved


def training_panels(models: Iterable[str]) -> Iterator[Panel]:
    logged = {place: MetricsFile(Path(name) / "metrics.jsonl").read() for place, name in enumerate(models)}
    # A pretraining logs its clean accuracy too; its thousands of steps would push fine-tuning into a corner.
    own = set(TRAINING) - {"eval_accuracy_clean"}
    logged = {place: rows for place, rows in logged.items() if any(own & row.keys() for row in rows)}
    for column, (title, ylabel, share) in TRAINING.items():
        curves = {}
        for place, rows in logged.items():
            points = [(row["step"], row[column]) for row in rows if isinstance(row.get(column), int | float)]
            if points and (column != "multiplier_mean" or any(value for _, value in points)):  # FARE has none
                curves[place] = thinned(points)
        if curves:
            yield "", title, figures.training_curves(curves, ylabel, share), curves


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``CURVE_POINTS`` points: means of neighbours."""
    size = -(-len(points) // CURVE_POINTS)
    pieces = (points[start : start + size] for start in range(0, len(points), size))
    return [(mean([x for x, _ in piece]), mean([y for _, y in piece])) for piece in pieces]


def strength_section(results: Sequence[Result], labels: Sequence[str]) -> dict[str, Any]:
    """Everything over the strength t of a head: a group per model, panels of shares and of other figures per set."""
    shares = (*ON_IMAGES, "pair_accuracy", "worst_group_accuracy", "group_gap")
    groups = []
    for place, model in enumerate(labels):
        of_model = [r for r in results if r["place"] == place]
        neutral = [r["value"] for r in of_model if r["measure"] == "neutral_t"]
        swept = [r for r in of_model if "t" in r["settings"] and r["value"] is not None]
        names = list(dict.fromkeys(map(figure_name, swept)))
        panels = []
        for of_set in dict.fromkeys(r["set"] for r in results):
            for title, ylabel, factor in (("shares", "share, %", 100), ("fairness", "fairness", 1)):
                curves: dict[int, dict[float, float]] = {}
                for r in swept:
                    if r["set"] == of_set and (r["measure"] in shares) == (title == "shares"):
                        curves.setdefault(names.index(figure_name(r)), {})[r["settings"]["t"]] = factor * r["value"]
                if curves:
                    figure = figures.t_sweep_panel(curves, ylabel, neutral[-1] if neutral else None)
                    panels.append((of_set, f"{of_set}, {title}", figure, curves))
        if panels:
            keys = legend(f"strength-{place}", range(len(names)), names)
            drawn = drawn_panels(f"strength-{place}", f"The head of {model}", panels, names)
            groups.append({"title": model, "legend": keys, "panels": drawn})
    return {"legend": [], "groups": groups}


# Pictures


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def png(pixel_values: Tensor, *, smooth: bool = True) -> str:
    """(3, H, W) in [0,1] as the source of an <img>; reduced to ``PICTURE_SIDE`` where larger."""
    image = Image.fromarray((pixel_values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue())


def picture_groups(results: Results, plain: Sequence[Result]) -> list[dict[str, Any]]:
    """Clean / attacked / perturbation of every model, per set and attack, at the largest eps that has pictures."""
    kept: dict[tuple[str, str, str], list[Result]] = {}
    for r in plain:
        shown = r["measure"] == "accuracy" and (r["eps"] is not None or r["attack"] == "typographic")
        if shown and results.pictures_path(r).exists():
            kept.setdefault((r["set"], r["attack"], r["variant"]), []).append(r)
    groups = []
    for (name, attack, variant), of_attack in kept.items():
        if attack == "pgd" and any(other[:2] == (name, "apgd") for other in kept):
            continue  # the stronger one looks the same
        eps = max(r["eps"] or 0 for r in of_attack)
        shown = [r for r in in_order_of_models(of_attack) if (r["eps"] or 0) == eps]
        rows = [
            {"name": r["label"], "examples": [example(*parts, eps) for parts in zip(found[0][:PICTURES], *found[1:])]}
            for r in shown
            if (found := results.pictures(r))
        ]
        title = f"{name}, {with_variant(heading(shown[0]), variant)}"
        groups.append({"title": title, "factor": f"{255 / (2 * eps):.3g}" if eps else "", "rows": rows})
    return groups


def example(clean: Tensor, attacked: Tensor, caption: Mapping[str, str], eps: float) -> dict[str, Any]:
    """One image with its attacked copy; under an l_inf attack also 1/2 + delta / (2 eps): grey where nothing changed."""
    magnified = png(0.5 + (attacked - clean) * (255 / (2 * eps)), smooth=False) if eps else ""
    sources = {"clean": png(clean), "attacked": png(attacked), "magnified": magnified}
    return {**caption, **sources, "small": is_small(clean)}


def is_small(pixel_values: Tensor) -> bool:
    """So few pixels that the page shows each as a square."""
    return max(pixel_values.shape[-2:]) <= 64


def picture_strips(results: Results, plain: Sequence[Result], sets: Iterable[str]) -> list[dict[str, Any]]:
    """What noise and corruptions look like: one image of each, clean first, with the first model's answers."""
    strips = []
    for name, attack in itertools.product(sets, ("gaussian_noise", "corruptions")):
        own = [r for r in plain if (r["set"], r["attack"], r["measure"]) == (name, attack, "accuracy")]
        own = [r for r in own if results.pictures_path(r).exists()]
        own = [r for r in own if r["place"] == own[0]["place"]]
        # Of a corruption the highest severity; of noise every sigma.
        highest = {(r["corruption"], r["sigma"]): r for r in sorted(own, key=lambda r: r["severity"] or 0)}
        shown = sorted(highest.values(), key=lambda r: (r["corruption"] or "", r["sigma"] or 0))
        found = [(r, kept) for r in shown if (kept := results.pictures(r))]
        if not found:
            continue
        _, (clean, _, captions) = found[0]
        first = {"title": "clean", "source": png(clean[0]), "predicted": captions[0]["predicted_clean"]}
        pictures = [first | {"label": captions[0]["label"]}]
        for r, (_, attacked, captions) in found:
            title = r["corruption"].replace("_", " ") if r["corruption"] else f"sigma {r['sigma']:g}/255"
            answer = {of: captions[0][of] for of in ("label", "predicted")}
            pictures.append({"title": title, "source": png(attacked[0])} | answer)
        severity = f"severity {shown[-1]['severity']}" if shown[-1]["severity"] else ""
        title = with_variant(f"{name}, {attack.replace('_', ' ')}", severity)
        strips.append({"title": title, "model": own[0]["label"], "small": is_small(clean), "pictures": pictures})
    return strips


# How it was measured


def methods(results: Sequence[Result]) -> dict[str, Any]:
    """Every attack and measure with its settings; what all have in common is said once."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        measure = "fidelity" if r["measure"].startswith("fidelity") else r["measure"]
        attack = r["attack"] if measure == "accuracy" else ""
        groups.setdefault((measure if measure in EXPLAINED else "fairness", attack), []).append(r)
    settings = {name: setting_values(group) for name, group in groups.items()}
    common = set.intersection(*(set(values.items()) for values in settings.values()))
    entries = [
        {"measure": measure, "attack": attack, "text": ATTACKS[attack].about if attack in ATTACKS else ""}
        | {"settings": [item for item in settings[measure, attack].items() if item not in common]}
        for measure, attack in groups
    ]
    return {"common": sorted(common), "entries": entries}


def setting_values(group: Sequence[Result]) -> dict[str, str]:
    """{setting: all its values} of the results of one attack or measure, strengths in their units."""
    values: dict[str, list[str]] = {}
    for name, title in (("eps", "eps, 1/255"), ("sigma", "sigma, 1/255"), ("severity", "severity"), ("n", "images")):
        form = ",d" if name == "n" else "g"
        values[title] = [format(value, form) for value in sorted({r[name] for r in group if r[name] is not None})]
    corruptions = {r["corruption"] for r in group if r["corruption"] is not None}
    values["corruptions"] = [str(len(corruptions))] if corruptions else []
    swept = sorted({r["settings"]["t"] for r in group if "t" in r["settings"]})
    values["t"] = [in_words(swept)] if swept else []
    for r in group:
        for name, value in flat_settings(r).items():
            if name not in ("t", "model_revision"):
                values.setdefault(name, []).append(value)
    return {name: " / ".join(dict.fromkeys(of_name)) for name, of_name in values.items() if of_name}


# benchmark.csv


def record_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the records of an accuracy say besides the share of right answers; None where they do not say it.

    acc5: share of images with the class among the five likeliest, of five classes or more. mean_per_class_recall: the
    mean over classes of the share that is right. broken: how many images each of ``BROKEN`` has. forwards: mean per image.
    """
    labelled = [row for row in rows if row.get("label") is not None and "correct" in row]
    recall, top5 = None, None
    if labelled:
        by_class: dict[int, list[bool]] = {}
        for row in labelled:
            by_class.setdefault(row["label"], []).append(bool(row["correct"]))
        recall = mean([mean(right) for right in by_class.values()])
        if all(len(row.get("top5") or ()) >= 5 for row in labelled):
            top5 = mean([row["label"] in row["top5"] for row in labelled])
    broken = None
    if rows and all("broken_by" in row for row in rows):
        broken = dict.fromkeys(BROKEN, 0)
        for row in rows:
            by = {"clean": "wrong before", None: "standing"}.get(row["broken_by"], row["broken_by"])
            broken[by if by in broken else "targets"] += 1
    forwards = [row["forwards"] for row in rows if row.get("forwards") is not None]
    found = {"acc5": top5, "mean_per_class_recall": recall, "broken": broken}
    return found | {"forwards": mean(forwards) if forwards else None}


def benchmark_csv(found: Sequence[Result]) -> str:
    """A row per accuracy. ``pretrained`` is the revision where one is known."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for r in found:
        if r["measure"] != "accuracy":
            continue
        pretrained = r["settings"].get("model_revision") or ""
        classifier = r["settings"].get("classifier", "zero_shot")
        low, high = r["ci95"] or (None, None)
        own = {
            "acc1": r["value"],
            "pretrained": pretrained,
            "task": TASKS.get(classifier, classifier),
            "language": "en",
            "model_fullname": f"{r['model']} {pretrained}".strip(),
            "classifier": classifier,
            "t": r["settings"].get("t"),
            "ci95_low": low,
            "ci95_high": high,
        }
        writer.writerow(r | own)
    return file.getvalue()
