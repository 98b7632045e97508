"""The README.md beside a trained model: method, settings, data, metrics, the exact command, versions."""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from utils.redaction import printable, shown_setting

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "webdataset", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def command_line() -> str:
    """The command of this process, as one would type it; without secrets."""
    words = (word.partition("=") if word.startswith("--") else ("", "", word) for word in sys.argv)
    return shlex.join(["python", *(flag + equals + shown_setting(value) for flag, equals, value in words)])


def write_card(directory: Path, make: Callable[[], str]) -> None:
    """Writes the text of ``make()`` as README.md. It comes after the model: a failure is a warning, the model stays."""
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
    evaluations: list[dict[str, Any]],
    notes: list[str],
    with_text: bool = True,
) -> str:
    """Markdown with the hub's metadata header. ``evaluations`` are metrics rows that hold eval_ keys.

    ``model_class``: the class of transformers that loads the model. ``with_text``: whether it has a text tower.
    """
    processor_class = "AutoProcessor" if with_text else "AutoImageProcessor"
    is_of_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) and not Path(base_model).exists()
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base_model}"] if is_of_hub else []),
        f"pipeline_tag: {'zero-shot-image-classification' if with_text else 'image-feature-extraction'}",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {method} from {base_model}",
        "",
        f"Load it with `{model_class}.from_pretrained` and `{processor_class}.from_pretrained`. {about}",
        "",
    ]
    if evaluations:
        keys = [key for key in evaluations[-1] if key.startswith("eval_")]
        lines += ["## Evaluations during training", "", "| step | " + " | ".join(keys) + " |"]
        lines += ["|---" * (len(keys) + 1) + "|"]
        for row in evaluations:
            values = [f"{row[key]:.4f}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in keys]
            lines.append(f"| {row['step']} | " + " | ".join(values) + " |")
        lines.append("")
    lines += [*notes, ""] if notes else []
    lines += ["## Command", "", "```", command_line(), "```", "", "## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in settings.items()]
    lines += ["", "## Versions", "", "| package | version |", "|---|---|"]
    lines += [f"| {name} | {number} |" for name, number in versions().items()]
    return "\n".join(map(printable, lines)) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
