"""The order of samples: complete, reproducible, the same for every number of processes."""

import itertools
import time
from collections import Counter

import pytest

from utils.data.order import (
    BLOCK_SIZE,
    NUM_RUNS,
    EpochOrder,
    EvalBatchSampler,
    SequentialOrder,
    TrainBatchSampler,
    permutation,
)

SHAPES = {
    "empty": [],
    "empty shard only": [0],
    "one sample": [1],
    "fewer than runs": [5, 0, 17],
    "one less than runs": [63],
    "as many as runs": [64],
    "one more than runs": [65],
    "one shard": [1000],
    "empty shards at the ends": [0, 0, 300, 0, 41, 0],
    "many small shards": [(7 * shard) % 5 for shard in range(200)],
    "many shards": [100 + shard % 3 for shard in range(150)],
}


def references(order):
    return [order.reference(slot) for slot in range(len(order))]


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("block_size", [1, 3, BLOCK_SIZE])
def test_every_sample_comes_once_in_an_epoch(sizes, block_size):
    order = EpochOrder(sizes, seed=3, epoch=1, block_size=block_size)
    expected = [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
    assert len(order) == len(expected)
    assert sorted(references(order)) == expected


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_order_is_the_documented_construction(sizes):
    """The whole list built in memory, step by step as the module describes it."""
    seed, epoch, block_size = 11, 4, 5
    concatenated = [
        (int(shard), sample) for shard in permutation(len(sizes), seed, 0, epoch) for sample in range(sizes[int(shard)])
    ]
    cuts, start = [], 0
    longer = len(concatenated) % NUM_RUNS
    for cut in range(NUM_RUNS):
        length = len(concatenated) // NUM_RUNS + (cut < longer)
        cuts.append(concatenated[start : start + length])
        start += length
    numbering = [*permutation(longer, seed, 2, epoch), *(longer + permutation(NUM_RUNS - longer, seed, 3, epoch))]
    runs = []
    for run, cut in enumerate(numbering):
        part, shuffled = cuts[cut], []
        for block, first in enumerate(range(0, len(part), block_size)):
            chunk = part[first : first + block_size]
            shuffled += [chunk[i] for i in permutation(len(chunk), seed, 1, epoch, run, block)]
        runs.append(shuffled)
    expected = [runs[slot % NUM_RUNS][slot // NUM_RUNS] for slot in range(len(concatenated))]
    assert references(EpochOrder(sizes, seed, epoch, block_size=block_size)) == expected


def test_order_is_frozen():
    """Written down once: a change here changes every run that is resumed."""
    assert permutation(8, 0, 1, 2).tolist() == FROZEN_PERMUTATION
    order = EpochOrder([100, 200, 300], seed=5, epoch=2)
    assert [order.reference(slot) for slot in (0, 1, 2, 63, 64, 599)] == FROZEN_REFERENCES


FROZEN_PERMUTATION = [1, 7, 0, 3, 5, 4, 6, 2]
FROZEN_REFERENCES = [(2, 211), (2, 237), (2, 199), (2, 294), (2, 214), (2, 12)]


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(4, seed, 0)) for seed in range(4800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7  # chi-square, 23 degrees, p = 0.001


@pytest.mark.parametrize("sizes", [[100, 50, 75], [30], [64], [100]], ids=str)
def test_order_differs_between_epochs_and_seeds_and_repeats(sizes):
    orders = {
        (seed, epoch): references(EpochOrder(sizes, seed, epoch)) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)
    }
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    for (seed, epoch), order in orders.items():
        assert references(EpochOrder(sizes, seed, epoch)) == order


def test_neighbours_in_a_shard_are_spread_out():
    order = references(EpochOrder([5000], seed=0, epoch=0))
    neighbours = sum(abs(a[1] - b[1]) == 1 for a, b in itertools.pairwise(order))
    assert neighbours < 50


def test_random_access_does_not_depend_on_what_was_asked_before():
    sizes = [700, 900]
    order = EpochOrder(sizes, seed=1, epoch=0, block_size=4)  # more blocks than the cache keeps
    expected = references(order)
    for slot in permutation(len(order), 9):
        assert order.reference(int(slot)) == expected[slot]


def test_large_sets_cost_no_memory_and_little_time():
    started = time.process_time()
    order = EpochOrder([10_000] * 50_000, seed=0, epoch=0)
    for slot in range(0, len(order), len(order) // 200):
        shard, sample = order.reference(slot)
        assert 0 <= shard < 50_000
        assert 0 <= sample < 10_000
    assert time.process_time() - started < 5


@pytest.mark.parametrize("sizes", [[5, 0, 17], [65], [300, 0, 41]])
def test_replacements_go_on_in_the_run_and_then_to_the_other_runs(sizes):
    order = EpochOrder(sizes, seed=2, epoch=0, block_size=3)
    everything = references(order)
    for slot in (0, 1, len(order) // 2, len(order) - 1):
        run = everything[slot % NUM_RUNS :: NUM_RUNS]
        position = slot // NUM_RUNS
        found = list(order.replacements(slot))
        assert found[: len(run) - 1] == run[position + 1 :] + run[:position]
        assert sorted([*found, everything[slot]]) == sorted(everything)


@pytest.mark.parametrize("sizes", [[5, 0, 17], [300, 0, 41, 200], [100] * 12])
def test_shards_of_block_are_those_that_its_slots_need(sizes):
    order = EpochOrder(sizes, seed=2, epoch=3, block_size=2)
    needed = {}
    for slot, (shard, _) in enumerate(references(order)):
        needed.setdefault(order.block_of(slot), set()).add(shard)
    for block in range(max(needed) + 1):
        shards = order.shards_of_block(block)
        assert len(set(shards)) == len(shards)
        assert set(shards) == needed[block]
    assert order.shards_of_block(max(needed) + 1) == []


def test_sequential_order():
    assert references(SequentialOrder([2, 0, 3])) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert references(SequentialOrder([])) == []


def global_batches(samples_per_epoch, batch_size, per_device, world_size, first_step, num_steps):
    """step -> {position: (epoch, slot)}, put together from all ranks."""
    batches = {}
    for rank in range(world_size):
        sampler = TrainBatchSampler(samples_per_epoch, batch_size, per_device, rank, world_size, first_step, num_steps)
        micro = list(sampler)
        accumulation = batch_size // (per_device * world_size)
        assert len(micro) == len(sampler) == (num_steps - first_step) * accumulation
        for number, references_ in enumerate(micro):
            assert len(references_) == per_device
            batch = batches.setdefault(first_step + number // accumulation, {})
            for epoch, slot, position in references_:
                assert slot % world_size == rank
                assert position not in batch
                batch[position] = (epoch, slot)
    return batches


def test_global_batches_do_not_depend_on_the_processes():
    expected = {step: {position: (step // 8, step % 8 * 12 + position) for position in range(12)} for step in range(20)}
    for world_size, per_device in [(1, 12), (1, 4), (2, 6), (2, 1), (3, 2), (4, 3), (12, 1)]:
        assert global_batches(103, 12, per_device, world_size, 0, 20) == expected  # 7 samples dropped per epoch


@pytest.mark.parametrize("first_step", [0, 1, 7, 8, 19, 20])
def test_resumed_batches_are_the_rest_of_the_uninterrupted_ones(first_step):
    whole = list(TrainBatchSampler(103, 12, 3, 1, 2, 0, 20))
    assert list(TrainBatchSampler(103, 12, 3, 1, 2, first_step, 20)) == whole[2 * first_step :]


@pytest.mark.parametrize("num_samples", [0, 1, 3, 7, 8, 9, 10, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_reads_every_sample_once_in_equally_many_batches(num_samples, world_size, batch_size):
    ranks = [EvalBatchSampler(num_samples, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in ranks]
    assert {len(each) for each in batches} == {len(ranks[0])}
    assert all(len(batch) <= batch_size for each in batches for batch in each)
    found = sorted(reference for each in batches for batch in each for reference in batch)
    assert found == [(0, slot, slot) for slot in range(num_samples)]
    for rank, each in enumerate(batches):
        assert [slot for batch in each for _, slot, _ in batch] == list(range(rank, num_samples, world_size))
