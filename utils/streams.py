"""Standard streams that never end a run: they may be closed, full, hung up or without a reader, in any encoding."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys

PIECE = 4096  # bytes; a pipe that is ready takes this many at once
READER_PATIENCE = 60.0  # seconds to wait for a reader that has stopped reading (a pager, Ctrl-S)


def outlive_streams() -> None:
    """After this call printing never ends the process, whether by ``| head``, ``>&-``, a full disk or a lost terminal.

    Output that cannot be written is dropped; if stdout is full, a line on stderr says so. Characters that the stream's
    encoding lacks, and bytes of a path that are not UTF-8, become escapes. Streams replaced by a test stay.
    """
    # A new file gets the lowest free number. Fill closed standard streams with /dev/null before the run opens files.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115
        if not isinstance(stream, io.TextIOWrapper) or _number_of(stream) != number:
            continue
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        buffer = io.BufferedWriter(_Lasting(number))  # type: ignore[type-var]
        lines = stream.line_buffering or stream.write_through
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=lines))


def _number_of(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


class _Lasting(io.FileIO):
    """Writes to an open file by its number and drops the bytes that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self.number, self.failed, self.patience = number, False, READER_PATIENCE

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            ready = select.poll()
            ready.register(self.number, select.POLLOUT)
            if not ready.poll(1000 * self.patience):
                self.patience = 0.0  # from now on do not wait: drop the text if the reader is not ready
                return len(data)
            self.patience = READER_PATIENCE
            written = super().write(memoryview(data)[:PIECE])
            return len(data) if written is None else written
        except OSError as error:
            if self.number == 1 and not self.failed and error.errno != errno.EPIPE:  # EPIPE: "| head" is done
                self.failed = True
                lost = f"stdout cannot be written ({error.strerror}): what is printed is lost, files are not"
                print(lost, file=sys.stderr)
            return len(data)
