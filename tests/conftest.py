"""Shared pieces of the suite: a small CLIP with random weights, the digits as shards, and a way to start a script."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.published_layouts import Published, save_layouts  # noqa: E402
from tests.small_models import save_small_clip  # noqa: E402
from tests.warm_python import script_environment, warm_python  # noqa: E402


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory) -> Path:
    """A CLIP of 2 layers for 32 px with random weights and a tokenizer that encodes any text."""
    directory = tmp_path_factory.mktemp("models") / "clip"
    save_small_clip(directory)
    return directory


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> dict[str, Published]:
    """The nine layouts in which people publish CLIPs, by name. ``clip_processor`` lies beside their folders."""
    return save_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits at 32 px in the data set layout: 1,437 training and 360 test images."""
    directory = tmp_path_factory.mktemp("data") / "digits"
    run_script("examples/make_digit_shards.py", "--output_dir", directory)
    return directory


@pytest.fixture(scope="session")
def attribute_digits(tmp_path_factory) -> Path:
    """Digits on red or blue ground at 32 px: labelled with attributes, as preference pairs, as captions."""
    directory = tmp_path_factory.mktemp("data") / "attribute-digits"
    run_script("examples/make_attribute_shards.py", "--output_dir", directory, "--image_size", 32)
    return directory


def run_script(
    script: str, *arguments: object, status: int = 0, launcher: tuple[str, ...] = (), timeout: float = 600, **env: str
) -> str:
    """Runs a script of the project in a process of its own and returns stdout and stderr together."""
    command = [*(launcher or (warm_python(),)), str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=script_environment() | env,
    )
    output = result.stdout + result.stderr
    assert result.returncode == status, f"status {result.returncode}, expected {status}:\n{output[-6000:]}"
    return output


def flags(settings: dict[str, object]) -> list[str]:
    """{"eps": [1, 4], "seed": 0} -> ["--eps", "1", "4", "--seed", "0"]."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def later_wins(*commands: list) -> list[str]:
    """Flags of several layers as one command: a layer replaces the flags that it names, with all their values."""
    merged: dict[str, list[str]] = {}
    for command in commands:
        own: dict[str, list[str]] = {}
        for word in map(str, command):
            if word.startswith("--"):
                name = word.partition("=")[0]
                own.setdefault(name, []).append(word)
            else:
                own[name].append(word)
        merged |= own
    return [word for words in merged.values() for word in words]


def two_processes() -> tuple[str, ...]:
    """torchrun with two processes on this machine."""
    return (warm_python(), "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")


def accelerate_launch(config: Path) -> tuple[str, ...]:
    """accelerate launch with a config file."""
    command = (warm_python(), "-m", "accelerate.commands.accelerate_cli", "launch")
    return (*command, "--main_process_port", str(free_port()), "--config_file", str(config))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
