"""The README.md beside a trained model: method, settings, data, metrics, the exact commands, launches, versions."""

from __future__ import annotations

import contextlib
import itertools
import logging
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from utils.redaction import printable

logger = logging.getLogger(__name__)

Launch = dict[str, Any]  # first_step, command, and launch: its settings (utils/processes/launch.py)
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "webdataset", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, without packages that are not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_card(directory: Path, make: Callable[[], str]) -> None:
    """Writes the text of ``make()`` as README.md. A failure is only a warning: the model is already saved."""
    path = directory / "README.md"
    try:
        path.write_text(make(), encoding="utf-8")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:160]
        logger.warning("%s cannot be written (%s); the model is saved without it", path, printable(reason))
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def model_card(
    *,
    method: str,
    model_class: str,
    about: str,
    tags: list[str],
    base_model: str,
    settings: dict[str, Any],
    launches: Sequence[Launch],
    evaluations: list[dict[str, Any]],
    notes: list[str],
    with_text: bool = True,
) -> str:
    """Markdown with the hub's header. ``evaluations``: metrics rows with eval_ keys. ``model_class`` loads it.

    ``launches``: the first one and those that went on from its checkpoints.
    """
    processor_class = "AutoProcessor" if with_text else "AutoImageProcessor"
    of_hub = re.fullmatch(r"(?:hf-hub:)?([\w.-]+(?:/[\w.-]+)?)(?:@.*)?", base_model)  # maybe NAME@BASE
    lines = ["---", "library_name: transformers"]
    lines += [f"base_model: {of_hub[1]}"] if of_hub and not Path(of_hub[1]).exists() else []
    lines += [f"pipeline_tag: {'zero-shot-image-classification' if with_text else 'image-feature-extraction'}"]
    lines += [f"tags: [{', '.join(tags)}]", "---", "", f"# {method} from {base_model}", ""]
    lines += [f"Load it with `{model_class}.from_pretrained` and `{processor_class}.from_pretrained`. {about}", ""]
    if evaluations:
        keys = ["step", *(key for key in evaluations[-1] if key.startswith("eval_"))]
        found = [[row.get(key, "") for key in keys] for row in evaluations]
        rows = [[f"{value:.4f}" if isinstance(value, float) else value for value in row] for row in found]
        lines += ["## Evaluations during training", "", *_table(keys, rows)]
    lines += [*notes, ""] if notes else []
    lines += launch_lines(launches)
    lines += ["## Settings", "", *_table(("setting", "value"), settings.items())]
    lines += ["## Versions", "", *_table(("package", "version"), versions().items())]
    return "\n".join(map(printable, lines))


def launch_lines(launches: Sequence[Launch]) -> list[str]:
    """The sections of a card with the commands and what came of them. Equal launches in a row are shown once."""
    groups = itertools.groupby(launches, key=lambda launch: (launch["command"], launch["launch"]))
    shown = [next(of_group) for _, of_group in groups]
    begins = [f"from step {launch['first_step']}" for launch in shown]
    commands = [launch["command"] for launch in shown]
    if len(shown) > 1:
        commands = [line for begin, command in zip(begins, commands) for line in (f"# {begin}", command)]
    names = dict.fromkeys(name for launch in shown for name in launch["launch"])
    rows = [[name, *(launch["launch"].get(name, "") for launch in shown)] for name in names]
    headings = ("launch", *(begins if len(shown) > 1 else ["value"]))
    return ["## Command", "", "```", *commands, "```", "", "## Launch", "", *_table(headings, rows)]


def _table(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table in Markdown, and an empty one."""
    cells = ([str(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in rows)
    return [*(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *cells)), ""]
