"""Counts the collectives of a LORE step under ZeRO-3, with parameters gathered once per attack or in every pass.

  python benchmarks/zero3_gathers.py --model runs/demo/base --data runs/demo/digits --output_dir runs/zero3-gathers

Runs two CPU processes with accelerate_configs/zero3_cpu_2proc.yaml; the counts do not depend on the device. The seconds
are those of a CPU, where gathering is a copy in memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import ROOT, in_parallel, markdown, print_table
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError

runs_flag = partial(flag, group="runs")


@dataclass
class Settings:
    """The run whose collectives are counted."""

    model: str = required("CLIP model to train", group="runs", path=True)
    data: str = required("data set with train/", group="runs", path=True)
    output_dir: str = required("directory for runs and counts", group="runs", path=True)
    attack_steps: int = runs_flag(10, "PGD steps", minimum=1)
    primal_steps: int = runs_flag(5, "K", minimum=1)
    steps: int = runs_flag(
        4,
        "training steps; the first two, in which DeepSpeed learns the order of the layers, "
        "and the last are not counted",
        minimum=4,
    )


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    output_dir = Path(settings.output_dir)
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: exists; give another directory")
    config = os.path.relpath(ROOT / "accelerate_configs/zero3_cpu_2proc.yaml")
    rows = [["one LORE step", "all-gathers", "gathered, x parameters", "other collectives", "seconds"]]
    for gather, name in (("false", "gathered in every forward and backward"), ("true", "gathered once per attack")):
        words = {
            "model_name_or_path": settings.model, "train_shards": f"{settings.data}/train", "report_to": "none",
            "output_dir": output_dir / gather, "gather_for_attack": gather, "attack_steps": settings.attack_steps,
            "primal_steps": settings.primal_steps, "max_steps": settings.steps, "logging_steps": 1000, "num_workers": 0,
            "per_device_train_batch_size": 8, "checkpoint_steps": 0, "cache_dir": output_dir / "cache",
        }  # fmt: skip
        command = ["accelerate", "launch", "--quiet", "--config_file", config, os.path.relpath(__file__)]
        in_parallel(1, [command + [str(word) for name, value in words.items() for word in (f"--{name}", value)]])
        found = json.loads((output_dir / gather / "collectives.json").read_text())
        counts = [f"{found[key]:.0f}" for key in ("all_gathers", "gathered", "others")]
        rows.append([name, counts[0], f"{found['gathered']:.1f}", counts[2], f"{found['seconds']:.2f}"])
    print_table("ZeRO-3 on two processes", rows)
    (output_dir / "table.md").write_text(markdown(rows))


def count(argv: Sequence[str]) -> None:
    """One process: trains, and counts DeepSpeed's collectives from the start of step 3 to that of the last step."""
    import deepspeed

    import train_lore
    import utils.training.run

    settings = parse_settings(train_lore.Settings, argv)
    learning_rate, marks = utils.training.run.cosine_learning_rate, {}

    def mark(step: int, *rest: float) -> float:
        if step not in marks:
            marks[step] = (time.perf_counter(), collectives(deepspeed.comm.comms_logger.comms_dict))
        return learning_rate(step, *rest)

    deepspeed.comm.configure(enabled=True, prof_all=True)
    utils.training.run.cosine_learning_rate = mark
    train_lore.main(argv)
    from safetensors import safe_open

    with safe_open(Path(settings.output_dir) / "model.safetensors", framework="pt") as model:
        names = list(model.keys())
        vision = [name for name in names if name.startswith(("vision_model", "visual_projection"))]
        parameters = sum(model.get_tensor(name).numel() for name in vision)
    first, last = marks[2], marks[settings.max_steps - 1]
    steps = settings.max_steps - 3
    gathers, floats, others = (
        (after - before) / steps for before, after in zip(first[1], last[1])
    )  # fmt: skip
    found = {
        "all_gathers": gathers,
        "gathered": floats / parameters,
        "others": others,
        "seconds": (last[0] - first[0]) / steps,
    }
    if os.environ["RANK"] == "0":
        (Path(settings.output_dir) / "collectives.json").write_text(json.dumps(found))


def collectives(logged: dict[str, dict[int, list]]) -> tuple[int, float, int]:
    """(all-gathers, floats that a process received by them, other collectives) so far."""
    gathers, floats, others = 0, 0.0, 0
    for name, by_size in logged.items():
        for size, (number, *_) in by_size.items():
            if "all_gather" in name:  # the size is that of one process's part
                gathers, floats = gathers + number, floats + number * size / 4 * int(os.environ["WORLD_SIZE"])
            else:
                others += number
    return gathers, floats, others


if __name__ == "__main__":
    run(main if "RANK" not in os.environ else lambda: count(sys.argv[1:]))
