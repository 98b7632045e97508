"""What a long run shows: a live bar in a terminal, one plain line per report elsewhere (a log file, a batch job)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from utils.redaction import escaped, printable

SILENCE = 5.0  # seconds
T = TypeVar("T")


class RunProgress:
    """Progress over ``total`` units. ``update`` moves the bar and its fields, ``note`` prints a line that stays.

    Without a terminal each ``update(..., report=True)`` is a plain line, and so is the first update after a silence of five
    seconds, in a long run of a twentieth of the time so far. ``enabled`` is for the main process alone; a ``transient``
    bar vanishes at the end.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, enabled: bool = True, transient: bool = False) -> None:
        self.title, self.total, self.done, self.enabled = escaped(title), total, done, enabled
        self.console = Console(file=sys.stderr, highlight=False, emoji=False)
        self.live = enabled and self.console.is_terminal
        self.first = done
        self.started = self.spoken = time.monotonic()
        self.fields: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            _Fields(),
            console=self.console,
            transient=transient,
        )

    def __enter__(self) -> RunProgress:
        if self.live:
            self.progress.start()
            self.task = self.progress.add_task(self.title, total=self.total, completed=self.done, fields=self.fields)
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.progress.stop()

    def update(self, done: int, fields: dict[str, Any] | None = None, *, report: bool = False) -> None:
        """``fields`` are values by name, shown in this order; ``report`` prints a line where there is no live bar."""
        self.done, self.fields = done, self.fields if fields is None else fields
        if self.live:
            self.progress.update(self.task, completed=done, fields=self.fields)
        elif self.enabled and (report or self._silent_for_long()):
            left = f"left {_duration(self._seconds_left())}" if self.first < done < self.total else ""
            line = "  ".join(filter(None, [f"{self.title} {done}/{self.total}", _join(fields or {}), left]))
            print(printable(line), file=sys.stderr, flush=True)
            self.spoken = time.monotonic()

    def within(self, what: str, batches: Iterable[T], total: int) -> Iterator[T]:
        """Passes batches on, and shows how many were worked on, while the units of the run stand still."""
        fields = self.fields
        for number, batch in enumerate(batches, 1):
            yield batch
            self.update(self.done, fields | {what: f"{number}/{total}"})
        self.update(self.done, fields)

    def note(self, line: str) -> None:
        """A line that stays on the screen and in the log."""
        if self.enabled:
            line = printable(line)
            if self.live:
                self.console.print(line, markup=False)
            else:
                print(line, file=sys.stderr, flush=True)
                self.spoken = time.monotonic()

    def _silent_for_long(self) -> bool:
        now = time.monotonic()
        return now - self.spoken >= max(SILENCE, (now - self.started) / 20)

    def _seconds_left(self) -> float:
        return (time.monotonic() - self.started) / (self.done - self.first) * (self.total - self.done)


class _TableConsole(Console):
    """Names are texts, also "runs/[/b]", ":heart:" and what would steer a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)


def wide_console() -> Console:
    """Standard output for tables: as wide as the terminal, and wide enough where there is none."""
    console = _TableConsole(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    return console


class _Fields(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_join(task.fields.get("fields", {})))


def _join(fields: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in fields.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
