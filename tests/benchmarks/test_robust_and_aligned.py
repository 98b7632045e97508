"""benchmarks/robust_and_aligned.py by the real scripts, on what is small; a second call makes nothing again."""

import json

import pytest

from tests.conftest import run_script


@pytest.mark.slow
def test_both_stages_are_trained_evaluated_and_tabulated(small_clip, digits, tmp_path):
    words = [
        "benchmarks/robust_and_aligned.py", "--model", small_clip, "--data", f"{digits}/",
        "--output_dir", tmp_path / "out", "--methods", "lore_po_l2", "po_l2", "--lore_steps", 1, "--po_steps", 1,
        "--batch_size", 8, "--num_samples", 12, "--apgd_steps", 2, "--jobs", 2,
    ]  # fmt: skip
    output = run_script(*words)
    assert output.count("$ accelerate launch") == 3 + 1  # the first stage that is not asked for too
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0] == "| method | original | typographic | follows the word | APGD 4/255 | moved |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| start model", "| PO + l2", "| LORE, then PO + l2"]
    assert lines[2].endswith("| 0.000 |")
    assert all(line.count("[") == 4 for line in lines[2:])
    assert (tmp_path / "out/scatter.png").stat().st_size > 10_000
    card = (tmp_path / "out/lore-po-l2-seed0/README.md").read_text()
    assert "# DPO + l2 (image tower) from" in card
    assert f"| model_name_or_path | {tmp_path / 'out/lore-seed0'} |" in card
    report = json.loads((tmp_path / "out/eval/results.json").read_text())
    assert run_script(*words).count("$ accelerate launch") == 1  # the evaluation, which finds everything done
    assert json.loads((tmp_path / "out/eval/results.json").read_text())["results"] == report["results"]
    run_script(*words, "--eps", 8, status=2)
