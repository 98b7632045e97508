"""LORE beside FARE from one start model: FARE as published, FARE with as many updates as LORE makes, LORE.

  python benchmarks/compare_methods.py --model runs/small-clip --data data/cifar10 --seeds 0 1 2 --output_dir runs/compare

Starts the real train_lore.py for every method and seed, then evaluate.py on all models, prints a table (mean and standard
deviation over seeds) and the clean accuracy over the first steps, and writes table.md and curves.png. All methods get the
same batches, attacks of the same strength, and the same learning rate; what is left free is given to all alike.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import claim_directory, in_parallel, launcher, markdown, percent, print_table
from utils.cli import flag, parse_settings, required, run
from utils.metrics import MetricsFile

START = "start model"
LINES = [(":", "o"), ("--", "s"), ("-", "^"), ("-.", "v"), ("-", "D")]  # of the methods in turn


@dataclass
class Settings:
    # fmt: off
    model: str = required("the model that every run starts from", group="what")
    data: str = required("labelled set with train/ and test/", group="what")
    seeds: list[int] = flag([0], "one run of each method per seed", group="what", minimum=0)
    output_dir: str = required("runs, evaluation, table.md and curves.png go here", group="what")
    eps: float = flag(4.0, "radius of the training attack, in 1/255", group="training", above=0, maximum=255)
    rho: list[float] = flag([0.1], "LORE's tolerance; several are several methods", group="training", minimum=0)
    steps: int = flag(60, "training steps", group="training", minimum=1)
    batch_size: int = flag(64, "images per step", group="training", minimum=1)
    learning_rate: float = flag(3e-4, "of the encoder, the same for every method", group="training", minimum=0)
    curve_steps: int = flag(10, "steps between evaluations during training", group="evaluation", minimum=1)
    curve_num_samples: int = flag(200, "test images of those", group="evaluation", minimum=1)
    eval_eps: list[float] = flag([2.0, 4.0], "radii of the final PGD evaluation, in 1/255", group="evaluation", above=0, maximum=255)
    num_samples: int = flag(1000, "test images of the final evaluation", group="evaluation", minimum=1)
    jobs: int = flag(1, "runs at a time, one thread each where more than one; then processes of the evaluation", group="run", minimum=1)
    # fmt: on


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    started = time.monotonic()
    output_dir = Path(settings.output_dir)
    claim_directory(
        output_dir,
        {name: getattr(settings, name) for name in ("model", "data", "eps", "steps", "batch_size", "learning_rate")},
    )
    methods = make_methods(settings)
    runs = {
        (name, seed): output_dir / f"{folder}-seed{seed}"
        for seed in settings.seeds
        for name, (folder, _) in methods.items()
    }
    in_parallel(
        settings.jobs,
        [
            train_command(settings, seed, run_dir, methods[name][1])
            for (name, seed), run_dir in runs.items()
            if not (run_dir / "model.safetensors").exists()
        ],
    )
    models = [settings.model, *map(str, runs.values())]
    in_parallel(settings.jobs, [evaluation_command(settings, models)])
    values = read_accuracies(settings, output_dir)
    histories = {key: MetricsFile(run_dir / "metrics.jsonl").read() for key, run_dir in runs.items()}

    table = accuracy_rows(settings, list(methods), values, runs)
    early = early_rows(settings, list(methods), histories)
    title = f"Accuracy in % on {settings.num_samples} test images, trained at eps {settings.eps:g}/255"
    print_table(title + (", mean ± standard deviation over seeds" if len(settings.seeds) > 1 else ""), table)
    print_table(f"Clean accuracy in % on {settings.curve_num_samples} test images after so many steps", early)
    (output_dir / "table.md").write_text(markdown(table) + "\n" + markdown(early), encoding="utf-8")
    draw_curves(settings, list(methods), histories, output_dir / "curves.png")
    print(
        f"{output_dir / 'table.md'} and {output_dir / 'curves.png'} written; {time.monotonic() - started:.0f} s in all"
    )


def make_methods(settings: Settings) -> dict[str, tuple[str, list[str]]]:
    """Method -> folder name and the flags that make it."""
    methods = {f"FARE, K = {k}": (f"fare-k{k}", ["--constraint", "none", "--primal_steps", str(k)]) for k in (1, 5)}
    for rho in settings.rho:
        flags = ["--constraint", "embedding", "--primal_steps", "5", "--rho", f"{rho:g}"]
        methods[f"LORE, K = 5, rho {rho:g}"] = (f"lore-rho{rho:g}", flags)
    return methods


def train_command(settings: Settings, seed: int, run_dir: Path, method: list[str]) -> list[str]:
    return [
        *launcher("train_lore.py"), "--model_name_or_path", settings.model,
        "--train_shards", f"{settings.data}/train", "--eval_shards", f"{settings.data}/test",
        "--eval_num_samples", str(settings.curve_num_samples), "--eval_steps", str(settings.curve_steps),
        "--eps", f"{settings.eps:g}", "--max_steps", str(settings.steps), "--resume_from_checkpoint", "latest",
        "--per_device_train_batch_size", str(settings.batch_size), "--learning_rate", f"{settings.learning_rate:g}",
        "--logging_steps", "2", "--checkpoint_steps", "0", "--num_workers", "0", "--report_to", "none",
        "--seed", str(seed), "--output_dir", str(run_dir), *method,
    ]  # fmt: skip


def evaluation_command(settings: Settings, models: Sequence[str]) -> list[str]:
    return [
        *launcher("evaluate.py", settings.jobs), "--model", *models, "--data", settings.data, "--attack", "clean", "pgd",
        "--eps", *(f"{eps:g}" for eps in settings.eval_eps), "--num_samples", str(settings.num_samples),
        "--num_workers", "0", "--output_dir", f"{settings.output_dir}/eval",
    ]  # fmt: skip


def read_accuracies(settings: Settings, output_dir: Path) -> dict[tuple[str, float | None], float]:
    """(model, eps or None for clean) -> accuracy on the first ``num_samples`` images."""
    report = json.loads((output_dir / "eval" / "results.json").read_text(encoding="utf-8"))
    return {
        (cell["model"], cell["eps"]): cell["value"]
        for cell in report["results"]
        if cell["settings"]["num_samples"] == settings.num_samples
    }


def accuracy_rows(
    settings: Settings, methods: list[str], values: dict, runs: dict[tuple[str, int], Path]
) -> list[list[str]]:
    columns = [None, *settings.eval_eps]
    rows = [["method", *("clean" if eps is None else f"PGD {eps:g}/255" for eps in columns)]]
    rows.append([START, *(percent([values[settings.model, eps]]) for eps in columns)])
    for name in methods:
        models = [str(runs[name, seed]) for seed in settings.seeds]
        rows.append([name, *(percent([values[model, eps] for model in models]) for eps in columns)])
    return rows


def early_rows(settings: Settings, methods: list[str], histories: dict[tuple[str, int], list[dict]]) -> list[list[str]]:
    curves = {key: curve(history, "eval_accuracy_clean") for key, history in histories.items()}
    steps = sorted(next(iter(curves.values())))[:8]
    rows = [["method", *map(str, steps)]]
    for name in methods:
        means = [statistics.mean(curves[name, seed][step] for seed in settings.seeds) for step in steps]
        rows.append([name, *(percent([mean]) for mean in means)])
    return rows


def curve(history: list[dict], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in history if key in row}


def draw_curves(
    settings: Settings, methods: list[str], histories: dict[tuple[str, int], list[dict]], path: Path
) -> None:
    """Means over seeds against the step: accuracies, clean distance, multiplier. Readable in black and white."""
    panels = [
        ("eval_accuracy_clean", "clean accuracy"),
        ("eval_accuracy_pgd", f"accuracy under PGD, eps {settings.eps:g}/255"),
        ("violation_ratio_mean", "clean distance / margin"),
        ("multiplier_mean", "multiplier of LORE"),
    ]
    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, title) in zip(axes, panels):
        for name, (line, marker) in zip(methods, itertools.cycle(LINES)):
            if key == "multiplier_mean" and not name.startswith("LORE"):
                continue
            curves = [curve(histories[name, seed], key) for seed in settings.seeds]
            steps = sorted(curves[0])
            means = [statistics.mean(points[step] for points in curves) for step in steps]
            axis.plot(steps, means, line, color="black", marker=marker, markersize=4,
                      markevery=max(1, math.ceil(len(steps) / 12)), label=name)  # fmt: skip
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    for rho in settings.rho:
        axes[2].axhline(rho, color="grey", linewidth=1)
        axes[2].annotate("rho", (settings.steps, rho), xytext=(-16, 3), textcoords="offset points", color="grey")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
