"""Files that are written completely or not at all, even if several processes write the same one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from utils.errors import os_errors


@contextlib.contextmanager
def whole_file(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """Gives a temporary path to write to. It is renamed to ``path`` at the end of the block, or deleted after an error.

    ``aside`` is that temporary path; by default it gets a random name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside or path.with_name(f".{secrets.token_hex(12)}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes, todo: str = "mend that and start again") -> None:
    """Writes a file and makes its folder. If that fails, raises a ``UserError`` that ends with ``todo``."""
    with os_errors(f"{path}: cannot be written", todo), whole_file(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
