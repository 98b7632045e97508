"""Checkpoints, complete or absent and checked when read, and the lock of an output directory.

    checkpoints/step-<n>/
      trainer_state.json    step, settings, launches, skipped samples, and size and SHA-256 of every other file
      parameters.safetensors, optimizer.<key>.safetensors    see utils/training/state.py
      extra.safetensors     state not prepared by accelerate: the multiplier and its optimizer, a running average
      model/                a directory for from_pretrained

Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.errors import UserError, os_errors
from utils.processes.distributed import gather_objects
from utils.training import state as training_state

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
EXTRA_FILE = "extra.safetensors"
LOCK_FILE = ".lock"
FORMAT = 2  # of a checkpoint; other formats are refused
STATE_KEYS = {"settings", "skips", "best", "sizes", "optimizer_numbers", "extra_numbers", "scaler"}


class FolderWriting:
    """A folder that all processes write together, in ``aside`` until it is complete.

    ``attempt()`` keeps its first failure and does not raise it, so that the processes still meet in the collectives.
    ``agree()`` then raises a failure of any process on all of them and deletes ``aside``.
    """

    def __init__(self, accelerator: Accelerator, what: str, aside: Path, last_good: Path | None) -> None:
        self.accelerator, self.what, self.aside, self.last_good = accelerator, what, aside, last_good
        self.failure: str | None = None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.failure = self.failure or str(error)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            kept = f"the last one is {self.last_good}" if self.last_good else "there is none yet"
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
            self.failure = self.failure or (
                f"--output_dir: the {self.what} cannot be written ({reason}); {kept}; "
                f"{'make room' if full else 'mend that'}, then go on with --resume_from_checkpoint latest"
            )

    def agree(self) -> None:
        failure = next((found for found in gather_objects(self.accelerator, self.failure) if found), None)
        if failure is not None:
            if self.accelerator.is_main_process:
                shutil.rmtree(self.aside, ignore_errors=True)
            raise UserError(failure)


@contextlib.contextmanager
def writing_folder(accelerator: Accelerator, what: str, aside: Path, checkpoints: Path) -> Iterator[FolderWriting]:
    """Makes an empty ``aside``; the body fills it and moves it. A failure raises the same ``UserError`` everywhere."""
    steps = _checkpoint_steps(checkpoints)
    writing = FolderWriting(accelerator, what, aside, steps[max(steps)] if steps else None)
    with writing.attempt():
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    writing.agree()
    yield writing
    writing.agree()


def replace_directory(aside: Path, final: Path) -> None:
    """Syncs every file of ``aside`` to the disk, then renames it to ``final`` and deletes the old ``final``.

    If killed between the two renames, the old one is left as ``.<name>.replaced``; ``take_output_dir`` restores it.
    """
    _sync(*sorted(aside.rglob("*"), reverse=True), aside)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(aside, final)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(final.parent)


def replace_model(accelerator: Accelerator, directory: Path, write_model: Callable[[Path], None]) -> None:
    """Replaces the model in ``directory`` by the present one, whole or not at all. Call on all processes."""
    aside, checkpoints = directory.with_name(f".{directory.name}.incomplete"), directory.with_name("checkpoints")
    with writing_folder(accelerator, "model", aside, checkpoints) as writing, writing.attempt():
        write_model(aside)
        if accelerator.is_main_process:
            replace_directory(aside, directory)


def publish_model(accelerator: Accelerator, output_dir: Path, write_model: Callable[[Path], None]) -> None:
    """Puts the final model's files into ``output_dir``, each one whole or not at all. Call on all processes."""
    aside, checkpoints = output_dir / ".model.incomplete", output_dir / "checkpoints"
    with writing_folder(accelerator, "model", aside, checkpoints) as writing, writing.attempt():
        write_model(aside)
        if accelerator.is_main_process:
            _sync(*aside.iterdir())
            for path in aside.iterdir():
                os.replace(path, output_dir / path.name)
            aside.rmdir()
            _sync(output_dir)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Any,
    state: dict[str, Any],
    extra_state: dict[str, Any],
    write_model: Callable[[Path], None],
    total_limit: int,
) -> Path:
    """Writes checkpoints/step-<n>/, whole or not at all, and deletes the oldest beyond ``total_limit`` (0: no limit).

    Call on all processes. ``model`` and ``optimizer`` are the prepared ones, ``state`` is JSON (step, settings, ...),
    ``extra_state`` holds the state dicts of everything not prepared. All processes call ``write_model(directory)``,
    which writes a directory for ``from_pretrained``, because it may have to gather the weights. If the checkpoint
    cannot be written, raises ``UserError`` on all processes; earlier checkpoints stay.
    """
    checkpoints = Path(output_dir) / "checkpoints"
    final, aside = checkpoints / f"step-{step}", checkpoints / f".step-{step}.incomplete"
    with writing_folder(accelerator, f"checkpoint of step {step}", aside, checkpoints) as writing:

        def write(name: str, tensors: training_state.Tensors) -> None:
            with writing.attempt():
                save_file(tensors, aside / f"{name}.safetensors")

        numbers = training_state.collect(accelerator, model, optimizer, write)
        with writing.attempt():
            write_model(aside / "model")
        merged = {key: value for part in gather_objects(accelerator, numbers) for key, value in part.items()}
        writing.agree()
        with writing.attempt():
            if accelerator.is_main_process:
                tensors, extra_numbers = training_state.flatten(extra_state)
                save_file(tensors, aside / EXTRA_FILE)
                scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()  # of fp16
                whole = state | {"format": FORMAT, "optimizer_numbers": merged, "extra_numbers": extra_numbers}
                whole |= {"scaler": scaler, "files": describe_files(aside)}
                (aside / STATE_FILE).write_text(json.dumps(whole, indent=1), encoding="utf-8")
                replace_directory(aside, final)
                _delete_oldest(checkpoints, total_limit)
    return final


def _delete_oldest(checkpoints: Path, total_limit: int) -> None:
    """Deletes the oldest checkpoints; if killed meanwhile, leaves no partial one behind."""
    steps = _checkpoint_steps(checkpoints)
    for step in sorted(steps)[:-total_limit] if total_limit > 0 else ():
        outdated = checkpoints / f".step-{step}.outdated"
        os.rename(steps[step], outdated)
        shutil.rmtree(outdated, ignore_errors=True)


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def describe_files(folder: Path) -> dict[str, list[Any]]:
    """{relative path: [bytes, SHA-256]} of all files below ``folder``."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in paths}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path) -> str | None:
    """The fault of a checkpoint in a few words; None if every file is as it was written."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            return f"written in format {state.get('format', 1)}, this version reads {FORMAT}"
        for name, (size, digest) in state["files"].items():
            path = checkpoint / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, was written with {size}"
            if _sha256(path) != digest:
                return f"{name} is not what was written"
        known = state.keys() >= STATE_KEYS and state["files"].keys() >= {"parameters.safetensors", EXTRA_FILE}
        known = known and isinstance(state.get("launches", []), list)
        return None if isinstance(state["step"], int) and known else f"{STATE_FILE} lacks entries"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except OSError as error:  # an error of the disk or the network, not of the checkpoint
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: cannot be read ({error.strerror}); mend that and start again"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{STATE_FILE} is not what was written"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises ``UserError`` if the checkpoint is damaged."""
    if wrong := damage(checkpoint):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: not a whole checkpoint ({wrong}); expected a directory "
            "checkpoints/step-<n> as a run wrote it; name another one, or latest"
        )
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def load_checkpoint(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, checkpoint: Path, state: dict[str, Any]
) -> dict[str, Any]:
    """Restores the prepared ``optimizer``; returns ``extra_state``, with tensors on the CPU and lists as dictionaries.

    Call on all processes, with the ``state`` from ``read_state``. ``load_parameters`` restores the parameters, before
    ``prepare``.
    """
    training_state.load_optimizer(accelerator, model, optimizer, checkpoint, state["optimizer_numbers"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return training_state.unflatten(training_state.read_tensors(checkpoint / EXTRA_FILE) | state["extra_numbers"])


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from, or None for a new run. A new run in a used output_dir raises ``UserError``."""
    if resume == "latest":
        return last_checkpoint(output_dir)
    if resume is None and any(path.name != LOCK_FILE for path in Path(output_dir).iterdir()):
        raise UserError(
            f"--output_dir {output_dir}: not empty; give another directory, or go on with its last checkpoint by "
            "--resume_from_checkpoint latest"
        )
    if resume is not None and not Path(resume).is_dir():
        raise UserError(
            f"--resume_from_checkpoint {resume}: no such directory; give checkpoints/step-<n> of a run, or latest"
        )
    return None if resume is None else Path(resume)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The intact checkpoint with the highest step, or None. Skips damaged ones with a warning.

    Raises ``UserError`` if all are damaged: a new run must not overwrite an old one.
    """
    found = sorted(_checkpoint_steps(Path(output_dir) / "checkpoints").items(), reverse=True)
    problems = []
    for _, path in found:
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged and passed over: %s", path, problem)
        problems.append(problem)
    if problems:
        raise UserError(
            f"--resume_from_checkpoint latest: none of the {len(found)} checkpoints in {found[0][1].parent} is whole "
            f"(of the newest: {problems[0]}); start anew in another --output_dir, or move that folder away"
        )
    return None


def _checkpoint_steps(checkpoints: Path) -> dict[int, Path]:
    found = {}
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / STATE_FILE).exists():
            found[int(match[1])] = path
    return found


def set_aside_later(output_dir: str | Path, step: int) -> None:
    """Renames the checkpoints after ``step``, from which the run resumes: it will write these steps again."""
    for later, path in sorted(_checkpoint_steps(Path(output_dir) / "checkpoints").items()):
        if later > step:
            names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            os.rename(path, aside)
            logger.warning("the run goes on from step %d: %s is set aside as %s", step, path, aside.name)


def best_so_far(
    resumed: dict[str, Any], settings: dict[str, Any], output_dir: Path, fresh: dict[str, Any]
) -> dict[str, Any]:
    """The checkpoint's best value if it is ``of`` the same images and texts and its model exists, else ``fresh``."""
    best = resumed["best"]
    same = best.get("of") == fresh["of"] and best.get("metric") == settings["keep_best"]
    return best if same and (output_dir / "best").is_dir() else fresh


_LOCKS: list[IO[str]] = []  # kept open until the process ends, because the locks end with them

# Endings of the files that a run writes into its output_dir. Everything else there is a folder.
FILE_ENDINGS = (".safetensors", ".json", ".jsonl", ".txt", ".md", ".model", ".jinja", ".part")
# Characters that a run may add to output_dir: checkpoints/.step-<n>.incomplete/model/<file>, a tracker's event files.
LONGEST_NAME = 150


def take_output_dir(output_dir: str | Path) -> None:
    """Makes the directory and locks it for this process, until the process ends for any reason.

    Call on the main process. Deletes the partial files of a killed run. Raises ``UserError`` if the directory cannot
    be written or another run holds the lock.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; give a directory")
    with os_errors(f"--output_dir {output_dir}: cannot be written", "name a directory that can"):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        # A record lock, not flock: data workers do not inherit it, and it dies with this process alone.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        problem = (
            f"another run is writing there ({lock.read().strip()}); wait for it, stop it, or give another directory"
        )
        lock.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            problem = f"cannot be locked ({error.strerror}); name a directory on a file system with locks"
        raise UserError(f"--output_dir {output_dir}: {problem}") from None
    with contextlib.suppress(OSError):  # on a full disk the lock still holds, without a name in it
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    _LOCKS.append(lock)
    for folder in (output_dir, output_dir / "checkpoints"):
        _clear_leftovers(folder)


def _clear_leftovers(folder: Path) -> None:
    """Deletes what a killed run was writing or deleting, and restores what it was replacing."""
    for path in folder.glob(".*.replaced"):
        final = folder / path.name[1:].removesuffix(".replaced")
        if not final.exists():
            os.rename(path, final)
    for ending in ("replaced", "outdated", "incomplete"):
        for path in folder.glob(f".*.{ending}"):
            shutil.rmtree(path, ignore_errors=True)


def refuse_unwritable(output_dir: str | Path, folders: Sequence[str] = ()) -> None:
    """Raises ``UserError`` if the run could not write later. Call on the main process, at the start.

    Makes, renames and deletes a checkpoint folder with the longest possible name. Checks that nothing blocks
    checkpoints/, best/, ``folders`` and the files, and that the path is UTF-8: safetensors and tokenizers open no
    other.
    """
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    try:
        str(output_dir).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--output_dir {output_dir}: not UTF-8, so that models cannot be saved there; give another name"
        ) from None
    for path in [*output_dir.iterdir(), *(checkpoints.iterdir() if checkpoints.is_dir() else ())]:
        folder = path.name in ("checkpoints", "best", *folders) or re.fullmatch(r"step-\d+", path.name)
        if not (path.is_dir() if folder else path.is_file() or not path.name.endswith(FILE_ENDINGS)):
            raise UserError(
                f"--output_dir {output_dir}: {path.relative_to(output_dir)} is in the way, the run writes a "
                f"{'folder' if folder else 'file'} of that name; move it away, or give another directory"
            )
    made = not checkpoints.exists()
    trial, renamed = checkpoints / ".trial.incomplete", checkpoints / ".trial.outdated"
    try:
        trial.mkdir(parents=True, exist_ok=True)  # exists if an earlier start was killed here
        (trial / ("x" * (LONGEST_NAME - len("checkpoints/.trial.incomplete/")))).write_bytes(bytes(4096))
        replace_directory(trial, renamed)
    except OSError as error:
        reason = "its files would get names that are too long" if error.errno == errno.ENAMETOOLONG else error.strerror
        raise UserError(
            f"--output_dir {output_dir}: checkpoints/ cannot be written ({reason}); name a directory that can"
        ) from None
    finally:
        for path in (trial, renamed):
            shutil.rmtree(path, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                checkpoints.rmdir()


def refuse_changed_settings(before: dict[str, Any], now: dict[str, Any], free: set[str]) -> None:
    """Raises ``UserError`` if settings that are not in ``free`` differ from the checkpoint's, and names them all.

    A setting that the checkpoint lacks was added to the project later and is not compared.
    """
    changed = [
        f"{name} was {before[name]}, is {value}"
        for name, value in now.items()
        if name in before and name not in free and _known_by(before[name]) != _known_by(value)
    ]
    if changed:
        batch = (
            "; a global batch is --per_device_train_batch_size x processes x --gradient_accumulation_steps, "
            f"--global_batch_size {before.get('global_batch_size')} keeps it"
        )
        raise UserError(
            f"--resume_from_checkpoint: the run was started with other settings ({'; '.join(changed)}); give the "
            f"same ones{batch if 'global_batch_size' in ' '.join(changed) else ''}, or start a new run in "
            "another --output_dir"
        )


def _known_by(value: Any) -> Any:
    """A setting in comparable form: a web address without the digest of its query, which is a signature that expires.

    Expands ``~``, which older checkpoints hold as typed.
    """
    if isinstance(value, list):
        return [_known_by(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r" \([0-9a-f]{8}\)$", "", value) if "://" in value else os.path.expanduser(value)


def refuse_non_finite(
    accelerator: Accelerator,
    losses: list[Tensor],
    updates_per_step: int,
    done: int,
    last_good: Path | None,
    *,
    first_step: int = 0,
    terms: Sequence[str] = (),
    grad_norm: Tensor | float | None = None,
) -> None:
    """Raises on all processes if a loss up to step ``done``, or the last step's gradient, is not finite.

    ``losses``: one per micro-batch, () or (1 + terms,): the loss, followed by the parts named in ``terms``.
    ``first_step``: no update was made before it, so the learning rate cannot be the cause. ``grad_norm`` is ignored
    under fp16, whose scaler skips updates that overflow.
    """
    means = accelerator.reduce(torch.stack(losses), reduction="mean").view(len(losses), -1)
    bad = (~means.isfinite()).any(dim=1).nonzero().flatten().tolist()
    place = bad[0] if bad else len(losses) - 1
    steps_back, updates_ahead = divmod(len(losses) - 1 - place, updates_per_step)
    step, update = done - steps_back, updates_per_step - 1 - updates_ahead
    first = update < accelerator.gradient_accumulation_steps  # first update of the step
    rescue = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
    norm = 0.0 if grad_norm is None or accelerator.mixed_precision == "fp16" else float(grad_norm)
    loss_came_first = bad and (step < done or first)
    if not math.isfinite(norm) and not loss_came_first:
        what, first = f"the gradient is {norm}, of a finite loss", True
    elif bad:
        named = [name for name, value in zip(terms, means[place, 1:].tolist()) if not math.isfinite(value)]
        what = f"the loss is {means[place, 0].item()}"
        rescue += f"; not finite in it: {', '.join(named)}" if named else ""
    else:
        return
    look = "look at the pictures, texts and labels of this step"
    if step == first_step + 1 and first:
        advice = (
            f"no update came before it, so that --learning_rate is not the cause; {look} and at the model's weights"
        )
    else:
        advice = (
            "where it rose before (metrics.jsonl), begin from its model/ as --model_name_or_path, with the start model "
            "as --reference_model_name_or_path, a lower --learning_rate or --max_grad_norm 1, in a new --output_dir; "
            f"where it did not, {look}"
        )
    raise UserError(f"step {step}: {what}; {rescue}; {advice}")
