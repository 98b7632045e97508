"""The paper's story on one pretrained encoder: the first updates, how the constraint is met, and a longer run.

  python benchmarks/real_encoder.py --model facebook/dinov2-small --image_size 56 --data data/tinyimagenet150 \\
    --eval_data data/cifar10 --mixed_precision bf16 --seeds 0 1 2 --jobs 2 --output_dir runs/real-encoder

Trains on --data and measures on --eval_data. An encoder without text first learns a linear head there, which then stays
as it is: all models are measured by one head. Starts each script of --parts as a user would and prints its command. If
started again, it continues where it stopped. benchmarks/results.py makes a page of the numbers.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import Flags, evaluation_flag, in_parallel, launcher, start, training_flag, what_flag, words
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError
from utils.models.hub import find_config
from utils.models.published import MODEL_TYPES, has_text, model_name

EARLY, MET, FRONT = "early_stability", "constraint", "trade_off"
SCRIPTS = {EARLY: EARLY, MET: EARLY, FRONT: FRONT}  # a part's script
NUMBERS = "real_{}"  # name of a part's numbers


@dataclass
class Settings:
    model: str = required("a pretrained encoder", group="what", path=True)
    data: str = required("labelled set: train/ is trained on; no label is used", group="what", path=True)
    eval_data: str | None = what_flag(None, "labelled set that is measured on (default: --data)", path=True)
    image_size: int | None = what_flag(None, "side of the encoder's input (default: the model's)", minimum=1)
    parts: list[str] = what_flag(list(SCRIPTS), "what is measured", choices=SCRIPTS)
    seeds: list[int] = what_flag([0], "one run of each variant per seed", minimum=0)
    add_seeds: bool = what_flag(False, "early_stability: join --seeds with those that the numbers already have")
    numbers_dir: str | None = what_flag(None, "for benchmarks/results.py (default: <output_dir>/numbers)", path=True)
    output_dir: str = required("runs, evaluations and numbers go here", group="what", path=True)

    mixed_precision: str = training_flag("no", "of the training runs", choices=("no", "bf16", "fp16"))
    learning_rate: float = training_flag(1e-5, "of the encoder", minimum=0)
    batch_size: int = training_flag(32, "images per step", minimum=1)
    rho: float = training_flag(0.05, "LORE's tolerance", minimum=0)
    eps: list[float] = training_flag([4.0, 8.0, 16.0], "radii of the first updates, in 1/255", above=0, maximum=255)
    updates: int = training_flag(200, "how many the first updates are", minimum=5)
    warmup: int = training_flag(100, "updates of FARE's warm-up", minimum=1)
    clean_weight: float = training_flag(10.0, "of FARE with a fixed weight, in the first updates", above=0)
    constraint_eps: float = training_flag(8.0, "radius at which LORE meets its constraint in several ways", above=0)
    penalties: list[float] = training_flag([100.0], "c of LORE's augmented Lagrangian there", above=0)
    dual_learning_rates: list[float] = training_flag([5e-3], "other dual learning rates there", above=0)
    steps: int = training_flag(600, "steps of the longer run, at 4/255", minimum=1)
    rhos: list[float] = training_flag([0.02, 0.05, 0.1, 0.2], "LORE's tolerances in the longer run", minimum=0)
    clean_weights: list[float] = training_flag([30.0, 10.0, 3.0, 1.0], "FARE's weights in the longer run", above=0)

    head_num_samples: int = evaluation_flag(10_000, "training images of the linear head", minimum=1)
    curve_num_samples: int = evaluation_flag(200, "test images of the first updates", minimum=1)
    num_samples: int = evaluation_flag(500, "test images of the longer run, under APGD", minimum=1)
    eval_eps: float = evaluation_flag(2.0, "radius of APGD there, in 1/255", above=0, maximum=255)
    apgd_targets: int = evaluation_flag(9, "classes that APGD-T tries, the likeliest first", minimum=1)
    attack_dtype: str = evaluation_flag("float32", "of APGD's gradients", choices=("float32", "bfloat16"))
    jobs: int = flag(1, "runs at a time, one thread each if several; then evaluation processes", group="run", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    started = time.monotonic()
    out = Path(settings.output_dir)
    common: dict[str, object] = {
        "model": settings.model, "data": settings.data, "eval_data": settings.eval_data or settings.data,
        "mixed_precision": settings.mixed_precision, "seeds": settings.seeds, "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate, "jobs": settings.jobs,
        "numbers_dir": settings.numbers_dir or out / "numbers",
    }  # fmt: skip
    common |= {"image_size": settings.image_size} if settings.image_size else {}
    if not classifies_by_text(settings):
        common["linear_head"] = learn_head(settings, out / "head")
    parts: dict[str, Flags] = {
        EARLY: {
            "eps": settings.eps, "rho": settings.rho, "updates": settings.updates, "warmups": settings.warmup,
            "clean_weights": settings.clean_weight, "num_samples": settings.curve_num_samples,
            "add_seeds": str(settings.add_seeds).lower(),
        },
        MET: {
            "eps": settings.constraint_eps, "rho": settings.rho, "updates": settings.updates,
            "fare_primal_steps": 5, "penalties": settings.penalties,
            "dual_learning_rates": settings.dual_learning_rates,
            "num_samples": settings.curve_num_samples, "add_seeds": str(settings.add_seeds).lower(),
        },
        FRONT: {
            "steps": settings.steps, "rhos": settings.rhos, "clean_weights": settings.clean_weights,
            "num_samples": settings.num_samples, "eval_eps": settings.eval_eps,
            "apgd_targets": settings.apgd_targets, "attack_dtype": settings.attack_dtype,
        },
    }  # fmt: skip
    for part in settings.parts:
        names = {"numbers_name": NUMBERS.format(part), "output_dir": out / SCRIPTS[part]}
        start(f"benchmarks/{SCRIPTS[part]}.py", common | parts[part] | names)
    print(f"{common['numbers_dir']}: {(time.monotonic() - started) / 60:.1f} minutes in all")


def classifies_by_text(settings: Settings) -> bool:
    _, config = find_config(model_name(settings.model, None, None, settings.image_size), "--model", MODEL_TYPES)
    return config is None or has_text(config)


def learn_head(settings: Settings, folder: Path) -> Path:
    """The head that measures all models: a linear probe on the start model's embeddings of the clean images."""
    asked = {
        "model": settings.model, "data": settings.eval_data or settings.data, "classifier": "linear_probe",
        "train_num_samples": settings.head_num_samples, "num_samples": settings.num_samples, "num_workers": 0,
        "output_dir": folder,
    }  # fmt: skip
    asked |= {"image_size": settings.image_size} if settings.image_size else {}
    in_parallel(settings.jobs, [[*launcher("evaluate.py", settings.jobs), *words(asked)]])
    heads = list((folder / "probes").glob("*.safetensors"))
    if len(heads) != 1:
        raise UserError(f"{folder}/probes: {len(heads)} heads where one was expected; give another --output_dir")
    return heads[0]


if __name__ == "__main__":
    run(main)
