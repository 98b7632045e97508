"""Being told to stop: SIGTERM and SIGUSR1 end a run after the step that is under way, with nothing lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator

REQUEUE = 85  # exit status of a run that was told to stop and can go on: start it again with the same command

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether one of SIGNALS has reached any process of the run, from now on until ``close``.

    Schedulers differ in whom they signal: one process, all of them, or those of one node. A single one is enough.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: signal.Signals | None = None  # that reached this process
        self._asked: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def ask(self) -> None:
        """Asks all processes, without waiting for their answer. A collective: ask while the device has work to come."""
        if self.accelerator.num_processes > 1:
            self._asked = self._gather()

    def _gather(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The signals of all processes, on the host once the event has come."""
        number = torch.tensor([0 if self.signal is None else int(self.signal)], device=self.accelerator.device)
        answer, arrived = self.accelerator.gather(number), None
        if answer.is_cuda:
            answer, arrived = answer.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        return answer, arrived

    def agreed(self) -> signal.Signals | None:
        """The signal that had reached any process when ``ask`` was called last, the same on all, or None.

        Waits for the device to come as far as that call, no further. What comes later is found at the next step.
        """
        if self.accelerator.num_processes == 1:
            return self.signal
        (answer, arrived), self._asked = self._asked or self._gather(), None
        if arrived is not None:
            arrived.synchronize()
        number = int(answer.max())
        return signal.Signals(number) if number else None

    def leave(self, told: signal.Signals, state: str, say: Callable[[str], None]) -> NoReturn:
        """Ends the process with REQUEUE. Call on all processes; ``state`` says in words what was saved."""
        say(f"{told.name} {state}; --resume_from_checkpoint latest goes on (exit status {REQUEUE})")
        # A launcher signals the slower processes when the first one has left: they keep their exit status.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self.accelerator.end_training()
        sys.exit(REQUEUE)

    def close(self) -> None:
        """The run is over: signals mean what they meant before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
