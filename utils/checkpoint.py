"""Checkpoints: whole or absent, found by step, pruned; and the rule for starting in a directory that is not empty."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.cli import UserError

STATE_FILE = "trainer_state.json"
EXTRA_FILE = "extra_state.pt"


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    *,
    state: dict[str, Any],
    extra_state: dict[str, Any],
    write_model: Callable[[Path], None],
    total_limit: int,
) -> Path:
    """Writes checkpoints/step-<n>/ aside, syncs it to the disk and renames it, so that it appears whole or not at all.

    Call on all processes. ``state`` is JSON (step, settings, ...), ``extra_state`` holds state dicts of what is not
    prepared by accelerate (the multiplier and its optimizer), ``write_model(directory)`` writes a directory that
    ``from_pretrained`` loads; it is called on all processes, which may have to gather the weights first. Afterwards the
    oldest checkpoints beyond ``total_limit`` are deleted (0: none).
    """
    checkpoints = Path(output_dir) / "checkpoints"
    final = checkpoints / f"step-{step}"
    aside = checkpoints / f".step-{step}.incomplete"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    write_model(aside / "model")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(extra_state, aside / EXTRA_FILE)
        (aside / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        replace_directory(aside, final)
        _prune(checkpoints, total_limit)
    accelerator.wait_for_everyone()
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises ``UserError`` where there is none."""
    try:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: not a whole checkpoint ({error}); expected a directory "
            f"checkpoints/step-<n> with {STATE_FILE} in it"
        ) from None


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Restores what ``save_state`` saved into the prepared objects; returns ``extra_state``. Unpickles no code."""
    accelerator.load_state(str(checkpoint))
    return torch.load(checkpoint / EXTRA_FILE, map_location="cpu", weights_only=True)


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start; refuses a used output_dir without ``resume``."""
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; give a directory")
    if resume is None:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(
                f"--output_dir {output_dir}: not empty; give another directory, or go on with its last checkpoint by "
                "--resume_from_checkpoint latest"
            )
        return None
    if resume == "latest":
        return last_checkpoint(output_dir)
    if not Path(resume).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {resume}: no such directory; give checkpoints/step-<n> of a run, or latest"
        )
    return Path(resume)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint with the highest step, or None."""
    steps = _checkpoint_steps(Path(output_dir) / "checkpoints")
    return steps[max(steps)] if steps else None


def replace_directory(aside: Path, final: Path) -> None:
    """Syncs every file of ``aside`` to the disk and gives it the name ``final``, in place of what had it."""
    for path in sorted(aside.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(aside)
    if final.exists():
        outdated = final.with_name(f".{final.name}.outdated")
        shutil.rmtree(outdated, ignore_errors=True)
        os.rename(final, outdated)
        os.rename(aside, final)
        shutil.rmtree(outdated, ignore_errors=True)
    else:
        os.rename(aside, final)
    _fsync(final.parent)


def replace_model(accelerator: Accelerator, directory: Path, write_model: Callable[[Path], None]) -> None:
    """Puts the present model in place of the one in ``directory``, whole or not at all. Call on all processes."""
    aside = directory.with_name(f".{directory.name}.incomplete")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write_model(aside)
    if accelerator.is_main_process:
        replace_directory(aside, directory)


def refuse_changed_settings(before: dict[str, Any], now: dict[str, Any], free: set[str]) -> None:
    """Raises ``UserError`` that names every setting of a resumed run, not in ``free``, that is not the checkpoint's."""
    changed = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in now.items()
        if name not in free and before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"--resume_from_checkpoint: the run was started with other settings ({'; '.join(changed)}); give the "
            "same ones, or start a new run in another --output_dir"
        )


def refuse_non_finite(
    accelerator: Accelerator, losses: list[Tensor], updates_per_step: int, done: int, last_good: Path | None
) -> None:
    """Stops the run on all processes where one of the ``losses`` up to step ``done`` is not finite."""
    means = accelerator.reduce(torch.stack(losses), reduction="mean")
    bad = (~means.isfinite()).nonzero().flatten().tolist()
    if bad:
        step = done - (len(losses) - 1 - bad[0]) // updates_per_step
        rescue = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
        raise UserError(
            f"step {step}: the loss is {means[bad[0]].item()}; {rescue}; go on from it with a lower --learning_rate or "
            "--max_grad_norm 1 in a new --output_dir"
        )


def _checkpoint_steps(checkpoints: Path) -> dict[int, Path]:
    if not checkpoints.is_dir():
        return {}
    found = {}
    for path in checkpoints.iterdir():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / STATE_FILE).exists():
            found[int(match.group(1))] = path
    return found


def _prune(checkpoints: Path, total_limit: int) -> None:
    steps = _checkpoint_steps(checkpoints)
    if total_limit > 0:
        for step in sorted(steps)[:-total_limit]:
            shutil.rmtree(steps[step])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
