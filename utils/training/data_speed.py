"""Whether the data keeps up: the number of data workers needed, and the fraction of time a run waits for batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import torch

from utils.data.order import TrainBatchSampler
from utils.data.shards import ShardDataset, ShardReader
from utils.data.skipped import BadSample
from utils.data.sources import is_remote
from utils.data.workers import waited_for
from utils.processes.distributed import default_num_workers

SPARE = 1.25  # workers share memory, caches and disk: a sample takes longer than when read alone
SAMPLES, SECONDS = 48, 0.5  # at most so many samples, for so long, are timed
NOTABLE_WAIT = 0.02
NOTHING_READ = "--train_shards: not one sample could be read in all this time; look whether disk and network answer"


def workers_needed(seconds_per_image: float, images_per_second: float, most: int) -> int:
    """Data workers needed for ``images_per_second``: ceil(1.25 * seconds * rate), between 1 and ``most``."""
    return max(1, math.ceil(min(SPARE * seconds_per_image * images_per_second, most)))


def measured_workers(
    dataset: ShardDataset, order: TrainBatchSampler, flops_per_sample: int, device: torch.device, dtype: torch.dtype
) -> tuple[int, str]:
    """Data workers for this process, as many as an ideal device could use, and a line that says why.

    Times samples of the first batch of ``order``, and matrix products in ``dtype``. Draws no random numbers.
    """
    most = default_num_workers()
    seconds = seconds_per_sample(dataset, next(iter(order), []))
    if seconds is None:
        return most, f"{most} data workers: no sample could be timed beforehand"
    rate = matmul_flops(device, dtype) / flops_per_sample
    workers = workers_needed(seconds, rate, most)
    speed = f"{1000 * seconds:.1f} ms an image, up to {rate:,.0f} images/s"
    return workers, f"{workers} data worker{'s' if workers > 1 else ''}: {speed}"


def seconds_per_sample(
    dataset: ShardDataset, references: Sequence[tuple[int, int, int]], patience: float = SECONDS
) -> float | None:
    """Mean seconds to read and decode a sample of ``references`` (epoch, slot, position); None if none is local."""
    urls, timed, started = dataset.index.urls, [], time.perf_counter()
    # A separate reader, closed afterwards: workers must not inherit its descriptors or prefetch threads by fork.
    with closing(ShardReader(dataset.index)) as reader, waited_for(lambda: NOTHING_READ):
        for epoch, slot, _ in references[: SAMPLES + 1]:
            if time.perf_counter() - started > patience:
                break
            shard, sample = dataset.order_of(epoch).reference(slot)
            if is_remote(urls[shard]) and not reader.cache.copy_of(urls[shard]).exists():
                continue
            with suppress(BadSample):
                reader.read(shard, sample, ())  # opens the shard, which training does once in thousands of samples
                clock = time.perf_counter()
                dataset.load(reader, shard, sample, epoch)
                timed.append(time.perf_counter() - clock)
    timed = timed[1:] or timed  # the first sample also loads libraries
    return sum(timed) / len(timed) if timed else None


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products on ``device``, after a warm-up, over about 0.05 s."""
    side = 4096 if device.type == "cuda" else 512
    factor = torch.full((side, side), 1 / side, device=device, dtype=dtype)
    product = factor @ factor
    count, elapsed = 1, 0.0
    while elapsed < 0.025:
        count *= 2
        product[0, 0].item()  # waits for the device
        clock = time.perf_counter()
        for _ in range(count):
            torch.mm(factor, factor, out=product)
        product[0, 0].item()
        elapsed = time.perf_counter() - clock
    return 2 * side**3 * count / elapsed


class TimedBatches:
    """The batches of an iterator, and how long the host waited for them. A GPU waits no longer than that."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self.batches, self.seconds, self.intervals, self.advised = batches, 0.0, 0, False

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        clock = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - clock

    def wait_fraction(self, seconds: float) -> float:
        """The fraction of ``seconds``, the time since the last call, that was spent waiting, in [0,1]."""
        waited, self.seconds = self.seconds, 0.0
        return min(1.0, waited / seconds)

    def advice(self, fraction: float, num_workers: int) -> str | None:
        """Advice if ``fraction`` is large, only once, and not in the first interval, when workers start."""
        self.intervals += 1
        if self.advised or self.intervals == 1 or fraction <= NOTABLE_WAIT:
            return None
        self.advised = True
        advice = (
            f"raise --num_workers (now {num_workers}), use --jpeg_draft true for large photographs, or local shards"
        )
        return f"waiting for data takes {100 * fraction:.0f} % of the time: {advice}"
