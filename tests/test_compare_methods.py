from tests.conftest import run_script


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
