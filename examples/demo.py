"""The whole way in a few minutes on a CPU, without downloads: LORE beside FARE from the same small CLIP.

  python examples/demo.py --output_dir runs/demo

Draws scikit-learn's digits into shards, pretrains a small CLIP on them, fine-tunes it with the real train_lore.py as FARE
is published (one update per batch), as FARE with as many updates as LORE makes, and as LORE, and evaluates all four.
Every method gets the same batches, attacks of the same strength and the same learning rate; none is tuned for the demo.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils.cli import UserError, flag, parse_settings, required, run
from utils.metrics import MetricsFile

METHODS = {
    "FARE": ["--constraint", "none", "--primal_steps", "1"],
    "FARE, 5 updates": ["--constraint", "none", "--primal_steps", "5"],
    "LORE": ["--constraint", "embedding", "--primal_steps", "5", "--rho", "0.1"],
}
STYLES = {"FARE": (":", "o"), "FARE, 5 updates": ("--", "s"), "LORE": ("-", "^")}


@dataclass
class Settings:
    output_dir: str = required("everything goes here", group="demo")
    overwrite: bool = flag(False, "delete what output_dir holds", group="demo")
    steps: int = flag(40, "training steps of each method", group="demo", minimum=1)
    eps: float = flag(16.0, "radius of the training attack, in 1/255", group="demo", above=0, maximum=255)
    seed: int = flag(0, "of pretraining and training", group="demo", minimum=0)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    demo = Path(settings.output_dir)
    if demo.exists() and any(demo.iterdir()):
        if not settings.overwrite:
            raise UserError(f"--output_dir {demo}: not empty; give another directory, or add --overwrite")
        shutil.rmtree(demo)
    started = time.monotonic()
    data, base = demo / "digits", demo / "base"

    say("1/4  Handwritten digits as shards")
    start("examples/make_digit_shards.py", "--output_dir", data)

    say("2/4  A small CLIP, pretrained on them")
    start("examples/pretrain_small_clip.py", "--train_data", data, "--output_dir", base, "--seed", settings.seed,
          *PRETRAINING)  # fmt: skip

    say(f"3/4  Fine-tuning against attacks of {settings.eps:g}/255: FARE, FARE at equal updates, LORE")
    runs = {name: demo / name.lower().replace(", ", "-").replace(" ", "-") for name in METHODS}
    for name, run_dir in runs.items():
        launch(
            "train_lore.py", "--model_name_or_path", base, "--train_shards", data / "train",
            "--eval_shards", data / "test", "--eval_num_samples", 180, "--eval_steps", 4, "--output_dir", run_dir,
            "--eps", settings.eps, "--max_steps", settings.steps, "--seed", settings.seed, *TRAINING, *METHODS[name],
        )  # fmt: skip

    say("4/4  Evaluation on the 360 test images")
    launch(
        "evaluate.py", "--model", base, *runs.values(), "--data", data, "--attack", "clean", "pgd",
        "--eps", settings.eps / 4, settings.eps / 2, settings.eps, "--num_workers", 0, "--output_dir", demo / "eval",
    )  # fmt: skip

    histories = {name: MetricsFile(run_dir / "metrics.jsonl").read() for name, run_dir in runs.items()}
    print_results(settings, demo, {"base": base, **runs})
    print_early_curve(histories)
    draw_curves(histories, settings, demo / "curves.png")
    print(f"\n{demo / 'curves.png'} shows the curves. {time.monotonic() - started:.0f} s in all.")
    print(f"Load a model: CLIPModel.from_pretrained({str(runs['LORE'])!r})")


PRETRAINING = ["--flip", "false"]
TRAINING = ["--per_device_train_batch_size", "64", "--learning_rate", "3e-4", "--logging_steps", "4",
            "--checkpoint_steps", "0", "--num_workers", "0", "--report_to", "none"]  # fmt: skip


def say(line: str) -> None:
    print(f"\n=== {line}", flush=True)


def start(script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> None:
    """Shows the command as a user would type it, and runs it."""
    words = [script, *map(str, arguments)]
    print("$", *(["accelerate launch --config_file accelerate_configs/cpu.yaml"] if launcher else ["python"]), *words)
    sys.stdout.flush()
    status = subprocess.run([sys.executable, *launcher, *words], cwd=ROOT, check=False).returncode
    if status:
        raise UserError(f"{script} ended with status {status}; its own message is above")


def launch(script: str, *arguments: object) -> None:
    launcher = ("-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--config_file")
    start(script, *arguments, launcher=(*launcher, "accelerate_configs/cpu.yaml"))


def print_results(settings: Settings, demo: Path, models: dict[str, Path]) -> None:
    """The evaluation once more, with the methods' names."""
    results = json.loads((demo / "eval" / "results.json").read_text(encoding="utf-8"))["results"]
    table = Table(title=f"Accuracy in % on the test digits, trained at eps {settings.eps:g}/255")
    table.add_column("method")
    columns = [None, settings.eps / 4, settings.eps / 2, settings.eps]
    for eps in columns:
        table.add_column("clean" if eps is None else f"PGD {eps:g}/255", justify="right")
    for name, model in models.items():
        values = {result["eps"]: result["value"] for result in results if result["model"] == str(model)}
        table.add_row(name, *(f"{100 * values[eps]:.1f}" for eps in columns))
    Console().print(table)


def print_early_curve(histories: dict[str, list[dict]]) -> None:
    """Clean accuracy at each evaluation."""
    curves = {
        name: {row["step"]: row["eval_accuracy_clean"] for row in history if "eval_accuracy_clean" in row}
        for name, history in histories.items()
    }
    steps = sorted(next(iter(curves.values())))[:8]
    table = Table(title="Clean accuracy in % over the first steps")
    table.add_column("step")
    for step in steps:
        table.add_column(str(step), justify="right")
    for name, curve in curves.items():
        table.add_row(name, *(f"{100 * curve[step]:.1f}" for step in steps))
    Console().print(table)


def draw_curves(histories: dict[str, list[dict]], settings: Settings, path: Path) -> None:
    """Clean accuracy, robust accuracy, clean distance and multiplier over the steps; readable in black and white."""
    panels = [
        ("eval_accuracy_clean", "clean accuracy", None),
        ("eval_accuracy_pgd", f"accuracy under PGD, eps {settings.eps:g}/255", None),
        ("violation_ratio_mean", "clean distance / margin", 0.1),
        ("multiplier_mean", "multiplier (LORE)", None),
    ]
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, (key, title, tolerance) in zip(axes, panels):
        for name, history in histories.items():
            if key == "multiplier_mean" and name != "LORE":
                continue
            points = [(row["step"], row[key]) for row in history if key in row]
            line, marker = STYLES[name]
            axis.plot(*zip(*points), line, marker=marker, markersize=4, label=name)
        if tolerance is not None:
            axis.axhline(tolerance, color="black", linewidth=0.8)
            axis.annotate("rho", (0, tolerance), xytext=(2, 2), textcoords="offset points", fontsize=8)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
