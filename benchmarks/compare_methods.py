"""LORE against FARE from one start model: FARE as published, FARE with as many updates as LORE, and LORE.

  python benchmarks/compare_methods.py --model runs/small-clip --data data/cifar10 --seeds 0 1 2 \\
    --output_dir runs/compare

Runs train_lore.py for every method and seed, then evaluate.py on all models. Prints a table (mean and standard
deviation over seeds) and the clean accuracy over the first steps; writes table.md and curves.png. All methods get the
same batches, the same strength of attack, the same learning rate and the same further settings.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import (
    FARE,
    START,
    Flags,
    StepSettings,
    evaluate,
    evaluation_flag,
    lore_runs,
    markdown,
    percent,
    print_table,
    training_flag,
)
from utils.cli import parse_settings, run
from utils.training.metrics import MetricsFile

LINES = [(":", "o"), ("--", "s"), ("-", "^"), ("-.", "v"), ("-", "D")]  # one per method


@dataclass
class Settings(StepSettings):
    rho: list[float] = training_flag([0.1], "LORE's tolerance; several are several methods", minimum=0)
    curve_steps: int = evaluation_flag(10, "steps between evaluations during training", minimum=1)
    curve_num_samples: int = evaluation_flag(200, "test images of those", minimum=1)
    eval_eps: list[float] = evaluation_flag([2.0, 4.0], "radii of the final PGD, in 1/255", above=0, maximum=255)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    started = time.monotonic()
    output_dir = Path(settings.output_dir)
    methods = make_methods(settings)
    runs = lore_runs(settings, methods, {name: folder_name(name) for name in methods}, kept=("eps", "steps"))
    models = [str(folder) for folders in runs.values() for folder in folders]
    cells = evaluate(settings, "compare", models, {"attack": ["clean", "pgd"], "eps": settings.eval_eps})
    values = {(cell["model"], cell["eps"]): cell["value"] for cell in cells}
    histories = {name: [MetricsFile(folder / "metrics.jsonl").read() for folder in of] for name, of in runs.items()}

    table = accuracy_rows(settings, values, runs)
    early = early_rows(histories)
    title = f"Accuracy in % on {settings.num_samples} test images, trained at eps {settings.eps:g}/255"
    print_table(title + (", mean ± standard deviation over seeds" if len(settings.seeds) > 1 else ""), table)
    print_table(f"Clean accuracy in % on {settings.curve_num_samples} test images after so many steps", early)
    (output_dir / "table.md").write_text(markdown(table) + "\n" + markdown(early), encoding="utf-8")
    draw_curves(settings, histories, output_dir / "curves.png")
    print(
        f"{output_dir / 'table.md'} and {output_dir / 'curves.png'} written; {time.monotonic() - started:.0f} s in all"
    )


def make_methods(settings: Settings) -> dict[str, Flags]:
    common = {
        "eps": settings.eps, "max_steps": settings.steps, "eval_shards": f"{settings.data}/test",
        "eval_steps": settings.curve_steps, "eval_num_samples": settings.curve_num_samples,
    }  # fmt: skip
    methods = {f"FARE, K = {k}": FARE | common | {"primal_steps": k} for k in (1, 5)}
    methods |= {f"LORE, K = 5, rho {rho:g}": common | {"primal_steps": 5, "rho": rho} for rho in settings.rho}
    return methods


def folder_name(method: str) -> str:
    """The method's name in the report: fare-k1, lore-k5-rho0.1."""
    return method.lower().replace(", ", "-").replace(" = ", "").replace(" ", "")


def accuracy_rows(settings: Settings, values: dict, runs: dict[str, list[Path]]) -> list[list[str]]:
    columns = [None, *settings.eval_eps]
    rows = [["method", *("clean" if eps is None else f"PGD {eps:g}/255" for eps in columns)]]
    for name, folders in {START: [settings.model], **runs}.items():
        rows.append([name, *(percent([values[str(folder), eps] for folder in folders]) for eps in columns)])
    return rows


def early_rows(histories: dict[str, list[list[dict]]]) -> list[list[str]]:
    curves = {name: [curve(history, "eval_accuracy_clean") for history in of] for name, of in histories.items()}
    steps = sorted(next(iter(curves.values()))[0])[:8]
    rows = [["method", *map(str, steps)]]
    for name, of in curves.items():
        rows.append([name, *(percent([statistics.mean(points[step] for points in of)]) for step in steps)])
    return rows


def curve(history: list[dict], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in history if key in row}


def draw_curves(settings: Settings, histories: dict[str, list[list[dict]]], path: Path) -> None:
    """Means over seeds by step: accuracies, clean distance, multiplier. Readable in black and white."""
    panels = [
        ("eval_accuracy_clean", "clean accuracy"),
        ("eval_accuracy_pgd", f"accuracy under PGD, eps {settings.eps:g}/255"),
        ("violation_ratio_mean", "clean distance / margin"),
        ("multiplier_mean", "multiplier of LORE"),
    ]
    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, title) in zip(axes, panels):
        for (name, of), (line, marker) in zip(histories.items(), itertools.cycle(LINES)):
            if key == "multiplier_mean" and not name.startswith("LORE"):
                continue
            curves = [curve(history, key) for history in of]
            steps = sorted(curves[0])
            means = [statistics.mean(points[step] for points in curves) for step in steps]
            axis.plot(steps, means, line, color="black", marker=marker, markersize=4,
                      markevery=max(1, math.ceil(len(steps) / 12)), label=name)  # fmt: skip
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    for rho in settings.rho:
        axes[2].axhline(rho, color="grey", linewidth=1)
        axes[2].annotate("rho", (settings.steps, rho), xytext=(-16, 3), textcoords="offset points", color="grey")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(histories), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
