"""train_lore.py with its collectives counted: process 0 writes those of the last step but one to the file argv[1]."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.pop(0)  # tests/: its folders have the names of others
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train_lore
import utils.training.run
from utils.cli import run

target = Path(sys.argv.pop(1))
counted: Counter[tuple[str, int]] = Counter()  # (what, bytes of the whole message) -> how often
marks: dict[int, Counter] = {}
wrapped: list[DistributedDataParallel] = []


def main() -> None:
    learning_rate, initialise = utils.training.run.cosine_learning_rate, DistributedDataParallel.__init__

    def mark(step: int, *rest: float) -> float:
        marks.setdefault(step, Counter(counted) + deepspeed_collectives())
        return learning_rate(step, *rest)

    def remember(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        wrapped.append(self)

    def watched(name: str) -> Any:
        collective = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not sys._getframe(1).f_globals["__name__"].startswith("deepspeed"):
                parts = args[0] if isinstance(args[0], list) else [args[0]]
                counted[f"own {name}", sum(part.nbytes for part in parts)] += 1
            return collective(*args, **kwargs)

        return call

    # The trainer's own go through accelerate to torch.distributed; DeepSpeed keeps a log of what it sends.
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor"):
        setattr(dist, name, watched(name))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.comm.configure(enabled=True, prof_all=True)
    utils.training.run.cosine_learning_rate = mark
    DistributedDataParallel.__init__ = remember
    train_lore.main()
    if os.environ["RANK"] == "0":
        last = max(marks)
        step = marks[last] - marks[last - 1]
        rows = [[name, size, number] for (name, size), number in sorted(step.items())]
        buckets = []
        if wrapped:  # DDP's reducer is not Python: its buckets are all reduced once in every backward pass
            logged = wrapped[0]._get_ddp_logging_data()
            buckets = [int(size) for size in (logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]).split(",")]
        target.write_text(json.dumps({"collectives": rows, "ddp_buckets": buckets}))


def deepspeed_collectives() -> Counter:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return Counter()
    import deepspeed

    logged = deepspeed.comm.comms_logger.comms_dict
    return Counter({(name, size): number for name, sizes in logged.items() for size, (number, *_) in sizes.items()})


run(main)
