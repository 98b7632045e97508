"""Shared by the comparisons: starts runs as a user would, several at a time, and makes tables with means over seeds."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, required
from utils.data.digests import files_digest, text_digest
from utils.errors import UserError
from utils.evaluation.results import Results, model_revision
from utils.models.published import model_name
from utils.processes.progress import wide_console
from utils.sets.typographic import KINDS, PLACES

ROOT = Path(__file__).resolve().parents[1]
FARE = {"constraint": "none"}
START = "start model"
COMMANDS = "commands.jsonl"  # in an output directory: the duration of each command started there

Flags = Mapping[str, Any]  # flags of a script, without the dashes

what_flag = partial(flag, group="what")
training_flag = partial(flag, group="training")
evaluation_flag = partial(flag, group="evaluation")


@dataclass
class Settings:
    """Flags of every comparison of training runs."""

    model: str = required("the model that every run starts from", group="what", path=True)
    data: str = required("labelled set: train/ is trained on, test/ is evaluated on", group="what", path=True)
    seeds: list[int] = what_flag([0], "one run of each variant per seed", minimum=0)
    output_dir: str = required("runs, evaluations and tables go here", group="what", path=True)
    batch_size: int = training_flag(64, "images per step", minimum=1)
    jobs: int = flag(1, "runs at a time, one thread each if several; then evaluation processes", group="run", minimum=1)


@dataclass
class NumbersSettings:
    """Flags of a script whose numbers appear in benchmarks/results.py."""

    numbers_dir: str | None = what_flag(
        None, "what was found goes here, for benchmarks/results.py (default: --output_dir)", path=True
    )
    numbers_name: str | None = what_flag(None, "as NAME.json (default: the script's)")


@dataclass
class LoreSettings(NumbersSettings, Settings):
    """Flags of every comparison of train_lore.py runs; scripts with the same runs can share an --output_dir."""

    eval_data: str | None = what_flag(None, "set whose test/ is evaluated on (default: --data)", path=True)
    linear_head: str | None = what_flag(None, "tells its classes apart, for an encoder without text", path=True)
    image_size: int | None = what_flag(None, "side of the encoder's input (default: the model's)", minimum=1)
    mixed_precision: str = training_flag("no", "of the training runs", choices=("no", "bf16", "fp16"))
    learning_rate: float = training_flag(3e-4, "of the encoder, the same for every variant", minimum=0)
    num_samples: int = evaluation_flag(500, "test images of the evaluation", minimum=1)

    def __post_init__(self) -> None:
        self.model, self.data = as_in_results(self.model), as_in_results(self.data)
        self.eval_data = as_in_results(self.eval_data or self.data)

    def evaluated_every(self, steps: int) -> Flags:
        """Flags of train_lore.py for evaluations of clean accuracy during training."""
        return {
            "eval_shards": f"{self.eval_data}/test", "eval_num_samples": self.num_samples,
            "eval_steps": max(1, steps), "eval_pgd": "false",
        } | self.with_head  # fmt: skip

    @property
    def with_head(self) -> Flags:
        return {"linear_head": self.linear_head} if self.linear_head else {}


@dataclass
class StepSettings(LoreSettings):
    """Flags for comparisons in which all runs have the same radius and number of steps."""

    eps: float = training_flag(4.0, "radius of the training attack, in 1/255", above=0, maximum=255)
    steps: int = training_flag(60, "training steps", minimum=1)


@dataclass
class WordSettings(Settings):
    """Flags for comparisons with words written on images, with separate words for training and evaluation."""

    fonts: list[str] = training_flag(["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"], "of words trained on", path=True)
    word_size_min: float = training_flag(40.0, "letters, in pixels at an image side of 224", above=0)
    word_size_max: float = training_flag(60.0, "in the same unit", above=0)
    word_place: str = training_flag("bottom", "of the words trained on", choices=PLACES)
    word_kind: str = training_flag("label", "of all words", choices=KINDS)
    eval_fonts: list[str] = evaluation_flag(["Aileron", "cmr10", "cmtt10"], "of words evaluated on", path=True)
    num_samples: int | None = evaluation_flag(None, "test images per set (default: all)", minimum=1)


def claim_directory(output_dir: Path, kept: dict[str, Any]) -> None:
    """Starts a comparison, or resumes an interrupted one if its settings ``kept``, model and data are the same."""
    note = output_dir / "settings.json"
    now = kept | {"content": {name: content(name, kept[name]) for name in ("model", "data") if kept.get(name)}}
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        if "content" not in before:  # accept it rather than throw hours of training away
            print(f"{output_dir}: of an earlier version, which did not look into model and data; taken as they are now")
            before["content"] = now["content"]
        if before != now:
            changed = ", ".join(name for name in now if before.get(name) != now[name])
            raise UserError(
                f"--output_dir {output_dir}: holds runs with other settings ({note}: {changed}); give another directory"
            )
    elif output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir}: not empty; give another directory")
    output_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now, indent=1), encoding="utf-8")


def content(kind: str, name: str) -> str:
    """A digest of a model, or of the shards and texts of a set; for what is not on this machine, the name itself."""
    if kind == "model":
        return model_revision(name) if Path(model_name(name).path).exists() else name
    folder = Path(name)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".tar", ".txt") and path.is_file())
    digests = [f"{path.relative_to(folder).as_posix()!r} {files_digest([path])}" for path in files]
    return text_digest(digests) if folder.is_dir() else name


def launcher(script: str, processes: int = 1, config: str | None = None, precision: str | None = None) -> list[str]:
    """The start of the command, with paths relative to the user's directory; on CPUs unless ``config`` is given."""
    config = config or ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    config, script = (os.path.relpath(ROOT / path) for path in (f"accelerate_configs/{config}", script))
    more = ["--num_processes", str(processes)] if processes > 2 else []
    more += ["--mixed_precision", precision] if precision else []
    return ["accelerate", "launch", "--quiet", "--config_file", config, *more, script]


def as_in_results(name: str) -> str:
    """The name of a model or set in results.json: a directory without a final slash, or a name on the hub."""
    return os.path.normpath(name) if name and Path(name).exists() else name


def lore_runs(
    settings: LoreSettings,
    variants: Mapping[str, Flags],
    names: Mapping[str, str] | None = None,
    kept: Sequence[str] = (),
) -> dict[str, list[Path]]:
    """Trains the runs that are missing and returns label -> the run's directory for each seed.

    A run is named after its flags: labels with equal flags share it, and so do scripts with the same --output_dir.
    ``names`` gives shorter names by label; then ``kept`` must hold the other settings, which have to be the same when
    the script is started again.
    """
    output_dir = Path(settings.output_dir)
    kept = ("model", "data", "batch_size", "learning_rate", *kept)
    others = {"image_size": settings.image_size, "mixed_precision": settings.mixed_precision}
    others = {name: value for name, value in others.items() if value not in (None, "no")}
    claim_directory(output_dir, {name: getattr(settings, name) for name in kept} | others)
    runs = {
        label: [
            output_dir / f"{names[label]}-seed{seed}" if names else output_dir / f"{run_name(flags)}_seed-{seed}"
            for seed in settings.seeds
        ]
        for label, flags in variants.items()
    }
    commands = {
        run_dir: lore_command(settings, variants[label], seed, run_dir)
        for place, seed in enumerate(settings.seeds)
        for label, folders in runs.items()
        if not ((run_dir := folders[place]) / "model.safetensors").exists()
    }
    in_parallel(settings.jobs, list(commands.values()), log=output_dir / COMMANDS)
    return runs


def run_name(flags: Flags) -> str:
    """A folder's name, made of all flags that the weights depend on."""
    named = {name: flags[name] for name in sorted(flags) if not name.startswith(("eval_", "linear_head"))}
    return "_".join(f"{name}-{_text(value)}" for name, value in named.items())


def lore_command(settings: LoreSettings, flags: Flags, seed: int, run_dir: Path) -> list[str]:
    common = {
        "model_name_or_path": settings.model, "train_shards": f"{settings.data}/train",
        "per_device_train_batch_size": settings.batch_size, "learning_rate": settings.learning_rate,
        "logging_steps": 1, "checkpoint_steps": 0, "num_workers": 0, "report_to": "none",
        "resume_from_checkpoint": "latest", "seed": seed, "output_dir": run_dir,
    }  # fmt: skip
    common |= {"image_size": settings.image_size} if settings.image_size else {}
    precision = flags.get("mixed_precision", settings.mixed_precision)  # a flag of the launcher
    flags = {name: value for name, value in flags.items() if name != "mixed_precision"}
    return [*launcher("train_lore.py", precision=precision if precision != "no" else None), *words(common | flags)]


def evaluate(
    settings: LoreSettings, name: str, models: Sequence[str | Path], flags: Flags, data: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Runs evaluate.py on the start model and ``models``, in <output_dir>/eval-<name>; returns cells of results.json.

    Finished cells are not measured again; cells of other settings are left out.
    """
    folder = Path(settings.output_dir) / f"eval-{name}"
    asked = {
        "model": [settings.model, *dict.fromkeys(map(str, models))], "data": list(data) or [settings.eval_data],
        "num_samples": settings.num_samples, "num_workers": 0, "output_dir": folder,
    }  # fmt: skip
    asked |= {"image_size": settings.image_size} if settings.image_size else {}
    asked |= {"classifier": "linear_head"} | settings.with_head if settings.linear_head else {}
    command = [*launcher("evaluate.py", settings.jobs), *words(asked | flags)]
    in_parallel(settings.jobs, [command], log=Path(settings.output_dir) / COMMANDS)
    return [cell for cell in Results(folder).current() if was_asked(cell, asked | flags)]


def was_asked(cell: Mapping[str, Any], flags: Flags) -> bool:
    """Whether evaluate.py measures this cell of results.json under these flags; other settings are ignored."""
    listed = {"dataset": "data", "eps": "eps", "sigma": "sigma", "severity": "severities"}
    for key, name in listed.items():
        values = flags.get(name)
        values = values if isinstance(values, (list, tuple)) else [values]
        if name in flags and cell[key] is not None and cell[key] not in values:
            return False
    return all(cell["settings"].get(name, value) == value for name, value in flags.items())


def words(flags: Flags) -> list[str]:
    """The flags as typed on a command line."""
    typed = []
    for name, value in flags.items():
        typed += [f"--{name}", *(map(_text, value) if isinstance(value, (list, tuple)) else [_text(value)])]
    return typed


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_parallel(jobs: int, commands: list[list[str]], log: Path | None = None) -> None:
    """Runs the commands, ``jobs`` at a time, and prints each as a user would type it. Writes a line each to ``log``."""
    at_a_time = max(1, min(jobs, len(commands)))
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})

    def start(command: list[str]) -> None:
        sys.stdout.write(f"\n$ {shlex.join(command)}\n")  # in one write: other runs may write too
        sys.stdout.flush()
        started = time.monotonic()
        started_command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
        status = subprocess.run(started_command, env=environment, check=False).returncode
        if status:
            script = next(word for word in command if word.endswith(".py"))
            raise UserError(f"{script} ended with status {status}; its own message is above")
        if log is not None:
            row = {"output_dir": command[command.index("--output_dir") + 1], "seconds": time.monotonic() - started}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"at_a_time": at_a_time}) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        for finished in [pool.submit(start, command) for command in commands]:
            finished.result()


def start(script: str, flags: Flags) -> None:
    """Runs a script as a user would and prints the command."""
    command = [os.path.relpath(ROOT / script), *words(flags)]
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)
    if status := subprocess.run([sys.executable, *command], check=False).returncode:
        raise UserError(f"{script} ended with status {status}; its own message is above")


def percent(values: list[float]) -> str:
    """Mean, and for several seeds the standard deviation."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def print_table(title: str, rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    wide_console().print(table)


def markdown(rows: list[list[str]]) -> str:
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"
