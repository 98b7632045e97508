"""Stop signals: SIGTERM, SIGUSR1 and SIGHUP end a run after the current step, and nothing is lost.

If that step waits for data that does not arrive, the run goes back to the last complete step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator

from utils.processes.tracker import end_training

REQUEUE = 85  # exit status of a run that a signal stopped and that can go on: start it with the same command
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # sent by schedulers; SIGHUP, from a closed terminal, means the same
GRACE = 5.0  # seconds that a batch may still take to arrive, or a model to load, after a stop signal
GIVEN_UP = 1000  # added to the signal's number if a process has no batch to go on with

T = TypeVar("T")


class WaitEnded(BaseException):
    """Raised by a signal handler to end a wait for data. Not an ``Exception``, so that no other code catches it."""


class GivenUp(WaitEnded):
    """The run was told to stop, and the data that it waits for does not arrive."""


class StopRequest:
    """Catches stop signals until ``close``, and lets all processes agree on whether any of them got one.

    A scheduler may signal one process, all of them, or those of one node. One is enough. While ``loading`` there is
    nothing to save, so a process that is still loading a few seconds after the signal exits at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: signal.Signals | None = None  # the first signal that this process got
        self.loading = True  # until just before the first step; after that the run saves its state before it ends
        self._waiting = self._gave_up = False
        self._answer: tuple[torch.Tensor, torch.cuda.Event | None] | None = None  # only with several processes
        self._over = threading.Event()
        self._reminder: threading.Thread | None = None
        hung_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # ignored under nohup
        self._before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in (*SIGNALS, *hung_up)}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            # Loading processes may wait for each other where no handler runs. After a longer pause most exit together.
            pause = 4 * GRACE if self.loading and self.accelerator.num_processes > 1 else GRACE
            self._reminder = threading.Thread(target=_remind, args=(number, self._over, pause), daemon=True)
            self._reminder.start()
        elif self._waiting:
            raise GivenUp
        elif self.loading:
            line = f"{self.signal.name} before the first step: nothing new to save (exit status {REQUEUE})\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())  # a handler may have interrupted a print
            self._over.set()
            raise SystemExit(REQUEUE)

    def unless_told(self, fetch: Callable[[], T]) -> T | None:
        """The result of ``fetch()``, or None if this process was told to stop and ``fetch`` takes longer than GRACE."""
        try:
            try:
                self._waiting = True
                return fetch()
            finally:
                self._waiting = False
        except GivenUp:
            self._gave_up = True
            return None

    def patiently(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches; raises GivenUp if this process was told to stop and the next batch does not arrive."""
        iterator = iter(batches)
        while (batch := self.unless_told(lambda: next(iterator, None))) is not None:
            yield batch
        if self._gave_up:
            raise GivenUp

    def ask(self) -> None:
        """Starts a collective that asks all processes, and does not wait for it: call it while the device has work."""
        if self.accelerator.num_processes > 1:
            number = torch.full((1,), self._number(), device=self.accelerator.device)  # made there: nothing waits
            answer, arrived = self.accelerator.gather(number), None
            if answer.is_cuda:
                answer, arrived = answer.to("cpu", non_blocking=True), torch.cuda.Event()
                arrived.record()
            self._answer = answer, arrived

    def _number(self) -> int:
        return 0 if self.signal is None else int(self.signal) + (GIVEN_UP if self._gave_up else 0)

    def _agreed_number(self) -> int:
        """The highest number of any process at the last ``ask``. Synchronises with the device up to that call."""
        if self._answer is None:
            return self._number()
        answer, arrived = self._answer
        if arrived is not None:
            arrived.synchronize()
        return int(answer.max())

    def gave_up(self) -> bool:
        """Whether at the last ``ask`` any process had given up waiting for a batch. The same on all processes."""
        return self._agreed_number() >= GIVEN_UP

    def agreed(self) -> signal.Signals | None:
        """The signal that any process had got by the last ``ask``, or None. The same on all processes."""
        number = self._agreed_number() % GIVEN_UP
        return signal.Signals(number) if number else None

    def leave(self, told: signal.Signals, state: str, say: Callable[[str], None]) -> NoReturn:
        """Exits with the status REQUEUE. Call it on all processes; ``state`` says in words what was saved."""
        say(f"{told.name} {state}; --resume_from_checkpoint latest goes on (exit status {REQUEUE})")
        # A launcher signals the slower processes when the first one has exited. Ignored, it keeps their exit status.
        self._before = dict.fromkeys(self._before, signal.SIG_IGN)
        self.close()
        end_training(self.accelerator)
        sys.exit(REQUEUE)

    def close(self) -> None:
        """Restores the signal handlers that were there before the run."""
        self._over.set()
        if self._reminder is not None:
            self._reminder.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _remind(number: int, over: threading.Event, pause: float) -> None:
    """Repeats the signal until ``over`` is set, because only a handler can interrupt a wait of the main thread.

    It holds no reference to the run: a thread that frees the last tensor during shutdown would abort the process.
    """
    while not over.wait(pause):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
