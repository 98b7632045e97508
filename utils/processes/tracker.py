"""The tracker of a run: tensorboard or wandb. Its failure never ends the run, since metrics.jsonl has every row."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available

from utils.errors import UserError
from utils.redaction import printable
from utils.whole_files import write_whole

logger = logging.getLogger(__name__)

_WANDB_KEY = "not logged in; wandb login once, or WANDB_API_KEY, or WANDB_MODE=offline, or --report_to none"
# If a thread of tensorboardX has died, nothing empties its queue, and a put into the full queue waits for ever.
_WRITERS: list[threading.Thread] = []
_MOST_QUEUED = 1000  # events; each value of a row is one


def check_tracker(report_to: str) -> None:
    """Raises ``UserError`` if the tracker's package or key is missing. Call it before a model is loaded."""
    found = {"tensorboardX": is_tensorboard_available, "wandb": is_wandb_available}
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(report_to)
    if package and not found[package]():
        raise UserError(f"--report_to {report_to}: needs the package {package}; install it or use --report_to none")
    offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun")
    key = offline or os.environ.get("WANDB_API_KEY") or sys.stdin.isatty()  # at a terminal wandb asks for it
    if report_to == "wandb" and not key:
        with contextlib.suppress(Exception):
            import wandb  # type: ignore[import-not-found]

            key = wandb.api.api_key  # looks into its settings and ~/.netrc
        if key is None:
            raise UserError(f"--report_to wandb: {_WANDB_KEY}")


def start_tracker(
    accelerator: Accelerator, report_to: str, project: str, settings: dict[str, Any], output_dir: Path, first_step: int
) -> None:
    """Opens the tracker with the run's settings, as texts: accelerate accepts only numbers and texts.

    A resumed run continues its old record. wandb finds it by the id in ``output_dir``/run.json, chosen at the first
    start. tensorboard uses its directory and drops the rows after ``first_step``, because they are logged again. If the
    tracker does not start, a warning says so and the run goes on; ``UserError`` if only the key is missing.
    """
    if report_to == "none":
        return
    config: dict[str, Any] | None = {name: printable(str(value)) for name, value in settings.items()}
    options: dict[str, Any] = {}
    if accelerator.is_main_process:  # the only one that opens a tracker
        run_id, known = _run_id(output_dir / "run.json")
        options = {"id": run_id, "resume": "allow"}
        if report_to == "tensorboard":
            options = {"purge_step": first_step + 1 if first_step else 0, "max_queue": _MOST_QUEUED}
            config = None if known else config  # tensorboard would show the settings as one more run
    try:
        accelerator.init_trackers(project, config=config, init_kwargs={report_to: options})
    except Exception as error:
        said = f"{type(error).__name__} {error}"
        if report_to == "wandb" and re.search(r"api.?key|log ?in|auth", said, re.IGNORECASE):
            raise UserError(f"--report_to wandb: {_WANDB_KEY}") from None
        _leave_out_tracker(accelerator, "did not start", error)
    _WRITERS[:] = [thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboardX")]


def _run_id(file: Path) -> tuple[str, bool]:
    """The id of the run and whether the file had it; a new id is written to the file first."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["id"]), True
    except (OSError, ValueError, KeyError, TypeError):
        run_id = secrets.token_hex(8)
        keep_facts(file, {"id": run_id})
        return run_id, False


def keep_facts(file: Path, facts: dict[str, Any]) -> None:
    """Writes facts about a run into its run.json, beside what is there."""
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
    write_whole(file, json.dumps((known if isinstance(known, dict) else {}) | facts, indent=1) + "\n")


def log_row(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Sends a row of metrics.jsonl to the tracker. If that fails, a warning says so and the tracker is dropped."""
    try:
        if not all(thread.is_alive() for thread in _WRITERS):
            raise OSError("its writing thread has ended")
        accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
    except Exception as error:
        _leave_out_tracker(accelerator, f"could not take step {row['step']}", error)


def _leave_out_tracker(accelerator: Accelerator, what: str, error: Exception) -> None:
    accelerator.trackers = []
    _WRITERS.clear()
    reason = printable(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    gone = "the run goes on without it, metrics.jsonl has every row"
    logger.warning("--report_to: the tracker %s (%s); %s", what, reason, gone)


def end_training(accelerator: Accelerator) -> None:
    """Closes the tracker and the process group. If the tracker cannot write its last rows, a warning says so."""
    try:
        accelerator.end_training()
    except Exception as error:
        if not accelerator.trackers:
            raise
        _leave_out_tracker(accelerator, "could not write all of its rows", error)
        accelerator.end_training()
    _WRITERS.clear()
