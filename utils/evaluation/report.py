"""report.html and benchmark.csv: what an evaluation found, for people and for tables of other projects.

Both are made from what lies in the directory alone (results.json, records/, pictures/, retrieval_*.png), and from the
metrics.jsonl of models that are local directories; they can be made again at any time. The page is one file that opens
offline: figures are SVG inside it, pictures are PNG inside it, there is no script.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from utils.evaluation.results import Results, attempt, cell_name, column_name, figure_name, replace_file
from utils.evaluation.sanity import READING
from utils.redaction import escaped
from utils.training.metrics import MetricsFile

# CLIP_benchmark's columns (`clip_benchmark build`), then what tells our rows apart.
CSV_COLUMNS = (
    *("acc1", "acc5", "mean_per_class_recall", "dataset", "model", "pretrained", "task", "language", "model_fullname"),
    *("classifier", "attack", "eps", "sigma", "corruption", "severity", "t", "ci95_low", "ci95_high", "n", "seed"),
)
TASKS = {"zero_shot": "zeroshot_classification", "linear_head": "linear_probe"}
MEASURES = {
    "accuracy": "Share of images whose answer is right.",
    "follows_word": "Share of images whose answer is the written word. Lower is better.",
    "pair_accuracy": "Share of pairs whose chosen text is more similar to the image than the rejected ones.",
    "retention": "Mean KL(reference || model) over the class prompts, clean images.",
    "neutral_t": "The t at which validation pairs are nearest chance while the task is kept.",
    "interpretability": "Cosine between an image and descriptions in natural language of its true class, clean images.",
    "fidelity": "||phi(x) - phi0(x)||^2 / ||phi0(x)||^2 and the cosine to phi0(x), phi0 the reference, clean images.",
    "fairness": "Between attributes: class prompts as queries (MaxSkew, NDKL), and classification.",
}
PICTURES = 4  # examples of every model and attack
PICTURE_SIDE = 128  # larger pictures are reduced: a page, not an archive
CURVE_POINTS = 400  # of a training curve; longer ones are averaged in pieces

Result = dict[str, Any]
Panel = tuple[str, str, Figure, Iterable[int]]  # set, title, what is drawn, places of the models in it


def write_report(output_dir: str | Path, undrawn: Sequence[str] = ()) -> Path:
    """Writes report.html and benchmark.csv into a directory that evaluate.py has filled; returns the page's path.

    A figure that cannot be drawn is named in the page, with those of ``undrawn``, and in the log.
    """
    results = Results(output_dir)
    if not results.results:
        raise UserError(f"{output_dir}: no results.json with results; expected the --output_dir of evaluate.py")
    found = [record_figures(results.records(result)) for result in results.current()]
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
    replace_file(
        results.output_dir / "benchmark.csv",
        benchmark_csv(results.current(), found).encode("utf-8", "backslashreplace"),
    )
    replace_file(path, page.encode("utf-8", "backslashreplace"))
    return path


def page_content(results: Results, found: Sequence[Mapping[str, Any]], undrawn: list[str]) -> dict[str, Any]:
    """Everything that the template shows, in words and finished markup; what could not be drawn is added to ``undrawn``."""
    every = results.current()
    models, sets = short_names(r["model"] for r in every), short_names(r["dataset"] for r in every)
    images = {name: max(r["n"] for r in every if r["dataset"] == name) for name in sets}
    revisions = {r["model"]: r["settings"].get("model_revision") for r in every}
    shards: dict[tuple[str, str], list[Any]] = {}
    for r in every:
        shards.setdefault((r["model"], r["dataset"]), []).append(r["settings"].get("shards"))
    plain = [r for r in every if "t" not in r["settings"]]
    names = dict(zip(map(id, plain), variants(plain)))
    comparisons = results.compared
    drawings: dict[str, Callable[[], Any]] = {
        "robustness": lambda: robustness_section(plain, names, models, sets),
        "front": lambda: front_section(plain, names, models, sets),
        "noise": lambda: noise_section(plain, names, models, sets),
        "corruptions": lambda: corruption_section(plain, names, models, sets),
        "interpretability": lambda: interpretability_section(results, plain, names, models, sets),
        "fidelity": lambda: fidelity_section(results, plain, names, models, sets),
        "training": lambda: training_section(models),
        "strength": lambda: strength_section(every, models, sets),
    }
    sections = []
    for name, draw in drawings.items():
        before = len(undrawn)
        section = attempt(f"{name} in report.html", draw, undrawn)
        if len(undrawn) > before:  # its place stays: tables stand there too
            section = {
                "id": name,
                "title": name.capitalize(),
                "text": "Could not be drawn.",
                "legend": [],
                "groups": [],
            }
        sections.append(section)
    keys = attempt("the legend", lambda: [key(place, f"model-{place}") for place in range(len(models))], undrawn)
    pictures = attempt("pictures", lambda: picture_groups(results, plain, names, models, sets), undrawn)
    strips = attempt("strips of pictures", lambda: picture_strips(results, plain, models, sets), undrawn)
    return {
        "written": results.written[:16].replace("T", " ") + " UTC",
        "environment": results.environment,
        "models": [
            {"key": keys[place] if keys else "", "short": models[name], "full": name, "revision": revisions[name]}
            for place, name in enumerate(models)
        ],
        "sets": [{"short": sets[name], "full": name, "images": f"{images[name]:,}"} for name in sets],
        "num_images": f"{sum(images.values()):,}",
        "warnings": [
            {"where": f"{models.get(w['model'], w['model'])}, {sets.get(w['dataset'], w['dataset'])}, {cell_title(w)}"}
            | {"text": w["text"]}
            for w in results.warnings
            if w["model_revision"] == revisions.get(w["model"])
            # Of data that have changed since: history, as its figures are. Earlier versions did not keep that.
            and ("shards" not in w or w["shards"] in shards.get((w["model"], w["dataset"]), []))
        ],
        "summary": summary_table(plain, names, comparisons, models, sets),
        "others": other_figures(plain, names, models, sets),
        "tests": test_table(comparisons, models, sets),
        "broken": broken_table(every, found, models, sets),
        "sections": [section for section in sections if section],
        "corruptions": corruption_table(plain, names, models, sets),
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


def cell_title(cell: Mapping[str, Any]) -> str:
    """``heading`` of something that names attack and strength only: a warning, a comparison."""
    return heading({"measure": "accuracy", "corruption": None, "sigma": None} | dict(cell))


def heading(cell: Mapping[str, Any]) -> str:
    """``column_name`` with spaces, so that it can be wrapped."""
    return column_name(dict(cell)).replace("_", " ")


def flat_settings(result: Mapping[str, Any]) -> dict[str, str]:
    """Settings and seed in words, those of nested groups as group.name; what is None is left out."""
    found: dict[str, str] = {"seed": str(result["seed"])}
    for name, value in result["settings"].items():
        nested = value.items() if isinstance(value, dict) else [(None, value)]
        for inner, of_inner in nested:
            if of_inner is not None:
                found[name if inner is None else f"{name}.{inner}"] = in_words(of_inner)
    return found


def in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        if len(value) > 12 and all(isinstance(item, int | float) for item in value):
            return f"{len(value)} values from {min(value):g} to {max(value):g}"
        return ", ".join(in_words(item) for item in value)
    return str(value)


def variants(results: Sequence[Result]) -> list[str]:
    """What tells each result from others of the same model, set and attack: "seed 1", "attack_steps 50"; mostly "".

    Everything measured with one attack carries the same names, so that columns and lines hold comparable figures.
    """
    groups: dict[tuple, list[dict[str, str]]] = {}
    identity = ("model", "dataset", "measure", "attack", "eps", "sigma", "corruption", "severity")
    for result in results:
        groups.setdefault(tuple(result[name] for name in identity), []).append(flat_settings(result))
    differing: dict[tuple, set[str]] = {}
    for (_, _, measure, attack, *_), group in groups.items():
        every = {name for settings in group for name in settings}
        differing.setdefault((measure, attack), set()).update(
            name for name in every if len({settings.get(name) for settings in group}) > 1
        )
    return [
        ", ".join(
            f"{name} {flat_settings(result).get(name, 'default')}"
            for name in sorted(differing[result["measure"], result["attack"]])
        )
        for result in results
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_variant(title: str, variant: str) -> str:
    return f"{title}, {variant}" if variant else title


def key(place: int, name: str, bar: bool = False) -> Markup:
    """The sample of a model's line or bar, for a legend."""
    return Markup(figures.inline_svg(figures.key_figure(place, bar), f"{name}-key", ""))


def clean_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The clean accuracy that belongs to an attacked one: of the same images by the same classifier; None without one."""

    def read_as(r: Result) -> tuple:
        return (r["model"], r["dataset"], r["seed"], *(repr(r["settings"].get(name)) for name in READING))

    return next(
        (r for r in results if (r["measure"], r["attack"]) == ("accuracy", "clean") and read_as(r) == read_as(result)),
        None,
    )


# Tables


def summary_table(
    results: Sequence[Result],
    names: Mapping[int, str],
    comparisons: Sequence[Result],
    models: Mapping[str, str],
    sets: Mapping[str, str],
) -> dict[str, Any] | None:
    """Accuracies in %: a group of rows per set, a row per model, a column per attack; corruptions as their mean."""
    shown = [r for r in results if r["measure"] in ("accuracy", "follows_word")]
    columns: dict[str, tuple] = {}
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    corrupted: dict[tuple[str, str, str], list[Result]] = {}
    attacks = list(ATTACKS)
    for r in shown:
        if r["corruption"] is not None:
            corrupted.setdefault((r["dataset"], r["model"], names[id(r)]), []).append(r)
            continue
        title = with_variant(heading(r), names[id(r)])
        columns[title] = (
            r["measure"] != "accuracy",
            attacks.index(r["attack"]) if r["attack"] in attacks else len(attacks),
            names[id(r)],
            r["eps"] or r["sigma"] or 0,
        )
        cells[r["dataset"], r["model"], title] = {"result": r, "value": percent(r["value"]), "small": interval(r)}
    for (dataset, model, variant), group in corrupted.items():
        mean, clean = sum(r["value"] for r in group) / len(group), clean_of(group[0], results)
        title, order = with_variant("corruptions, mean", variant), (False, attacks.index("corruptions"), variant)
        columns[title] = (*order, 0)
        cells[dataset, model, title] = {"value": percent(mean), "small": f"of {len(group)}"}
        if clean:
            columns[title := with_variant("corruptions, drop", variant)] = (*order, 1)
            cells[dataset, model, title] = {"value": f"{100 * (mean - clean['value']):+.1f}", "small": "points"}
    ordered = sorted(columns, key=columns.__getitem__)
    groups = []
    for dataset in sets:
        rows: list[dict[str, Any]] = []
        for model in models:
            row = [cells.get((dataset, model, title)) for title in ordered]
            sizes = sorted({cell["result"]["n"] for cell in row if cell and "result" in cell})
            if any(row):
                images = " to ".join(f"{n:,}" for n in sizes[:: len(sizes) - 1 or 1])
                rows.append({"name": models[model], "images": images, "cells": row})
        for column in range(len(ordered)):
            mark_best([row["cells"][column] for row in rows], comparisons)
        if rows:
            groups.append({"name": sets[dataset], "rows": rows})
    return {"columns": ordered, "groups": groups, "corrupted": bool(corrupted)} if groups else None


def interval(result: Result) -> str:
    return "" if result["ci95"] is None else f"[{percent(result['ci95'][0])}, {percent(result['ci95'][1])}]"


def mark_best(cells: Sequence[dict[str, Any] | None], comparisons: Sequence[Result]) -> None:
    """Sets ``best`` on the highest of a column's cells and on those that McNemar's test does not tell from it (p >= 0.05).

    On none where a test is missing (no records, other images, not an accuracy) or where nothing is told apart.
    """
    rivals = [cell for cell in cells if cell and cell.get("result", {}).get("measure") == "accuracy"]
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


def other_figures(
    results: Sequence[Result], names: Mapping[int, str], models: Mapping[str, str], sets: Mapping[str, str]
) -> dict[str, Any] | None:
    """What is not an accuracy: a row per figure, a column per model."""
    shown = [r for r in results if r["measure"] not in ("accuracy", "follows_word")]
    columns = {model: short for model, short in models.items() if any(r["model"] == model for r in shown)}
    groups = []
    for dataset in sets:
        rows: dict[str, dict[str, dict[str, str]]] = {}
        for r in shown:
            if r["dataset"] == dataset:
                small = "" if r["ci95"] is None else "[{:.4g}, {:.4g}]".format(*r["ci95"])
                title = with_variant(figure_name(r), names[id(r)])
                value = "undefined" if r["value"] is None else f"{r['value']:.4g}"
                rows.setdefault(title, {})[r["model"]] = {"value": value, "small": small}
        if rows:
            table = [{"name": name, "cells": [row.get(model) for model in columns]} for name, row in rows.items()]
            groups.append({"name": sets[dataset], "rows": table})
    return {"columns": list(columns.values()), "groups": groups} if groups else None


def test_table(
    comparisons: Sequence[Result], models: Mapping[str, str], sets: Mapping[str, str]
) -> dict[str, Any] | None:
    """McNemar's tests: a row per pair of models, a column per attack."""
    columns = list(dict.fromkeys(cell_title(test) for test in comparisons))
    groups = []
    for dataset in sets:
        rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
        for test in comparisons:
            if test["dataset"] == dataset:
                row = rows.setdefault(tuple(test["models"]), {})
                row.setdefault(cell_title(test), []).append(test | {"p": p_value(test["p_value"])})
        if rows:
            table = [
                {"pair": [models[model] for model in pair], "cells": [row.get(title, []) for title in columns]}
                for pair, row in rows.items()
            ]
            groups.append({"name": sets[dataset], "rows": table})
    return {"columns": columns, "groups": groups, "number": len(comparisons)} if groups else None


def p_value(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}" if value < 0.01 else f"p = {value:.2f}"


def broken_table(
    results: Sequence[Result],
    found: Sequence[Mapping[str, Any]],
    models: Mapping[str, str],
    sets: Mapping[str, str],
) -> list[dict[str, Any]]:
    """What broke the images under APGD, in % of all: a group of rows per set; empty where records do not say."""
    groups = []
    for dataset in sets:
        rows = [
            {
                "name": f"{models[r['model']]}, {r['eps']:g}/255",
                "shares": [percent(count / r["n"]) for count in of_records["broken"].values()],
                "forwards": "" if of_records["forwards"] is None else f"{of_records['forwards']:,.0f}",
            }
            for r, of_records in zip(results, found)
            if r["attack"] == "apgd" and r["dataset"] == dataset and of_records["broken"]
        ]
        if rows:
            groups.append({"name": sets[dataset], "rows": rows})
    return groups


def corruption_table(
    results: Sequence[Result], names: Mapping[int, str], models: Mapping[str, str], sets: Mapping[str, str]
) -> dict[str, Any] | None:
    """Accuracy per corruption, mean over severities: a row per corruption, a column per model."""
    shown = [r for r in results if r["corruption"] is not None and r["measure"] == "accuracy"]
    columns = {model: short for model, short in models.items() if any(r["model"] == model for r in shown)}
    groups = []
    for dataset in sets:
        rows: dict[str, dict[str, list[float]]] = {}
        for r in shown:
            if r["dataset"] == dataset:
                title = with_variant(r["corruption"].replace("_", " "), names[id(r)])
                rows.setdefault(title, {}).setdefault(r["model"], []).append(r["value"])
        table = []
        for name, row in rows.items():
            means = [sum(row[model]) / len(row[model]) if model in row else None for model in columns]
            shades = [None if mean is None else {"value": percent(mean), "shade": f"{mean:.2f}"} for mean in means]
            table.append({"name": name, "cells": shades})
        if table:
            groups.append({"name": sets[dataset], "rows": table})
    return {"columns": list(columns.values()), "groups": groups} if groups else None


# Figures: a section has groups, each with a legend and panels


def figure_section(
    name: str, title: str, text: str, panels: Sequence[Panel], labels: Sequence[str], bar: bool = False
) -> dict[str, Any] | None:
    """A section of a page with one legend; None without panels. Sets with several panels get a heading each."""
    if not panels:
        return None
    places = sorted({place for *_, drawn in panels for place in drawn})
    by_set: dict[str, list[Panel]] = {}
    for panel in panels:
        by_set.setdefault(panel[0], []).append(panel)
    if all(len(of_set) == 1 for of_set in by_set.values()):
        # One panel a set: the set is the panel's title.
        by_set = {
            "": [
                (dataset, with_variant(dataset, of_panel), figure, drawn) for dataset, of_panel, figure, drawn in panels
            ]
        }
    return {
        "id": name,
        "title": title,
        "text": text,
        "legend": legend(name, places, labels, bar),
        "groups": [
            {"title": dataset, "legend": [], "panels": drawn_panels(f"{name}-{n}", title, of_set, labels)}
            for n, (dataset, of_set) in enumerate(by_set.items())
        ],
    }


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


def point(result: Result, x: float) -> figures.Point:
    return (x, result["value"], *(result["ci95"] or (None, None)))


def strength_curves(
    results: Sequence[Result], names: Mapping[int, str], models: Mapping[str, str], attack: str, unit: str
) -> dict[tuple[str, str], dict[int, list[figures.Point]]]:
    """{(set, variant): {place of the model: points over eps or sigma}}; 0 is the clean accuracy where it is known."""
    curves: dict[tuple[str, str], dict[int, list[figures.Point]]] = {}
    places = list(models)
    for r in results:
        if r["measure"] != "accuracy" or r["attack"] != attack or r[unit] is None:
            continue
        points = curves.setdefault((r["dataset"], names[id(r)]), {}).setdefault(places.index(r["model"]), [])
        clean = clean_of(r, results)
        if not points and clean:
            points.append(point(clean, 0))
        points.append(point(r, r[unit]))
    return curves


def robustness_section(results, names, models, sets):
    panels = []
    for attack in ATTACKS:
        curves = strength_curves(results, names, models, attack, "eps")
        panels += [
            (sets[dataset], with_variant(attack, variant), figures.accuracy_curves(lines, "eps, 1/255"), lines)
            for (dataset, variant), lines in curves.items()
        ]
    return figure_section(
        "robustness",
        "Accuracy against the size of the perturbation",
        "Accuracy over eps, in 1/255; eps 0 is clean. Bands: Wilson 95 % intervals.",
        panels,
        list(models.values()),
    )


def front_section(results, names, models, sets):
    """Clean against robust accuracy under the strongest l_inf attack that several models share, and written words."""
    panels = []
    places, labels = list(models), list(models.values())
    beside = point_names(labels)
    for dataset in sets:
        columns: dict[tuple, dict[int, tuple[Result, Result]]] = {}
        for r in results:
            attacked = r["measure"] == "accuracy" and (r["eps"] is not None or r["attack"] == "typographic")
            if r["dataset"] == dataset and attacked and (clean := clean_of(r, results)):
                columns.setdefault((r["attack"], names[id(r)], r["eps"]), {})[places.index(r["model"])] = clean, r
        columns = {column: of_column for column, of_column in columns.items() if len(of_column) > 1}
        strongest = next((attack for attack in ("apgd", *ATTACKS) if any(attack in c for c in columns)), None)
        for column, of_column in sorted(columns.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or 0)):
            if column[0] not in (strongest, "typographic"):
                continue
            title = with_variant(heading(next(iter(of_column.values()))[1]), column[1])
            points = {place: (beside[place], point(clean, 0), point(r, 0)) for place, (clean, r) in of_column.items()}
            figure = figures.clean_robust_front(points, f"{column[0]} accuracy, %")
            panels.append((sets[dataset], title, figure, points))
    return figure_section(
        "front",
        "Clean against robust accuracy",
        "Each model is a point: right is better on clean images, up is better on attacked ones. The step line is the Pareto "
        "front, the models that no other one beats in both. Crosses: Wilson 95 % intervals. Of the l_inf attacks the "
        "strongest that the models share.",
        panels,
        labels,
    )


def point_names(labels: Sequence[str], length: int = 22) -> list[str]:
    """Names that fit beside points: of long ones the words that all begin with are left out, then the middle."""
    if max(map(len, labels)) > length:
        differ = next((n for n, letters in enumerate(zip(*labels)) if len(set(letters)) > 1), 0)
        start = 1 + max(labels[0].rfind(separator, 0, differ) for separator in "-_ /")
        labels = [f"…{label[start:]}" if start > 6 else label for label in labels]
    half = length // 2
    return [label if len(label) <= length else f"{label[: half - 1]}…{label[-half:]}" for label in labels]


def noise_section(results, names, models, sets):
    curves = strength_curves(results, names, models, "gaussian_noise", "sigma")
    return figure_section(
        "noise",
        "Gaussian noise",
        "Accuracy over the noise's standard deviation sigma, in 1/255; 0 is clean. Bands: Wilson 95 % intervals.",
        [
            (sets[dataset], variant, figures.accuracy_curves(lines, "sigma, 1/255"), lines)
            for (dataset, variant), lines in curves.items()
        ],
        list(models.values()),
    )


def corruption_section(results, names, models, sets):
    """Bars by severity, mean over the corruptions; severity 0 is clean."""
    panels: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = {}
    places = list(models)
    for r in results:
        if r["corruption"] is not None and r["measure"] == "accuracy":
            of_model = panels.setdefault((r["dataset"], names[id(r)]), {}).setdefault(places.index(r["model"]), {})
            if not of_model and (clean := clean_of(r, results)):
                of_model[0] = [clean["value"]]
            of_model.setdefault(r["severity"], []).append(r["value"])
    drawn = []
    for (dataset, variant), of_panel in panels.items():
        means = {
            place: {severity: sum(values) / len(values) for severity, values in of_model.items()}
            for place, of_model in of_panel.items()
        }
        drawn.append((sets[dataset], variant, figures.severity_bars(means), means))
    return figure_section(
        "corruptions",
        "Common corruptions",
        "Accuracy by severity, mean over the corruptions. Below: each corruption, mean over its severities.",
        drawn,
        list(models.values()),
        bar=True,
    )


def distribution_panels(
    results: Results, shown: Sequence[Result], names: Mapping[int, str], models: Mapping[str, str], column: str
) -> dict[tuple[str, str], dict[int, list[float]]]:
    """{(set, variant): {place of the model: a column of its records}}, where records have it."""
    panels: dict[tuple[str, str], dict[int, list[float]]] = {}
    places = list(models)
    for r in shown:
        values = [row[column] for row in results.records(r) if row.get(column) is not None]
        if values:
            panels.setdefault((r["dataset"], names[id(r)]), {}).setdefault(places.index(r["model"]), values)
    return panels


def interpretability_section(results, plain, names, models, sets):
    shown = [r for r in plain if r["measure"] == "interpretability"]
    panels = distribution_panels(results, shown, names, models, "value")
    return figure_section(
        "interpretability",
        "Interpretability",
        MEASURES["interpretability"] + " Further right: the embedding says more clearly what is seen.",
        [
            (sets[dataset], variant, figures.distributions(values, "cosine"), values)
            for (dataset, variant), values in panels.items()
        ],
        list(models.values()),
    )


def fidelity_section(results, plain, names, models, sets):
    shown = [r for r in plain if r["measure"].startswith("fidelity")]
    panels = []
    for column, xlabel in (("value", "relative squared distance"), ("cosine", "cosine to the reference")):
        for (dataset, variant), values in distribution_panels(results, shown, names, models, column).items():
            same = 0 if column == "value" else 1  # of the reference itself there is nothing to show
            values = {place: found for place, found in values.items() if max(abs(x - same) for x in found) > 1e-5}
            if values:
                figure = figures.distributions(values, xlabel)
                panels.append((sets[dataset], with_variant(xlabel, variant), figure, values))
    text = "How far clean embeddings have moved: " + MEASURES["fidelity"]
    return figure_section("fidelity", "Fidelity to the reference", text, panels, list(models.values()))


TRAINING = {  # of metrics.jsonl: heading, axis, a share of images?
    "eval_accuracy_clean": ("clean accuracy", "accuracy", True),
    "eval_accuracy_pgd": ("accuracy under PGD, at the run's own eps", "accuracy", True),
    "eval_accuracy_attacked": ("accuracy on attacked images", "accuracy", True),
    "multiplier_mean": ("multiplier, mean", "multiplier", False),
    "violation_ratio_median": ("clean distance / margin, median", "ratio", False),
    "violation_ratio_p95": ("clean distance / margin, 95th percentile", "ratio", False),
    "eval_kl": ("KL to the start model", "nats", False),
}


def training_section(models: Mapping[str, str]):
    logged = {place: MetricsFile(Path(name) / "metrics.jsonl").read() for place, name in enumerate(models)}
    # A pretraining also logs its clean accuracy; thousands of steps of that would push fine-tuning into a corner.
    own = set(TRAINING) - {"eval_accuracy_clean"}
    logged = {
        place: rows for place, rows in logged.items() if any(own & row.keys() for row in rows if isinstance(row, dict))
    }
    panels = []
    for column, (title, ylabel, share) in TRAINING.items():
        curves = {}
        for place, rows in logged.items():
            pairs = [(row.get("step"), row.get(column)) for row in rows if isinstance(row, dict)]
            points = [
                (step, value)
                for step, value in pairs
                if isinstance(step, int | float) and isinstance(value, int | float)
            ]
            if points and (column != "multiplier_mean" or any(value for _, value in points)):  # FARE has none
                curves[place] = thinned(points)
        if curves:
            panels.append(("", title, figures.training_curves(curves, ylabel, share), curves))
    return figure_section(
        "training",
        "Training",
        f"What the runs logged, over steps. Curves of more than {CURVE_POINTS} points are averaged in pieces.",
        panels,
        list(models.values()),
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``CURVE_POINTS`` points: means of neighbours."""
    size = -(-len(points) // CURVE_POINTS)
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(sum(values) / len(piece) for values in zip(*piece)) for piece in pieces]


def strength_section(results: Sequence[Result], models: Mapping[str, str], sets: Mapping[str, str]):
    """Everything over the strength t of a head: a group per model, panels of shares and of other figures per set."""
    shares = ("accuracy", "follows_word", "pair_accuracy", "worst_group_accuracy", "group_gap")
    groups = []
    for place, model in enumerate(models):
        swept = [r for r in results if r["model"] == model and "t" in r["settings"] and r["value"] is not None]
        neutral = [r["value"] for r in results if (r["model"], r["measure"]) == (model, "neutral_t")]
        labels = list(dict.fromkeys(figure_name(r) for r in swept))
        panels = []
        for dataset in sets:
            for title, ylabel in (("shares", "share, %"), ("fairness", "fairness")):
                curves: dict[int, dict[float, float]] = {}
                for r in swept:
                    if r["dataset"] == dataset and (r["measure"] in shares) == (title == "shares"):
                        value = 100 * r["value"] if title == "shares" else r["value"]
                        curves.setdefault(labels.index(figure_name(r)), {})[r["settings"]["t"]] = value
                if curves:
                    figure = figures.t_sweep_panel(curves, ylabel, neutral[-1] if neutral else None)
                    panels.append((sets[dataset], f"{sets[dataset]}, {title}", figure, curves))
        if panels:
            groups.append(
                {
                    "title": models[model],
                    "legend": legend(f"strength-{place}", range(len(labels)), labels),
                    "panels": drawn_panels(f"strength-{place}", f"The head of {models[model]}", panels, labels),
                }
            )
    text = "t = 1 is the trained head, t = 0 the original; t* is where validation pairs are nearest chance."
    section = {"id": "strength", "title": "The strength of the head", "text": text, "legend": [], "groups": groups}
    return section if groups else None


# Pictures


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def png(pixel_values: Tensor, *, smooth: bool = True) -> str:
    """(3, H, W) in [0,1] as the source of an <img>; reduced to ``PICTURE_SIDE`` where larger."""
    pixels = (pixel_values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue())


def picture_groups(
    results: Results,
    plain: Sequence[Result],
    names: Mapping[int, str],
    models: Mapping[str, str],
    sets: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Clean / attacked / perturbation of every model, per set and attack, at the largest eps that has pictures."""
    kept: dict[tuple[str, str, str], list[Result]] = {}
    for r in plain:
        shown = r["measure"] == "accuracy" and (r["eps"] is not None or r["attack"] == "typographic")
        if shown and results.pictures_path(r).exists():
            kept.setdefault((r["dataset"], r["attack"], names[id(r)]), []).append(r)
    groups = []
    for (dataset, attack, variant), cells in kept.items():
        if attack == "pgd" and any(other[:2] == (dataset, "apgd") for other in kept):
            continue  # the stronger one looks the same
        eps = max((r["eps"] or 0) for r in cells)
        cells = [r for r in cells if (r["eps"] or 0) == eps]
        rows = []
        for model in models:
            for r in cells:
                if r["model"] == model and (found := results.pictures(r)):
                    clean, attacked, captions = found
                    examples = [example(*parts, eps) for parts in zip(clean[:PICTURES], attacked, captions)]
                    rows.append({"name": models[model], "examples": examples})
        groups.append(
            {
                "title": f"{sets[dataset]}, {with_variant(heading(cells[0]), variant)}",
                "factor": f"{255 / (2 * eps):.3g}" if eps else "",
                "rows": rows,
            }
        )
    return groups


def example(clean: Tensor, attacked: Tensor, caption: Mapping[str, str], eps: float) -> dict[str, Any]:
    """One image with its attacked copy; under an l_inf attack also 1/2 + delta / (2 eps): grey where nothing changed."""
    pictures = [{"source": png(clean), "alt": f"clean image of {caption['label']}"}]
    pictures.append({"source": png(attacked), "alt": f"attacked image, taken for {caption['predicted']}"})
    if eps:
        magnified = 0.5 + (attacked - clean) * (255 / (2 * eps))
        pictures.append({"source": png(magnified, smooth=False), "alt": "the perturbation, magnified"})
    return {"pictures": pictures, "small": max(clean.shape[-2:]) <= 64, **caption}


def picture_strips(
    results: Results, plain: Sequence[Result], models: Mapping[str, str], sets: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What noise and corruptions look like: one image of each, clean first, with the first model's answers."""
    strips = []
    for dataset in sets:
        for attack in ("gaussian_noise", "corruptions"):
            cells = [
                r
                for r in plain
                if (r["dataset"], r["attack"], r["measure"]) == (dataset, attack, "accuracy")
                and results.pictures_path(r).exists()
            ]
            cells = [r for r in cells if r["model"] == cells[0]["model"]]
            # Of a corruption the highest severity; of noise every sigma.
            last = {(r["corruption"], r["sigma"]): r for r in sorted(cells, key=lambda r: r["severity"] or 0)}
            shown = sorted(last.values(), key=lambda r: (r["corruption"] or "", r["sigma"] or 0))
            of_each = [(r, found) for r in shown if (found := results.pictures(r))]
            if not of_each:
                continue
            clean, _, captions = of_each[0][1]
            first = captions[0]
            pictures = [{"title": "clean", "source": png(clean[0]), "label": first["label"]}]
            pictures[0] |= {"predicted": first["predicted_clean"]}
            for r, (_, attacked, captions) in of_each:
                title = r["corruption"].replace("_", " ") if r["corruption"] else f"sigma {r['sigma']:g}/255"
                pictures.append({"title": title, "source": png(attacked[0])})
                pictures[-1] |= {name: captions[0][name] for name in ("label", "predicted")}
            strips.append(
                {
                    "title": with_variant(
                        f"{sets[dataset]}, {attack.replace('_', ' ')}",
                        f"severity {shown[-1]['severity']}" if shown[-1]["severity"] else "",
                    ),
                    "model": models[cells[0]["model"]],
                    "small": max(clean.shape[-2:]) <= 64,
                    "pictures": pictures,
                }
            )
    return strips


# How it was measured


def methods(results: Sequence[Result]) -> dict[str, Any]:
    """In words: what every attack and measure is, with its settings; what all have in common is said once."""
    groups: dict[str, list[Result]] = {}
    for r in results:
        measure = "fidelity" if r["measure"].startswith("fidelity") else r["measure"]
        if measure not in MEASURES:
            measure = "fairness"
        name = measure if measure != "accuracy" else f"accuracy, {r['attack']}"
        groups.setdefault(name, []).append(r)
    settings = {name: setting_values(group) for name, group in groups.items()}
    common = set.intersection(*(set(values.items()) for values in settings.values()))
    entries = []
    for name, group in groups.items():
        measure = name.split(",")[0]
        attack = ATTACKS.get(group[0]["attack"])
        text = (attack.about if attack else "") if measure == "accuracy" else MEASURES[measure]
        own = {key: value for key, value in settings[name].items() if (key, value) not in common}
        entries.append({"name": name, "text": text, "settings": list(own.items())})
    return {"common": sorted(common), "entries": entries}


def setting_values(group: Sequence[Result]) -> dict[str, str]:
    """{setting: all its values} of the results of one attack or measure, strengths in their units."""
    values: dict[str, dict[str, None]] = {}
    strengths = (("eps", "eps, 1/255"), ("sigma", "sigma, 1/255"), ("severity", "severity"), ("n", "images"))
    for name, title in strengths:
        found = sorted({r[name] for r in group if r[name] is not None})
        if found:
            values[title] = {f"{value:,}" if name == "n" else f"{value:g}": None for value in found}
    corruptions = list(dict.fromkeys(r["corruption"] for r in group if r["corruption"] is not None))
    if corruptions:
        values["corruptions"] = {str(len(corruptions)): None}
    strengths_of_head = sorted({r["settings"]["t"] for r in group if "t" in r["settings"]})
    if strengths_of_head:
        values["t"] = {in_words(strengths_of_head): None}
    for r in group:
        for name, value in flat_settings(r).items():
            if name not in ("t", "model_revision"):
                values.setdefault(name, {})[value] = None
    return {name: " / ".join(of_name) for name, of_name in values.items()}


# benchmark.csv


def record_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the records of an accuracy say besides the share of right answers; None where they do not say it.

    acc5: share of images with the class among the five likeliest, of five classes or more. mean_per_class_recall: the
    mean over classes of the share that is right. broken: how many images were wrong before, fell to the cross-entropy, to a
    target, or stand. forwards: mean per image.
    """
    labelled = [row for row in rows if row.get("label") is not None and "correct" in row]
    recall, top5 = None, None
    if labelled:
        by_class: dict[Any, list[bool]] = {}
        for row in labelled:
            by_class.setdefault(row["label"], []).append(bool(row["correct"]))
        recall = sum(sum(right) / len(right) for right in by_class.values()) / len(by_class)
        if all(len(row.get("top5") or ()) >= 5 for row in labelled):
            top5 = sum(row["label"] in row["top5"] for row in labelled) / len(labelled)
    broken = None
    if rows and all("broken_by" in row for row in rows):
        broken = {"clean": 0, "cross-entropy": 0, "targets": 0, "standing": 0}
        for row in rows:
            by = "standing" if row["broken_by"] is None else row["broken_by"]
            broken[by if by in broken else "targets"] += 1
    forwards = [row["forwards"] for row in rows if row.get("forwards") is not None]
    return {
        "acc5": top5,
        "mean_per_class_recall": recall,
        "broken": broken,
        "forwards": sum(forwards) / len(forwards) if forwards else None,
    }


def benchmark_csv(results: Sequence[Result], found: Sequence[Mapping[str, Any]]) -> str:
    """A row per accuracy, with CLIP_benchmark's column names first. ``pretrained`` is the revision where one is known."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for r, figures_of in zip(results, found):
        if r["measure"] != "accuracy":
            continue
        pretrained = r["settings"].get("model_revision") or ""
        classifier = r["settings"].get("classifier", "zero_shot")
        low, high = r["ci95"] or (None, None)
        row = {
            name: r[name]
            for name in ("dataset", "model", "attack", "eps", "sigma", "corruption", "severity", "n", "seed")
        }
        row |= {
            "acc1": r["value"],
            "acc5": figures_of["acc5"],
            "mean_per_class_recall": figures_of["mean_per_class_recall"],
            "pretrained": pretrained,
            "task": TASKS.get(classifier, classifier),
            "classifier": classifier,
            "language": "en",
            "model_fullname": f"{r['model']} {pretrained}".strip(),
            "t": r["settings"].get("t"),
            "ci95_low": low,
            "ci95_high": high,
        }
        writer.writerow(row)
    return file.getvalue()
