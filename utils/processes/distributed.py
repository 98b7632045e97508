"""Processes and devices: one Accelerator that works everywhere, and the collectives of the trainers.

Only the encoder goes through ``prepare``; the multiplier stays outside and averages its gradients here. Under DeepSpeed
the parameters stay float32 and the encoder's own autocast does the mixed precision. Other ways silently train wrongly.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    set_seed,
)
from torch import Tensor, nn

from utils.errors import UserError
from utils.processes.environment import NO_FP16, check_launch
from utils.processes.launcher import meet
from utils.processes.tracker import check_tracker

WORKING = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)
MIXED_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start_accelerator(
    *,
    seed: int = 0,
    per_device_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    max_grad_norm: float | None = None,
    report_to: str = "none",
    output_dir: str | None = None,
    days_of_patience: float | None = None,
    tf32: bool = False,
    compile: bool = False,
) -> Accelerator:
    """The Accelerator for what ``accelerate launch``, ``torchrun`` or plain ``python`` set up; float32 stays float32.

    ``tf32``: products of float32 tensors keep 10 bits of mantissa on NVIDIA GPUs, at several times the speed.
    ``days_of_patience``: how long a process waits for the others in a collective (default: torch's 10 to 30 minutes).
    Batch, accumulation and clipping are None where nothing is trained. Raises ``UserError`` where the processes are no
    group, and for what an accelerate config or the environment cannot ask for here (utils/processes/environment.py).
    """
    launched = check_launch(  # once: accelerate changes some of its variables
        per_device_batch_size=per_device_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        compile=compile,
    )
    check_tracker(report_to)
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
        group: dict[str, Any] = {} if torch.cuda.is_available() else {"backend": "gloo"}
        if days_of_patience is not None:
            group["timeout"] = timedelta(days=days_of_patience)
        if group:
            handlers.append(InitProcessGroupKwargs(**group))
        if not torch.distributed.is_initialized():
            meet()
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps or 1,
            kwargs_handlers=handlers,
            log_with=None if report_to == "none" else report_to,
            project_dir=output_dir,
        )
    except (ValueError, ImportError, NotImplementedError) as error:  # how accelerate says that it cannot do what is set
        raise UserError(f"accelerate: {str(error)[:300]}; correct the accelerate config") from None
    chosen, formed = accelerator.distributed_type, accelerator.num_processes
    if chosen not in WORKING or formed != launched or (deepspeed and chosen != DistributedType.DEEPSPEED):
        asked = f"{launched} processes{' with DeepSpeed' if deepspeed else ''} were started"
        raise UserError(
            f"{asked}, but accelerate formed a group of {formed} of kind {chosen.value}, which would train wrongly; "
            "use a config of accelerate_configs/ (cpu_2proc.yaml for CPUs; with torch_xla set USE_TORCH_XLA=0)"
        )
    if chosen == DistributedType.DEEPSPEED:
        _configure_deepspeed(
            accelerator, per_device_batch_size or 1, gradient_accumulation_steps or 1, max_grad_norm or 0.0
        )
    # The patch embedding is the only convolution of a ViT, and pixels lose an attack's steps in TF32's 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = tf32
    warnings.filterwarnings("ignore", message=".*torch.distributed process group is initialized, but.*")
    # DeepSpeed calls these by their names before torch 2.13.
    warnings.filterwarnings("ignore", message=".*`torch.distributed.* is deprecated.*", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    set_seed(seed)
    return accelerator


def _configure_deepspeed(accelerator: Accelerator, batch_size: int, accumulation: int, max_grad_norm: float) -> None:
    """One meaning of every flag with and without DeepSpeed: settings of the command line go into its config."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # With a json the precision stands there; accelerate then forbids it in the yaml.
    for precision in ("bf16", "fp16"):
        if str(config.get(precision, {}).get("enabled")).lower() == "true":
            os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    if compute_dtype(accelerator) == torch.float16:
        raise UserError(f"mixed_precision: {NO_FP16}")
    config["train_micro_batch_size_per_gpu"] = batch_size
    config["gradient_accumulation_steps"] = accumulation
    config["gradient_clipping"] = max_grad_norm
    # DeepSpeed's own bf16 would turn the patch embedding to bf16 and weaken the attack; see utils/models/encoders.py.
    config["bf16"] = {"enabled": False}
    config["fp16"] = {"enabled": False}
    config["zero_force_ds_cpu_optimizer"] = False  # accelerate would put its own in place of --optimizer
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # in float32, as they are


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


def _outcome(make: Callable[[], Any]) -> list[Any]:
    """[what ``make`` returns, None] or [None, the line of its ``UserError``]."""
    try:
        return [make(), None]
    except UserError as error:
        return [None, str(error)]


def from_main_process(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """``make()`` on the main process, its result (or its ``UserError``) on every process."""
    outcome = _outcome(make) if accelerator.is_main_process else [None, None]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome, from_process=0)
    made, line = outcome
    if line is not None:
        raise UserError(line)
    return made


def everywhere(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """``make()`` on every process; the first process's ``UserError`` is raised by all, none is left waiting."""
    made, line = _outcome(make)
    for found in gather_objects(accelerator, line):
        if found is not None:
            raise UserError(found)
    return made


def on_every_node(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """``make()`` on the first process of every node while the others wait, for whom it is None."""
    return everywhere(accelerator, lambda: make() if accelerator.is_local_main_process else None)


@contextmanager
def gathered(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Under ZeRO-3 the parameters of ``module`` are whole inside, gathered once; elsewhere nothing happens.

    Without it each forward and each backward gathers every layer again: 2 n times for an attack of n steps. It costs
    the memory of the whole parameters. All processes enter and leave together; nobody changes parameters inside.
    """
    sharded: list[Any] = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not enabled or not sharded:
        yield
        return
    import deepspeed

    held = "held by gathered()"
    with deepspeed.zero.GatheredParameters(sharded):
        # DeepSpeed's hooks would shard a layer again after its forward; they leave alone what is in use.
        for parameter in sharded:
            parameter.ds_active_sub_modules.add(held)
        try:
            yield
        finally:
            for parameter in sharded:
                parameter.ds_active_sub_modules.discard(held)


def shard_frozen(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """A frozen ``module`` sharded over the processes by ZeRO-3: an engine to call like it, by all equally often."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        like = "accelerate_configs/zero3.yaml"
        raise UserError(f"--shard_reference true: needs DeepSpeed; use a config like {like}, or leave it out")
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": {"enabled": False}}
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def default_num_workers(most: int = 32) -> int:
    """Data workers for one process: its share of the CPU cores less one for itself, between 1 and ``most``."""
    cpus = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # A rank that is a task of srun may be bound to its own share already.
    if "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] == os.environ.get("SLURM_STEP_NUM_TASKS"):
        cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", cpus))
    return max(1, min(most, cpus - 1))
