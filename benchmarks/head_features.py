"""Compares training a head on cached embeddings with embedding every image in every step.

  python benchmarks/head_features.py --model runs/reading-clip --data data/cifar10 --output_dir runs/head-features

Runs train_po.py --trainable head three times: with an empty cache, with the first run's cache, and with
--cache_features false. Prints images per second of the training steps and seconds of the whole command.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import in_parallel, launcher, markdown, print_table
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError
from utils.training.metrics import MetricsFile


@dataclass
class Settings:
    model: str = required("CLIP model", group="what", path=True)
    data: str = required("labelled set with train/", group="what", path=True)
    output_dir: str = required("runs and table.md go here; must not exist yet", group="what", path=True)
    batch_size: int = flag(128, "images per step", group="training", minimum=1)
    steps: int = flag(300, "steps on kept embeddings", group="training", minimum=20)
    recomputed_steps: int = flag(10, "steps without them", group="training", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: exists; give another directory, what it keeps would count")
    rows = [["embeddings", "steps", "images/s in training", "whole command, s"]]
    rates = {}
    for name, steps, kept in (
        ("made, then kept", settings.steps, True),
        ("kept from before", settings.steps, True),
        ("recomputed in every step", settings.recomputed_steps, False),
    ):
        run_dir = output_dir / f"run-{len(rows)}"
        command = [
            *launcher("train_po.py"), "--model_name_or_path", settings.model, "--trainable", "head",
            "--train_shards", f"{settings.data}/train", "--cache_features", str(kept).lower(),
            "--max_steps", str(steps), "--per_device_train_batch_size", str(settings.batch_size),
            "--logging_steps", str(steps), "--checkpoint_steps", "0", "--num_workers", "0", "--report_to", "none",
            "--cache_dir", str(output_dir / "cache"), "--output_dir", str(run_dir),
        ]  # fmt: skip
        started = time.monotonic()
        in_parallel(1, [command])
        seconds = time.monotonic() - started
        rates[name] = MetricsFile(run_dir / "metrics.jsonl").read()[-1]["images_per_second"]
        rows.append([name, str(steps), f"{rates[name]:,.0f}", f"{seconds:.1f}"])
    shutil.rmtree(output_dir / "cache")
    print_table(f"Training a head, batch {settings.batch_size}", rows)
    ratio = rates["kept from before"] / rates["recomputed in every step"]
    (output_dir / "table.md").write_text(markdown(rows), encoding="utf-8")
    print(f"kept against recomputed: {ratio:.0f} x the images per second")


if __name__ == "__main__":
    run(main)
