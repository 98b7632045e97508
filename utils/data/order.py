"""The order of samples, computed from (seed, epoch, shard sizes) before anything is read.

The order defines the global batches. They are the same for any number of processes and data workers, and a run resumes
at a step without reading the samples before it. MosaicML's StreamingDataset calls this "elastic determinism"
(https://docs.mosaicml.com/projects/streaming); here it needs only the sample counts of plain .tar shards.

An epoch has one *slot* per sample. The shards are permuted and concatenated. The list is cut into ``NUM_RUNS`` equal
runs (the first N % NUM_RUNS of them have one sample more). The runs are numbered in a random order, the longer ones
first; this alone shuffles sets of few samples. Every run is shuffled in blocks of ``BLOCK_SIZE`` samples. Slot g takes
position g // NUM_RUNS of run g % NUM_RUNS. Global batch b has the slots bB ... (b+1)B-1; rank r takes the slots g with
g % world_size = r.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from torch.utils.data import Sampler

# Both numbers determine the order: changing one changes the data of every resumed run.
NUM_RUNS = 64
BLOCK_SIZE = 2048


def permutation(size: int, seed: int, *key: int) -> np.ndarray:
    """A permutation of 0 ... size-1, int64. It depends only on the integers (seed, *key), none of them negative.

    It sorts raw Philox words, which NumPy guarantees over versions and platforms, unlike ``Generator.permutation``.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(size)
    return np.argsort(words, kind="stable")


# At any time the current and the next block of each run are in use, 16 KiB each.
_kept_permutation = lru_cache(2 * NUM_RUNS)(permutation)


class SequentialOrder:
    """Slot g -> (shard number, sample number) of the g-th sample, shard after shard, for evaluation.

    sizes: number of samples of each shard, may be 0. shards: their numbers in reading order (default: 0, 1, 2, ...).
    """

    def __init__(self, sizes: Sequence[int], shards: Sequence[int] | None = None) -> None:
        self._shards = range(len(sizes)) if shards is None else shards
        self._sizes = [int(sizes[shard]) for shard in self._shards]
        self._ends = list(accumulate(self._sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def reference(self, slot: int) -> tuple[int, int]:
        """(shard number, sample number within the shard) of ``slot``, 0 <= slot < len(self)."""
        return self._sample(slot)

    def replacements(self, slot: int) -> Iterator[tuple[int, int]]:
        """The samples that may fill ``slot`` if its own cannot be read: none."""
        return iter(())

    def block_of(self, slot: int) -> int:
        """The number of the block of ``slot``. The shards of a block are fetched together; here a shard is a block."""
        return bisect_right(self._ends, slot)

    def shards_of_block(self, block: int) -> list[int]:
        """The numbers of the shards that hold the samples of a block; empty after the last block."""
        return list(self._shards[block : block + 1])

    def _sample(self, index: int) -> tuple[int, int]:
        """(shard number, sample number) at an index into the concatenated shards."""
        place = bisect_right(self._ends, index)
        return self._shards[place], index - self._ends[place] + self._sizes[place]


class EpochOrder(SequentialOrder):
    """The shuffled order of one epoch, with random access; its memory does not grow with the number of samples."""

    def __init__(
        self, sizes: Sequence[int], seed: int, epoch: int, num_runs: int = NUM_RUNS, block_size: int = BLOCK_SIZE
    ) -> None:
        super().__init__(sizes, permutation(len(sizes), seed, 0, epoch).tolist())
        self.seed, self.epoch, self.num_runs, self.block_size = seed, epoch, num_runs, block_size
        length, longer = divmod(len(self), num_runs)
        cuts = [*permutation(longer, seed, 2, epoch), *(longer + permutation(num_runs - longer, seed, 3, epoch))]
        self._starts = [int(cut) * length + min(int(cut), longer) for cut in cuts]
        self._lengths = [length + (run < longer) for run in range(num_runs)]

    def reference(self, slot: int) -> tuple[int, int]:
        position, run = divmod(slot, self.num_runs)
        return self._in_run(run, position)

    def replacements(self, slot: int) -> Iterator[tuple[int, int]]:
        """The rest of the slot's run, wrapping around, then the other runs: every other sample of the epoch once.

        The other runs are needed because in a small set all samples of one run may be unreadable.
        """
        position, first_run = divmod(slot, self.num_runs)
        length = self._lengths[first_run]
        for step in range(1, length):
            yield self._in_run(first_run, (position + step) % length)
        for step in range(1, self.num_runs):
            run = (first_run + step) % self.num_runs
            for other in range(self._lengths[run]):
                yield self._in_run(run, other)

    def block_of(self, slot: int) -> int:
        """The shuffle block of ``slot``; all runs are in the block of this number at the same time."""
        return slot // self.num_runs // self.block_size

    def shards_of_block(self, block: int) -> list[int]:
        places: dict[int, None] = {}  # an ordered set: in the order of the runs, without duplicates
        for start, length in zip(self._starts, self._lengths):
            first = start + block * self.block_size
            end = min(first + self.block_size, start + length)
            if first < end:
                places |= dict.fromkeys(range(bisect_right(self._ends, first), bisect_right(self._ends, end - 1) + 1))
        return [self._shards[place] for place in places if self._sizes[place]]

    def _in_run(self, run: int, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_size)
        first = block * self.block_size
        size = min(self.block_size, self._lengths[run] - first)
        order = _kept_permutation(size, self.seed, 1, self.epoch, run, block)
        return self._sample(self._starts[run] + first + int(order[offset]))


@dataclass(eq=False)
class TrainBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """The micro-batches of one rank from ``first_step`` up to ``num_steps``, over all epochs.

    Yields lists of ``per_device_batch_size`` tuples (epoch, slot, position). position = slot - bB is the place in the
    global batch and seeds everything random about a sample. The last partial batch of an epoch is dropped. Every rank
    has ``micro_batches`` per step.
    """

    samples_per_epoch: int
    global_batch_size: int
    per_device_batch_size: int
    rank: int
    world_size: int
    first_step: int
    num_steps: int

    def __post_init__(self) -> None:
        self.stride = self.per_device_batch_size * self.world_size
        self.micro_batches = self.global_batch_size // self.stride

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in range(self.first_step, self.num_steps):
            epoch, batch = divmod(step, self.samples_per_epoch // self.global_batch_size)
            first_slot = batch * self.global_batch_size
            for start in range(self.rank, self.global_batch_size, self.stride):
                positions = range(start, start + self.stride, self.world_size)
                yield [(epoch, first_slot + position, position) for position in positions]


@dataclass(eq=False)
class EvalBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """The batches of one rank for evaluation: samples rank, rank + world_size, ... as lists of (0, slot, slot).

    Nothing is dropped or repeated. All ranks get the same number of batches, because collectives hang otherwise. A rank
    with too few samples gets an empty list last.
    """

    num_samples: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        slots = range(self.rank, self.num_samples, self.world_size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(0, slot, slot) for slot in slots[start : start + self.batch_size]]
