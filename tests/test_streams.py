"""utils/streams.py: whatever becomes of stdout and stderr, a run ends as it would have, with everything saved."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, two_processes

SPEAKS = """
import logging, os, sys
from utils.cli import run
def main():
    print("out" * 5000)
    print("\\N{SNOWMAN} \\udcff", file=sys.stderr)
    logging.warning("a warning")
    with open(sys.argv[1], "x") as file:
        assert file.fileno() > 2  # else what is printed would go into it
        file.write("saved")
    print("end", flush=True)
run(main)
"""
LOST = [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "| true", "2>&1 | head -c 1"]


def test_what_is_printed_ends_no_process(tmp_path: Path) -> None:
    """sos#4474. All ways side by side, for a process takes its time to start."""
    running = []
    for number, redirection in enumerate(LOST):
        saved = tmp_path / str(number)
        command = f'set -o pipefail; "$0" -c "$1" {saved} {redirection}'
        running.append((redirection, saved, shell(command, SPEAKS, PYTHONIOENCODING="ascii")))
    for redirection, saved, process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, (redirection, errors)
        assert saved.read_text() == "saved", redirection
        if redirection == ">/dev/full":
            assert "stdout cannot be written (No space left on device)" in errors
            assert "\\u2603 \\udcff" in errors


def test_a_stream_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    program = """
import os, sys
import utils.streams
reader, writer = os.pipe()
os.dup2(writer, 1)
utils.streams.READER_PATIENCE = 0.2
utils.streams.outlive_streams()
print("x" * 1_000_000, flush=True)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def shell(command: str, program: str, **env: str) -> subprocess.Popen:
    """The command with this Python as $0 and the program as $1."""
    return subprocess.Popen(
        ["bash", "-c", command, sys.executable, program],
        cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip


TRAIN = ("--train_shards", "--output_dir", "--max_steps", "--num_workers", "--logging_steps", "--report_to")


@pytest.mark.parametrize("launcher", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_outlives_its_terminal(small_clip: Path, digits: Path, tmp_path: Path, launcher: bool) -> None:
    """sos#4474: without any stream all is saved, metrics.jsonl whole, status 0; under a launcher too."""
    values = (digits / "train/000000.tar", tmp_path / "run", 2, 1, 1, "tensorboard")
    words = [str(word) for pair in zip(TRAIN, values) for word in pair]
    words += ["--model_name_or_path", str(small_clip), "--per_device_train_batch_size", "4"]
    words += ["--attack_steps", "1", "--primal_steps", "1"]
    start = " ".join(two_processes()[1:]) if launcher else ""
    process = shell(f'"$0" {start} train_lore.py {shlex.join(words)} <&- >&- 2>&-', "")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (tmp_path / "run/model.safetensors").is_file()
    assert (tmp_path / "run/README.md").is_file()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
