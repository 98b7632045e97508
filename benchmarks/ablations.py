"""The ablations of LORE at a scale that fits a CPU: rho, K, the form of the multiplier, the margin, and no constraint at all.

  python benchmarks/ablations.py --model runs/small-clip --data data/cifar10 --seeds 0 1 2 --output_dir runs/ablations

Starts train_lore.py on the ablation recipes (recipes/ablation_*.yaml), which differ in one setting each, with the model,
data, batch and steps of this command in place of theirs; then evaluate.py once on all models. Prints a table for each
ablation (mean and standard deviation over seeds) and writes them to table.md. The row that an ablation shares with the
others is one run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import ROOT, claim_directory, in_parallel, launcher, markdown, percent, print_table
from utils.cli import flag, parse_settings, required, run
from utils.metrics import MetricsFile

RECIPE = "recipes/ablation_{}_vit-b-32_imagenet-100.yaml"
START = "start model"


@dataclass
class Settings:
    # fmt: off
    model: str = required("the model that every run starts from", group="what")
    data: str = required("labelled set with train/ and test/", group="what")
    seeds: list[int] = flag([0], "one run of each variant per seed", group="what", minimum=0)
    output_dir: str = required("runs, evaluation and table.md go here", group="what")
    eps: float = flag(4.0, "radius of the training attack, in 1/255", group="training", above=0, maximum=255)
    rho: float = flag(0.02, "tolerance wherever it is not what varies", group="training", minimum=0)
    rhos: list[float] = flag([0.005, 0.02, 0.05, 0.1, 0.2], "tolerances of the first table", group="training", minimum=0)
    fixed_rhos: list[float] = flag([3.2, 6.3, 12.7], "squared distances allowed under a fixed margin", group="training", minimum=0)
    primal_steps: list[int] = flag([1, 2, 3, 5, 7, 10], "K of the second table", group="training", minimum=1)
    clean_weights: list[float] = flag([1.0, 10.0], "weights of the clean distance in place of the constraint", group="training", above=0)
    steps: int = flag(60, "training steps", group="training", minimum=1)
    batch_size: int = flag(64, "images per step", group="training", minimum=1)
    learning_rate: float = flag(3e-4, "of the encoder, the same for every variant", group="training", minimum=0)
    eval_eps: list[float] = flag([2.0, 4.0], "radii of the PGD evaluation, in 1/255", group="evaluation", above=0, maximum=255)
    num_samples: int = flag(1000, "test images of the evaluation", group="evaluation", minimum=1)
    jobs: int = flag(1, "runs at a time, one thread each where more than one; then processes of the evaluation", group="run", minimum=1)
    # fmt: on


@dataclass(frozen=True)
class Variant:
    """One row: the recipe (by the word in its name) and what the command line adds to it."""

    recipe: str
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return "_".join([self.recipe, *(word.strip("-") for word in self.flags)])


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    started = time.monotonic()
    output_dir = Path(settings.output_dir)
    kept = ("model", "data", "eps", "rho", "steps", "batch_size", "learning_rate")
    claim_directory(output_dir, {name: getattr(settings, name) for name in kept})
    tables = make_tables(settings)
    variants = dict.fromkeys(variant for rows in tables.values() for variant in rows.values())
    runs = {
        (variant, seed): output_dir / f"{variant.folder}-seed{seed}" for seed in settings.seeds for variant in variants
    }
    in_parallel(
        settings.jobs,
        [
            train_command(settings, variant, seed, run_dir)
            for (variant, seed), run_dir in runs.items()
            if not (run_dir / "model.safetensors").exists()
        ],
    )
    in_parallel(settings.jobs, [evaluation_command(settings, [settings.model, *map(str, runs.values())])])
    values = read_values(settings, output_dir)

    written = []
    for title, rows in tables.items():
        table = [["", "clean", *(f"PGD {eps:g}/255" for eps in settings.eval_eps), "clean distance, % of norm²", "λ"]]
        if not written:
            table.append([START, *cells(settings, values, [settings.model]), ""])
        for label, variant in rows.items():
            folders = [runs[variant, seed] for seed in settings.seeds]
            table.append([label, *cells(settings, values, list(map(str, folders))), multiplier(folders)])
        print_table(title, table)
        written.append(f"**{title}**\n\n{markdown(table)}")
    (output_dir / "table.md").write_text("\n".join(written), encoding="utf-8")
    print(f"{output_dir / 'table.md'} written; {time.monotonic() - started:.0f} s in all")


def make_tables(settings: Settings) -> dict[str, dict[str, Variant]]:
    """Title -> row -> variant. Everything but what the title names is the recipe's, rho as given."""
    rho = ("--rho", f"{settings.rho:g}")
    base = Variant("rho", rho)
    tables = {
        "rho": {f"rho {value:g}": Variant("rho", ("--rho", f"{value:g}")) for value in settings.rhos},
        "primal steps": {
            f"K = {k}": base if k == 5 else Variant("primal-steps", (*rho, "--primal_steps", str(k)))
            for k in settings.primal_steps
        },
        "multiplier": {
            "network": base,
            "linear": Variant("multiplier-linear", rho),
            "scalar": Variant("multiplier-scalar", rho),
        },
        "margin": {f"relative, rho {settings.rho:g}": base}
        | {f"fixed, {value:g}": Variant("margin-fixed", ("--rho", f"{value:g}")) for value in settings.fixed_rhos},
        "constraint": {
            f"LORE, rho {settings.rho:g}": base,
            "FARE, K = 5": Variant("fare-equal-updates"),
        }
        | {
            f"FARE + {weight:g} x clean distance": Variant("clean-weight", ("--clean_weight", f"{weight:g}"))
            for weight in settings.clean_weights
        },
    }
    return tables


def train_command(settings: Settings, variant: Variant, seed: int, run_dir: Path) -> list[str]:
    return [
        *launcher("train_lore.py"), "--config", str(ROOT / RECIPE.format(variant.recipe)),
        "--model_name_or_path", settings.model, "--train_shards", f"{settings.data}/train", "--eval_shards", f"{settings.data}/test", "--eval_num_samples", "100",
        "--eval_steps", str(settings.steps), "--eps", f"{settings.eps:g}",
        "--max_steps", str(settings.steps), "--per_device_train_batch_size", str(settings.batch_size),
        "--global_batch_size", str(settings.batch_size), "--learning_rate", f"{settings.learning_rate:g}",
        "--logging_steps", "10", "--checkpoint_steps", "0", "--num_workers", "0", "--report_to", "none",
        "--seed", str(seed), "--resume_from_checkpoint", "latest", "--output_dir", str(run_dir), *variant.flags,
    ]  # fmt: skip


def evaluation_command(settings: Settings, models: list[str]) -> list[str]:
    return [
        *launcher("evaluate.py", settings.jobs), "--model", *models, "--data", settings.data, "--attack", "clean", "pgd",
        "--eps", *(f"{eps:g}" for eps in settings.eval_eps), "--measure", "accuracy", "fidelity",
        "--reference_model_name_or_path", settings.model, "--num_samples", str(settings.num_samples),
        "--num_workers", "0", "--output_dir", f"{settings.output_dir}/eval",
    ]  # fmt: skip


def read_values(settings: Settings, output_dir: Path) -> dict[tuple[str, str, float | None], float]:
    """(model, measure, eps or None) -> figure on the first ``num_samples`` images."""
    report = json.loads((output_dir / "eval" / "results.json").read_text(encoding="utf-8"))
    return {
        (cell["model"], cell["measure"], cell["eps"]): cell["value"]
        for cell in report["results"]
        if cell["settings"]["num_samples"] == settings.num_samples
    }


def cells(settings: Settings, values: dict, models: list[str]) -> list[str]:
    """Accuracies in %, and the mean of ||z - z0||^2 / ||z0||^2 on the test images in %."""
    keys = [("accuracy", eps) for eps in (None, *settings.eval_eps)] + [("fidelity", None)]
    return [percent([values[model, measure, eps] for model in models]) for measure, eps in keys]


def multiplier(folders: list[Path]) -> str:
    """Mean multiplier at the last logged step, over images and seeds."""
    last = [MetricsFile(folder / "metrics.jsonl").read()[-1]["multiplier_mean"] for folder in folders]
    return f"{statistics.mean(last):.2g}" if any(last) else "-"


if __name__ == "__main__":
    run(main)
