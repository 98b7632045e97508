"""LORE with one setting changed at a time, and TeCoA with and without constraints, at a scale that fits a CPU.

  python benchmarks/ablations.py --model runs/small-clip --data data/cifar10 --seeds 0 1 2 --output_dir runs/results

Tables: K, the form of the multiplier, the margin, the steps of the training attack, the supervised objective. The
recipes ablation_*.yaml and tecoa*.yaml change the same settings; here the model is small. All tables share one run.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import evidence
from benchmarks.comparison import FARE, START, Flags, StepSettings, evaluate, evaluation_flag, lore_runs, training_flag
from benchmarks.evidence import CONFIRMED, NOT_CONFIRMED, Claim, Numbers, Table, difference, verdict
from utils.cli import parse_settings, run
from utils.evaluation.figures import line_style
from utils.training.metrics import MetricsFile

K, FORM, MARGIN, STEPS, SUPERVISED = (
    "updates per batch",
    "multiplier",
    "margin",
    "steps of the training attack",
    "supervised",
)
TECOA = "TeCoA, K = {}"


@dataclass
class Settings(StepSettings):
    rho: float = training_flag(0.02, "tolerance of the embedding constraint", minimum=0)
    supervised_rho: float = training_flag(0.1, "TeCoA's tolerance: of ||z0||^2, of the entropy", minimum=0)
    fixed_rhos: list[float] = training_flag([3.2, 6.3, 12.7], "squared distances that a fixed margin allows", minimum=0)
    primal_steps: list[int] = training_flag([1, 2, 3, 5, 7, 10], "K; 5 is everywhere else", minimum=1)
    attack_steps: list[int] = training_flag([1, 2, 5, 10, 20], "PGD steps; 10 is everywhere else", minimum=1)
    eval_eps: float = evaluation_flag(4.0, "radius of APGD, in 1/255", above=0, maximum=255)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    rows = make_rows(settings)
    runs = lore_runs(settings, {(title, label): flags for title, of in rows.items() for label, flags in of.items()})
    models = [folder for folders in runs.values() for folder in folders]
    asked = {
        "attack": ["clean", "apgd"], "eps": settings.eval_eps, "measure": ["accuracy", "fidelity"],
        "reference_model_name_or_path": settings.model,
    }  # fmt: skip
    cells = evaluate(settings, "ablations", models, asked)
    values = {(cell["model"], cell["measure"], cell["attack"]): cell["value"] for cell in cells}

    def read(names: list[str], multiplier: list[float]) -> dict[str, list[float]]:
        columns = {"clean": ("accuracy", "clean"), "robust": ("accuracy", "apgd"), "distance": ("fidelity", "clean")}
        found = {key: [values[name, *column] for name in names] for key, column in columns.items()}
        return found | {"multiplier": multiplier}

    found = {START: {START: read([settings.model], [])}} | {title: {} for title in rows}
    for (title, label), folders in runs.items():
        last = [MetricsFile(folder / "metrics.jsonl").read()[-1].get("multiplier_mean", 0.0) for folder in folders]
        found[title][label] = read(list(map(str, folders)), last if any(last) else [])
    numbers = evidence.write_numbers(settings, [*models, Path(settings.output_dir) / "eval-ablations"], found)
    evidence.show(tables(numbers))


def make_rows(settings: Settings) -> dict[str, dict[str, Flags]]:
    """Title -> label -> flags. Only the settings that the title names differ from the common run's."""
    common = {"eps": settings.eps, "max_steps": settings.steps, "primal_steps": 5}
    base = common | {"rho": settings.rho}
    tecoa, held = {"objective": "tecoa"}, common | {"rho": settings.supervised_rho}
    return {
        K: {f"K = {k}": base | {"primal_steps": k} for k in settings.primal_steps},
        FORM: {"network": base} | {form: base | {"multiplier": form} for form in ("linear", "scalar")},
        MARGIN: {f"relative, rho {settings.rho:g}": base}
        | {f"fixed, {rho:g}": base | {"rho": rho, "margin": "fixed"} for rho in settings.fixed_rhos},
        STEPS: {
            f"{n} step{'s' * (n > 1)}": base | ({} if n == 10 else {"attack_steps": n}) for n in settings.attack_steps
        },
        SUPERVISED: {
            TECOA.format(1): tecoa | FARE | common | {"primal_steps": 1},
            TECOA.format(5): tecoa | FARE | common,
            f"TeCoA + l2, rho {settings.supervised_rho:g}": tecoa | held,
            f"TeCoA + KL, rho {settings.supervised_rho:g}": tecoa | held | {"constraint": "kl"},
        },
    }


def tables(numbers: Numbers) -> list[Table]:
    settings, found = numbers["settings"], numbers["results"]
    n = settings["num_samples"]
    heading = ["", "clean", f"APGD {settings['eval_eps']:g}/255", "clean distance, % of norm²", "λ"]
    made = []
    for title in (K, FORM, MARGIN, STEPS, SUPERVISED):
        rows = [heading]
        for label, of in (found[START] | found[title]).items():
            multiplier = f"{statistics.mean(of['multiplier']):.2g}" if of["multiplier"] else "-"
            rows.append(
                [
                    label,
                    evidence.share(of["clean"], n),
                    evidence.share(of["robust"], n),
                    evidence.number(of["distance"], 1, 100),
                    multiplier,
                ]
            )
        made.append((title[0].upper() + title[1:], rows))
    return made


def draw(numbers: Numbers) -> Figure:
    found = numbers["results"]
    titles = [title for title in found if title != START]
    figure, axes = evidence.new_figure(3, 2)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    for axis, title in zip(axes, titles):
        for place, (label, of) in enumerate((found[START] | found[title]).items()):
            x, y = ([100 * statistics.mean(of[key])] for key in ("clean", "robust"))
            style = line_style(place)
            axis.errorbar(
                x, y, xerr=evidence.error_bars([of["clean"]]), yerr=evidence.error_bars([of["robust"]]),
                linestyle="none", color=style["color"], marker=style["marker"], capsize=2, elinewidth=0.8, label=label,
                markerfacecolor="white" if place % 2 else style["color"],
            )  # fmt: skip
        axis.set(
            title=title, xlabel="clean accuracy, %", ylabel=f"under APGD {numbers['settings']['eval_eps']:g}/255, %"
        )
        axis.legend(fontsize=6.5, frameon=False, loc="best")
    return figure


def claims(numbers: Numbers) -> list[Claim]:
    settings, found = numbers["settings"], numbers["results"]
    n = settings["num_samples"]
    rows = []
    ks = list(found[K])
    clean, robust = (difference(found[K][ks[-1]][key], found[K][ks[0]][key], n) for key in ("clean", "robust"))
    said = f"{ks[-1]} less {ks[0]}: clean {clean}, APGD {robust} points"
    rows.append(Claim("LORE", "robust accuracy rises with K", said, verdict(robust)))
    rows.append(Claim("LORE", "clean accuracy rises with K (the paper's text)", said, verdict(clean)))
    falls = CONFIRMED if clean.high < 0 else NOT_CONFIRMED
    rows.append(Claim("LORE", "clean accuracy falls with K (the paper's table)", said, falls))

    distances = {form: 100 * statistics.mean(of["distance"]) for form, of in found[FORM].items()}
    gap = difference(found[FORM]["scalar"]["distance"], found[FORM]["network"]["distance"], None)
    said = "clean distance, % of norm²: " + ", ".join(f"{form} {value:.1f}" for form, value in distances.items())
    rows.append(
        Claim(
            "LORE",
            "a network enforces the constraint better than a scalar multiplier, at one learning rate",
            said,
            verdict(gap),
        )
    )

    # For a fair comparison, take the fixed threshold whose distance is nearest to the relative one's.
    relative, *fixed = found[MARGIN]
    mean = {label: statistics.mean(of["distance"]) for label, of in found[MARGIN].items()}
    nearest = min(fixed, key=lambda label: abs(mean[label] - mean[relative]))
    clean, robust = (
        difference(found[MARGIN][relative][key], found[MARGIN][nearest][key], n) for key in ("clean", "robust")
    )
    rows.append(
        Claim(
            "LORE", "a relative margin beats a fixed one",
            f"{relative} - {nearest} (the nearest distance): clean {clean}, APGD {robust} points",
            CONFIRMED if CONFIRMED in (verdict(clean), verdict(robust)) else NOT_CONFIRMED,
        )
    )  # fmt: skip
    tecoa, *constrained = [label for label in found[SUPERVISED] if label != TECOA.format(1)]
    for label in constrained:
        clean, robust = (
            difference(found[SUPERVISED][label][key], found[SUPERVISED][tecoa][key], n) for key in ("clean", "robust")
        )
        both = [verdict(clean), verdict(robust)]
        partly = {(CONFIRMED, CONFIRMED): ""} | {
            (CONFIRMED, second): ": clean only" for second in both if second != CONFIRMED
        }
        rows.append(
            Claim(
                "LORE", f"{label.split(',')[0]} beats TeCoA, clean and attacked",
                f"{label} - {tecoa}: clean {clean}, APGD {robust} points",
                CONFIRMED if both == [CONFIRMED] * 2 else NOT_CONFIRMED + partly.get(tuple(both), ""),
            )
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    run(main)
