"""What comparisons share: runs as a user would start them, several at a time, and tables with means over seeds."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import UserError
from utils.progress import wide_console

ROOT = Path(__file__).resolve().parents[1]


def claim_directory(output_dir: Path, kept: dict[str, Any]) -> None:
    """Starts, or goes on where an interrupted comparison with the same settings ``kept`` stopped."""
    note = output_dir / "settings.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != kept:
        raise UserError(f"--output_dir {output_dir}: holds runs with other settings ({note}); give another directory")
    if output_dir.exists() and any(output_dir.iterdir()) and not note.exists():
        raise UserError(f"--output_dir {output_dir}: not empty; give another directory")
    output_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def launcher(script: str, processes: int = 1, config: str | None = None) -> list[str]:
    """The start of the command, with the project's files as seen from where the user is; on CPUs unless ``config`` is given."""
    config = config or ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    config, script = (os.path.relpath(ROOT / path) for path in (f"accelerate_configs/{config}", script))
    more = ["--num_processes", str(processes)] if processes > 2 else []
    return ["accelerate", "launch", "--quiet", "--config_file", config, *more, script]


def in_parallel(jobs: int, commands: list[list[str]]) -> None:
    """Runs the commands, ``jobs`` at a time; each is shown as a user would type it."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})

    def start(command: list[str]) -> None:
        sys.stdout.write(f"\n$ {shlex.join(command)}\n")  # in one piece: another run may be writing too
        sys.stdout.flush()
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
        status = subprocess.run(command, env=environment, check=False).returncode
        if status:
            raise UserError(
                f"{next(word for word in command if word.endswith('.py'))} ended with status {status}; its own message is above"
            )

    with ThreadPoolExecutor(jobs) as pool:
        for finished in [pool.submit(start, command) for command in commands]:
            finished.result()


def percent(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def print_table(title: str, rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    wide_console().print(table)


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"
