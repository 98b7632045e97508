"""Processes and devices: one Accelerator that works everywhere, and the collectives of the trainers.

Only the encoder goes through ``prepare``; the multiplier does not, and its gradients are averaged here. Under DeepSpeed
the parameters stay float32 and the encoder's own autocast does mixed precision. Other setups train wrongly in silence.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import MappingProxyType
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

from utils.errors import OwnError, UserError
from utils.processes.environment import Numbers, check_launch
from utils.processes.tracker import check_tracker

WORKING = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)
PATIENCE = timedelta(minutes=10)  # how long to wait for the other processes to start
A_WHILE = 60.0  # seconds of waiting, after which a warning says what the process waits for
MIXED_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOTHING_TRAINED = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
_MEETING: list[Any] = []  # keeps the store alive: rank 0 serves it to the others until the process ends

logger = logging.getLogger(__name__)


def start_accelerator(
    *,
    seed: int = 0,
    numbers: Numbers = MappingProxyType({}),
    report_to: str = "none",
    output_dir: str | None = None,
    days_of_patience: float | None = None,
    tf32: bool = False,
    compile: bool = False,
) -> Accelerator:
    """Makes the Accelerator under ``accelerate launch``, ``torchrun`` or plain ``python``; float32 stays float32.

    ``numbers``: batch size of a process, accumulation and clipping by DeepSpeed's names; empty if nothing is trained.
    ``tf32``: products of float32 tensors keep 10 bits of mantissa on NVIDIA GPUs and are several times as fast.
    ``days_of_patience``: how long a process waits for the others in a collective (default: torch's 10 to 30 minutes).
    Raises ``UserError`` if the processes form no group, and for settings that utils/processes/environment.py refuses.
    """
    launched = check_launch(numbers, compile)  # only once: accelerate changes some of the variables it reads
    check_tracker(report_to)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # torch 2.13 calls the argument outdated, but accelerate has no newer one to pass.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns, even if it is only installed
        if not deepspeed:
            # Without this variable a config with several CPU processes runs unsynchronised replicas. With it, or with
            # Accelerator(cpu=True), accelerate silently turns DeepSpeed off.
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if "RANK" in os.environ:
        group: dict[str, Any] = {} if torch.cuda.is_available() else {"backend": "gloo"}
        if days_of_patience is not None:
            group["timeout"] = timedelta(days=days_of_patience)
        if group:
            handlers.append(InitProcessGroupKwargs(**group))
        if not torch.distributed.is_initialized():
            meet()
    numbers = NOTHING_TRAINED | dict(numbers)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=int(numbers["gradient_accumulation_steps"]),
            kwargs_handlers=handlers,
            log_with=None if report_to == "none" else report_to,
            project_dir=output_dir,
        )
    except (ValueError, ImportError, NotImplementedError) as error:  # accelerate's errors for a bad config
        raise UserError(f"accelerate: {str(error)[:300]}; correct the accelerate config") from None
    chosen, formed = accelerator.distributed_type, accelerator.num_processes
    if chosen not in WORKING or formed != launched or (deepspeed and chosen != DistributedType.DEEPSPEED):
        asked = f"{launched} processes{' with DeepSpeed' if deepspeed else ''} were started"
        raise UserError(
            f"{asked}, but accelerate formed a group of {formed} of kind {chosen.value}, which would train wrongly; "
            "use a config of accelerate_configs/ (cpu_2proc.yaml for CPUs, no use_cpu with DeepSpeed; with "
            "torch_xla set USE_TORCH_XLA=0)"
        )
    if chosen == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, numbers)
    # A ViT's only convolution is the patch embedding. TF32's 10 bits would lose the small steps of an attack on pixels.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = tf32
    warnings.filterwarnings("ignore", message=".*torch.distributed process group is initialized, but.*")
    # DeepSpeed still calls these functions by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", message=".*`torch.distributed.* is deprecated.*", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    set_seed(seed)
    return accelerator


def meet(patience: timedelta = PATIENCE) -> None:
    """Waits until all processes of the launcher have started; ``UserError`` if some have not after ``patience``.

    torch alone would wait as long as in a collective, which is days in an evaluation, even for an unknown host.
    """
    rank, ranks = os.environ["RANK"], [str(rank) for rank in range(int(os.environ["WORLD_SIZE"]))]
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    place = f"MASTER_ADDR={host} MASTER_PORT={port}"
    told = threading.Timer(
        A_WHILE, logger.warning, [f"waiting for {len(ranks)} processes at {place}, at most {patience}"]
    )
    told.daemon = True
    told.start()
    try:
        socket.getaddrinfo(host, port)
        store = next(torch.distributed.rendezvous("env://", timeout=patience))[0]
        _MEETING.append(store)
        store = torch.distributed.PrefixStore("meeting", store)
        store.set(rank, "here")
        try:
            store.wait(ranks, patience)
        except torch.distributed.DistStoreError:
            missing = ", ".join([rank for rank in ranks if not store.check([rank])][:8])
            raise UserError(
                f"{len(ranks)} processes were to meet at {place}, but rank {missing} has not come within "
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


def _configure_deepspeed(config: dict[str, Any], numbers: Numbers) -> None:
    """Writes the flags' numbers into DeepSpeed's config, so that a flag means the same with and without DeepSpeed."""
    # A DeepSpeed json holds the precision itself; accelerate then forbids it in the yaml.
    if str(config.get("bf16", {}).get("enabled")).lower() == "true":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    config |= numbers
    # DeepSpeed's own bf16 would run the patch embedding in bf16 and weaken the attack; see utils/models/encoders.py.
    config |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    config["zero_force_ds_cpu_optimizer"] = False  # else accelerate replaces the optimizer of --optimizer
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # despite its name in float32


def mixed_precision(accelerator: Accelerator) -> str:
    """no, bf16 or fp16, from the accelerate config or the environment."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # DeepSpeed's own mixed precision is off
    return accelerator.mixed_precision


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype in which the transformer blocks compute."""
    return MIXED_PRECISIONS[mixed_precision(accelerator)]


def warn_of_emulation(accelerator: Accelerator) -> None:
    """Warns if a CPU has no instructions for the precision: its products are then tens of times slower than float32."""
    precision = mixed_precision(accelerator)
    on_cpu = accelerator.device.type == "cpu" and accelerator.is_main_process
    if precision == "no" or not on_cpu or not torch.backends.mkldnn.is_available():  # only oneDNN can tell
        return
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")():
        logger.warning(
            f"mixed_precision {precision}: this CPU has no instructions for it and is many times slower than with no"
        )


def average_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Averages the gradients over the processes, for a module that is not wrapped for distributed training."""
    if accelerator.num_processes == 1:
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")


def mean_over_processes(accelerator: Accelerator, values: Tensor) -> float:
    """The mean of all values of all processes, which may hold unequal numbers of them. (n,) -> float."""
    sums = torch.tensor([float(values.sum()), len(values)], dtype=torch.float64)
    total, count = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    return total / count if count else float("nan")


def gather_objects(accelerator: Accelerator, item: Any) -> list[Any]:
    """[item of rank 0, item of rank 1, ...] on every process."""
    return gather_object([item]) if accelerator.num_processes > 1 else [item]


def _outcome(make: Callable[[], Any]) -> list[Any]:
    """[the result of ``make``, None] or [None, the text of its ``UserError``]."""
    try:
        return [make(), None]
    except UserError as error:
        return [None, str(error)]


def from_main_process(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """Calls ``make`` on the main process. Every process returns its result or raises its ``UserError``."""
    outcome = _outcome(make) if accelerator.is_main_process else [None, None]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome, from_process=0)
    made, line = outcome
    if line is not None:
        raise UserError(line)
    return made


def everywhere(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """Calls ``make`` on every process. If any raises ``UserError``, all raise the one of the lowest rank."""
    made, line = _outcome(make)
    for found in gather_objects(accelerator, line):
        if found is not None:
            raise UserError(found)
    return made


def on_every_node(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """Calls ``make`` on the first process of every node while the other processes wait; they return None."""
    return everywhere(accelerator, lambda: make() if accelerator.is_local_main_process else None)


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Hugging Face models built inside the block are whole, even if an Accelerator has a ZeRO-3 config."""
    from transformers.integrations import deepspeed as integration

    kept, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


@contextmanager
def gathered(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Under ZeRO-3, gathers the parameters of ``module`` once for the whole block; otherwise does nothing.

    Without it each forward and each backward gathers every layer again: 2 n times for an attack of n steps. It needs
    memory for all parameters. All processes enter and leave together. Do not change parameters in the block.
    """
    sharded: list[Any] = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not enabled or not sharded:
        yield
        return
    import deepspeed

    held = "held by gathered()"
    with deepspeed.zero.GatheredParameters(sharded):
        # DeepSpeed's hooks shard a layer again after its forward, unless a submodule is registered as using it.
        for parameter in sharded:
            parameter.ds_active_sub_modules.add(held)
        try:
            yield
        finally:
            for parameter in sharded:
                parameter.ds_active_sub_modules.discard(held)


def shard_frozen(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Shards a frozen ``module`` by ZeRO-3. Call the returned engine like it, equally often on all processes."""
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
    """Number of data workers of one process: its share of the CPU cores minus one for itself, 1 to ``most``."""
    cpus = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # If every rank is a task of srun, it may be bound to its own cores already: do not divide again.
    if "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] == os.environ.get("SLURM_STEP_NUM_TASKS"):
        cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", cpus))
    return max(1, min(most, cpus - 1))
