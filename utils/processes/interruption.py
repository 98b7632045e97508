"""Being told to stop: SIGTERM, SIGUSR1 and SIGHUP end a run after the step that is under way, with nothing lost.

Where that step waits for data that does not come, the run goes back to the last whole step.
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

REQUEUE = 85  # exit status of a run that was told to stop and can go on: start it again with the same command
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of schedulers; SIGHUP, of a terminal that is closed, means the same
GRACE = 5.0  # seconds that data may still take to come, or a model to load, once the run was told to stop
GIVEN_UP = 1000  # added to the signal's number where a process has no batch to go on with

T = TypeVar("T")


class WaitEnded(BaseException):
    """Raised by the handler of a signal, out of a wait for data. No Exception: nothing on its way may catch it."""


class GivenUp(WaitEnded):
    """The run was told to stop, and the data that it waits for does not come."""


class StopRequest:
    """Whether one of the signals has reached any process of the run, from now on until ``close``.

    Schedulers differ in whom they signal: one process, all of them, or those of one node. A single one is enough. While
    ``loading`` there is nothing to save: a process that does not come so far within seconds just ends.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: signal.Signals | None = None  # that reached this process
        self.loading = True  # until the first step is about to begin: from then on the end is orderly
        self._waiting = self._gave_up = False
        self._answer: tuple[torch.Tensor, torch.cuda.Event | None] | None = None  # of several processes
        self._over = threading.Event()
        self._reminder: threading.Thread | None = None
        hung_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # ignored under nohup
        self._before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in (*SIGNALS, *hung_up)}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            # Processes that load wait for each other in places that no signal reaches; most will leave together.
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
        """``fetch()``, or None where this process was told to stop and it takes longer than GRACE."""
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
        """Passes batches on; raises GivenUp where this process was told to stop and the next one does not come."""
        iterator = iter(batches)
        while (batch := self.unless_told(lambda: next(iterator, None))) is not None:
            yield batch
        if self._gave_up:
            raise GivenUp

    def ask(self) -> None:
        """Asks all processes, without waiting for their answer. A collective: ask while the device has work to come."""
        if self.accelerator.num_processes > 1:
            number = torch.tensor([self._number()], device=self.accelerator.device)
            answer, arrived = self.accelerator.gather(number), None
            if answer.is_cuda:
                answer, arrived = answer.to("cpu", non_blocking=True), torch.cuda.Event()
                arrived.record()
            self._answer = answer, arrived

    def _number(self) -> int:
        return 0 if self.signal is None else int(self.signal) + (GIVEN_UP if self._gave_up else 0)

    def _agreed_number(self) -> int:
        """The highest number of any process at the last ``ask``. Waits for the device to come as far as that."""
        if self._answer is None:
            return self._number()
        answer, arrived = self._answer
        if arrived is not None:
            arrived.synchronize()
        return int(answer.max())

    def gave_up(self) -> bool:
        """Whether any process had no batch, because it was told to stop, at the last ``ask``. The same on all."""
        return self._agreed_number() >= GIVEN_UP

    def agreed(self) -> signal.Signals | None:
        """The signal that had reached any process at the last ``ask``, or None. The same on all."""
        number = self._agreed_number() % GIVEN_UP
        return signal.Signals(number) if number else None

    def leave(self, told: signal.Signals, state: str, say: Callable[[str], None]) -> NoReturn:
        """Ends the process with REQUEUE. Call on all processes; ``state`` says in words what was saved."""
        say(f"{told.name} {state}; --resume_from_checkpoint latest goes on (exit status {REQUEUE})")
        # A launcher signals the slower processes when the first one has left: they keep their exit status.
        self._before = dict.fromkeys(self._before, signal.SIG_IGN)
        self.close()
        end_training(self.accelerator)
        sys.exit(REQUEUE)

    def close(self) -> None:
        """The run is over: signals mean what they meant before."""
        self._over.set()
        if self._reminder is not None:
            self._reminder.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _remind(number: int, over: threading.Event, pause: float) -> None:
    """Sends the signal once more, again and again: only a handler gets the main thread out of a wait.

    Knows no run: a thread that lets go of the last tensor while the interpreter ends would abort the process.
    """
    while not over.wait(pause):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
