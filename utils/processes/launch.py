"""How a run was launched: the command that a user typed, and what came of it: processes, precision, sharding, device.

A launcher hands its script nothing but environment variables. Its own command line is that of a parent process.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config import default_config_file
from accelerate.utils import DistributedType

from utils.processes.distributed import gather_objects, mixed_precision
from utils.redaction import shown_setting

# The first words of a command that starts a script, without folders. rank.py is this project's own, for SLURM.
ACCELERATE = (
    ("accelerate", "launch"),
    ("accelerate-launch",),
    ("python", "-m", "accelerate.commands.launch"),
    ("python", "-m", "accelerate.commands.accelerate_cli", "launch"),
)
LAUNCHERS = (
    *ACCELERATE,
    ("torchrun",),
    ("python", "-m", "torch.distributed.run"),
    ("python", "-m", "torch.distributed.launch"),
    ("deepspeed",),
    ("python", "rank.py"),
)


def launch_settings(accelerator: Accelerator) -> dict[str, Any]:
    """What the launcher, its config and the environment came to. Call it on all processes: they gather their devices.

    ``zero_stage`` and ``offload`` are there under DeepSpeed, ``config_file`` if the launcher read one.
    """
    own = accelerator.is_local_main_process, device_name(accelerator.device)
    first_of_machine, devices = zip(*gather_objects(accelerator, own))
    settings = {
        "num_processes": accelerator.num_processes,
        "num_machines": sum(first_of_machine),
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": mixed_precision(accelerator),
        "device": "; ".join(dict.fromkeys(devices)),
    }
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        parts = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        offloaded = [part for part, key in parts.items() if _device(zero.get(key)) != "none"]
        settings |= {"zero_stage": int(zero["stage"]), "offload": ", ".join(offloaded) or "none"}
    if config_file := _config_file(_launcher()):
        settings["config_file"] = shown_setting(config_file)
    return settings


def launched_command() -> str:
    """The command that launched this process, as a user would type it in a shell, without secrets.

    Of several launchers, one per machine, it is the one on this machine.
    """
    words = (
        word.partition("=") if word.startswith("--") else ("", "", word)
        for word in _launcher() or ["python", *sys.argv]
    )
    return shlex.join([flag + equals + shown_setting(value) for flag, equals, value in words])


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def as_typed(words: Sequence[str]) -> list[str]:
    """The command line of a process as a user types it: a program without its folder, Python without options.

    A program of Python is shown by its name: the system starts `accelerate` as `/opt/bin/python /opt/bin/accelerate`.
    """
    if not words:  # of a process of the system
        return []
    program, rest = Path(words[0]).name, list(words[1:])
    if not re.fullmatch(r"python[\d.]*", program):
        return [program, *rest]
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
        del rest[: 2 if rest[0] in ("-X", "-W") else 1]
    if rest and not rest[0].startswith("-") and not rest[0].endswith(".py"):
        return [Path(rest[0]).name, *rest[1:]]
    return ["python", *rest]


def _launcher() -> list[str] | None:
    """The words of the launcher that started this script with these arguments, or None if no parent is one.

    Of nested launchers it is the outermost, which the user typed. A launcher of another script, which started this one
    by itself, is none. rank.py becomes the script, so that this process is looked at too.
    """
    found = None
    with contextlib.suppress(psutil.Error):
        for process in (own := psutil.Process(), *own.parents()):
            with contextlib.suppress(psutil.Error):  # it has ended, or its words are hidden
                words = as_typed(process.cmdline())
                if _starts(words, LAUNCHERS) and _ends_in_own(words):
                    found = words
    return found


def _starts(words: Sequence[str], commands: Sequence[Sequence[str]]) -> bool:
    return any([Path(word).name for word in words[: len(command)]] == list(command) for command in commands)


def _ends_in_own(words: Sequence[str]) -> bool:
    """Whether a command ends in this script and its arguments; a launcher may start it by path or as a module."""
    script, *arguments = words[-len(sys.argv) :]
    return Path(script).stem == Path(sys.argv[0]).stem and arguments == sys.argv[1:]


def _config_file(words: list[str] | None) -> str | None:
    """The file that a launcher read its settings from, by `--config_file` or accelerate's default, or None."""
    if words is None:
        return None
    own, named = words[: -len(sys.argv)], None
    for word, following in zip(own, [*own[1:], None]):
        name, equals, value = word.partition("=")
        if name in ("--config_file", "--config-file"):
            named = value if equals else following
    if named is None and _starts(words, ACCELERATE) and "--cpu" not in own and os.path.isfile(default_config_file):
        return re.sub(f"^{re.escape(os.path.expanduser('~'))}/", "~/", default_config_file)
    return named


def _device(section: Any) -> str:
    """Where a section of DeepSpeed's config puts something: cpu or none."""
    return str((section or {}).get("device", "none")).lower()
