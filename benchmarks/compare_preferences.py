"""Preference optimisation against typographic attacks: compares CE, DPO, IPO and KTO from one start model.

  python benchmarks/compare_preferences.py --model runs/reading-clip --data data/cifar10 --seeds 0 1 2 \\
    --output_dir runs/preferences

Runs train_po.py for every method and seed, then evaluate.py on all models. Prints a table per evaluation set (mean and
standard deviation over seeds): accuracy on original and on attacked images, how often the written word is predicted, KL
to the start model on original images. Training and evaluation have separate word settings, so that the evaluation can
use fonts, sizes and places that were not trained on.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import (
    START,
    WordSettings,
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
from utils.errors import UserError
from utils.methods.preferences import DEFAULT_BETA, PREFERENCES
from utils.sets.typographic import PLACES

FIGURES = [("accuracy", "clean"), ("accuracy", "typographic"), ("follows_word", "typographic"), ("retention", "clean")]
HEADINGS = ["original", "typographic", "follows the word", "KL to the start, nats"]


@dataclass
class Settings(WordSettings):
    eval_data: list[str] = what_flag([], "labelled sets whose test/ is evaluated on (default: --data)", path=True)
    preferences: list[str] = what_flag(["ce", "dpo", "ipo", "kto"], "methods", choices=PREFERENCES)
    batch_size: int = training_flag(64, "images per step, each clean and attacked", minimum=1)
    steps: int = training_flag(150, "training steps", minimum=1)
    learning_rate: float = training_flag(3e-4, "the same for every method", minimum=0)
    beta: list[float] = training_flag(
        [], "one for each of --preferences (default: dpo 1, ipo 0.1, kto 1.5); ce has none, write 1", above=0
    )
    reg_weight: float = training_flag(1.0, "weight of the KL on clean images, for every method but ipo", minimum=0)
    ipo_reg_weight: float = training_flag(10.0, "ipo's, whose loss starts at 1/(4 beta^2): 25 at beta 0.1", minimum=0)
    word_size_max: float = training_flag(50.0, "in the same unit", above=0)

    eval_word_size_min: float = evaluation_flag(50.0, "letters, in pixels at an image side of 224", above=0)
    eval_word_size_max: float = evaluation_flag(60.0, "in the same unit", above=0)
    eval_word_place: str = evaluation_flag("top", "of the words evaluated on", choices=PLACES)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    if settings.beta and len(settings.beta) != len(settings.preferences):
        raise UserError(
            f"--beta: {len(settings.beta)} values for {len(settings.preferences)} preferences; give one each"
        )
    started = time.monotonic()
    output_dir = Path(settings.output_dir)
    kept = (
        "model", "data", "steps", "batch_size", "learning_rate", "beta", "reg_weight", "ipo_reg_weight", "fonts",
        "word_size_min", "word_size_max", "word_place", "word_kind",
    )  # fmt: skip
    claim_directory(output_dir, {name: getattr(settings, name) for name in kept})
    runs = {
        (preference, seed): output_dir / f"{preference}-seed{seed}"
        for seed in settings.seeds
        for preference in settings.preferences
    }
    in_parallel(
        settings.jobs,
        [
            train_command(settings, preference, seed, run_dir)
            for (preference, seed), run_dir in runs.items()
            if not (run_dir / "model.safetensors").exists()
        ],
    )
    models = [settings.model, *map(str, runs.values())]
    in_parallel(settings.jobs, [evaluation_command(settings, models)])
    values = read_figures(settings, output_dir)
    tables = []
    for name in settings.eval_data or [settings.data]:
        rows = table_rows(settings, name, values, runs)
        title = f"{name}: accuracy in %, {settings.steps} steps of {settings.batch_size} images"
        print_table(title + (", mean ± standard deviation over seeds" if len(settings.seeds) > 1 else ""), rows)
        tables.append(f"{name}\n\n{markdown(rows)}")
    (output_dir / "table.md").write_text("\n".join(tables), encoding="utf-8")
    print(f"{output_dir / 'table.md'} written; {time.monotonic() - started:.0f} s in all")


def train_command(
    settings: Settings, preference: str, seed: int, run_dir: Path, beta_factor: float = 1.0, reg_factor: float = 1.0
) -> list[str]:
    reg_weight = reg_factor * (settings.ipo_reg_weight if preference == "ipo" else settings.reg_weight)
    betas = dict(zip(settings.preferences, settings.beta)) or DEFAULT_BETA
    beta = [] if preference == "ce" else ["--beta", f"{beta_factor * betas[preference]:g}"]
    return [
        *launcher("train_po.py"), "--model_name_or_path", settings.model, "--train_shards", f"{settings.data}/train",
        "--preference", preference, *beta, "--reg_weight", f"{reg_weight:g}", "--max_steps", str(settings.steps),
        "--per_device_train_batch_size", str(settings.batch_size), "--learning_rate", f"{settings.learning_rate:g}",
        "--fonts", *settings.fonts, "--word_size_min", f"{settings.word_size_min:g}",
        "--word_size_max", f"{settings.word_size_max:g}", "--word_place", settings.word_place,
        "--word_kind", settings.word_kind, "--logging_steps", "25", "--checkpoint_steps", "0", "--num_workers", "0",
        "--report_to", "none", "--resume_from_checkpoint", "latest", "--seed", str(seed), "--output_dir", str(run_dir),
    ]  # fmt: skip


def evaluation_command(settings: Settings, models: Sequence[str]) -> list[str]:
    samples = [] if settings.num_samples is None else ["--num_samples", str(settings.num_samples)]
    return [
        *launcher("evaluate.py", settings.jobs), "--model", *models, "--data", *(settings.eval_data or [settings.data]),
        "--measure", "accuracy", "retention", "--attack", "clean", "typographic",
        "--reference_model_name_or_path", settings.model, "--fonts", *settings.eval_fonts,
        "--word_size_min", f"{settings.eval_word_size_min:g}", "--word_size_max", f"{settings.eval_word_size_max:g}",
        "--word_place", settings.eval_word_place, "--word_kind", settings.word_kind, *samples, "--num_workers", "0",
        "--output_dir", f"{settings.output_dir}/eval",
    ]  # fmt: skip


def read_figures(settings: Settings, output_dir: Path) -> dict[tuple[str, str, str, str], float]:
    """(model, set, measure, attack) -> value."""
    words = {
        "fonts": settings.eval_fonts,
        "size": [settings.eval_word_size_min, settings.eval_word_size_max],
        "place": settings.eval_word_place,
    }
    found = {}
    report = json.loads((output_dir / "eval" / "results.json").read_text(encoding="utf-8"))
    for cell in report["results"]:
        asked = cell["settings"]
        same_words = words.items() <= asked.get("words", words).items()
        if asked["num_samples"] == settings.num_samples and same_words:
            found[cell["model"], cell["dataset"], cell["measure"], cell["attack"]] = cell["value"]
    return found


def table_rows(settings: Settings, name: str, values: dict, runs: dict[tuple[str, int], Path]) -> list[list[str]]:
    rows = [["method", *HEADINGS]]
    methods = {START: [settings.model]}
    for preference in settings.preferences:
        methods[preference.upper()] = [str(runs[preference, seed]) for seed in settings.seeds]
    for method, models in methods.items():
        cells = [[values[model, name, *figure] for model in models] for figure in FIGURES]
        rows.append([method, *map(percent, cells[:3]), nats(cells[3])])
    return rows


def nats(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    run(main)
