"""benchmarks/ablations.py: every row is the recipe's run with one setting changed, and the tables are made end to end."""

import dataclasses

import pytest

import train_lore
from benchmarks import ablations
from tests.conftest import run_script
from utils.cli import parse_settings


def test_every_row_differs_from_the_common_one_in_what_its_table_names(tmp_path):
    settings = ablations.Settings(model="model", data="data", output_dir="out")

    def of(variant):
        command = ablations.train_command(settings, variant, 3, tmp_path)
        words = command[command.index("--config") :]
        assert words.count("--rho") <= 1
        return dataclasses.asdict(parse_settings(train_lore.Settings, words))

    tables = ablations.make_tables(settings)
    base = of(tables["primal steps"]["K = 5"])
    assert (base["constraint"], base["rho"], base["seed"], base["global_batch_size"]) == ("embedding", 0.02, 3, 64)
    may_differ = {
        "rho": {"rho"},
        "primal steps": {"primal_steps"},
        "multiplier": {"multiplier"},
        "margin": {"margin", "rho"},
        "constraint": {"constraint", "clean_weight", "rho"},
    }
    assert tables.keys() == may_differ.keys()
    for title, rows in tables.items():
        found = [of(variant) for variant in rows.values()]
        assert base in found
        different = {key for one in found for key in one if one[key] != base[key]}
        assert different == may_differ[title]
        assert len({str(one) for one in found}) == len(rows)
    folders = [variant.folder for rows in tables.values() for variant in dict.fromkeys(rows.values())]
    assert len(set(folders)) == len({variant for rows in tables.values() for variant in rows.values()})


@pytest.mark.slow
def test_ablations_are_trained_evaluated_and_tabulated(small_clip, digits, tmp_path):
    output = run_script(
        "benchmarks/ablations.py", "--model", small_clip, "--data", digits, "--output_dir", tmp_path / "ablations",
        "--steps", 1, "--batch_size", 8, "--num_samples", 20, "--eval_eps", 4, "--rhos", 0.02, 0.1, "--fixed_rhos", 1,
        "--primal_steps", 1, 5, "--clean_weights", 1, "--jobs", 2,
    )  # fmt: skip
    table = (tmp_path / "ablations/table.md").read_text()
    assert output.count("$ accelerate launch") == 8 + 1
    assert [line for line in table.splitlines() if line.startswith("**")] == [
        "**rho**", "**primal steps**", "**multiplier**", "**margin**", "**constraint**",
    ]  # fmt: skip
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and not line.startswith("|  ")]
    assert [row[0].strip("| ") for row in rows] == [
        "start model", "rho 0.02", "rho 0.1", "K = 1", "K = 5", "network", "linear", "scalar", "relative, rho 0.02",
        "fixed, 1", "LORE, rho 0.02", "FARE, K = 5", "FARE + 1 x clean distance",
    ]  # fmt: skip
    assert rows[0][3] == "0.0"  # the start model has not moved
    assert all(float(row[3]) > 0 for row in rows[1:])
    assert rows[1][1:] == rows[4][1:] == rows[5][1:] == rows[8][1:] == rows[10][1:]  # one run
