"""Progress of a long run: a live bar in a terminal, else one plain line per report (in a log file or a batch job)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from utils.redaction import escaped, printable

SILENCE = 5.0  # seconds
T = TypeVar("T")


class RunProgress:
    """Progress over ``total`` units, of which ``done`` are done. A ``transient`` bar disappears at the end.

    Without a terminal ``update(..., report=True)`` prints a plain line. So does the first update after a silence of
    five seconds, or of a twentieth of the time so far if that is longer. Only the main process sets ``enabled``.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, enabled: bool = True, transient: bool = False) -> None:
        self.title, self.total, self.first, self.done, self.enabled = escaped(title), total, done, done, enabled
        console = Console(file=sys.stderr, highlight=False, emoji=False)
        self.live = enabled and console.is_terminal
        self.started = self.spoken = time.monotonic()
        self.fields: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}", markup=False, table_column=Column()),
            console=console,
            transient=transient,
        )
        self.task = self.progress.add_task(self.title, total=total, completed=done, shown="")

    def __enter__(self) -> RunProgress:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.progress.stop()

    def update(self, done: int, fields: dict[str, Any] | None = None, *, report: bool = False) -> None:
        """Shows ``fields``, values by name, in this order; ``report`` prints a line if there is no live bar."""
        self.done, self.fields = done, self.fields if fields is None else fields
        if self.live:
            self.progress.update(self.task, completed=done, shown=_join(self.fields))
            return
        now = time.monotonic()
        if report or now - self.spoken >= max(SILENCE, (now - self.started) / 20):
            parts = [f"{self.title} {done}/{self.total}", _join(fields or {})]
            if self.first < done < self.total:
                seconds = int((now - self.started) / (done - self.first) * (self.total - done))
                parts.append(f"left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}")
            self.note("  ".join(filter(None, parts)))

    def within(self, what: str, batches: Iterable[T], total: int) -> Iterator[T]:
        """Yields the batches and shows how many are done; the count of the run itself does not change."""
        fields = self.fields
        for number, batch in enumerate(batches, 1):
            yield batch
            self.update(self.done, fields | {what: f"{number}/{total}"})
        self.update(self.done, fields)

    def note(self, line: str) -> None:
        """Prints a line that stays on the screen and in the log."""
        if self.live:
            self.progress.console.print(printable(line), markup=False)
        elif self.enabled:
            print(printable(line), file=sys.stderr, flush=True)
            self.spoken = time.monotonic()


class _TableConsole(Console):
    """Prints names such as "runs/[/b]" and ":heart:" literally, and escapes control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)


def wide_console() -> Console:
    """Standard output for tables: as wide as the terminal, or 160 columns without one."""
    console = _TableConsole(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    return console


def _join(fields: dict[str, Any]) -> str:
    values = (f"{value:.4g}" if isinstance(value, float) else value for value in fields.values())
    return "  ".join(f"{name} {value}" for name, value in zip(fields, values))
