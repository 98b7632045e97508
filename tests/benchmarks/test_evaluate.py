import pytest

from tests.conftest import ROOT, run_script


@pytest.mark.slow
def test_forwards_are_the_floor_and_masks_equal_the_reference(attribute_digits, tmp_path):
    run_script(
        "benchmarks/evaluate.py", "--model", ROOT / "examples/reading_clip", "--data", attribute_digits, "--eps", 1, 4,
        "--num_samples", 24, "--num_steps", 8, "--batch_size", 16, "--output_dir", tmp_path / "bench",
    )  # fmt: skip
    heading, _, *rows = [
        line.strip("| ").split(" | ") for line in (tmp_path / "bench/table.md").read_text().splitlines()
    ]
    assert len(rows) == 2
    for row in rows:
        by_heading = dict(zip(heading, row))
        assert row[2] == row[3]  # robust accuracies
        assert by_heading["differ"] == "0"
        assert by_heading["here / floor"] in ("1.000", "1.001")
        assert float(by_heading["fewer"].removesuffix(" x")) > 1
