"""report.html, benchmark.csv and the terminal's tables, made from the directory of an evaluation.

They can be made again at any time. The page is one file without scripts that opens offline and contains its figures
and pictures. Its text is in report.html.jinja.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from PIL import Image
from rich.table import Table as TerminalTable
from torch import Tensor

from utils.errors import UserError
from utils.evaluation import figures
from utils.evaluation.attacks import ATTACKS
from utils.evaluation.results import (
    Cell,
    Results,
    attempt,
    cell_name,
    column_name,
    figure_name,
    file_name,
    read_alike,
    replace_file,
    short_names,
)
from utils.processes.progress import wide_console
from utils.redaction import escaped
from utils.training.metrics import MetricsFile

# CLIP_benchmark's columns (`clip_benchmark build`), then those that distinguish our rows.
CSV_COLUMNS = (
    *("acc1", "acc5", "mean_per_class_recall", "dataset", "model", "pretrained", "task", "language", "model_fullname"),
    *("classifier", "attack", "eps", "sigma", "corruption", "severity", "t"),
    *("image_size", "ci95_low", "ci95_high", "n", "seed"),
)
TASKS = {"zero_shot": "zeroshot_classification", "linear_head": "linear_probe"}
TRAINING = {  # key of metrics.jsonl: title, axis, whether it is a share of images
    "eval_accuracy_clean": ("clean accuracy", "accuracy", True),
    "eval_accuracy_pgd": ("accuracy under PGD, at the run's own eps", "accuracy", True),
    "eval_accuracy_attacked": ("accuracy on attacked images", "accuracy", True),
    "multiplier_mean": ("multiplier, mean", "multiplier", False),
    "violation_ratio_median": ("clean distance / margin, median", "ratio", False),
    "violation_ratio_p95": ("clean distance / margin, 95th percentile", "ratio", False),
    "eval_kl": ("KL to the start model", "nats", False),
}
ON_IMAGES = ("accuracy", "follows_word")  # measures in the table of accuracies
SHARES = (*ON_IMAGES, "pair_accuracy", "worst_group_accuracy", "group_gap")  # drawn in %
# Measures with their own entry under "How it was measured"; all others are fairness.
EXPLAINED = (*ON_IMAGES, "pair_accuracy", "retention", "neutral_t", "interpretability", "fidelity")
MANY_COLUMNS = 7  # a terminal table with more columns is transposed
PICTURES = 4  # examples for every model and attack
PICTURE_SIDE = 128  # larger pictures are reduced, to keep the page small
CURVE_POINTS = 400  # per training curve; longer ones are averaged
BROKEN = ("wrong before", "cross-entropy", "targets", "standing")  # outcomes of an image under APGD

# A result of results.json. The page adds ``place`` and ``label`` of its model, ``set`` (the short name), ``variant``,
# and ``clean``, the clean accuracy of the same images by the same classifier, or None.
Result = dict[str, Any]
Table = dict[str, Any]
Cells = dict[tuple[str, str, str], list[dict[str, Any]]]  # (set, row, column): contents, mostly one


class Panel(NamedTuple):
    """A figure of a section, under the heading of its group; ``keys``: {place of a line style: name in the legend}."""

    group: str
    title: str
    draw: Callable[[Axes], None]
    keys: dict[int, str]


class Shown:
    """The results of a page, as ``Result`` describes them."""

    def __init__(self, results: Results, found: Sequence[Result]) -> None:
        self.results = results
        self.models = short_names((r["model"] for r in found), of_models=True)
        self.sets = short_names(r["dataset"] for r in found)
        self.labels = list(self.models.values())
        plain = [r for r in found if "t" not in r["settings"]]
        variant = dict(zip(map(id, plain), variants(plain)))
        clean: dict[str, Result] = {}
        for r in plain:
            if (r["measure"], r["attack"]) == ("accuracy", "clean"):
                clean.setdefault(read_alike(r), r)
        places = {name: place for place, name in enumerate(self.models)}
        self.every = [
            r
            | {"place": places[r["model"]], "label": self.models[r["model"]], "set": self.sets[r["dataset"]]}
            | {"variant": variant.get(id(r), ""), "clean": clean.get(read_alike(r))}
            for r in found
        ]
        self.plain = [r for r in self.every if "t" not in r["settings"]]

    def accuracies(self, attack: str = "") -> list[Result]:
        """The accuracies under one attack, or under all."""
        return [r for r in self.plain if r["measure"] == "accuracy" and attack in ("", r["attack"])]

    def panel(
        self, group: str, title: str, of_models: Mapping[int, Any], draw: Callable[..., None], **more: Any
    ) -> Panel:
        """A panel that ``draw(axis, of_models, **more)`` draws; ``of_models`` is keyed by place."""
        keys = {place: self.labels[place] for place in of_models}
        return Panel(group, title, lambda axis: draw(axis, of_models, **more), keys)


def write_report(output_dir: str | Path, undrawn: Sequence[str] = ()) -> Path:
    """Writes report.html, benchmark.csv and pictures of heads into an evaluation's directory; returns the page's path.

    The page and the log name every figure that cannot be drawn; the page also names those in ``undrawn``.
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
    """The variables of the template. ``found``: the current results with their ``record_figures``."""
    shown = Shown(results, found)
    attempt("head_t_*.png", partial(draw_heads, shown), undrawn)
    sections = []
    for name, (title, _) in SECTIONS.items():
        drawn = attempt(f"{name} in report.html", partial(section, shown, name), undrawn)
        if drawn is None or drawn["groups"]:  # keep a failed section: its place also has tables
            sections.append({"id": name, "title": title, "legend": [], "groups": []} | (drawn or {}))
    keys = attempt("the legend", lambda: legend("model", enumerate(shown.labels)), undrawn)
    pictures = attempt("pictures", lambda: picture_groups(shown), undrawn)
    strips = attempt("strips of pictures", lambda: picture_strips(shown), undrawn)
    revisions = {r["model"]: r["settings"].get("model_revision") for r in found}
    read = [(r["model"], r["dataset"], r["settings"].get("shards")) for r in found]
    return {
        "results": results,
        "models": shown.models,
        "sets": {
            name: (short, max(r["n"] for r in found if r["dataset"] == name)) for name, short in shown.sets.items()
        },
        "keys": [entry["key"] for entry in keys or []],
        "revisions": revisions,
        "heading": heading,
        "warnings": [
            w
            for w in results.warnings
            if w["model_revision"] == revisions.get(w["model"])
            # Leave out warnings on data that has changed since. Earlier versions did not record the data.
            and ("shards" not in w or (w["model"], w["dataset"], w["shards"]) in read)
        ],
        "summary": summary_table(shown),
        "others": other_figures(shown),
        "tests": test_table(shown),
        "broken": broken_table(shown),
        "corruptions": corruption_table(shown),
        "sections": sections,
        "pictures": pictures or [],
        "strips": strips or [],
        "undrawn": undrawn,
        "retrieved": {
            path.stem.removeprefix("retrieval_"): data_uri(path.read_bytes())
            for path in sorted(results.output_dir.glob("retrieval_*.png"))
        },
        "methods": methods(shown.every),
    }


# Names and numbers


def heading(cell: Mapping[str, Any]) -> str:
    """``column_name`` with spaces, so that it can be wrapped; also for a warning or a comparison."""
    return column_name({"measure": "accuracy", "corruption": None, "sigma": None} | dict(cell)).replace("_", " ")


def flat_settings(result: Mapping[str, Any]) -> dict[str, str]:
    """Seed and settings in words, nested ones as group.name, without None."""
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
    """The settings that distinguish each result from others of its model, set and attack: mostly "", or "seed 1".

    All results of one attack name the same settings, so that columns and lines hold comparable figures.
    """
    settings = [flat_settings(result) for result in results]
    groups = defaultdict(list)
    identity = ("measure", "attack", "model", "dataset", "eps", "sigma", "corruption", "severity")
    for result, own in zip(results, settings):
        groups[tuple(result[name] for name in identity)].append(own)
    differing: dict[tuple[str, str], set[str]] = defaultdict(set)
    for (measure, attack, *_), group in groups.items():
        names = {name for own in group for name in own} - {"probe_tolerance"}  # follows from the classifier
        differing[measure, attack] |= {name for name in names if len({own.get(name) for own in group}) > 1}
    return [
        ", ".join(f"{name} {own.get(name, 'default')}" for name in sorted(differing[r["measure"], r["attack"]]))
        for r, own in zip(results, settings)
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


# Tables: groups of rows, one per set. A cell's content has ``value``, and optionally ``small``, ``best``, ``shade``.


def table(sets: Iterable[str], columns: Sequence[str], cells: Cells) -> Table | None:
    """A table with rows in the order of their first cell, without empty columns; None if there are no cells."""
    filled = {column for _, _, column in cells}
    columns = [column for column in columns if column in filled]
    groups = []
    for name in sets:
        rows = dict.fromkeys(row for of_set, row, _ in cells if of_set == name)
        shown = [{"name": row, "cells": [cells.get((name, row, column)) for column in columns]} for row in rows]
        if shown:
            groups.append({"name": name, "rows": shown})
    return {"columns": columns, "groups": groups} if groups else None


def turned(content: Table) -> Table:
    """The table with rows and columns swapped."""
    cells: Cells = {}
    rows: dict[str, None] = {}
    for group in content["groups"]:
        rows |= dict.fromkeys(row["name"] for row in group["rows"])
        for place, column in enumerate(content["columns"]):
            for row in group["rows"]:
                if cell := row["cells"][place]:
                    cells[group["name"], column, row["name"]] = cell
    return table([group["name"] for group in content["groups"]], list(rows), cells) or content


def print_tables(results: Results, asked: Iterable[Cell]) -> None:
    """Prints the figures asked for, and those of every head at t = 0, t* (if pairs gave one) and t = 1."""
    shown = Shown(results, [result for cell in asked if (result := results.find(cell)) is not None])
    tables = {"Accuracy in %, with Wilson 95 % intervals": summary_table(shown), "Other figures": other_figures(shown)}
    tables |= {f"The head of {name}": strength_table(shown, place) for place, name in enumerate(shown.models)}
    for title, content in tables.items():
        if content is None:
            continue
        if len(content["columns"]) > max(MANY_COLUMNS, len(shown.models)):
            content = turned(content)
        drawn = TerminalTable(title=title)
        for name in ("data", ""):
            drawn.add_column(name, overflow="fold")
        for name in content["columns"]:
            drawn.add_column(name, overflow="fold", justify="right")
        for group in content["groups"]:
            for row in group["rows"]:
                parts = [cell[0] if cell else {"value": ""} for cell in row["cells"]]
                texts = [f"{part['value']} {part.get('small', '')}".strip() for part in parts]
                drawn.add_row(group["name"], row["name"], *texts)
        wide_console().print(drawn)


def summary_table(shown: Shown) -> Table | None:
    """Accuracies in %: a row per model, a column per attack; corruptions as their mean."""
    order = {attack: place for place, attack in enumerate(ATTACKS)}
    columns: dict[str, tuple] = {}  # column: sort key
    cells: Cells = {}
    images: dict[tuple[str, str], set[int]] = defaultdict(set)
    corrupted: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for r in sorted(shown.plain, key=lambda r: r["place"]):
        if r["measure"] not in ON_IMAGES:
            continue
        of_row = images[r["set"], r["label"]]
        if r["corruption"] is not None:
            corrupted[r["set"], r["label"], r["variant"]].append(r)
            continue
        of_row.add(r["n"])
        title, place = joined(heading(r), r["variant"]), order.get(r["attack"], len(order))
        columns[title] = (r["measure"] != "accuracy", place, r["variant"], r["eps"] or r["sigma"] or 0)
        small = "" if r["ci95"] is None else "[{}, {}]".format(*map(percent, r["ci95"]))
        cells[r["set"], r["label"], title] = [{"result": r, "value": percent(r["value"]), "small": small}]
    for (name, model, variant), group in corrupted.items():
        average, clean = mean([r["value"] for r in group]), group[0]["clean"]
        title, drop = joined("corruptions, mean", variant), joined("corruptions, drop", variant)
        columns[title] = (False, order["corruptions"], variant, 0)
        cells[name, model, title] = [{"value": percent(average), "small": f"of {len(group)}"}]
        if clean:
            columns[drop] = (False, order["corruptions"], variant, 1)
            cells[name, model, drop] = [{"value": f"{100 * (average - clean['value']):+.1f}", "small": "points"}]
    ordered = sorted(columns, key=columns.__getitem__)
    for name, column in itertools.product(shown.sets.values(), ordered):
        in_column = [cell[0] for (of_set, _, title), cell in cells.items() if (of_set, title) == (name, column)]
        mark_best(in_column, shown.results.compared)
    numbers: Cells = {}
    for (name, model), of_row in images.items():
        sizes = sorted({min(of_row), max(of_row)}) if of_row else []
        numbers[name, model, "images"] = [{"value": " to ".join(f"{n:,}" for n in sizes)}]
    return table(shown.sets.values(), ["images", *ordered], numbers | cells)


def mark_best(cells: Sequence[dict[str, Any]], comparisons: Sequence[Result]) -> None:
    """Sets ``best`` on a column's highest cell and on all that McNemar's test cannot distinguish from it (p >= 0.05).

    Marks none if a test is missing (no records, other images, not an accuracy) or if that would mark all cells.
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
        p_value = next((test["p_value"] for test in comparisons if set(test["records"]) == pair), None)
        if p_value is None:
            return
        if p_value >= 0.05:
            tied.append(cell)
    if len(tied) < len(rivals):
        for cell in tied:
            cell["best"] = True


def other_figures(shown: Shown) -> Table | None:
    """All figures but accuracies: a row per figure, a column per model."""
    others = [r for r in shown.plain if r["measure"] not in ON_IMAGES]
    cells: Cells = {}
    for r in others:
        small = "" if r["ci95"] is None else "[{:.4g}, {:.4g}]".format(*r["ci95"])
        value = "undefined" if r["value"] is None else f"{r['value']:.4g}"
        cells[r["set"], joined(figure_name(r), r["variant"]), r["label"]] = [{"value": value, "small": small}]
    return table(shown.sets.values(), shown.labels, cells)


def test_table(shown: Shown) -> Table | None:
    """McNemar's tests: a row per pair of models, a column per attack."""
    cells: Cells = {}
    comparisons = shown.results.compared
    for test in comparisons:
        pair, p = ", ".join(shown.models[name] for name in test["models"]), test["p_value"]
        small = "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"
        counts = f"b {test['only_first']}, c {test['only_second']}"
        cell = cells.setdefault((shown.sets.get(test["dataset"], ""), pair, heading(test)), [])
        cell.append({"value": counts, "small": small, "significant": p < 0.05})
    return table(shown.sets.values(), list(dict.fromkeys(map(heading, comparisons))), cells)


def broken_table(shown: Shown) -> Table | None:
    """The outcomes of images under APGD, in % of all; None if the records do not say."""
    cells: Cells = {}
    for r in shown.every:
        if r["attack"] == "apgd" and r["broken"]:
            row = joined(f"{r['label']}, {r['eps']:g}/255", r["variant"])
            values = {column: percent(count / r["n"]) for column, count in r["broken"].items()}
            values["forwards"] = "" if r["forwards"] is None else f"{r['forwards']:,.0f}"
            cells |= {(r["set"], row, column): [{"value": value}] for column, value in values.items()}
    return table(shown.sets.values(), [*BROKEN, "forwards"], cells)


def corruption_table(shown: Shown) -> Table | None:
    """Accuracy in % per corruption, mean over severities: a row per corruption, a column per model."""
    corrupted = [r for r in shown.accuracies() if r["corruption"] is not None]
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for r in corrupted:
        title = joined(r["corruption"].replace("_", " "), r["variant"])
        values[r["set"], title, r["label"]].append(r["value"])
    means = {place: mean(of_cell) for place, of_cell in values.items()}
    cells: Cells = {place: [{"value": percent(mean), "shade": f"{mean:.2f}"}] for place, mean in means.items()}
    return table(shown.sets.values(), shown.labels, cells)


def strength_table(shown: Shown, place: int) -> Table | None:
    """All figures over the strength t of a head, at t = 0, t* and t = 1."""
    swept, neutral = strengths(shown, place)
    marks = {0.0: "t = 0"} | ({} if neutral is None else {neutral: f"t* = {neutral:g}"}) | {1.0: "t = 1"}
    cells: Cells = {}
    for r in swept:
        t, value = r["settings"]["t"], "undefined" if r["value"] is None else f"{r['value']:.3f}"
        if t in marks:
            cells[r["set"], figure_name(r), marks[t]] = [{"value": value}]
    return table(shown.sets.values(), list(marks.values()), cells)


# Figures: a section has groups of panels, and legends


def section(shown: Shown, name: str) -> dict[str, Any]:
    """Panels under one legend; for heads one legend per group, because each head has its own curves.

    If no group has several panels, the groups' names go into the titles instead of headings.
    """
    about, panels = SECTIONS[name]
    of_heads = name == "strength"
    groups: dict[str, list[Panel]] = defaultdict(list)
    for panel in panels(shown):
        groups[panel.group].append(panel)
    if groups and not of_heads and all(len(of_group) == 1 for of_group in groups.values()):
        groups = {"": [p._replace(title=joined(p.group, p.title)) for (p,) in groups.values()]}
    drawn, keys = [], list[tuple[int, str]]()
    for n, (group, of_group) in enumerate(groups.items()):
        svgs = []
        for m, panel in enumerate(of_group):
            of = f"The head of {group}" if of_heads else about
            subject = panel.title if of_heads or panel.group in panel.title else joined(panel.group, panel.title)
            what = f"{of}: {subject}. Drawn: {joined(*panel.keys.values())}"
            svg = figures.inline_svg(figures.figure_of({"": panel.draw}), f"{name}-{n}-{m}", what)
            svgs.append({"title": panel.title, "svg": Markup(svg)})
        own = [item for panel in of_group for item in panel.keys.items()]
        keys += own
        drawn.append({"title": group, "legend": legend(f"{name}-{n}", own) if of_heads else [], "panels": svgs})
    return {"legend": [] if of_heads else legend(name, keys, bar=name == "corruptions"), "groups": drawn}


def legend(name: str, keys: Iterable[tuple[int, str]], bar: bool = False) -> list[dict[str, Any]]:
    """Samples of lines or bars, with their names."""
    return [
        {"key": Markup(figures.inline_svg(figures.key_figure(place, bar), f"{name}-{place}-key", "")), "label": label}
        for place, label in sorted(set(keys))
    ]


def by_panel(results: Iterable[Result]) -> dict[tuple[str, str], dict[int, list[Result]]]:
    """{(set, variant): {place of the model: its results}}"""
    panels: dict[tuple[str, str], dict[int, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        panels[r["set"], r["variant"]][r["place"]].append(r)
    return panels


def point(result: Result, x: float) -> figures.Point:
    return (x, result["value"], *(result["ci95"] or (None, None)))


def strength_panels(shown: Shown, attack: str, unit: str) -> Iterator[Panel]:
    """Accuracy over eps or sigma, in 1/255; the value at 0 is the clean accuracy, if known."""
    attacked = [r for r in shown.accuracies(attack) if r[unit] is not None]
    for (name, variant), of_models in by_panel(attacked).items():
        curves = {}
        for place, of_model in of_models.items():
            clean = of_model[0]["clean"]
            curves[place] = [point(clean, 0)] if clean else []
            curves[place] += [point(r, r[unit]) for r in of_model]
        title = variant if unit == "sigma" else joined(attack, variant)
        yield shown.panel(name, title, curves, figures.accuracy_curves, xlabel=f"{unit}, 1/255")


def front_panels(shown: Shown) -> Iterator[Panel]:
    """Clean against robust accuracy, under written words and the strongest l_inf attack that several models share."""
    beside = point_names(shown.labels)
    columns: dict[str, dict[tuple[str, str, float], dict[int, Result]]] = {}
    for r in shown.plain:
        of_set = columns.setdefault(r["set"], {})
        attacked = r["measure"] == "accuracy" and (r["eps"] is not None or r["attack"] == "typographic")
        if attacked and r["clean"]:
            of_set.setdefault((r["attack"], r["variant"], r["eps"] or 0), {})[r["place"]] = r
    for name, of_set in columns.items():
        shared = {column: of_models for column, of_models in sorted(of_set.items()) if len(of_models) > 1}
        attacks = {attack for attack, _, _ in shared}
        strongest = next((attack for attack in ("apgd", *ATTACKS) if attack in attacks), None)
        for (attack, variant, _), of_models in shared.items():
            if attack in (strongest, "typographic"):
                points = {place: (beside[place], point(r["clean"], 0), point(r, 0)) for place, r in of_models.items()}
                title = joined(heading(next(iter(of_models.values()))), variant)
                yield shown.panel(name, title, points, figures.clean_robust_front, ylabel=f"{attack} accuracy, %")


def point_names(labels: Sequence[str], length: int = 22) -> list[str]:
    """Names that fit beside points: long ones lose the words that all names begin with, then their middle."""
    if max(map(len, labels)) > length:
        differ = next((n for n, letters in enumerate(zip(*labels)) if len(set(letters)) > 1), 0)
        start = 1 + max(labels[0].rfind(separator, 0, differ) for separator in "-_ /")
        labels = [f"…{label[start:]}" if start > 6 else label for label in labels]
    half = length // 2
    return [label if len(label) <= length else f"{label[: half - 1]}…{label[-half:]}" for label in labels]


def corruption_panels(shown: Shown) -> Iterator[Panel]:
    """Bars by severity, mean over the corruptions; severity 0 is clean."""
    for (name, variant), of_models in by_panel(r for r in shown.accuracies() if r["corruption"] is not None).items():
        bars = {}
        for place, of_model in of_models.items():
            values: dict[float, list[float]] = defaultdict(list)
            if clean := of_model[0]["clean"]:
                values[0].append(clean["value"])
            for r in of_model:
                values[r["severity"]].append(r["value"])
            bars[place] = {severity: mean(of_severity) for severity, of_severity in values.items()}
        yield shown.panel(name, variant, bars, figures.severity_bars)


def distribution_panels(shown: Shown, measure: str, column: str, xlabel: str, title: str = "") -> Iterator[Panel]:
    """The distribution of a column of the records, if records have it."""
    of_measure = [r for r in shown.plain if r["measure"].startswith(measure)]
    for (name, variant), of_models in by_panel(of_measure).items():
        values = {}
        for place, of_model in of_models.items():
            columns = (
                [row[column] for row in shown.results.records(r) if row.get(column) is not None] for r in of_model
            )
            found = next(filter(None, columns), [])
            same = {"fidelity": {"value": 0, "cosine": 1}}.get(measure, {}).get(column)
            # The reference itself does not differ from itself: nothing to show.
            if found and (same is None or max(abs(x - same) for x in found) > 1e-5):
                values[place] = found
        if values:
            yield shown.panel(name, joined(title, variant), values, figures.distributions, xlabel=xlabel)


def fidelity_panels(shown: Shown) -> Iterator[Panel]:
    for column, xlabel in (("value", "relative squared distance"), ("cosine", "cosine to the reference")):
        yield from distribution_panels(shown, "fidelity", column, xlabel, title=xlabel)


def training_panels(shown: Shown) -> Iterator[Panel]:
    logged = {place: MetricsFile(Path(name) / "metrics.jsonl").read() for place, name in enumerate(shown.models)}
    # Pretraining also logs a clean accuracy; its thousands of steps would squeeze the curves of fine-tuning.
    own = set(TRAINING) - {"eval_accuracy_clean"}
    logged = {place: rows for place, rows in logged.items() if any(own & row.keys() for row in rows)}
    for column, (title, ylabel, share) in TRAINING.items():
        curves = {}
        for place, rows in logged.items():
            points = [(row["step"], row[column]) for row in rows if isinstance(row.get(column), int | float)]
            if points and (column != "multiplier_mean" or any(value for _, value in points)):  # FARE has no multiplier
                curves[place] = thinned(points)
        if curves:
            yield shown.panel("", title, curves, figures.training_curves, ylabel=ylabel, share=share)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``CURVE_POINTS`` points: means of neighbours."""
    size = -(-len(points) // CURVE_POINTS)
    pieces = (zip(*points[start : start + size]) for start in range(0, len(points), size))
    return [(mean(xs), mean(ys)) for xs, ys in pieces]


def strengths(shown: Shown, place: int) -> tuple[list[Result], float | None]:
    """The results over the strength t of this model's head, and its t* if pairs gave one."""
    of_model = [r for r in shown.every if r["place"] == place]
    neutral = [r["value"] for r in of_model if r["measure"] == "neutral_t"]
    return [r for r in of_model if "t" in r["settings"]], neutral[-1] if neutral else None


def head_panels(shown: Shown) -> Iterator[Panel]:
    """A group per head: for every set, shares of images in % over t, and other figures over t."""
    for place, model in enumerate(shown.labels):
        swept, neutral = strengths(shown, place)
        swept = [r for r in swept if r["value"] is not None]
        names = dict(enumerate(dict.fromkeys(map(figure_name, swept))))
        places = {name: of_curve for of_curve, name in names.items()}
        panels: dict[tuple[str, bool], dict[int, dict[float, float]]] = {}
        for r in swept:
            share = r["measure"] in SHARES
            curves = panels.setdefault((r["set"], share), defaultdict(dict))
            curves[places[figure_name(r)]][r["settings"]["t"]] = r["value"] * (100 if share else 1)
        for (of_set, share), curves in panels.items():
            ylabel = "share, %" if share else "fairness"
            draw = partial(figures.t_sweep, curves=curves, names=names, ylabel=ylabel, neutral=neutral)
            title = joined(of_set, "shares" if share else "fairness")
            yield Panel(model, title, draw, {of_curve: names[of_curve] for of_curve in curves})


def draw_heads(shown: Shown) -> None:
    """Writes head_t_<model>.png for every head, its panels in one picture."""
    for model, panels in itertools.groupby(head_panels(shown), key=lambda panel: panel.group):
        path = shown.results.output_dir / f"head_t_{file_name(model)}.png"
        draws = {panel.title: panel.draw for panel in panels}
        figure = figures.figure_of(draws, f"What the strength of the head changes: {model}")
        figures.save_figure(figure, path, dpi=120)


# In the order of the page: the title and the panels.
SECTIONS: dict[str, tuple[str, Callable[[Shown], Iterable[Panel]]]] = {
    "robustness": (
        "Accuracy against the size of the perturbation",
        lambda shown: (panel for attack in ATTACKS for panel in strength_panels(shown, attack, "eps")),
    ),
    "front": ("Clean against robust accuracy", front_panels),
    "noise": ("Gaussian noise", lambda shown: strength_panels(shown, "gaussian_noise", "sigma")),
    "corruptions": ("Common corruptions", corruption_panels),
    "interpretability": (
        "Interpretability",
        lambda shown: distribution_panels(shown, "interpretability", "value", "cosine"),
    ),
    "fidelity": ("Fidelity to the reference", fidelity_panels),
    "training": ("Training", training_panels),
    "strength": ("The strength of the head", head_panels),
}


# Pictures


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def png(pixel_values: Tensor, *, smooth: bool = True) -> str:
    """(3, H, W) in [0,1] as the source of an <img>, reduced to ``PICTURE_SIDE`` if larger."""
    image = Image.fromarray((pixel_values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue())


def picture_groups(shown: Shown) -> list[dict[str, Any]]:
    """Clean image, attacked image and perturbation per model, set and attack, at the largest eps with pictures."""
    kept: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for r in sorted(shown.accuracies(), key=lambda r: r["place"]):
        if (r["eps"] is not None or r["attack"] == "typographic") and shown.results.pictures_path(r).exists():
            kept[r["set"], r["attack"], r["variant"]].append(r)
    groups = []
    for (name, attack, variant), of_attack in kept.items():
        if attack == "pgd" and any(other[:2] == (name, "apgd") for other in kept):
            continue  # the stronger one looks the same
        eps = max(r["eps"] or 0 for r in of_attack)
        strongest = [r for r in of_attack if (r["eps"] or 0) == eps]
        rows = {
            r["label"]: [example(*parts, eps) for parts in itertools.islice(zip(*found), PICTURES)]
            for r in strongest
            if (found := shown.results.pictures(r))
        }
        title = f"{name}, {joined(heading(strongest[0]), variant)}"
        groups.append({"title": title, "factor": f"{255 / (2 * eps):.3g}" if eps else "", "rows": rows})
    return groups


def example(clean: Tensor, attacked: Tensor, caption: Mapping[str, str], eps: float) -> dict[str, Any]:
    """An image, its attacked copy, and for an l_inf attack 1/2 + delta / (2 eps): grey where nothing changed."""
    magnified = png(0.5 + (attacked - clean) * (255 / (2 * eps)), smooth=False) if eps else ""
    sources = {"clean": png(clean), "attacked": png(attacked), "magnified": magnified}
    return {**caption, **sources, "small": is_small(clean)}


def is_small(pixel_values: Tensor) -> bool:
    """Whether a picture has so few pixels that the page shows each as a square."""
    return max(pixel_values.shape[-2:]) <= 64


def picture_strips(shown: Shown) -> list[dict[str, Any]]:
    """Examples of noise and corruptions: one image of each, the clean one first, with the first model's answers."""
    strips = []
    for name, attack in itertools.product(shown.sets.values(), ("gaussian_noise", "corruptions")):
        own = [r for r in shown.accuracies(attack) if r["set"] == name and shown.results.pictures_path(r).exists()]
        own = [r for r in own if r["place"] == own[0]["place"]]
        # The highest severity of a corruption; every sigma of noise.
        highest = {(r["corruption"], r["sigma"]): r for r in sorted(own, key=lambda r: r["severity"] or 0)}
        found = []
        for r in sorted(highest.values(), key=lambda r: (r["corruption"] or "", r["sigma"] or 0)):
            if kept := shown.results.pictures(r):
                title = r["corruption"].replace("_", " ") if r["corruption"] else f"sigma {r['sigma']:g}/255"
                found.append((title, r["severity"], *(part[0] for part in kept)))
        if not found:
            continue
        _, severity, clean, _, answers = found[0]
        pictures = [{"title": "clean", "source": png(clean), "predicted": answers["predicted_clean"]}]
        pictures[0]["label"] = answers["label"]
        for title, _, _, attacked, answers in found:
            answer = {of: answers[of] for of in ("label", "predicted")}
            pictures.append({"title": title, "source": png(attacked)} | answer)
        title = f"{name}, {attack.replace('_', ' ')}" + (f", severity {severity}" if severity else "")
        strips.append({"title": title, "model": own[0]["label"], "small": is_small(clean), "pictures": pictures})
    return strips


# How it was measured


def methods(results: Sequence[Result]) -> dict[str, Any]:
    """Every attack and measure with its settings; settings common to all are listed once."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for r in results:
        measure = "fidelity" if r["measure"].startswith("fidelity") else r["measure"]
        attack = r["attack"] if measure == "accuracy" else ""
        groups[measure if measure in EXPLAINED else "fairness", attack].append(r)
    settings = {name: setting_values(group) for name, group in groups.items()}
    common = set.intersection(*(set(values.items()) for values in settings.values()))
    entries = [
        {"measure": measure, "attack": attack, "text": ATTACKS[attack].about if attack in ATTACKS else ""}
        | {"settings": [item for item in settings[measure, attack].items() if item not in common]}
        for measure, attack in groups
    ]
    return {"common": sorted(common), "entries": entries}


def setting_values(group: Sequence[Result]) -> dict[str, str]:
    """{setting: all its values} for the results of one attack or measure, strengths with their units."""
    values: dict[str, list[str]] = defaultdict(list)
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
                values[name].append(value)
    return {name: " / ".join(dict.fromkeys(of_name)) for name, of_name in values.items() if of_name}


# benchmark.csv


def record_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Further figures from the records of an accuracy; None if the records lack the values.

    acc5: share of images with their class among the five likeliest, for five classes or more. mean_per_class_recall:
    mean over classes of the share of correct images. broken: images per ``BROKEN``. forwards: mean passes per image.
    """
    labelled = [row for row in rows if row.get("label") is not None and "correct" in row]
    by_class: dict[int, list[bool]] = defaultdict(list)
    for row in labelled:
        by_class[row["label"]].append(row["correct"])
    recalls = [mean(right) for right in by_class.values()]
    top5 = [row["label"] in row["top5"] for row in labelled if len(row.get("top5") or ()) >= 5]
    broken = None
    if rows and all("broken_by" in row for row in rows):
        names = {"clean": "wrong before", None: "standing", "cross-entropy": "cross-entropy"}
        broken = dict.fromkeys(BROKEN, 0) | Counter(names.get(row["broken_by"], "targets") for row in rows)
    forwards = [row["forwards"] for row in rows if row.get("forwards") is not None]
    return {
        "acc5": mean(top5) if top5 and len(top5) == len(labelled) else None,
        "mean_per_class_recall": mean(recalls) if recalls else None,
        "broken": broken,
        "forwards": mean(forwards) if forwards else None,
    }


def benchmark_csv(found: Sequence[Result]) -> str:
    """A row per accuracy. ``pretrained`` is the model's revision, if known."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for r in found:
        if r["measure"] != "accuracy":
            continue
        pretrained = r["settings"].get("model_revision") or ""
        classifier = r["settings"].get("classifier", "zero_shot")
        own = {
            "acc1": r["value"],
            "pretrained": pretrained,
            "task": TASKS.get(classifier, classifier),
            "language": "en",
            "model_fullname": f"{r['model']} {pretrained}".strip(),
            "classifier": classifier,
            "t": r["settings"].get("t"),
            "image_size": r["settings"].get("image_size"),
        }
        writer.writerow(r | own | dict(zip(("ci95_low", "ci95_high"), r["ci95"] or ())))
    return file.getvalue()
