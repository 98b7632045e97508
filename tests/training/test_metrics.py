import json

import pytest
import torch

from tests.small_models import small_encoder
from utils.training.metrics import (
    MetricsFile,
    forward_flops,
    lore_flops_per_image,
    peak_flops,
    peak_memory_gib,
    violation_statistics,
)


def test_violation_statistics_describe_the_batch():
    distance, margin = torch.tensor([0.0, 1.0, 2.0, 30.0]), torch.tensor([10.0, 10.0, 10.0, 100.0])
    found = violation_statistics(distance, margin, rho=0.15)
    assert found == pytest.approx(
        {
            "violation_ratio_mean": 0.15,
            "violation_ratio_median": 0.15,
            "violation_ratio_p95": 0.285,
            "violation_ratio_max": 0.3,
            "violated_fraction": 0.5,
        }
    )


def test_a_lore_step_costs_52_forwards_and_fare_24():
    assert lore_flops_per_image(1, attack_steps=10, primal_steps=5, clean_in_primal=True, dual=True) == 52
    assert lore_flops_per_image(1, attack_steps=10, primal_steps=1, clean_in_primal=False, dual=False) == 24


def test_forward_flops_count_the_matrix_products(small_clip):
    tokens, width, layers, inner, out = 17, 32, 2, 64, 24
    attention = 4 * 2 * tokens * width * width + 2 * 2 * tokens * tokens * width
    mlp = 2 * 2 * tokens * width * inner
    patches = 2 * 16 * width * 3 * 8 * 8
    expected = patches + layers * (attention + mlp) + 2 * width * out
    assert forward_flops(small_encoder(small_clip)) == pytest.approx(expected, rel=0.02)


def test_devices_without_a_known_peak_report_none():
    assert peak_flops(torch.device("cpu")) is None
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(64, 2**20)  # 256 MiB
    assert peak_memory_gib(torch.device("cpu")) >= before
    assert 0.25 < peak_memory_gib(torch.device("cpu")) < 100
    del held


def test_metrics_file_survives_a_killed_writer_and_is_cut_back(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    for step in (0, 2, 4):
        file.write({"step": step, "loss": 1.0})
    with file.path.open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert [row["step"] for row in file.read()] == [0, 2, 4]
    file.cut_back(2)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [0, 2]
    with pytest.raises(ValueError, match="JSON"):
        file.write({"step": 4, "loss": float("nan")})
