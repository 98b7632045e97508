"""Files that are written whole or not at all, also where several processes write the same one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from utils.errors import os_errors


@contextlib.contextmanager
def whole_file(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """Where to write what becomes ``path`` at the end of the block; after an error nothing is left of it.

    ``aside`` has a name of its own unless it is given.
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
    """Writes a file and its folder. ``UserError``, which ends in ``todo``, where that fails."""
    with os_errors(f"{path}: cannot be written", todo), whole_file(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
