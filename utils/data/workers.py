"""Data workers: how they start, how long the run waits for them, and how they end."""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from utils.data.order import EvalBatchSampler, TrainBatchSampler
from utils.data.sources import ShardError
from utils.errors import UserError
from utils.processes.interruption import WaitEnded

logger = logging.getLogger(__name__)

SLOW_BATCH = 60.0  # seconds of waiting for a batch, after which a warning says so
LONGEST_WAIT = 3600.0  # seconds, after which waiting ends with an error; a large shard over a slow line takes minutes
LONGEST_SOCKET = 107  # bytes in the path of an AF_UNIX socket

_ABANDONED: list[Any] = []  # loaders kept alive, because their destructor would wait for stuck workers


class _Late(WaitEnded):
    """The wait has lasted LONGEST_WAIT."""


class PatientLoader(DataLoader):
    """The loader of a ``ShardDataset``. Its workers ignore stop signals, and every wait for a batch has a time limit.

    persistent: keep the workers for the next pass.
    """

    dataset: Any
    batch_sampler: Any

    def __init__(
        self,
        dataset: Any,
        sampler: TrainBatchSampler | EvalBatchSampler,
        num_workers: int,
        pin_memory: bool,
        persistent: bool = False,
    ) -> None:
        if num_workers:
            _short_socket_folder()
            _kill_workers_at_exit()
        super().__init__(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=dataset.collate_fn,
            persistent_workers=persistent and num_workers > 0,
            worker_init_fn=_calm_worker,
            # The loader draws a seed for its workers, which do not use it. Draw it here, not from the run's own state.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._waited_for(super().__iter__())  # the workers start now, not at the first batch

    def _waited_for(self, batches: Any) -> Iterator[Any]:
        for place in itertools.count():
            with waited_for(functools.partial(self._late, batches, place), batches):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _late(self, batches: Any, place: int) -> str:
        """The error text for the batch at ``place``, counted from the start of ``batches``, if it does not arrive."""
        workers = getattr(batches, "_workers", [])
        number = place % max(1, len(workers))
        who = f"data worker {number} (process {workers[number].pid})" if workers else "reading"
        shards = self.dataset.shards_of(next(itertools.islice(self.batch_sampler, place, None), []))
        names = ", ".join(shards[:3]) + (f" and {len(shards) - 3} more" if len(shards) > 3 else "")
        return (
            f"{who} has delivered nothing for {LONGEST_WAIT:.0f} s; its batch is read from {names or 'the cache'}; "
            "check that the disk, network or server of these files answers, or bring them near with --prefetch; "
            "then go on with --resume_from_checkpoint latest"
        )


@contextmanager
def waited_for(late: Callable[[], str], held: Any = None) -> Iterator[None]:
    """Limits a wait for data: a warning after SLOW_BATCH seconds, a ShardError with ``late()`` after LONGEST_WAIT.

    Only a wait of the main thread can be ended. ``held``, a loader, is then kept for ever: its destructor would wait.
    """
    text = "waiting for data since %.0f s: the disk, the network or the decoding is slow; the run goes on when it comes"
    timer = threading.Timer(SLOW_BATCH, logger.warning, (text, SLOW_BATCH))
    timer.daemon = True
    in_main_thread = threading.current_thread() is threading.main_thread()

    def end(number: int, frame: FrameType | None) -> None:
        raise _Late

    try:
        timer.start()
        if in_main_thread:
            before = signal.signal(signal.SIGALRM, end)
            signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT, 5.0)
        try:
            yield
        finally:
            timer.cancel()
            if in_main_thread:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
    except WaitEnded as ended:
        _ABANDONED.append(held)
        if not isinstance(ended, _Late):
            raise
        raise ShardError(late()) from None


def worker_died(error: Exception) -> bool:
    """Whether a worker process is gone. If only its work failed, torch says "Caught ... in DataLoader worker"."""
    if "Caught " in str(error):
        return False
    # The other errors come from batches already sent: they are handles that only the living worker could resolve.
    gone = any(sign in str(error) for sign in ("Pin memory thread exited", "DataLoader worker"))
    return gone or isinstance(error, ConnectionError | EOFError | FileNotFoundError)


def _short_socket_folder() -> None:
    """Makes a folder with a short path for the workers' sockets: with a long one a send fails unseen, the run hangs."""
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is not None:
        return
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) + len("/pymp-xxxxxxxx/listener-xxxxxxxx") > LONGEST_SOCKET:
            continue
        with suppress(OSError):
            made = tempfile.mkdtemp(prefix="pymp-", dir=folder)
            multiprocessing.util.Finalize(None, shutil.rmtree, [made], {"ignore_errors": True}, exitpriority=-100)
            config["tempdir"] = made
            return
    raise UserError(
        f"TMPDIR {tempfile.gettempdir()}: data workers need a folder for sockets that can be written, with a path of "
        f"at most {LONGEST_SOCKET - 32} bytes; set TMPDIR to one, or --num_workers 0"
    )


@functools.cache
def _kill_workers_at_exit() -> None:
    """At exit multiprocessing sends its children SIGTERM and waits. Workers ignore SIGTERM, so kill them before."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill)


def _calm_worker(worker: int) -> None:
    """Ignores stop signals in a worker: only the training process handles them, even if a scheduler signals all."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # a stuck worker does not notice that the training process has died
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
