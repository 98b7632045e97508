"""benchmarks/ablations.py: every row changes what its table names, and nothing else."""

import dataclasses

import train_lore
from benchmarks import ablations
from benchmarks.comparison import lore_command, run_name
from utils.cli import parse_settings


def test_every_row_differs_from_the_common_one_in_what_its_table_names(tmp_path):
    settings = ablations.Settings(model="model", data="data", output_dir="out")

    def of(flags):
        command = lore_command(settings, flags, 3, tmp_path)
        words = command[command.index("--model_name_or_path") :]
        return dataclasses.asdict(parse_settings(train_lore.Settings, words))

    tables = ablations.make_rows(settings)
    base = of(tables[ablations.K]["K = 5"])
    assert (base["constraint"], base["rho"], base["seed"], base["primal_steps"]) == ("embedding", 0.02, 3, 5)
    may_differ = {
        ablations.K: {"primal_steps"},
        ablations.FORM: {"multiplier"},
        ablations.MARGIN: {"margin", "rho"},
        ablations.STEPS: {"attack_steps"},
        ablations.SUPERVISED: {"objective", "constraint", "primal_steps", "rho"},
    }
    assert tables.keys() == may_differ.keys()
    for title, rows in tables.items():
        found = [of(flags) for flags in rows.values()]
        assert base in found or title == ablations.SUPERVISED
        different = {key for one in found for key in one if one[key] != base[key]}
        assert different <= may_differ[title]
        assert len({str(one) for one in found}) == len(rows)
    runs = {run_name(flags): of(flags) for rows in tables.values() for flags in rows.values()}
    assert len(runs) == len({str(one) for one in runs.values()})
