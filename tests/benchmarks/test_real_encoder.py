"""benchmarks/real_encoder.py on a tiny DINOv2: a head is learnt, every part runs, and the page shows its claims."""

import json

import pytest

from benchmarks import results
from benchmarks.evidence import NOT_TESTED
from tests.conftest import run_script
from tests.small_models import save_small_model


@pytest.mark.slow
def test_every_part_runs_on_an_encoder_without_text(digits, tmp_path):
    model = tmp_path / "dinov2"
    save_small_model(model, "dinov2")
    numbers = tmp_path / "numbers"
    words = [
        "benchmarks/real_encoder.py", "--model", model, "--data", digits, "--image_size", 24,
        "--seeds", 0, 1, "--batch_size", 8, "--eps", 8, "--updates", 10, "--warmup", 5,
        "--steps", 1, "--rhos", 0.1, "--clean_weights", 3, "--head_num_samples", 200, "--curve_num_samples", 12, "--num_samples", 12,
        "--jobs", 2, "--numbers_dir", numbers, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    run_script(*words, timeout=900)
    found = results.read_numbers(numbers)
    assert list(found) == list(results.REAL)
    methods = found["real_early_stability"]["results"]["8"]
    assert list(methods) == ["FARE, K = 1", "FARE, K = 5", "FARE, warm-up 5", "FARE + weight 10", "LORE"]
    starts = {name: [curve[0] for curve in of["clean"]] for name, of in methods.items()}
    assert len({tuple(values) for values in starts.values()}) == 1, "one start model and one head for all"
    rows = results.summary(found)
    assert rows[0][4:] == ["dinov2", "verdict"]
    assert any(row[5] not in (NOT_TESTED, "verdict") for row in rows)
    processors = list((tmp_path / "out/early_stability").glob("*/preprocessor_config.json"))
    sizes = [json.loads(path.read_text())["crop_size"] for path in processors]
    assert sizes == [{"height": 24, "width": 24}] * 2 * len(methods)
    run_script("benchmarks/results.py", "--numbers_dir", numbers, "--page", tmp_path / "page.md")
    assert "A pretrained encoder: a longer run" in (tmp_path / "page.md").read_text()
