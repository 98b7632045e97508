"""Optimizer, learning rate, number of steps.

The learning rate is a pure function of the step: nothing to save, nothing that a launcher can advance twice.
"""

from __future__ import annotations

import math

import torch
from accelerate.utils import is_bnb_available
from torch import nn
from torch.optim import Optimizer

from utils.cli import UserError


def make_optimizer(name: str, module: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW over all parameters: ``adamw``, or with 8-bit states ``adamw_8bit`` and ``paged_adamw_8bit``."""
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    if not is_bnb_available():
        raise UserError(f"--optimizer {name}: needs the package bitsandbytes; install it or use adamw")
    import bitsandbytes

    optimizer_class = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[name]
    return optimizer_class(module.parameters(), lr=learning_rate, weight_decay=weight_decay)


def count_steps(
    *, samples_per_epoch: int, num_samples: int, global_batch_size: int, epochs: int, max_steps: int | None
) -> int:
    """Steps of the whole run; a last partial batch of an epoch is dropped. Refuses an epoch that holds no batch."""
    if samples_per_epoch > num_samples:
        raise UserError(
            f"--train_num_samples {samples_per_epoch}: the shards hold {num_samples} samples, and an epoch reads each "
            "at most once; lower it"
        )
    if samples_per_epoch < global_batch_size:
        raise UserError(
            f"--per_device_train_batch_size: the global batch of {global_batch_size} (x processes x accumulation) is "
            f"larger than an epoch of {samples_per_epoch} samples; make it smaller"
        )
    return max_steps or epochs * (samples_per_epoch // global_batch_size)


def cosine_learning_rate(step: int, peak: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Linear from peak / warmup_steps to ``peak``, then half a cosine that would reach 0 at ``total_steps``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """The same learning rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
