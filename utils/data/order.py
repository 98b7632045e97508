"""The order in which samples are seen, computed from (seed, epoch, shard sizes) before anything is read.

The order belongs to the global batch, not to the processes: any number of ranks and loader workers sees the same global
batches, and a run resumes at a step without reading what came before. It is the idea of MosaicML's StreamingDataset
(https://docs.mosaicml.com/projects/streaming, "elastic determinism") on the sample counts of plain .tar shards.

An epoch has one *slot* per sample. The shards are permuted and concatenated, the list is cut into ``NUM_RUNS`` equal
runs (the first N % NUM_RUNS of them one longer), the runs are numbered in a random order (the longer ones first;
without that, sets of few samples would hardly be shuffled), every run is shuffled in blocks of ``BLOCK_SIZE``
references, and slot g takes position g // NUM_RUNS of run g % NUM_RUNS. Global batch b is the slots bB ... (b+1)B-1;
rank r takes the slots g with g % world_size = r.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from torch.utils.data import Sampler

# Both numbers are part of the order: changing one changes every run that is resumed. They belong into the checkpoint.
NUM_RUNS = 64
BLOCK_SIZE = 2048

# A block permutation takes 8 * BLOCK_SIZE bytes; one block of each run, and the next one, are in use at a time.
CACHED_BLOCKS = 2 * NUM_RUNS


def permutation(size: int, seed: int, *key: int) -> np.ndarray:
    """A permutation of 0 ... size-1, int64, that depends on the integers (seed, *key) alone.

    It sorts raw Philox words: NumPy keeps those the same over versions and platforms, not ``Generator.permutation``.
    ``seed`` and ``key`` must not be negative.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(size)
    return np.argsort(words, kind="stable")


class EpochOrder:
    """Slot -> (shard number, sample number) for one epoch, by random access; memory does not grow with the samples.

    ``sizes`` are the sample counts of the shards, in the order in which the user gave them; zeros are allowed.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, epoch: int, num_runs: int = NUM_RUNS, block_size: int = BLOCK_SIZE
    ) -> None:
        if seed < 0 or epoch < 0 or min(sizes, default=0) < 0:
            raise ValueError(f"seed ({seed}), epoch ({epoch}) and sizes must not be negative")
        self.seed, self.epoch, self.num_runs, self.block_size = seed, epoch, num_runs, block_size
        self._shards = permutation(len(sizes), seed, 0, epoch).tolist()
        self._ends = list(accumulate(int(sizes[shard]) for shard in self._shards))
        self._sizes = [int(sizes[shard]) for shard in self._shards]
        self._num_samples = self._ends[-1] if self._ends else 0
        self._run_length, self._longer_runs = divmod(self._num_samples, num_runs)
        longer = permutation(self._longer_runs, seed, 2, epoch)
        others = self._longer_runs + permutation(num_runs - self._longer_runs, seed, 3, epoch)
        cuts = [*longer.tolist(), *others.tolist()]
        self._run_starts = [cut * self._run_length + min(cut, self._longer_runs) for cut in cuts]
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self._num_samples

    def reference(self, slot: int) -> tuple[int, int]:
        """(shard number, sample number within the shard) of ``slot``, 0 <= slot < len(self); else IndexError."""
        if not 0 <= slot < self._num_samples:
            raise IndexError(f"slot {slot} of an epoch of {self._num_samples} samples")
        position, run = divmod(slot, self.num_runs)
        return self._reference(run, position)

    def replacements(self, slot: int) -> Iterator[tuple[int, int]]:
        """What may fill ``slot`` where its own sample cannot be read: the next references of its run, wrapping round.

        Where a whole run is unreadable (runs of fewer than 64 samples are short) the following runs come next; every
        other sample of the epoch comes once.
        """
        position, first_run = divmod(slot, self.num_runs)
        length = self._length_of(first_run)
        for step in range(1, length):
            yield self._reference(first_run, (position + step) % length)
        for step in range(1, self.num_runs):
            run = (first_run + step) % self.num_runs
            for other in range(self._length_of(run)):
                yield self._reference(run, other)

    def block_of(self, slot: int) -> int:
        """The shuffle block in which ``slot`` lies; all runs go through their blocks side by side."""
        return slot // self.num_runs // self.block_size

    def shards_of_block(self, block: int) -> list[int]:
        """Numbers of the shards that block ``block`` of all runs takes its samples from; empty past the last block."""
        shards: dict[int, None] = {}
        for run in range(self.num_runs):
            start = self._run_starts[run] + block * self.block_size
            end = min(start + self.block_size, self._run_starts[run] + self._length_of(run))
            if start < end:
                for place in range(bisect_right(self._ends, start), bisect_right(self._ends, end - 1) + 1):
                    if self._sizes[place]:
                        shards[self._shards[place]] = None
        return list(shards)

    def _length_of(self, run: int) -> int:
        return self._run_length + (run < self._longer_runs)

    def _reference(self, run: int, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_size)
        index = self._run_starts[run] + block * self.block_size + int(self._permutation_of(run, block)[offset])
        place = bisect_right(self._ends, index)
        return self._shards[place], index - self._ends[place] + self._sizes[place]

    def _permutation_of(self, run: int, block: int) -> np.ndarray:
        found = self._blocks.get((run, block))
        if found is None:
            size = min(self.block_size, self._length_of(run) - block * self.block_size)
            found = self._blocks[run, block] = permutation(size, self.seed, 1, self.epoch, run, block)
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end((run, block))
        return found


class SequentialOrder:
    """Slot g -> the g-th sample, shard after shard in the order given: for evaluation."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = [int(size) for size in sizes]
        self._ends = list(accumulate(self._sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def reference(self, slot: int) -> tuple[int, int]:
        """(shard number, sample number within the shard) of ``slot``, 0 <= slot < len(self); else IndexError."""
        if not 0 <= slot < len(self):
            raise IndexError(f"slot {slot} of {len(self)} samples")
        shard = bisect_right(self._ends, slot)
        return shard, slot - self._ends[shard] + self._sizes[shard]


class TrainBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """The micro-batches of one rank from ``first_step`` up to ``num_steps``, over the ends of epochs.

    Yields lists of (epoch, slot, position), ``per_device_batch_size`` long; position = slot - b * B is the place in the
    global batch, which seeds what is random about a sample. The last partial batch of an epoch is dropped. Every rank
    gets the same number of micro-batches: (num_steps - first_step) * gradient_accumulation_steps.

    ValueError where world_size does not divide the global batch, where the global batch is not per_device_batch_size *
    world_size * (a whole number of micro-batches), or where an epoch is smaller than one global batch.
    """

    def __init__(
        self,
        samples_per_epoch: int,
        global_batch_size: int,
        per_device_batch_size: int,
        rank: int,
        world_size: int,
        first_step: int,
        num_steps: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(f"a global batch of {global_batch_size} does not divide among {world_size} processes")
        if per_device_batch_size < 1 or global_batch_size % (per_device_batch_size * world_size):
            raise ValueError(
                f"a global batch of {global_batch_size} is not a whole number of micro-batches of "
                f"{per_device_batch_size} samples on {world_size} processes"
            )
        if samples_per_epoch < global_batch_size:
            raise ValueError(f"an epoch of {samples_per_epoch} samples is smaller than a batch of {global_batch_size}")
        if not 0 <= first_step <= num_steps:
            raise ValueError(f"cannot start at step {first_step} of {num_steps}")
        self.batches_per_epoch = samples_per_epoch // global_batch_size
        self.global_batch_size, self.per_device_batch_size = global_batch_size, per_device_batch_size
        self.rank, self.world_size = rank, world_size
        self.first_step, self.num_steps = first_step, num_steps

    def __len__(self) -> int:
        per_step = self.global_batch_size // (self.per_device_batch_size * self.world_size)
        return (self.num_steps - self.first_step) * per_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        stride = self.per_device_batch_size * self.world_size
        for step in range(self.first_step, self.num_steps):
            epoch, batch = divmod(step, self.batches_per_epoch)
            first_slot = batch * self.global_batch_size
            for start in range(self.rank, self.global_batch_size, stride):
                positions = range(start, start + stride, self.world_size)
                yield [(epoch, first_slot + position, position) for position in positions]


class EvalBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """The batches of one rank for evaluation: samples rank, rank + world_size, ... as lists of (0, slot, slot).

    Nothing is dropped or repeated. Every rank gets the same number of batches, since unequal numbers hang collectives:
    a rank that runs short ends with an empty list.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes")
        if batch_size < 1 or num_samples < 0:
            raise ValueError(f"cannot cut {num_samples} samples into batches of {batch_size}")
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        slots = range(self.rank, self.num_samples, self.world_size)
        for batch in range(len(self)):
            yield [(0, slot, slot) for slot in slots[batch * self.batch_size : (batch + 1) * self.batch_size]]
