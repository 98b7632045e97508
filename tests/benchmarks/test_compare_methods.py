import json
import shutil

import pytest

from benchmarks.comparison import claim_directory, markdown
from tests.conftest import run_script
from tests.published_layouts import FARE, save_layouts
from utils.errors import UserError


@pytest.mark.slow
def test_all_methods_are_trained_evaluated_and_tabulated(small_clip, digits, tmp_path):
    output = run_script(
        "benchmarks/compare_methods.py", "--model", small_clip, "--data", digits, "--output_dir", tmp_path / "compare",
        "--seeds", 0, 1, "--steps", 2, "--batch_size", 8, "--curve_steps", 1, "--curve_num_samples", 10,
        "--num_samples", 20, "--eval_eps", 4, "--jobs", 3,
    )  # fmt: skip
    table = (tmp_path / "compare/table.md").read_text()
    lines = table.splitlines()
    assert lines[0] == "| method | clean | PGD 4/255 |"
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| start model", "| FARE, K = 1", "| FARE, K = 5", "| LORE, K = 5, rho 0.1",
    ]  # fmt: skip
    assert all("±" in line for line in lines[3:6])
    assert "| method | 0 | 1 | 2 |" in table
    assert (tmp_path / "compare/curves.png").stat().st_size > 10_000
    assert output.count("$ accelerate launch") == 2 * 3 + 1
    assert (tmp_path / "compare/eval-compare/report.html").exists()


def test_runs_of_another_content_are_not_gone_on_with(tmp_path):
    kept = {"data": str(tmp_path / "set"), "steps": 3}
    (tmp_path / "set").mkdir()
    (tmp_path / "set/classnames.txt").write_text("cat\ndog\n")
    for _ in range(2):
        claim_directory(tmp_path / "runs", kept)
    (tmp_path / "set/classnames.txt").write_text("cow\ndog\n")
    with pytest.raises(UserError, match=r"holds runs with other settings \(.*settings.json: content\)"):
        claim_directory(tmp_path / "runs", kept)
    (tmp_path / "runs/settings.json").write_text(json.dumps(kept))  # of an earlier version
    claim_directory(tmp_path / "runs", kept)
    assert markdown([["model"], ["a|b"]]).splitlines()[-1] == "| a\\|b |"


def test_the_content_of_a_model_is_that_of_its_file_and_of_its_base(tmp_path):
    layouts = save_layouts(tmp_path / "published")
    tower, folder = layouts["robustvlm_visual"], layouts[FARE].path
    named = f"{tower.path}@{folder}"

    def refused(runs: str, name: str) -> None:
        with pytest.raises(UserError, match=r"settings.json: content\)"):
            claim_directory(tmp_path / runs, {"model": name})

    for _ in range(2):
        claim_directory(tmp_path / "of-file", {"model": named})
        claim_directory(tmp_path / "of-folder", {"model": folder})
        claim_directory(tmp_path / "of-hub", {"model": "openai/clip-vit-base-patch32"})  # is not looked into
    shutil.copy(layouts["simclip_visual"].path, tower.path)
    refused("of-file", named)
    claim_directory(tmp_path / "of-other-file", {"model": named})
    with open(f"{folder}/open_clip_config.json", "a") as file:
        file.write("\n")
    refused("of-other-file", named)
    refused("of-folder", folder)
