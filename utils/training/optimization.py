"""Optimizer, number of steps, and the learning rate, a function of the step alone, so that nothing must be saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_bnb_available
from torch import nn
from torch.optim import Optimizer

from utils.errors import UserError

ADAMW = ("adamw", "adamw_8bit", "paged_adamw_8bit")


def make_optimizer(name: str, module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """An optimizer of all parameters: ``adamax``, ``adamw``, or AdamW with 8-bit states."""
    options: dict[str, Any] = {"params": module.parameters(), "lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":  # fused: one pass over the weights, no temporaries of their size
        return torch.optim.AdamW(**options, fused=True)
    if name == "adamax":
        return torch.optim.Adamax(**options)
    if not is_bnb_available():
        raise UserError(f"--optimizer {name}: needs the package bitsandbytes; install it or use adamw")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (PagedAdamW8bit if name.startswith("paged") else AdamW8bit)(**options)


def accumulation_steps(
    global_batch_size: int | None, per_device_batch_size: int, processes: int, given: int | None = None
) -> int:
    """Micro-batches per step: N / (processes x per-device batch); without a global batch size N, ``given`` or 1.

    Raises ``UserError``, with sizes that fit, if this is not a whole number or differs from ``given``.
    """
    if global_batch_size is None:
        return given or 1
    at_once, flag = processes * per_device_batch_size, f"--global_batch_size {global_batch_size}"
    product = f"{processes} x {per_device_batch_size} (processes x --per_device_train_batch_size)"
    steps, rest = divmod(global_batch_size, at_once)
    if rest:
        batches = " or ".join(str(batch) for batch in (steps * at_once, (steps + 1) * at_once) if batch)
        advice, (share, indivisible) = f"try --global_batch_size {batches}", divmod(global_batch_size, processes)
        if not indivisible:
            sizes = range(min(share, per_device_batch_size, 1 << 16), 0, -1)
            smaller = next(size for size in sizes if share % size == 0)
            advice = f"--per_device_train_batch_size {smaller} would fit, or --global_batch_size {batches}"
        raise UserError(f"{flag}: not a whole number of times {product} = {at_once}; {advice}")
    if given not in (None, steps):
        advice = f"leave it out, or give --global_batch_size {given * at_once} (none: as the others say)"
        raise UserError(f"--gradient_accumulation_steps {given} with {flag}: that is {steps} times {product}; {advice}")
    return steps


def count_steps(
    *, samples_per_epoch: int, num_samples: int, global_batch_size: int, epochs: int, max_steps: int | None
) -> int:
    """Steps of the whole run, without partial batches. Raises ``UserError`` if an epoch holds no whole batch."""
    if samples_per_epoch > num_samples:
        held = f"the shards hold {num_samples} samples, and an epoch reads each at most once"
        raise UserError(f"--train_num_samples {samples_per_epoch}: {held}; lower it")
    if samples_per_epoch < global_batch_size:
        batch = f"the global batch of {global_batch_size} (x processes x accumulation, or --global_batch_size)"
        fault = f"{batch} is larger than an epoch of {samples_per_epoch} samples; make it smaller"
        raise UserError(f"--per_device_train_batch_size: {fault}")
    return max_steps or epochs * (samples_per_epoch // global_batch_size)


def cosine_learning_rate(step: int, peak: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Rises linearly from peak / warmup_steps to ``peak``, then falls by half a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class BetaAverage:
    """Running average of a module's weights over a run, float32: weight Beta(0.7, 0.7) at (k + 1/2) / (n + 1).

    k is the step, 0 at the start. The first and last steps weigh most. Source: official code of arXiv 2411.08923.
    """

    def __init__(self, module: nn.Module, total_steps: int) -> None:
        self.total_steps = total_steps
        self.weights = [parameter.detach().float().clone() for parameter in module.parameters()]
        self.total = self._weight(0)

    def update(self, module: nn.Module, step: int) -> None:
        """Adds the weights after ``step`` steps, 1 ... total_steps, to the average."""
        weight = self._weight(step)
        self.total += weight
        with torch.no_grad():
            torch._foreach_lerp_(self.weights, [p.detach().float() for p in module.parameters()], weight / self.total)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the block the module has the averaged weights."""
        parameters = [parameter.detach() for parameter in module.parameters()]
        kept = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, self.weights)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, kept)

    def state_dict(self) -> dict:
        return {"weights": self.weights, "total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.weights = [state["weights"][place].to(old.device) for place, old in enumerate(self.weights)]
        self.total = state["total"]

    def _weight(self, step: int) -> float:
        share = (step + 0.5) / (self.total_steps + 1)
        return (share * (1 - share)) ** (0.7 - 1)  # Beta's density up to a factor


def load_optimizer_state(optimizer: Optimizer, state: dict) -> None:
    """Restores ``optimizer.state_dict()["state"]``, keyed by the parameter's index; hyperparameters stay."""
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
