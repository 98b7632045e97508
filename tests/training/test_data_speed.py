"""Data workers follow from two measured speeds; waiting for data is timed and said once."""

import time

import pytest
import torch

import train_lore
import train_po
import utils.training.run
from tests.shard_maker import ShardServer, image_bytes, make_shards, write_shard
from utils.data.images import ImageTransform
from utils.data.order import TrainBatchSampler
from utils.data.shards import ShardDataset, index_shards
from utils.training import data_speed
from utils.training.data_speed import TimedBatches, matmul_flops, measured_workers, seconds_per_sample, workers_needed
from utils.training.metrics import MetricsFile, preference_flops_per_sample

CPU = torch.device("cpu")


def dataset(paths, tmp_path):
    index = index_shards(paths, cache_dir=tmp_path / "cache")
    return ShardDataset(index, ImageTransform(8, (8, 8)), order="shuffled")


def first_batch(data, batch_size=10):
    return TrainBatchSampler(len(data), batch_size, batch_size, 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("seconds", "rate", "most", "workers"),
    [
        (0.0041, 540, 32, 3),  # 2.77 with what is spared
        (0.0032, 1000, 32, 4),  # exactly: no more than needed
        (0.00321, 1000, 32, 5),
        (0.0041, 540, 2, 2),
        (1e-5, 10, 32, 1),
        (0.01, 1e9, 1, 1),
        (0.01, float("inf"), 7, 7),
    ],
)
def test_workers_keep_up_with_the_device(seconds, rate, most, workers):
    assert workers_needed(seconds, rate, most) == workers


def test_workers_follow_from_what_is_measured(tmp_path, monkeypatch, capfd):
    data = dataset(make_shards(tmp_path, [30]), tmp_path)
    real_load = ShardDataset.load
    monkeypatch.setattr(data_speed, "default_num_workers", lambda: 9)
    monkeypatch.setattr(data_speed, "matmul_flops", lambda device, dtype: 2e9)
    monkeypatch.setattr(ShardDataset, "load", lambda *words: time.sleep(0.02) or real_load(*words))
    random_state = torch.get_rng_state()
    for flops, expected in ((2 * 10**7, range(3, 5)), (10**9, range(1, 2)), (10**6, range(9, 10))):
        workers, line = measured_workers(data, first_batch(data), flops, CPU, torch.float32)
        assert workers in expected
        assert line.startswith(f"{workers} data worker{'s' if workers > 1 else ''}: 2")
        assert line.endswith(f" ms an image, up to {2e9 / flops:,.0f} images/s")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capfd.readouterr() == ("", "")


def test_timing_ends_in_time_and_leaves_out_what_cannot_be_read(tmp_path, monkeypatch):
    whole = image_bytes(1)
    samples = [(f"s{number:02d}", {"jpg": whole if number < 5 else whole[:50]}) for number in range(100)]
    shard = write_shard(tmp_path / "0.tar", samples)
    data = dataset([shard], tmp_path)
    assert 0 < seconds_per_sample(data, [(0, slot, slot) for slot in range(100)]) < 0.1
    real_load, calls = ShardDataset.load, []

    def slow(*words):
        calls.append(1)
        time.sleep(0.05)
        return real_load(*words)

    monkeypatch.setattr(ShardDataset, "load", slow)
    seconds_per_sample(data, [(0, slot, slot) for slot in range(100)], patience=0.2)
    assert 1 <= len(calls) <= 5


def test_without_a_readable_sample_all_cores_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(data_speed, "default_num_workers", lambda: 9)
    bad = write_shard(tmp_path / "bad.tar", [(f"s{number}", {"jpg": b"no image"}) for number in range(20)])
    with ShardServer(tmp_path) as server:
        make_shards(tmp_path, [20], sizes_json=True)
        url = f"{server.url}/0.tar"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for place in (bad, url):
            data = dataset([place], tmp_path)
            assert measured_workers(data, first_batch(data), 1, CPU, torch.float32)[0] == 9
        assert not server.requests["/0.tar"]  # nothing is brought only to be timed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_matrix_products_is_measured_in_a_moment(dtype):
    started = time.perf_counter()
    assert 1e8 < matmul_flops(CPU, dtype) < 1e15
    assert time.perf_counter() - started < 20  # about 0.1 where nothing else runs


def test_waiting_is_timed_and_said_once():
    def slowly():
        while True:
            time.sleep(0.02)
            yield {}

    batches, started = TimedBatches(slowly()), time.perf_counter()
    for _ in range(3):
        next(batches)
    assert 0.5 < batches.wait_fraction(time.perf_counter() - started) <= 1
    assert batches.wait_fraction(1.0) == 0  # counted once
    assert list(TimedBatches(iter([{}, {}]))) == [{}, {}]

    assert batches.advice(0.9, 2) is None  # workers start
    assert batches.advice(0.02, 2) is None
    assert "takes 40 % of the time: raise --num_workers (now 2)" in batches.advice(0.4, 2)
    assert batches.advice(0.9, 2) is None


def test_flops_of_a_preference_step():
    assert preference_flops_per_sample(10, 2, head=False) == 2 * (10 + 30)
    assert preference_flops_per_sample(10, 1, head=True) == 10
    assert preference_flops_per_sample(10, 2, head=False, dual=True) == 2 * (10 + 30) + 10
    assert preference_flops_per_sample(10, 1, head=True, dual=True) == 10


@pytest.fixture
def arguments(small_clip, digits, tmp_path):
    def make(**changes):
        settings = {
            "model_name_or_path": small_clip, "train_shards": digits / "test", "output_dir": tmp_path / "run",
            "cache_dir": tmp_path / "cache", "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1,
            "report_to": "none",
        } | changes  # fmt: skip
        return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]

    return make


TRAINERS = [
    (train_lore, {"attack_steps": 1, "primal_steps": 1}),
    (train_po, {"word_size_min": 40, "word_size_max": 60}),
]


@pytest.mark.parametrize(("trainer", "changes"), TRAINERS)
def test_the_measured_number_is_used_and_written_down(arguments, tmp_path, monkeypatch, capfd, trainer, changes):
    real_batches, used = utils.training.run.train_batches, []

    def without_workers(*words, num_workers, **more):
        used.append(num_workers)
        return real_batches(*words, num_workers=0, **more)

    monkeypatch.setattr(utils.training.run, "train_batches", without_workers)
    monkeypatch.setattr(data_speed, "default_num_workers", lambda: 6)
    monkeypatch.setattr(data_speed, "matmul_flops", lambda device, dtype: 1e30)
    trainer.main(arguments(**changes))
    assert used == [6]
    assert "\n6 data workers: " in capfd.readouterr().err
    assert "| num_workers | 6 |" in (tmp_path / "run/README.md").read_text()
    measured = MetricsFile(tmp_path / "run/metrics.jsonl").read()

    trainer.main(arguments(num_workers=2, output_dir=tmp_path / "named", **changes))
    assert used == [6, 2]
    assert "data workers" not in capfd.readouterr().err
    named = MetricsFile(tmp_path / "named/metrics.jsonl").read()
    assert [row["loss"] for row in named] == [row["loss"] for row in measured]


@pytest.mark.parametrize(("trainer", "changes"), TRAINERS)
def test_a_slow_loader_shows_in_the_rows_and_in_one_line(arguments, tmp_path, monkeypatch, capfd, trainer, changes):
    trainer.main(arguments(num_workers=0, output_dir=tmp_path / "fast", **changes))
    real_batches = utils.training.run.train_batches
    capfd.readouterr()

    def slow(*words, **more):
        for batch in real_batches(*words, **more):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(utils.training.run, "train_batches", slow)
    trainer.main(arguments(num_workers=0, **changes))
    fast, slow = (
        [row["data_wait_fraction"] for row in MetricsFile(tmp_path / name / "metrics.jsonl").read()]
        for name in ("fast", "run")
    )
    assert len(fast) == len(slow) == 4
    assert all(0 <= fraction <= 1 for fraction in fast + slow)
    assert min(slow[1:]) > 0.85
    assert min(fast[1:]) < 0.5
    assert capfd.readouterr().err.count("% of the time: raise --num_workers (now 0)") == 1
