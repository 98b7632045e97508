"""The processes that a launcher started: how many they are, and whether they meet."""

from __future__ import annotations

import logging
import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch

from utils.errors import OwnError, UserError

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=10)  # for the other processes to start
A_WHILE = 60.0  # seconds, then a line says what is waited for

_MEETING: list[Any] = []  # the store, which rank 0 serves to the others as long as the process lives


def launched_processes() -> int:
    """Processes of the run as the launcher says it, before they are a group.

    Raises ``UserError`` where its variables are not those of one process of a group.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given or given == {"WORLD_SIZE": "1"}:
        _refuse_lone_processes()
        return 1
    if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise OwnError(
            f"{said} in the environment without {', '.join(missing)}: a part of what a launcher sets; start with "
            f"{_launchers()}, or unset {' and '.join(given)} for a run of one process"
        )
    size = _number("WORLD_SIZE", 1, 2**31)
    _number("RANK", 0, size - 1)
    _number("MASTER_PORT", 1, 2**16 - 1)
    local_size = _number("LOCAL_WORLD_SIZE", 1, 2**31) if "LOCAL_WORLD_SIZE" in os.environ else size
    _number("LOCAL_RANK", 0, local_size - 1)
    return size


def _number(name: str, low: int, high: int) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise OwnError(f"{name}={text} in the environment: not a whole number; start with {_launchers()}, which set it")
    if not low <= int(text) <= high:
        expected = f"expected a number from {low} to {high}"
        raise OwnError(f"{name}={text} in the environment: {expected}; see how it was started")
    return int(text)


def _refuse_lone_processes() -> None:
    """UserError where something else than accelerate launch or torchrun has started several processes, or tried to."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("1", "0", ""):
            said = f"{name}={os.environ[name]} in the environment"
            raise UserError(f"{said}: started by MPI, which is not read here; start with {_launchers(slurm=True)}")
    # accelerate launch sets both for --num_processes 2 and more, also where it then starts a single process.
    if os.environ.get("MASTER_ADDR") == "127.0.0.1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and has started one (distributed_type: MULTI_CPU, or "
            "--cpu); use accelerate_configs/cpu_2proc.yaml with --num_processes"
        )


def _launchers(slurm: bool = False) -> str:
    under_slurm = ", under SLURM with srun python slurm/rank.py" if slurm or "SLURM_JOB_ID" in os.environ else ""
    return f"accelerate launch or torchrun{under_slurm}"


def meet(patience: timedelta = PATIENCE) -> None:
    """Waits until all processes of the launcher have started; ``UserError`` where they do not within ``patience``.

    torch alone would wait as long as for a collective, in an evaluation for days, also for a host without an address.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    place = f"MASTER_ADDR={host} MASTER_PORT={port}"
    told = threading.Timer(A_WHILE, logger.warning, [f"waiting for {size} processes at {place}, at most {patience}"])
    told.daemon = True
    told.start()
    try:
        socket.getaddrinfo(host, port)
        store = next(torch.distributed.rendezvous("env://", timeout=patience))[0]
        _MEETING.append(store)
        store = torch.distributed.PrefixStore("meeting", store)
        store.set(str(rank), "here")
        try:
            store.wait([str(number) for number in range(size)], patience)
        except torch.distributed.DistStoreError:
            missing = [str(number) for number in range(size) if not store.check([str(number)])]
            raise UserError(
                f"{size} processes were to meet at {place}, but rank {', '.join(missing[:8])} has not come within "
                f"{patience}; see what became of it, or correct WORLD_SIZE (num_processes, num_machines)"
            ) from None
    except (OSError, RuntimeError) as error:  # no address; DistNetworkError, DistStoreError
        said = " ".join(str(error).split())
        if isinstance(error, OSError):
            reason = f"the host has no address here ({error.strerror})"
        elif "EADDRINUSE" in said or "address already in use" in said.lower():
            reason = "the port is in use; choose another MASTER_PORT (--main_process_port)"
        else:
            reason = f"rank {rank} does not reach rank 0 within {patience} ({said[:160]})"
        raise OwnError(f"{place}: {reason}; address and port are those of rank 0, the same for all processes") from None
    finally:
        told.cancel()
