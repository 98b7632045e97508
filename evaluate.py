"""Measures zero-shot accuracy of CLIP models on labelled sets, clean and under attack, and prints a table.

  python evaluate.py --model runs/lore4 runs/fare4 openai/clip-vit-base-patch32 \\
    --data data/cifar10 data/caltech101 --attack clean pgd --eps 1 2 4 --num_samples 1000 --output_dir runs/eval

A data set is a directory with classnames.txt and <split>/*.tar. Cells that results.json already holds are not measured
again. Start it with `accelerate launch` to share the images among processes: the figures stay the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from utils.cli import UserError, flag, parse_settings, required, run
from utils.distributed import compute_dtype, default_num_workers, from_main_process, gather_objects, start_accelerator
from utils.encoders import ImageEncoder, check_model, load_clip, make_encoder
from utils.images import ImageTransform
from utils.metrics import wilson_interval
from utils.model_card import versions
from utils.progress import RunProgress, wide_console
from utils.shards import ShardDataset, eval_loader
from utils.skipped import SkipCounter, count_skipped
from utils.zeroshot import ClassPrompts, LabelledSet, class_prompts, open_set, predictions

SCHEMA_VERSION = 1
NO_CORRUPTION = {"corruption": None, "severity": None, "sigma": None}


@dataclass
class Settings:
    """Everything that an evaluation can be told."""

    # fmt: off
    model: list[str] = required("Hugging Face ids or local directories of CLIP models", group="what", many=True)
    data: list[str] = required("directories with classnames.txt and <split>/*.tar", group="what", many=True)
    split: str = flag("test", "folder of each data set that is read", group="what")
    num_samples: int | None = flag(None, "the first N images of each set, shards in numeric order (default: all)", group="what", minimum=1)
    classnames: str | None = flag(None, "file with one class name per line (default: the set's own)", group="what")

    attack: list[str] = flag(["clean"], "clean, pgd", group="attack", choices=("clean", "pgd"))
    eps: list[float] = flag([4.0], "radii of the l_inf attacks, in 1/255", group="attack", above=0, maximum=255)
    attack_steps: int = flag(10, "PGD steps", group="attack", minimum=1)
    attack_step_size: float | None = flag(None, "PGD step, in 1/255 (default: eps/4)", group="attack", above=0)
    seed: int = flag(0, "of the random starts", group="attack", minimum=0)

    output_dir: str = required("results.json is written here", group="run")
    batch_size: int = flag(128, "images per process and batch", group="run", minimum=1)
    num_workers: int | None = flag(None, "data workers per process (default: by the CPU cores, at most 8)", group="run", minimum=0)
    cache_dir: str | None = flag(None, "where shard indexes are kept (default: the system's cache)", group="run")
    max_bad_fraction: float = flag(0.01, "share of unreadable samples past which the evaluation stops", group="run", minimum=0, maximum=1)
    # fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    accelerator = start_accelerator(seed=settings.seed)
    results_path = Path(settings.output_dir) / "results.json"
    for model in settings.model:
        check_model(model, "--model")
    sets = {name: from_main_process(accelerator, lambda name=name: open_data(settings, name)) for name in settings.data}
    results = from_main_process(accelerator, lambda: read_results(results_path))

    for model in settings.model:
        missing = [
            (name, cell)
            for name in sets
            for cell in wanted_cells(settings, accelerator, model, name)
            if find_result(results, cell) is None
        ]
        if not missing:
            continue
        clip, processor = load_clip(model, "--model")
        encoder = make_encoder(clip, processor, compute_dtype(accelerator)).to(accelerator.device).eval()
        prompts: dict[str, ClassPrompts] = {}  # once per set, whatever the number of attacks on it
        for name, cell in missing:
            if name not in prompts:
                prompts[name] = class_prompts(clip, processor, sets[name], accelerator.device)
            dataset = ShardDataset(
                sets[name].index,
                ImageTransform.from_processor(processor.image_processor),
                order="sequential",
                with_labels=True,
                num_classes=len(sets[name].classnames),
            )
            correct = measure_accuracy(settings, accelerator, encoder, dataset, prompts[name], cell)
            value, interval = sum(correct) / len(correct), wilson_interval(sum(correct), len(correct))
            results.append(cell | {"value": value, "ci95": list(interval), "n": len(correct)} | NO_CORRUPTION)
            if accelerator.is_main_process:
                write_results(results_path, results)

    if accelerator.is_main_process:
        print_table(settings, accelerator, results)
    accelerator.end_training()


def open_data(settings: Settings, name: str) -> LabelledSet:
    """Finds a set's shards, class names and templates, and counts its samples."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"--data {name}: no such directory; expected a data set with classnames.txt and {settings.split}/"
        )
    if not (folder / settings.split).is_dir():
        found = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(
            f"--data {name}: no split {settings.split!r}; found {', '.join(found) or 'no folder'}; name one with --split"
        )
    return open_set(
        [str(folder / settings.split)],
        flag="--data",
        with_classes=True,
        classnames=settings.classnames,
        cache_dir=settings.cache_dir,
    )


def wanted_cells(settings: Settings, accelerator: Accelerator, model: str, dataset: str) -> list[dict[str, Any]]:
    """What identifies each figure asked for: two cells that are equal here are the same measurement."""
    common = {"model": model, "dataset": dataset, "measure": "accuracy", "seed": settings.seed}
    reading = {"split": settings.split, "num_samples": settings.num_samples, "classnames": settings.classnames}
    reading["compute_dtype"] = str(compute_dtype(accelerator)).removeprefix("torch.")
    cells = []
    if "clean" in settings.attack:
        cells.append(common | {"attack": "clean", "eps": None, "settings": reading})
    if "pgd" in settings.attack:
        for eps in settings.eps:
            step_size = settings.attack_step_size or eps / 4
            attack = {"attack_steps": settings.attack_steps, "attack_step_size": step_size, "loss": "cross-entropy"}
            cells.append(common | {"attack": "pgd", "eps": eps, "settings": reading | attack})
    return cells


def find_result(results: list[dict[str, Any]], cell: dict[str, Any]) -> dict[str, Any] | None:
    """The finished measurement of this cell, or None."""
    return next((result for result in results if cell.items() <= result.items()), None)


def measure_accuracy(
    settings: Settings,
    accelerator: Accelerator,
    encoder: ImageEncoder,
    dataset: ShardDataset,
    prompts: ClassPrompts,
    cell: dict[str, Any],
) -> list[bool]:
    """Whether each image is classified rightly, in the set's order, from all processes together."""
    num_samples = min(settings.num_samples or dataset.index.num_samples, dataset.index.num_samples)
    loader = eval_loader(
        dataset,
        num_samples=num_samples,
        batch_size=settings.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=default_num_workers() if settings.num_workers is None else settings.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    skips = SkipCounter(dataset.index, settings.max_bad_fraction)

    attack = "clean" if cell["eps"] is None else f"{cell['attack']} eps {cell['eps']:g}"
    title = f"{cell['model']}  {cell['dataset']}  {attack}"
    with RunProgress(title, num_samples, enabled=accelerator.is_main_process) as progress:
        positions, correct = predictions(
            encoder,
            count_skipped(loader, skips),
            *prompts,
            device=accelerator.device,
            eps=None if cell["eps"] is None else cell["eps"] / 255,
            step_size=None if cell["eps"] is None else cell["settings"]["attack_step_size"] / 255,
            num_steps=settings.attack_steps,
            seed=settings.seed,
            on_batch=lambda seen, right: progress.update(
                min(num_samples, seen * accelerator.num_processes), {"accuracy": right / seen}
            ),
        )
        own = list(zip(positions.tolist(), correct.tolist()))
        merged = sorted(pair for pairs in gather_objects(accelerator, own) for pair in pairs)
        all_skips = skips.merge(gather_objects(accelerator, skips.state()))
        all_skips.check()
        if merged:
            accuracy = sum(right for _, right in merged) / len(merged)
            progress.update(num_samples, {"accuracy": accuracy}, report=True)
    if not merged:
        raise UserError(f"--data {cell['dataset']}: no readable labelled image; {all_skips.summary()}")
    return [right for _, right in merged]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results of an earlier call with this output_dir, to go on with."""
    if not path.exists():
        return []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"--output_dir {path.parent}: results.json has schema version {report['schema_version']}, this program "
                f"writes {SCHEMA_VERSION}; give another directory"
            )
        return report["results"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"--output_dir {path.parent}: results.json is not a report ({error}); give another directory"
        ) from None


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Replaces results.json, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    environment = versions() | {"device": device}
    report = {"schema_version": SCHEMA_VERSION, "environment": environment, "results": results}
    aside = path.with_suffix(".json.tmp")
    aside.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(aside, path)


def print_table(settings: Settings, accelerator: Accelerator, results: list[dict[str, Any]]) -> None:
    """One row per model and set, one column per attack: accuracy in % with its Wilson 95 % interval."""
    table = Table(title="Zero-shot accuracy in %, with Wilson 95 % intervals")
    table.add_column("model", overflow="fold")
    table.add_column("data", overflow="fold")
    table.add_column("n", justify="right")
    for cell in wanted_cells(settings, accelerator, "", ""):
        table.add_column("clean" if cell["eps"] is None else f"{cell['attack']} {cell['eps']:g}/255", justify="right")
    for model in settings.model:
        for name in settings.data:
            found = [find_result(results, cell) for cell in wanted_cells(settings, accelerator, model, name)]
            figures = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (r["value"], *r["ci95"]))) for r in found]
            table.add_row(model, name, str(found[0]["n"]), *figures)
    wide_console().print(table)


if __name__ == "__main__":
    run(main)
