"""Robustness to pixel attacks and written words together: LORE, preference optimisation, and one after the other.

  python benchmarks/robust_and_aligned.py --model examples/reading_clip --data data/attribute-digits --seeds 0 1 2 \\
    --output_dir runs/robust-and-aligned

Runs train_lore.py and train_po.py for every method and seed on one start model; a method's second stage trains the
model of the first. Then runs evaluate.py once on all models. Prints a table (mean and standard deviation over seeds;
intervals for one seed): accuracy on original images, on images with wrong words and under APGD, and the distance of
original images' embeddings from the start model's. Writes table.md and scatter.png. Finished runs are not repeated.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import (
    START,
    WordSettings,
    as_in_results,
    claim_directory,
    evaluation_flag,
    in_parallel,
    launcher,
    markdown,
    percent,
    print_table,
    training_flag,
    what_flag,
)
from utils.cli import parse_settings, run
from utils.methods.preferences import PREFERENCES
from utils.sets.typographic import PLACES


class Method(NamedTuple):
    """A run: its script, the method whose model it starts from (None: the start model), and its name in tables."""

    stage: str  # lore, po, po_l2, po_head
    start: str | None
    name: str


METHODS = {
    "lore": Method("lore", None, "LORE"),
    "po": Method("po", None, "PO"),
    "po_l2": Method("po_l2", None, "PO + l2"),
    "lore_po_head": Method("po_head", "lore", "LORE, then PO (head)"),
    "lore_po": Method("po", "lore", "LORE, then PO"),
    "lore_po_l2": Method("po_l2", "lore", "LORE, then PO + l2"),
    "po_lore": Method("lore", "po", "PO, then LORE"),
}
MARKERS = ["*", "o", "s", "D", "^", "v", "<", ">"]  # for the start model and each method


@dataclass
class Settings(WordSettings):
    methods: list[str] = what_flag(
        list(METHODS), "which runs; the first stage that a method needs is made in any case", choices=tuple(METHODS)
    )
    eps: float = training_flag(4.0, "LORE: radius of the training attack, in 1/255", above=0, maximum=255)
    rho: float = training_flag(0.1, "LORE: tolerance", minimum=0)
    lore_steps: int = training_flag(60, "LORE: training steps, of 5 updates each", minimum=1)
    lore_learning_rate: float = training_flag(3e-4, "LORE: of the encoder", minimum=0)
    preference: str = training_flag("dpo", "PO: the loss", choices=PREFERENCES)
    beta: float = training_flag(0.5, "PO: strength of the preference", above=0)
    reg_weight: float = training_flag(1.0, "PO: weight of the KL on clean images", minimum=0)
    po_steps: int = training_flag(100, "PO: training steps", minimum=1)
    po_learning_rate: float = training_flag(3e-4, "PO: of the image tower", minimum=0)
    head_learning_rate: float = training_flag(1e-2, "PO: of the head", minimum=0)
    po_rho: float = training_flag(0.05, "PO + l2: tolerance, from the model that the stage starts from", minimum=0)
    word_place: str = training_flag("bottom", "of all words", choices=PLACES)
    po_dual_learning_rate: float = training_flag(1e-3, "PO + l2: of the multiplier", minimum=0)

    eval_eps: list[float] = evaluation_flag([4.0], "radii of APGD, in 1/255", above=0, maximum=255)
    apgd_steps: int = evaluation_flag(100, "steps of each run of APGD", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    started = time.monotonic()
    settings.model, settings.data = as_in_results(settings.model), as_in_results(settings.data)
    output_dir = Path(settings.output_dir)
    free = ("methods", "seeds", "output_dir", "eval_eps", "eval_fonts", "apgd_steps", "num_samples", "jobs")
    claim_directory(output_dir, {name: value for name, value in vars(settings).items() if name not in free})
    methods = {key: METHODS[key] for key in METHODS if key in settings.methods}
    first = {method.start for method in methods.values() if method.start}
    runs = {
        (key, seed): output_dir / f"{key.replace('_', '-')}-seed{seed}"
        for seed in settings.seeds
        for key in METHODS
        if key in methods or key in first
    }
    for stage in (1, 2):
        in_parallel(
            settings.jobs,
            [
                train_command(settings, key, seed, runs)
                for (key, seed), run_dir in runs.items()
                if (stage == 1) == (METHODS[key].start is None) and not (run_dir / "model.safetensors").exists()
            ],
        )
    models = {START: [settings.model]}
    models |= {method.name: [str(runs[key, seed]) for seed in settings.seeds] for key, method in methods.items()}
    of_all = [model for of_method in models.values() for model in of_method]
    in_parallel(settings.jobs, [evaluation_command(settings, of_all)])
    found = read_figures(settings, output_dir)

    rows = table_rows(settings, models, found)
    title = f"{settings.data}: accuracy in %, LORE at eps {settings.eps:g}/255"
    print_table(title + (", mean ± standard deviation over seeds" if len(settings.seeds) > 1 else ""), rows)
    (output_dir / "table.md").write_text(markdown(rows), encoding="utf-8")
    draw_scatter(settings, models, found, output_dir / "scatter.png")
    print(
        f"{output_dir / 'table.md'} and {output_dir / 'scatter.png'} written; {time.monotonic() - started:.0f} s in all"
    )


def train_command(settings: Settings, key: str, seed: int, runs: dict[tuple[str, int], Path]) -> list[str]:
    stage, start, _ = METHODS[key]
    common = [
        "--model_name_or_path", str(runs[start, seed]) if start else settings.model,
        "--train_shards", f"{settings.data}/train",
        "--per_device_train_batch_size", str(settings.batch_size), "--logging_steps", "10", "--checkpoint_steps", "0",
        "--num_workers", "0", "--report_to", "none", "--resume_from_checkpoint", "latest", "--seed", str(seed),
        "--output_dir", str(runs[key, seed]),
    ]  # fmt: skip
    if stage == "lore":
        return [
            *launcher("train_lore.py"), *common, "--eps", f"{settings.eps:g}", "--rho", f"{settings.rho:g}",
            "--max_steps", str(settings.lore_steps), "--learning_rate", f"{settings.lore_learning_rate:g}",
        ]  # fmt: skip
    head = stage == "po_head"
    rate = settings.head_learning_rate if head else settings.po_learning_rate
    held = [
        "--constraint", "embedding", "--rho", f"{settings.po_rho:g}",
        "--dual_learning_rate", f"{settings.po_dual_learning_rate:g}",
    ]  # fmt: skip
    return [
        *launcher("train_po.py"), *common, "--trainable", "head" if head else "image",
        "--preference", settings.preference, "--beta", f"{settings.beta:g}", "--reg_weight", f"{settings.reg_weight:g}",
        "--max_steps", str(settings.po_steps), "--learning_rate", f"{rate:g}",
        *word_flags(settings, settings.fonts), *(held if stage == "po_l2" else []),
    ]  # fmt: skip


def evaluation_command(settings: Settings, models: Sequence[str]) -> list[str]:
    samples = [] if settings.num_samples is None else ["--num_samples", str(settings.num_samples)]
    return [
        *launcher("evaluate.py", settings.jobs), "--model", *models, "--data", settings.data,
        "--measure", "accuracy", "fidelity", "--reference_model_name_or_path", settings.model,
        "--attack", "clean", "typographic", "apgd", "--eps", *(f"{eps:g}" for eps in settings.eval_eps),
        "--apgd_steps", str(settings.apgd_steps), *word_flags(settings, settings.eval_fonts), *samples,
        "--num_workers", "0", "--output_dir", f"{settings.output_dir}/eval",
    ]  # fmt: skip


def word_flags(settings: Settings, fonts: Sequence[str]) -> list[str]:
    return [
        "--fonts", *fonts,
        "--word_size_min", f"{settings.word_size_min:g}", "--word_size_max", f"{settings.word_size_max:g}",
        "--word_place", settings.word_place, "--word_kind", settings.word_kind,
    ]  # fmt: skip


def columns(settings: Settings) -> dict[str, tuple[str, str, float | None]]:
    """Heading -> (measure, attack, eps)."""
    return {
        "original": ("accuracy", "clean", None),
        "typographic": ("accuracy", "typographic", None),
        "follows the word": ("follows_word", "typographic", None),
        **{apgd_heading(eps): ("accuracy", "apgd", eps) for eps in settings.eval_eps},
        "moved": ("fidelity", "clean", None),
    }


def apgd_heading(eps: float) -> str:
    return f"APGD {eps:g}/255"


def read_figures(settings: Settings, output_dir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(model, heading) -> the cell of results.json that was measured with these settings."""
    headings = {figure: heading for heading, figure in columns(settings).items()}
    wanted = {"num_samples": settings.num_samples, "apgd_steps": settings.apgd_steps}
    found = {}
    report = json.loads((output_dir / "eval" / "results.json").read_text(encoding="utf-8"))
    for cell in report["results"]:
        asked = cell["settings"]
        same = all(asked.get(name, value) == value for name, value in wanted.items())
        same = same and asked.get("words", {}).get("fonts", settings.eval_fonts) == settings.eval_fonts
        heading = headings.get((cell["measure"], cell["attack"], cell["eps"]))
        if same and heading and cell["dataset"] == settings.data:
            found[cell["model"], heading] = cell
    return found


def table_rows(settings: Settings, models: dict[str, list[str]], found: dict) -> list[list[str]]:
    rows = [["method", *columns(settings)]]
    for name, of_method in models.items():
        row = [name]
        for heading, (measure, *_) in columns(settings).items():
            cells = [found[model, heading] for model in of_method]
            values, interval = [cell["value"] for cell in cells], cells[0]["ci95"]
            if measure == "fidelity":
                row.append(distance(values))
            elif len(settings.seeds) == 1:
                row.append(f"{percent(values)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]")
            else:
                row.append(percent(values))
        rows.append(row)
    return rows


def distance(values: list[float]) -> str:
    """||phi(x) - phi0(x)||^2 / ||phi0(x)||^2, where phi0 is the start model."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def draw_scatter(settings: Settings, models: dict[str, list[str]], found: dict, path: Path) -> None:
    """Accuracy with wrong words against accuracy under the strongest APGD; bars: standard deviation, or the interval.

    Readable in black and white: each method has a marker, filled grey if LORE is part of it.
    """
    heading = apgd_heading(max(settings.eval_eps))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    names = [START, *(method.name for method in METHODS.values())]
    for name, of_method in models.items():
        place, bars = [], []
        for column in ("typographic", heading):
            cells = [found[model, column] for model in of_method]
            values = [100 * cell["value"] for cell in cells]
            place.append(statistics.mean(values))
            low, high = (100 * end for end in cells[0]["ci95"])
            spread = statistics.stdev(values) if len(values) > 1 else None
            bars.append([[spread], [spread]] if spread is not None else [[values[0] - low], [high - values[0]]])
        axis.errorbar(
            *([value] for value in place), xerr=bars[0], yerr=bars[1], fmt=MARKERS[names.index(name)], color="black",
            markerfacecolor="0.6" if "LORE" in name else "white", markersize=11 if name == START else 8,
            linewidth=0.8, elinewidth=0.8, capsize=2, label=name,
        )  # fmt: skip
    axis.set(xlabel="accuracy on images with wrong words, %", ylabel=f"accuracy under {heading}, %")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
