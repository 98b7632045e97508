"""A small version of every table and figure of docs/results.md: scikit-learn's digits, one seed, two cores.

  python benchmarks/results_quick.py --output_dir runs/results-quick        # make results-quick

Makes the data and a start model, runs the scripts of the evidence on them, and then benchmarks/results.py. If started
again, it continues where it stopped. The numbers only show that the scripts work; docs/results.md says what they mean
for the methods.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import ROOT, Flags, start
from utils.cli import flag, parse_settings, required, run


@dataclass
class Settings:
    output_dir: str = required("data, models, runs, numbers and results.md go here", group="what", path=True)
    seed: int = flag(0, "of every run", group="what", minimum=0)
    jobs: int = flag(2, "runs at a time", group="run", minimum=1)
    tiny: bool = flag(False, "one step of everything on a few images: does it still run?", group="run")


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    started = time.monotonic()
    out = Path(settings.output_dir)
    digits, base, attributes, numbers = (str(out / name) for name in ("digits", "base", "attributes", "numbers"))
    if not Path(digits).exists():
        start("examples/make_digit_shards.py", {"output_dir": digits})
    if not Path(attributes).exists():
        start("examples/make_attribute_shards.py", {"output_dir": attributes})
    if not (Path(base) / "model.safetensors").exists():
        sizes = {"hidden_size": 64, "flip": "false", "crop_padding": 2, "batch_size": 32, "overwrite": "true"}
        start(
            "examples/pretrain_small_clip.py",
            {"train_data": digits, "output_dir": base, "epochs": 1 if settings.tiny else 6} | sizes,
        )
    common = {"seeds": settings.seed, "jobs": settings.jobs, "numbers_dir": numbers}
    on_digits = common | {"model": base, "data": digits, "batch_size": 32, "output_dir": out / "lore"}
    with_words = {
        "word_kind": "label", "word_place": "bottom", "word_size_min": 40, "word_size_max": 60,
        "eval_word_place": "bottom", "eval_word_size_min": 40, "eval_word_size_max": 60,
    }  # fmt: skip
    scripts: dict[str, Flags] = {
        "early_stability": on_digits | {"eps": [8, 16], "updates": 200, "curve_updates": 10, "num_samples": 200},
        "trade_off": on_digits | {
            "eps": 16, "eval_eps": 8, "rhos": [0.02, 0.05, 0.1], "clean_weights": [3, 1, 0.3],
            "steps": 40, "num_samples": 200,
        },
        "ablations": on_digits | {
            "eps": 16, "eval_eps": 8, "rho": 0.1, "fixed_rhos": [10, 20, 40], "steps": 40, "num_samples": 200,
        },
        "transfer": on_digits | {
            "zero_shot_data": [digits, attributes], "probe_data": [attributes],
            "eps": 16, "eval_eps": 8, "rhos": [0.1], "steps": 40, "num_samples": 150,
        },
        "preferences": common | with_words | {
            "model": os.path.relpath(ROOT / "examples/reading_clip"), "data": attributes,
            "pairs": f"{attributes}/pairs", "steps": 60, "num_samples": 200, "reg_factors": [0, 3],
            "output_dir": out / "preferences",
        },
        "attack_check": on_digits | {"eps": 16, "steps": 40, "num_samples": 100, "square_queries": 1000},
    }  # fmt: skip
    less = {"num_samples": 20, "batch_size": 8}
    tiny: dict[str, Flags] = {
        "early_stability": less | {"updates": 10, "eps": 16},
        "trade_off": less | {"steps": 1, "rhos": [0.02, 0.1], "clean_weights": [3, 1]},
        "ablations": less | {"steps": 1, "fixed_rhos": 10, "primal_steps": [1, 5], "attack_steps": [1, 10]},
        "transfer": less | {"steps": 1},
        "preferences": less | {
            "steps": 1, "preferences": ["ce", "dpo"], "beta_factors": 0.3, "reg_factors": 0.3, "head_epochs": 1,
        },
        "attack_check": less | {"steps": 1, "square_queries": 20, "apgd_steps": 5},
    }  # fmt: skip
    for name, flags in scripts.items():
        start(f"benchmarks/{name}.py", flags | (tiny[name] if settings.tiny else {}))
    early = scripts["early_stability"] | {"eps": 16} | (tiny["early_stability"] if settings.tiny else {})
    longer = {} if settings.tiny else {"updates": 500, "curve_updates": 50}
    sooner = {"fare_primal_steps": 5, "penalties": 30, "dual_learning_rates": 5e-3}
    start("benchmarks/early_stability.py", early | longer | {"numbers_name": "constraint"})
    start("benchmarks/early_stability.py", early | sooner | {"numbers_name": "penalty"})
    page = out / "results.md"
    page.unlink(missing_ok=True)
    start(
        "benchmarks/results.py", {"numbers_dir": numbers, "page": page, "title": "Results in small: digits, one seed"}
    )
    print(f"{page}: {(time.monotonic() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    run(main)
