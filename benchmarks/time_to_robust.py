"""Minutes of training until a model withstands APGD: FARE by a plain step as published, FARE and LORE by train_lore.py.

  python benchmarks/time_to_robust.py --model runs/small-clip --data data/cifar10 --target 0.25 --eval_eps 2 \\
    --output_dir runs/time-to-robust

All start from the same model and see the same batches in the same order, at the same learning rate. "FARE, plain" is
the first variant of benchmarks/train_step.py: float32, transformers' own layers, parameters that require gradients
during the attack. "FARE" and "LORE" are train_lore.py. Every --check_steps steps a copy of the model is saved;
afterwards evaluate.py attacks the copies in order until one reaches the target. Minutes are steps times the run's
median step time, without start, compilation (a minute or two), copies and evaluation. Writes table.md and results.json;
an interrupted comparison resumes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import claim_directory, launcher, markdown, print_table
from benchmarks.train_step import Trainee, cpu_name, ladder, load_tower, synchronise
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageTransform, pixel_normalisation
from utils.data.shards import ShardDataset, train_batches
from utils.errors import UserError
from utils.models.hub import load
from utils.models.published import save_model
from utils.processes.progress import RunProgress
from utils.sets.labelled import open_set
from utils.training.metrics import MetricsFile
from utils.training.optimization import cosine_learning_rate, set_learning_rate

ON_GPU = torch.cuda.is_available()
CONFIG = "single_gpu.yaml" if ON_GPU else "cpu.yaml"
METHODS = {  # name -> folder, flags of train_lore.py
    "FARE, plain": ("fare-plain", None),
    "FARE": ("fare", ["--constraint", "none", "--primal_steps", "1"]),
    "LORE": ("lore", []),
}


@dataclass
class Settings:
    model: str = required("the model that every run starts from", group="what", path=True)
    data: str = required("labelled set with train/ and test/", group="what", path=True)
    target: float = flag(0.25, "accuracy under APGD to reach", group="what", minimum=0, maximum=1)
    eval_eps: float = flag(2.0, "radius of APGD, in 1/255", group="what", above=0, maximum=255)
    num_samples: int = flag(300, "the first N test images", group="what", minimum=1)
    eps: float = flag(4.0, "radius of the training attack, in 1/255", group="training", above=0, maximum=255)
    rho: float = flag(0.05, "LORE's tolerance", group="training", minimum=0)
    steps: int = flag(150, "training steps of each run, whose cosine ends there", group="training", minimum=1)
    check_steps: int = flag(10, "steps between copies of the model", group="training", minimum=1)
    batch_size: int = flag(64, "images per step", group="training", minimum=1)
    learning_rate: float = flag(3e-4, "of the encoder", group="training", minimum=0)
    precision: str = flag("bf16", "of this project's runs", group="training", choices=("bf16", "no"))
    compile: bool = flag(True, "compile this project's runs", group="training")
    seed: int = flag(0, "of data order and attack starts", group="training", minimum=0)
    output_dir: str = required("runs, evaluations and table.md go here", group="run", path=True)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    kept = {name: value for name, value in vars(settings).items() if name not in ("target", "output_dir")}
    claim_directory(output_dir, kept)
    found = {}
    for folder, flags in METHODS.values():
        run_dir = output_dir / folder
        if not (run_dir / "model.safetensors").exists():
            if flags is None:
                train_plainly(settings, run_dir)
            else:
                call(train_command(settings, run_dir, flags), settings)
    for name, (folder, _) in METHODS.items():
        found[name] = first_robust(settings, output_dir / folder)
    plain = found["FARE, plain"]
    rows = [["method", "steps", "minutes", "of plain", "s/step", "APGD", "clean"]]
    for name, result in found.items():
        reached = result["minutes"] is not None
        share = f"{result['minutes'] / plain['minutes']:.2f}" if reached and plain["minutes"] else ""
        steps, minutes = (str(result["step"]), f"{result['minutes']:.2f}") if reached else ("not reached", "")
        accuracies = [f"{100 * result[key]:.1f}" for key in ("apgd", "clean")]
        rows.append([name, steps, minutes, share, f"{result['seconds_per_step']:.2f}", *accuracies])
    (output_dir / "table.md").write_text(markdown(rows), encoding="utf-8")
    hardware = torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} threads, {cpu_name()}"
    report = {"settings": vars(settings), "hardware": hardware, "torch": torch.__version__, "results": found}
    (output_dir / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print_table(f"Training until {settings.target:.0%} under APGD at {settings.eval_eps:g}/255, {hardware}", rows)


def train_plainly(settings: Settings, run_dir: Path) -> None:
    """FARE with K = 1 by the plain step, on the batches of train_lore.py; writes the same copies and metrics.jsonl."""
    device = "cuda" if ON_GPU else "cpu"
    clip, processor = load(settings.model, "--model", ("clip",))
    step = PlainSettings(seed=settings.seed, device=device)
    trainee = Trainee(ladder()[0], load_tower(settings.model, settings.seed), "FARE", step, eps=settings.eps / 255)
    for encoder in (trainee.encoder, trainee.reference):
        mean, std = pixel_normalisation(processor.image_processor)
        encoder.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
        encoder.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
    train_set = open_set([f"{settings.data}/train"], flag="--data", with_classes=False)
    dataset = ShardDataset(
        train_set.index, ImageTransform.from_processor(processor.image_processor), order="shuffled", seed=settings.seed
    )
    batches = train_batches(
        dataset, samples_per_epoch=train_set.index.num_samples, global_batch_size=settings.batch_size,
        per_device_batch_size=settings.batch_size, rank=0, world_size=1,
        first_step=0, num_steps=settings.steps, num_workers=1,
    )  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    with RunProgress("FARE, plain", settings.steps) as progress:
        for index in range(settings.steps):
            clock = time.perf_counter()
            batch = {"images": next(batches)["images"].to(device)}
            set_learning_rate(trainee.optimizer, cosine_learning_rate(index, settings.learning_rate, settings.steps))
            trainee.lore_step(index, batch)
            synchronise(device)
            rate = settings.batch_size / (time.perf_counter() - clock)
            metrics.write({"step": index + 1, "images_per_second": rate})
            progress.update(index + 1, {"img/s": rate})
            if (index + 1) % settings.check_steps == 0 or index + 1 == settings.steps:
                state = trainee.encoder.model.state_dict()
                save_model(run_dir / f"checkpoints/step-{index + 1}/model", clip, processor, state)
    save_model(run_dir, clip, processor, state)


@dataclass
class PlainSettings:
    """Settings for a ``Trainee`` of benchmarks/train_step.py: FARE as published, 10 attack steps, one update."""

    seed: int
    device: str
    attack_steps: int = 10
    primal_steps: int = 1
    gradient_checkpointing: bool = False


def train_command(settings: Settings, run_dir: Path, method: list[str]) -> list[str]:
    return [
        *launcher("train_lore.py", config=CONFIG), "--model_name_or_path", settings.model,
        "--train_shards", f"{settings.data}/train", "--eps", f"{settings.eps:g}", "--rho", f"{settings.rho:g}",
        "--max_steps", str(settings.steps), "--per_device_train_batch_size", str(settings.batch_size),
        "--learning_rate", f"{settings.learning_rate:g}", "--logging_steps", "1",
        "--checkpoint_steps", str(settings.check_steps), "--checkpoints_total_limit", "0",
        "--resume_from_checkpoint", "latest", "--report_to", "none", "--compile", str(settings.compile).lower(),
        "--seed", str(settings.seed), "--output_dir", str(run_dir), *method,
    ]  # fmt: skip


def call(command: list[str], settings: Settings) -> None:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    script = next(place for place, word in enumerate(command) if word.endswith(".py"))
    precision = settings.precision if command[script].endswith("train_lore.py") else "no"
    command[script:script] = [
        "--mixed_precision",
        precision,
        "--num_cpu_threads_per_process",
        str(torch.get_num_threads()),
    ]
    status = subprocess.run(command, env=dict(os.environ), check=False).returncode
    if status:
        raise UserError(f"{command[script]} ended with status {status}; its own message is above")


def first_robust(settings: Settings, run_dir: Path) -> dict[str, Any]:
    """The first copy of a run that reaches the target, or else the last one, with None for the minutes."""
    rows = MetricsFile(run_dir / "metrics.jsonl").read()
    seconds = statistics.median(settings.batch_size / row["images_per_second"] for row in rows)
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
    for step in steps:
        model = str(run_dir / f"checkpoints/step-{step}/model")
        accuracies = evaluate(settings, model, run_dir / "eval")
        if accuracies["apgd"] >= settings.target:
            break
    reached = accuracies["apgd"] >= settings.target
    return accuracies | {
        "step": step,
        "minutes": step * seconds / 60 if reached else None,
        "seconds_per_step": seconds,
    }


def evaluate(settings: Settings, model: str, output_dir: Path) -> dict[str, float]:
    command = [
        *launcher("evaluate.py", config=CONFIG), "--model", model, "--data", settings.data, "--attack", "clean", "apgd",
        "--eps", f"{settings.eval_eps:g}", "--num_samples", str(settings.num_samples), "--num_workers", "0",
        "--output_dir", str(output_dir),
    ]  # fmt: skip
    call(command, settings)
    report = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    cells = [cell for cell in report["results"] if cell["model"] == model and cell["measure"] == "accuracy"]
    return {cell["attack"]: cell["value"] for cell in cells}


if __name__ == "__main__":
    run(main)
