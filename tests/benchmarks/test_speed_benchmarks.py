"""benchmarks/train_step.py and benchmarks/time_to_robust.py run, on what is small, and compare like with like."""

import json

import pytest
import torch

from tests.conftest import run_script
from tests.published_layouts import save_layouts
from utils.errors import UserError
from utils.models.encoders import make_encoder
from utils.models.published import load_model


@pytest.mark.slow
def test_variants_of_a_step_do_the_same(small_clip, tmp_path, monkeypatch):
    from benchmarks import train_step

    monkeypatch.setattr(
        "sys.argv",
        [
            "train_step.py", "--encoders", str(small_clip), "--batch_size", "8", "--rounds", "2", "--attack_steps", "2",
            "--primal_steps", "2", "--trainer", "false", "--output_dir", str(tmp_path / "out"),
            "--variants", "plain", "+ frozen", "+ one", "+ fused", "+ bf16", "+ lean",
        ],
    )  # fmt: skip
    train_step.main()
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["method"] for row in report["rows"]} == {"LORE", "FARE", "PO image"}
    assert report["hardware"]["matmul_flops"]["float32"] > 1e9
    for row in report["rows"]:
        assert len(row["all_seconds"]) == len(row["watched"]) == 3
        assert row["images_per_second"] > 0
        half = row["variant"] in ("+ bf16", "+ lean")
        assert row["largest_difference"] < (0.5 if half else 1e-3), row["variant"]
    assert (tmp_path / "out/table.md").read_text().count("|  | + lean |") == 3


def test_wrong_settings_of_the_benchmark_are_named(tmp_path, monkeypatch):
    from benchmarks import train_step

    for words, line in (
        (["--variants", "+ magic"], "none is known"),
        (["--batch_size", "1", "2", "3"], "give one, or one for each"),
        (["--encoders", str(tmp_path), "--batch_size", "2"], "no config.json"),
    ):
        monkeypatch.setattr("sys.argv", ["train_step.py", "--output_dir", str(tmp_path / "out"), *words])
        with pytest.raises(UserError, match=line):
            train_step.main()


@pytest.mark.slow
def test_minutes_to_a_target_are_found(small_clip, digits, tmp_path):
    """A target of 0 is reached by the first copy of every run; one of 1 by none, from the copies that are kept."""
    words = [
        "benchmarks/time_to_robust.py", "--model", str(small_clip), "--data", str(digits),
        "--steps", "4", "--check_steps", "2", "--batch_size", "8", "--num_samples", "10",
        "--compile", "false", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    run_script(*words, "--target", "0")
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert list(results) == ["FARE, plain", "FARE", "LORE"]
    assert all(result["step"] == 2 and result["minutes"] > 0 for result in results.values())
    run_script(*words, "--target", "1")
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert all(result["step"] == 4 and result["minutes"] is None for result in results.values())


def test_a_plain_run_starts_from_an_image_tower_and_its_base(digits, tmp_path):
    from benchmarks import time_to_robust

    one = save_layouts(tmp_path / "published")["robustvlm_visual"]
    settings = time_to_robust.Settings(
        model=f"{one.path}@{one.base_model}", data=str(digits), output_dir="", steps=1, check_steps=1, batch_size=4,
        learning_rate=0.0,
    )  # fmt: skip
    time_to_robust.train_plainly(settings, tmp_path / "run")
    encoder = make_encoder(*load_model(str(tmp_path / "run"))).eval()
    expected = one.expected["image_features"]
    with torch.no_grad():
        assert (encoder(one.images) - expected).norm() < 1e-5 * expected.norm()
