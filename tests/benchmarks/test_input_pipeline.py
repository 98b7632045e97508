import json

from tests.conftest import run_script


def test_every_way_is_measured_and_drafts_only_change_large_images(tmp_path):
    run_script(
        "benchmarks/input_pipeline.py", "--image_sizes", "40x30", "1000x901", "--num_images", 4, "--batch_size", 2,
        "--rounds", 1, "--workers", 0, 1, "--seconds", 0.1, "--train_steps", 0, "--output_dir", tmp_path / "bench",
    )  # fmt: skip
    found = json.loads((tmp_path / "bench/results.json").read_text())
    small, large = found["sets"]["40x30"], found["sets"]["1000x901"]
    for one in (small, large):
        assert all(0 < seconds["median"] < 10 for seconds in one["seconds_per_image"].values())
        assert len(one["seconds_per_image"]) == 3
        assert one["images_per_second"].keys() == {"0", "1"}
    assert small["draft_psnr_db"] is None
    assert 40 < large["draft_psnr_db"] < 70
    assert large["bytes_per_file"] > 10 * small["bytes_per_file"]
    assert found["hardware"]["cores"] >= 1
    assert "torch" in found["versions"]
    table = (tmp_path / "bench/table.md").read_text()
    assert "| 40x30 |" in table
    assert "| equal |" in table
