from tests.conftest import run_script


def test_all_methods_are_trained_evaluated_and_tabulated(small_clip, digits, tmp_path):
    output = run_script(
        "benchmarks/compare_preferences.py", "--model", small_clip, "--data", digits,
        "--output_dir", tmp_path / "compare", "--preferences", "ipo", "--seeds", 0, 1,
        "--steps", 2, "--batch_size", 8, "--num_samples", 20, "--jobs", 2,
    )  # fmt: skip
    lines = (tmp_path / "compare/table.md").read_text().splitlines()
    assert lines[:3] == [
        str(digits),
        "",
        "| method | original | typographic | follows the word | KL to the start, nats |",
    ]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| start model", "| IPO"]
    assert lines[4].endswith("| 0.000 |")
    assert all(line.count("±") == 4 for line in lines[5:])
    assert output.count("$ accelerate launch") == 2 + 1


def test_kept_embeddings_are_measured(small_clip, digits, tmp_path):
    output = run_script(
        "benchmarks/head_features.py", "--model", small_clip, "--data", digits, "--output_dir", tmp_path / "features",
        "--steps", 20, "--recomputed_steps", 1, "--batch_size", 16,
    )  # fmt: skip
    assert "kept against recomputed: " in output
    assert len((tmp_path / "features/table.md").read_text().splitlines()) == 5
