"""Processes and devices: one Accelerator made the way that works everywhere, and the collectives of the trainers.

What works, and what silently trains wrongly, was tried out: only the encoder goes through ``prepare``; the multiplier
stays outside and averages its gradients here; under DeepSpeed the parameters stay float32 and the encoder's own
autocast does the mixed precision.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    is_tensorboard_available,
    is_wandb_available,
    set_seed,
)
from torch import Tensor, nn

from utils.cli import UserError

MIXED_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start_accelerator(
    *,
    seed: int = 0,
    per_device_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 0.0,
    report_to: str = "none",
    output_dir: str | None = None,
    days_of_patience: float | None = None,
) -> Accelerator:
    """The Accelerator for what ``accelerate launch``, ``torchrun`` or plain ``python`` set up; float32 stays float32.

    ``days_of_patience``: how long a process waits for the others in a collective (default: torch's own 10 to 30 minutes).

    Raises ``UserError`` where the launcher's processes did not become processes of one group, and for settings that an
    accelerate config cannot ask for here.
    """
    if report_to == "tensorboard" and not is_tensorboard_available():
        raise UserError("--report_to tensorboard: needs the package tensorboardX; install it or use --report_to none")
    if report_to == "wandb" and not is_wandb_available():
        raise UserError("--report_to wandb: needs the package wandb; install it or use --report_to none")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # torch 2.13 calls the argument outdated, but accelerate passes no other.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns of it, also where it is merely installed
        if not deepspeed:
            # Without it a config with several CPU processes runs unsynchronised replicas. With it, or with
            # Accelerator(cpu=True), DeepSpeed is silently turned off.
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if "RANK" in os.environ:
        group = {} if torch.cuda.is_available() else {"backend": "gloo"}
        if days_of_patience is not None:
            group["timeout"] = timedelta(days=days_of_patience)
        if group:
            handlers.append(InitProcessGroupKwargs(**group))
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=handlers,
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir,
    )
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise UserError(
            f"the accelerate config asks for DeepSpeed but accelerate chose {accelerator.distributed_type.value}; leave "
            "use_cpu out of the config and ACCELERATE_USE_CPU out of the environment"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes but accelerate formed a group of "
            f"{accelerator.num_processes}: each would train alone; use a config of accelerate_configs/ (cpu_2proc.yaml shows what CPU processes need)"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, per_device_batch_size, gradient_accumulation_steps, max_grad_norm)
    # The patch embedding is the only convolution of a ViT, and pixels lose an attack's steps in TF32's 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message=".*torch.distributed process group is initialized, but.*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    set_seed(seed)
    return accelerator


def _configure_deepspeed(accelerator: Accelerator, batch_size: int, accumulation: int, max_grad_norm: float) -> None:
    """One meaning of every flag with and without DeepSpeed: settings of the command line go into its config."""
    if compute_dtype(accelerator) == torch.float16:
        raise UserError(
            "mixed_precision: fp16 is not supported with DeepSpeed here; use bf16 or no in the accelerate config"
        )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = batch_size
    config["gradient_accumulation_steps"] = accumulation
    config["gradient_clipping"] = max_grad_norm
    # DeepSpeed's own bf16 would turn the patch embedding to bf16 and weaken the attack; see utils/encoders.py.
    config["bf16"] = {"enabled": False}
    config["fp16"] = {"enabled": False}
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # in float32, as they are


def start_tracker(accelerator: Accelerator, report_to: str, project: str, settings: dict[str, Any]) -> None:
    """Opens the tracker with the run's settings. accelerate takes numbers and texts only."""
    if report_to != "none":
        accelerator.init_trackers(project, config={name: str(value) for name, value in settings.items()})


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of the transformer blocks, from the accelerate config's ``mixed_precision``."""
    precision = accelerator.mixed_precision
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # DeepSpeed's own mixed precision is off
    return MIXED_PRECISIONS[precision]


def average_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Mean over processes of the gradients of a module that is not wrapped for distributed training."""
    if accelerator.num_processes == 1:
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")


def mean_over_processes(accelerator: Accelerator, values: Tensor) -> float:
    """Mean of all processes' values together, also where they hold unequally many. (n,) -> float."""
    sums = torch.tensor([float(values.sum()), len(values)], dtype=torch.float64)
    total, count = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    return total / count if count else float("nan")


def gather_objects(accelerator: Accelerator, item: Any) -> list[Any]:
    """[item of rank 0, item of rank 1, ...] on every process."""
    return gather_object([item]) if accelerator.num_processes > 1 else [item]


def from_main_process(accelerator: Accelerator, make: Any) -> Any:
    """``make()`` on the main process, its result (or its UserError) on every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome, from_process=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def default_num_workers() -> int:
    """Data workers for one process: its share of the CPU cores less one for itself, between 1 and 8."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_processes - 1))
