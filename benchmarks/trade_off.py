"""Clean against robust accuracy: LORE by rho, a fixed weight on the clean distance, FARE at equal updates.

  python benchmarks/trade_off.py --model runs/small-clip --data data/cifar10 --seeds 0 1 2 --output_dir runs/results

All runs see the same batches and make K updates on each. Two more FARE runs make one update per batch, on as many
batches and on K times as many. The encoders are measured under APGD, and by their clean embeddings: cosine to 150
descriptions of the true class, distance to the start model's, and the largest possible change of a cosine to any text.
An encoder without text needs --linear_head; then no descriptions are compared.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import evidence
from benchmarks.comparison import FARE, START, Flags, StepSettings, evaluate, evaluation_flag, lore_runs, training_flag
from benchmarks.evidence import CONFIRMED, NOT_CONFIRMED, Claim, Numbers, Table, difference, verdict
from utils.cli import parse_settings, run
from utils.evaluation.figures import line_style
from utils.evaluation.results import Results, mcnemar

LORE, WEIGHT, EQUAL = "LORE", "FARE + weight", "FARE, K = {}"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class Settings(StepSettings):
    rhos: list[float] = training_flag([0.005, 0.01, 0.02, 0.05, 0.1], "LORE's tolerances", minimum=0)
    clean_weights: list[float] = training_flag(
        [30.0, 10.0, 3.0, 1.0, 0.3], "weights of the clean distance in place of the constraint", above=0
    )
    primal_steps: int = training_flag(5, "K, updates per batch", minimum=1)
    eval_eps: float = evaluation_flag(4.0, "radius of APGD, in 1/255", above=0, maximum=255)
    apgd_targets: int = evaluation_flag(9, "classes that APGD-T tries, the likeliest first", minimum=1)
    attack_dtype: str = evaluation_flag("float32", "of APGD's gradients", choices=("float32", "bfloat16"))


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    runs = lore_runs(settings, make_variants(settings))
    models = [str(folder) for folders in runs.values() for folder in folders]
    by_text = [] if settings.linear_head else ["interpretability"]
    asked = {
        "attack": ["clean", "apgd"], "eps": settings.eval_eps, "measure": ["accuracy", *by_text, "fidelity"],
        "apgd_targets": settings.apgd_targets, "attack_dtype": settings.attack_dtype,
        "reference_model_name_or_path": settings.model,
    }  # fmt: skip
    cells = evaluate(settings, "trade-off", models, asked)
    folder = Path(settings.output_dir) / "eval-trade-off"
    report = Results(folder)
    by_label = {START: [settings.model]} | {label: list(map(str, folders)) for label, folders in runs.items()}
    found = {label: read_model(cells, report, names) for label, names in by_label.items()}
    if len(settings.seeds) == 1:  # images of several seeds are the same ones: a test of them all would count them twice
        equal = str(runs[EQUAL.format(settings.primal_steps)][0])
        for label, (name, *_) in by_label.items():
            found[label] |= {"mcnemar": against(cells, report, name, equal)}
    numbers = evidence.write_numbers(settings, [*models, folder], found)
    evidence.show(tables(numbers))


def make_variants(settings: Settings) -> dict[str, Flags]:
    k = settings.primal_steps
    common = {"eps": settings.eps, "max_steps": settings.steps, "primal_steps": k}
    once = FARE | common | {"primal_steps": 1}
    return {
        "FARE, K = 1": once,
        f"FARE, K = 1, {k} x the images": once | {"max_steps": k * settings.steps},
        EQUAL.format(k): FARE | common,
        **{f"{WEIGHT} {w:g}": FARE | common | {"clean_weight": w} for w in settings.clean_weights},
        **{f"{LORE}, rho {rho:g}": common | {"rho": rho} for rho in settings.rhos},
    }


def read_model(cells: list[dict], report: Results, names: list[str]) -> dict[str, list]:
    """Figures of a variant, one per seed; quantiles over the images of all seeds.

    The largest change of a cosine: for all unit vectors t, |cos(z, t) - cos(z0, t)| <= ||z/|z| - z0/|z0||| =
    sqrt(2 - 2 cos(z, z0)), with equality for one t; this is at most 2 sqrt(||z - z0||^2 / ||z0||^2).
    """

    def of(measure: str, attack: str = "clean") -> list[dict]:
        return [
            c for name in names for c in cells if (c["model"], c["measure"], c["attack"]) == (name, measure, attack)
        ]

    moved = [row for cell in of("fidelity") for row in report.records(cell)]
    distance = np.array([row["value"] for row in moved])
    change = np.sqrt(np.maximum(0, 2 - 2 * np.array([row["cosine"] for row in moved])))
    described = np.array([row["value"] for cell in of("interpretability") for row in report.records(cell)])
    bound = 2 * np.sqrt(distance)
    by_text = {
        "cosine": [cell["value"] for cell in of("interpretability")],
        "cosine_quantiles": np.quantile(described, QUANTILES).tolist(),
    } if len(described) else {}  # fmt: skip
    return by_text | {
        "clean": [cell["value"] for cell in of("accuracy")],
        "robust": [cell["value"] for cell in of("accuracy", "apgd")],
        "distance": [cell["value"] for cell in of("fidelity")],
        "distance_quantiles": np.quantile(distance, QUANTILES).tolist(),
        "cosine_change_quantiles": np.quantile(change, QUANTILES).tolist(),
        # Tolerance: one rounding, a cosine of 1 - 1e-7, gives a change of 4e-4.
        "beyond_bound": int((change > bound + 1e-3).sum()),
        "images": len(distance),
    }  # fmt: skip


def against(cells: list[dict], report: Results, name: str, other: str) -> dict[str, list]:
    """McNemar's test of two models by attack: images that only the first gets right, only the second, and p."""

    def correct(model: str, attack: str) -> list[bool]:
        wanted = (model, "accuracy", attack)
        (cell,) = [c for c in cells if (c["model"], c["measure"], c["attack"]) == wanted]
        return [row["correct"] for row in sorted(report.records(cell), key=lambda row: row["position"])]

    return {attack: list(mcnemar(correct(name, attack), correct(other, attack))) for attack in ("clean", "apgd")}


def family(found: Numbers, name: str) -> list[str]:
    return [label for label in found if label.startswith(name)]


def tables(numbers: Numbers) -> list[Table]:
    settings, found = numbers["settings"], numbers["results"]
    n, apgd = settings["num_samples"], f"APGD {settings['eval_eps']:g}/255"
    accuracies = [["", "clean", apgd, "clean distance, % of norm²"]]
    headings = [
        "",
        "distance, % of norm²: median",
        "95th percentile",
        "largest",
        "change of a cosine: median",
        "largest",
    ]
    fidelity = [[*headings, "2 sqrt(rho)", *["cosine to descriptions"] * ("cosine" in found[START])]]
    for label, of in found.items():
        accuracies.append(
            [
                label,
                evidence.share(of["clean"], n),
                evidence.share(of["robust"], n),
                evidence.number(of["distance"], 1, 100),
            ]
        )
        if label == START or label.startswith((LORE, EQUAL.format(settings["primal_steps"]))):
            distance, change = of["distance_quantiles"], of["cosine_change_quantiles"]
            bound = f"{2 * float(label.split('rho ')[1]) ** 0.5:.2f}" if "rho " in label else "-"
            ends = [f"{100 * distance[i]:.1f}" for i in (2, 4, 5)] + [f"{change[i]:.2f}" for i in (2, 5)]
            fidelity.append([label, *ends, bound, *([evidence.number(of["cosine"], 3)] if "cosine" in of else [])])
    equal = EQUAL.format(settings["primal_steps"])
    tests = [["", *(f"{attack}: only this one / only {equal} / p" for attack in ("clean", apgd))]]
    for label, of in found.items():
        if "mcnemar" in of and label != equal:
            counts = (f"{b} / {c} / {p:.2g}" for b, c, p in of["mcnemar"].values())
            tests.append([label, *counts])
    areas = [["", "area", "less the fixed weight's"]]
    per_seed = {name: front_areas(numbers, name) for name in (WEIGHT, LORE)}
    for name, values in per_seed.items():
        gap = "-" if name == WEIGHT else str(difference(values, per_seed[WEIGHT], None, 1.0))
        areas.append([name, evidence.number(values), gap])
    return [
        (f"Accuracy in % on {n} test images, trained at eps {settings['eps']:g}/255", accuracies),
        ("Area under the front of clean and robust accuracy, in points², above the lowest of either", areas),
        ("Clean embeddings against the start model's, and the bound on any cosine", fidelity),
        *[(f"McNemar's exact test: of the same {n} images, those that one of two models gets right", tests)]
        * (len(tests) > 1),
    ]


def front_areas(numbers: Numbers, name: str) -> list[float]:
    """For each seed, the area that a family's points dominate, measured from the lowest accuracies of all points."""
    found = numbers["results"]
    both = [label for each in (WEIGHT, LORE) for label in family(found, each)]
    corner = tuple(100 * min(min(found[label][key]) for label in both) for key in ("clean", "robust"))
    areas = []
    for seed in range(len(numbers["settings"]["seeds"])):
        points = [tuple(100 * found[label][key][seed] for key in ("clean", "robust")) for label in family(found, name)]
        areas.append(evidence.dominated_area(points, corner))
    return areas


def draw(numbers: Numbers) -> Figure:
    settings, found = numbers["settings"], numbers["results"]
    by_text = "cosine" in found[START]
    figure, (plane, *others) = evidence.new_figure(3 if by_text else 2, height=3.6)
    distances = others[-1]
    singles = ["FARE, K = 1", EQUAL.format(settings["primal_steps"]), START]
    for place, name in enumerate([LORE, WEIGHT]):
        labels = family(found, name)
        means = [[100 * statistics.mean(found[x][key]) for x in labels] for key in ("clean", "robust")]
        style = line_style(place)
        line = evidence.front(list(zip(*means)))
        plane.plot(*zip(*line), color=style["color"], linestyle=style["linestyle"])
        plane.errorbar(
            *means,
            xerr=evidence.error_bars([found[x]["clean"] for x in labels]),
            yerr=evidence.error_bars([found[x]["robust"] for x in labels]),
            color=style["color"], marker=style["marker"], linestyle="none", capsize=2, elinewidth=0.8,
            label=f"{name}, {'over rho' if name == LORE else 'over the weight'}",
        )  # fmt: skip
        for label, x, y in zip(labels, *means):
            plane.annotate(
                label.split()[-1], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6.5, color=style["color"]
            )
    for place, label in enumerate(singles, 2):
        means = [100 * statistics.mean(found[label][key]) for key in ("clean", "robust")]
        style = line_style(place)
        plane.errorbar(
            *([value] for value in means),
            xerr=evidence.error_bars([found[label]["clean"]]),
            yerr=evidence.error_bars([found[label]["robust"]]),
            color="black", marker=style["marker"], markerfacecolor="white", linestyle="none", capsize=2, elinewidth=0.8,
            label=label,
        )  # fmt: skip
    plane.set(xlabel="clean accuracy, %", ylabel=f"accuracy under APGD {settings['eval_eps']:g}/255, %")
    plane.legend(fontsize=7, frameon=False)

    shown = [START, EQUAL.format(settings["primal_steps"]), *reversed(family(found, LORE))]
    panels = [(others[0], "cosine_quantiles", "cosine to descriptions of the true class")] if by_text else []
    for axis, key, label in [*panels, (distances, "distance_quantiles", "clean distance, share of norm²")]:
        boxes = [
            dict(zip(("whislo", "q1", "med", "q3", "whishi"), found[x][key][:5]), label=x)
            for x in (shown[1:] if axis is distances else shown)
        ]
        axis.bxp(boxes, vert=False, showfliers=False, medianprops={"color": "black"}, widths=0.6)
        axis.set(xlabel=label)
        axis.tick_params(axis="y", labelsize=7)
    evidence.plain_log(distances, "x")
    for place, box in enumerate(shown[1:], 1):
        if "rho" in box:
            rho = float(box.split()[-1])
            distances.plot(
                [rho, rho],
                [place - 0.4, place + 0.4],
                color="#D55E00",
                linewidth=2,
                label="rho" if place == 2 else None,
            )
    distances.legend(fontsize=7, frameon=False)
    return figure


def claims(numbers: Numbers) -> list[Claim]:
    settings, found = numbers["settings"], numbers["results"]
    n, k = settings["num_samples"], settings["primal_steps"]
    equal = EQUAL.format(k)
    lore = family(found, LORE)
    loosest = max(lore, key=lambda label: float(label.split()[-1]))
    rows = []

    def compared(first: str, second: str, text: str) -> None:
        clean, robust = (difference(found[first][key], found[second][key], n) for key in ("clean", "robust"))
        both = CONFIRMED if verdict(clean) == verdict(robust) == CONFIRMED else NOT_CONFIRMED
        said = f"{first} - {second}: clean {clean}, APGD {robust} points"
        if both == NOT_CONFIRMED and CONFIRMED in (verdict(clean), verdict(robust)):
            both += ": " + ("clean only" if verdict(clean) == CONFIRMED else "robust only")
        rows.append(Claim("LORE", text, said, both))

    compared(
        loosest,
        "FARE, K = 1",
        "more accurate than FARE, clean and attacked, on the same images (60.5 / 3.0 to 60.0 / 1.8 and up)",
    )
    compared(loosest, equal, "the same against FARE with as many updates (not in the paper)")
    areas = {name: front_areas(numbers, name) for name in (LORE, WEIGHT)}
    gap = difference(areas[LORE], areas[WEIGHT], None, 1.0)
    rows.append(
        Claim(
            "LORE", "Fig. 1b, 3: a better front than a fixed weight",
            f"area under the front, LORE - {WEIGHT}: {gap} points²", verdict(gap),
        )
    )  # fmt: skip
    rhos = [label.split()[-1] for label in lore]
    p95 = {rho: found[label]["distance_quantiles"][4] for rho, label in zip(rhos, lore)}
    rows.append(
        Claim(
            "LORE", "the constraint holds for images never trained on: clean distance at most rho",
            "95th percentile: " + ", ".join(f"{value:.3f} (rho {rho})" for rho, value in p95.items()),
            evidence.at_all([rho for rho in rhos if p95[rho] <= float(rho)], rhos, "at rho"),
        )
    )  # fmt: skip
    beyond = sum(found[label]["beyond_bound"] for label in found)
    images = sum(found[label]["images"] for label in found)
    rows.append(
        Claim(
            "LORE", "a cosine to any text changes by at most 2 sqrt(clean distance / margin)",
            f"{beyond} of {images} embeddings beyond the bound", NOT_CONFIRMED if beyond else CONFIRMED,
        )
    )  # fmt: skip
    if "cosine" not in found[START]:
        return rows
    closer = [
        rho
        for rho, x in zip(rhos, lore)
        if verdict(difference(found[x]["cosine"], found[equal]["cosine"], None)) == CONFIRMED
    ]
    means = {label: statistics.mean(found[label]["cosine"]) for label in (START, equal, *lore)}
    rows.append(
        Claim(
            "LORE", "Fig. 4b: LORE's images are closer to descriptions of their class than FARE's",
            "mean cosine: " + ", ".join(f"{label} {mean:.3f}" for label, mean in means.items()),
            evidence.at_all(closer, rhos, "at rho"),
        )
    )  # fmt: skip
    return rows


if __name__ == "__main__":
    run(main)
