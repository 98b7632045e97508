"""What a launcher asks for: each of its settings that would change a run is obeyed or refused, before data is opened.

accelerate reads its settings from the environment, where ``accelerate launch`` puts those of its config. Most of them
were made for other loops than these: a compiled or sharded model that is not saved as it was trained, gradients that are
accumulated elsewhere. ``RULES`` classifies every variable that accelerate reads, ``DEEPSPEED`` every field of a DeepSpeed
json. What neither knows changes nothing that is known (a variable) or is refused (a field).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_deepspeed_available

from utils.cli import nearest
from utils.errors import UserError
from utils.text_files import parse_json, read_text_file

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=10)  # for the other processes to start
A_WHILE = 60.0  # seconds, then a line says what is waited for

TRUE, FALSE = (
    ("true", "1", "yes", "y", "t", "on"),
    ("false", "0", "no", "n", "f", "off"),
)  # what accelerate takes for it
OFF = (*FALSE, "", "none")


class Rule(NamedTuple):
    """What a variable may say, in small letters (None: anything), and what to write in place of anything else."""

    allowed: tuple[str, ...] | None
    instead: str
    setting: str = ""  # what it is called in an accelerate config


def _only_with(name: str) -> Rule:
    return Rule(None, f"read only with {name}, which is refused")


_NO_FSDP = "sharding is DeepSpeed's here: accelerate_configs/zero2.yaml or zero3.yaml"
_PROCESSES = "of the launcher; launched_processes looks at them together"
_NO_LOADER = "the scripts deal out the data themselves, by --seed and --global_batch_size"
_NO_JSON = "of a DeepSpeed config without a json; one with it has the value there"
RULES = {
    # Obeyed: what they may say.
    "ACCELERATE_MIXED_PRECISION": Rule(("no", "bf16", "fp16"), "write no, bf16 or fp16", "mixed_precision"),
    "ACCELERATE_USE_CPU": Rule((*TRUE, *FALSE), "write true or false", "use_cpu"),
    "ACCELERATE_USE_DEEPSPEED": Rule(("true", "false"), "write true or false", "distributed_type"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": Rule(None, "read and checked here", "deepspeed_config_file"),
    "ACCELERATE_CONFIG_DS_FIELDS": Rule(None, "read and checked here"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": Rule(("1", "2", "3"), "write 1, 2 or 3; without sharding: accelerate_configs/ddp.yaml", "zero_stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": Rule(("none", "cpu"), "write none or cpu", "offload_optimizer_device"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": Rule(("none", "cpu"), "write none or cpu", "offload_param_device"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(None, "compared with the flag", "gradient_accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": Rule(None, "compared with the flag", "gradient_clipping"),
    "ACCELERATE_DEBUG_MODE": Rule((*TRUE, *FALSE), "write true or false", "debug"),  # checks shapes in collectives
    "ACCELERATE_CPU_AFFINITY": Rule((*TRUE, *FALSE), "write true or false", "enable_cpu_affinity"),
    # Refused, unless they say that they are off.
    "ACCELERATE_DYNAMO_BACKEND": Rule(OFF, "compile with --compile true", "dynamo_config: dynamo_backend"),
    "ACCELERATE_FP8_BACKEND": Rule(("no",), "precision is no, bf16 or fp16", "fp8_config: backend"),
    "ACCELERATE_USE_FSDP": Rule(OFF, _NO_FSDP, "distributed_type: FSDP"),
    "ACCELERATE_USE_MEGATRON_LM": Rule(OFF, _NO_FSDP, "distributed_type: MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Rule(OFF, _NO_FSDP, "parallelism_config"),
    "ACCELERATE_USE_SAGEMAKER": Rule(OFF, "start with accelerate launch or torchrun on the machine itself", "compute_environment"),
    "ACCELERATE_DOWNCAST_BF16": Rule(OFF, "it is for TPUs; mixed_precision: bf16 is enough", "downcast_bf16"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": Rule(OFF, "no encoder here has such layers", "deepspeed_moe_layer_cls_names"),
    "ACCELERATE_TORCH_DEVICE": Rule((), "choose GPUs by CUDA_VISIBLE_DEVICES, the CPU by ACCELERATE_USE_CPU=true"),
    "XLA_USE_BF16": Rule(OFF, "precision is mixed_precision of the accelerate config"),
    "XLA_DOWNCAST_BF16": Rule(OFF, "precision is mixed_precision of the accelerate config"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Rule(OFF, "use --tf32 true, which leaves the patch embedding in float32"),
    "NVIDIA_TF32_OVERRIDE": Rule(("0", ""), "use --tf32 true, which leaves the patch embedding in float32"),
    # Of other versions of accelerate, or believed to be: without effect, so that whoever sets them would be deceived.
    "ACCELERATE_USE_IPEX": Rule(OFF, "IPEX is not used", "ipex_config: ipex"),
    "ACCELERATE_USE_XPU": Rule(OFF, "the scripts run on CPUs and CUDA GPUs", "ipex_config: use_xpu"),
    "ACCELERATE_SPLIT_BATCHES": Rule(OFF, _NO_LOADER), "ACCELERATE_DISPATCH_BATCHES": Rule(OFF, _NO_LOADER),
    "ACCELERATE_EVEN_BATCHES": Rule(OFF, _NO_LOADER), "ACCELERATE_USE_SEEDABLE_SAMPLER": Rule(OFF, _NO_LOADER),
    "ACCELERATE_STEP_SCHEDULER_WITH_OPTIMIZER": Rule(OFF, "the scripts set the learning rate themselves, see --warmup_steps"),
    # Without effect here, whatever they say.
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": Rule((*TRUE, *FALSE), "write true or false", "zero3_init_flag"),  # models are built whole
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": Rule(None, "models are saved in float32 at every stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": _only_with("nvme"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": _only_with("nvme"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": Rule((*TRUE, *FALSE), "write true or false"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": Rule((*TRUE, *FALSE), "write true or false"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": Rule((*TRUE, *FALSE), "write true or false"),
    "ACCELERATE_DYNAMO_MODE": _only_with("ACCELERATE_DYNAMO_BACKEND"), "ACCELERATE_DYNAMO_": _only_with("ACCELERATE_DYNAMO_BACKEND"),
    "ACCELERATE_FP8_": _only_with("fp8"), "FSDP_": _only_with("ACCELERATE_USE_FSDP"),
    "MEGATRON_LM_": _only_with("ACCELERATE_USE_MEGATRON_LM"), "PARALLELISM_CONFIG_": _only_with("ACCELERATE_USE_PARALLELISM_CONFIG"),
    "ACCELERATE_ALLOW_CP_STANDALONE": _only_with("ACCELERATE_USE_PARALLELISM_CONFIG"),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": _only_with("ACCELERATE_USE_SAGEMAKER"),
    "ACCELERATE_BYPASS_DEVICE_MAP": Rule(None, "for models that are spread over GPUs"),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": Rule(None, "for models that are built without weights"),
    "ACCELERATE_LOG_LEVEL": Rule(None, "what accelerate logs"), "ACCELERATE_ENABLE_RICH": Rule(None, "how it prints"),
    "ACCELERATE_IN_TPU_POD": Rule(None, "of its TPU launcher"), "ACCELERATE_NUM_PROCESSES": Rule(None, "of its own tests"),
    "ACCELERATE_DEBUG_RDV_FILE": Rule(None, "of its notebook launcher"), "FORK_LAUNCHED": Rule((*TRUE, *FALSE), "unset it"),
    "DEEPSPEED_USE_HPU": Rule(None, "for HPUs"), "PT_HPU_LAZY_MODE": Rule(None, "for HPUs"),
    "PYTORCH_ENABLE_MPS_FALLBACK": Rule(None, "for Macs"), "USE_TORCH_XLA": Rule(None, "a run on XLA is refused"),
    "OMP_NUM_THREADS": Rule(None, "speed"), "NCCL_P2P_DISABLE": Rule(None, "speed"), "NCCL_IB_DISABLE": Rule(None, "speed"),
    **{name: Rule(None, _PROCESSES) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")},
    **{prefix: Rule(None, _PROCESSES) for prefix in ("PMI_", "MPI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")},
}  # fmt: skip
FLAGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}
# Of a DeepSpeed config with a json, accelerate refuses these beside it.
IN_THE_JSON = ("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "offload_optimizer_device", "offload_param_device",
               "offload_param_nvme_path", "offload_optimizer_nvme_path", "zero3_save_16bit_model", "mixed_precision")  # fmt: skip

# A DeepSpeed json. Fields that change speed, memory or what is printed; None stands for fields with a check of their own.
_SPEED = """
    steps_per_print wall_clock_breakdown dump_state memory_breakdown flops_profiler comms_logger tensorboard wandb csv_monitor comet
    zero_allow_untested_optimizer aio disable_allgather timers monitor_config
    zero_optimization.overlap_comm zero_optimization.contiguous_gradients zero_optimization.reduce_scatter
    zero_optimization.reduce_bucket_size zero_optimization.use_multi_rank_bucket_allreduce zero_optimization.allgather_partitions
    zero_optimization.allgather_bucket_size zero_optimization.round_robin_gradients zero_optimization.sub_group_size
    zero_optimization.ignore_unused_parameters zero_optimization.memory_efficient_linear zero_optimization.stage3_max_live_parameters
    zero_optimization.stage3_max_reuse_distance zero_optimization.stage3_prefetch_bucket_size
    zero_optimization.stage3_param_persistence_threshold zero_optimization.stage3_model_persistence_threshold
    zero_optimization.stage3_use_all_reduce_for_fetch_params zero_optimization.stage3_module_granularity_threshold
    zero_optimization.stage3_gather_16bit_weights_on_model_save zero_optimization.offload_optimizer.pin_memory
    zero_optimization.offload_optimizer.buffer_count zero_optimization.offload_optimizer.fast_init
    zero_optimization.offload_param.pin_memory zero_optimization.offload_param.buffer_count
    zero_optimization.offload_param.buffer_size zero_optimization.offload_param.max_in_cpu
"""
# What may say "auto": the scripts, or the precision of the accelerate config, fill it in.
_AUTO = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
]
DEEPSPEED: dict[str, Rule | None] = {
    **dict.fromkeys(_SPEED.split()),
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")),
    "zero_optimization.stage": Rule(("1", "2", "3"), "write 1, 2 or 3; without sharding: accelerate_configs/ddp.yaml"),
    "zero_optimization.offload_optimizer.device": Rule(("none", "cpu"), "write none or cpu"),
    "zero_optimization.offload_param.device": Rule(("none", "cpu"), "write none or cpu"),
    "bf16.enabled": Rule((*TRUE, *FALSE, "auto"), "write true or false"),
    "fp16.enabled": Rule((*FALSE, "auto"), "fp16 is not supported with DeepSpeed here; use bf16 or no in the accelerate config"),
    "zero_force_ds_cpu_optimizer": Rule(FALSE, "the optimizer is --optimizer, also where its state is offloaded"),
    "communication_data_type": Rule(("fp32", "float32"), "gradients are averaged in float32"),
    "data_types.grad_accum_dtype": Rule(("fp32", "float32"), "gradients are kept in float32"),
    "optimizer": Rule((), "the optimizer is --optimizer with --learning_rate and --weight_decay"),
    "scheduler": Rule((), "the learning rate follows --learning_rate, --warmup_steps and a cosine"),
    "amp": Rule((), "precision is bf16 in the json, or mixed_precision"),
    "activation_checkpointing": Rule((), "use --gradient_checkpointing true"),
    "compile": Rule((), "compile with --compile true"),
    "fp16": Rule((), "fp16 is not supported with DeepSpeed here; use bf16 or no in the accelerate config"),
    "checkpoint": Rule((), "checkpoints are the scripts' own, see --checkpoint_steps"),
}  # fmt: skip


def launched_processes(environ: Mapping[str, str] = os.environ) -> int:
    """Processes of the run, as the launcher says it: known before they are a group.

    Raises ``UserError`` where its variables are not those of one process of a group.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: environ[name] for name in names if name in environ}
    if not given or given == {"WORLD_SIZE": "1"}:
        _refuse_lone_processes(environ)
        return 1
    try:
        if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
            under_slurm = ", under SLURM with srun python slurm/rank.py" if "SLURM_JOB_ID" in environ else ""
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(
                f"{said} in the environment without {', '.join(missing)}: a part of what a launcher sets; start with "
                f"accelerate launch or torchrun{under_slurm}, or unset {' and '.join(given)} for a run of one process"
            )
        number = {name: _whole_number(name, environ[name]) for name in (*names, "MASTER_PORT")}
        for name, low, high in (
            ("WORLD_SIZE", 1, 2**31), ("RANK", 0, number["WORLD_SIZE"] - 1), ("MASTER_PORT", 1, 2**16 - 1),
            ("LOCAL_RANK", 0, _whole_number("LOCAL_WORLD_SIZE", environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])) - 1),
        ):  # fmt: skip
            if not low <= number[name] <= high:
                raise UserError(
                    f"{name}={environ[name]} in the environment: expected a number from {low} to {high}; see how it was started"
                )
    except UserError as error:
        error.every_rank = False  # of this process alone, as far as it knows
        raise
    return number["WORLD_SIZE"]


def _whole_number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(
            f"{name}={text} in the environment: not a whole number; the launcher sets it, start with accelerate launch or torchrun"
        )
    return int(text)


def _refuse_lone_processes(environ: Mapping[str, str]) -> None:
    """UserError where something else than accelerate launch or torchrun has started several processes, or tried to."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if environ.get(name, "1") not in ("1", "0", ""):
            raise UserError(
                f"{name}={environ[name]} in the environment: started by MPI, which the scripts do not read; start with "
                "accelerate launch or torchrun, under SLURM with srun python slurm/rank.py"
            )
    # accelerate launch sets both for --num_processes 2 and more, also where it then starts a single process.
    if environ.get("MASTER_ADDR") == "127.0.0.1" and "ACCELERATE_MIXED_PRECISION" in environ:
        raise UserError(
            "accelerate launch was asked for several processes and has started one (distributed_type: MULTI_CPU, or --cpu); "
            "use accelerate_configs/cpu_2proc.yaml with --num_processes"
        )


def classify(name: str) -> Rule | None:
    """The rule of a variable: its own, or that of a beginning which ends in an underscore. None where there is none."""
    parts = name.split("_")
    beginnings = ["_".join(parts[:count]) + "_" for count in range(len(parts) - 1, 0, -1)]
    return next((RULES[known] for known in (name, *beginnings) if known in RULES), None)


def check_launch(
    *,
    per_device_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    max_grad_norm: float | None = None,
    compile: bool = False,
) -> int:
    """Processes of the run. Raises ``UserError`` for what the launcher, its config or the environment asks for and these scripts would not do.

    The arguments are the run's own; None where nothing is trained. What is obeyed is left in the environment as accelerate
    reads it.
    """
    processes = launched_processes()
    trained = {"gradient_accumulation_steps": gradient_accumulation_steps, "max_grad_norm": max_grad_norm}
    for name in sorted(os.environ):
        value, rule = os.environ[name].strip().lower(), classify(name)
        if rule is None:
            if name.startswith("ACCELERATE_"):
                close = nearest(name, RULES)
                logger.warning(
                    "%s is no setting of accelerate that is known here%s; it is not obeyed",
                    *(name, f", did you mean {close}?" if close else ""),
                )
        elif name in FLAGS:
            _check_number(name, trained[FLAGS[name]])
        elif rule.allowed is not None and value not in rule.allowed:
            raise UserError(f"{_said(name)}: {rule.instead}")
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        os.environ["ACCELERATE_MIXED_PRECISION"] = os.environ["ACCELERATE_MIXED_PRECISION"].strip().lower()
    _check_gpus()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        _check_deepspeed(
            {
                "train_micro_batch_size_per_gpu": per_device_batch_size,
                "gradient_accumulation_steps": gradient_accumulation_steps,
                "gradient_clipping": max_grad_norm,
                "train_batch_size": processes * (per_device_batch_size or 0) * (gradient_accumulation_steps or 0)
                or None,
            }
        )
    if compile:
        _check_compiler()
    return processes


def _said(name: str) -> str:
    setting = RULES[name].setting if name in RULES else ""
    return (
        f"{name}={os.environ[name]} ({f'{setting} in the accelerate config, or ' if setting else ''}in the environment)"
    )


def _check_number(name: str, flag_value: float | None) -> None:
    """Of accelerate's own accumulation and clipping: obeyed where they are what the flag says, else refused."""
    value = os.environ[name].strip().lower()
    if flag_value is not None and value not in ("auto", "none", ""):
        try:
            same = float(value) == flag_value
        except ValueError:
            same = False
        if not same:
            raise UserError(
                f"{_said(name)}: the scripts do that themselves, and --{FLAGS[name]} is {flag_value:g}; remove it there, "
                f"and write --{FLAGS[name]} {value} if that is meant"
            )
    del os.environ[name]  # accelerate would let it win, and reads no "auto" outside of DeepSpeed


def _check_gpus() -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").strip().lower()
    if visible is None or use_cpu in TRUE or torch.cuda.is_available():
        wanted = os.environ.get("LOCAL_RANK", "")
        if (
            torch.cuda.is_available()
            and wanted
            and use_cpu not in TRUE
            and 1 < torch.cuda.device_count() <= int(wanted)
        ):
            error = UserError(
                f"LOCAL_RANK={wanted}, but {torch.cuda.device_count()} GPUs are visible; start as many processes as there "
                "are GPUs (num_processes of the accelerate config, gpu_ids, CUDA_VISIBLE_DEVICES)"
            )
            error.every_rank = False
            raise error
        return
    hidden = visible.strip() in ("", "-1", "NoDevFiles")
    if not hidden or use_cpu in FALSE:
        found = (
            "hides every GPU and use_cpu of the accelerate config is false" if hidden else "and torch finds no such GPU"
        )
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible!r} (gpu_ids in the accelerate config, or in the environment) {found}; correct "
            "it, or use accelerate_configs/cpu.yaml (ACCELERATE_USE_CPU=true) to run on the CPU"
        )


def _check_compiler() -> None:
    """UserError where torch.compile would do nothing, or fail at the first batch."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name, "") not in ("", "0"):
            raise UserError(
                f"--compile true: {name}={os.environ[name]} switches it off; unset it, or leave --compile out"
            )
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in TRUE:
        if importlib.util.find_spec("triton") is None:
            raise UserError("--compile true: needs the package triton on a GPU; install it, or leave --compile out")
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    else:
        compilers = [os.environ.get("CXX") or "g++"]
    if not any(map(shutil.which, compilers)):
        raise UserError(
            f"--compile true: needs a compiler, no {' or '.join(compilers)} is found; install g++, or leave --compile out"
        )


def _check_deepspeed(expected: dict[str, float | None]) -> None:
    if not is_deepspeed_available():
        raise UserError(
            "the accelerate config asks for DeepSpeed, which is not installed; install it, or use accelerate_configs/ddp.yaml"
        )
    if "RANK" not in os.environ:
        raise UserError(
            "ACCELERATE_USE_DEEPSPEED=true: DeepSpeed needs a launcher; start with accelerate launch or torchrun"
        )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in TRUE:
        raise UserError(
            "the accelerate config asks for DeepSpeed and for the CPU, where accelerate leaves DeepSpeed out; leave use_cpu "
            "out of the config and ACCELERATE_USE_CPU out of the environment"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError(
            "mixed_precision: fp16 is not supported with DeepSpeed here; use bf16 or no in the accelerate config"
        )
    if not torch.cuda.is_available():
        for tool in ("g++", "ninja"):
            if not shutil.which(os.environ.get("CXX", tool) if tool == "g++" else tool):
                raise UserError(
                    f"DeepSpeed on the CPU compiles its collectives: no {tool} is found; install it, or use accelerate_configs/cpu_2proc.yaml"
                )
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return
    where = f"{path} (deepspeed_config_file in the accelerate config)"
    twice = [field for field in os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",") if field in IN_THE_JSON]
    if twice:
        raise UserError(
            f"{', '.join(twice)} in the accelerate config beside {where}: accelerate takes them from the json alone; remove them from the config"
        )
    check_deepspeed_json(read_text_file(path, where), where, expected)


def check_deepspeed_json(text: str, where: str, expected: Mapping[str, float | None]) -> None:
    """Raises ``UserError`` for a DeepSpeed config that is no JSON or asks for what these scripts would not do.

    ``expected``: what the run's flags say of batches and clipping, by DeepSpeed's names.
    """
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); see accelerate_configs/deepspeed/") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(
            f'{where}: expected an object with "zero_optimization" in it; see accelerate_configs/deepspeed/'
        )
    if "stage" not in config["zero_optimization"]:
        raise UserError(f"{where}: zero_optimization.stage: missing; write 1, 2 or 3")
    _check_fields(config, "", where, expected)
    wants, precision = config.get("bf16", {}).get("enabled"), os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wants is False and precision == "bf16":
        raise UserError(f"{where}: bf16.enabled is false, but mixed_precision is bf16; say the same in both")


def _check_fields(section: dict[str, Any], prefix: str, where: str, expected: Mapping[str, float | None]) -> None:
    for key, value in section.items():
        name = prefix + key
        rule = DEEPSPEED.get(name)
        within = any(known.startswith(f"{name}.") for known in DEEPSPEED)
        off = (
            value is False or value is None or (isinstance(value, dict) and str(value.get("enabled")).lower() in FALSE)
        )
        if value == "auto" and name not in _AUTO:
            raise UserError(
                f"{where}: {name}: 'auto' is not filled in here; write a value, as in accelerate_configs/deepspeed/"
            )
        if name in expected and value not in ("auto", expected[name]) and expected[name] is not None:
            flag = (
                "max_grad_norm"
                if name == "gradient_clipping"
                else "per_device_train_batch_size and --gradient_accumulation_steps"
            )
            raise UserError(
                f'{where}: {name}: {value!r}, but --{flag} give {expected[name]:g}; write "auto" in the json'
            )
        if isinstance(value, dict) and within and not off:
            _check_fields(value, f"{name}.", where, expected)
        elif within and not isinstance(value, dict):
            raise UserError(f"{where}: {name}: expected an object in braces; see accelerate_configs/deepspeed/")
        elif name in DEEPSPEED and (rule is None or (rule.allowed and str(value).lower() in rule.allowed)):
            continue
        elif not off:
            advice = rule.instead if rule else f"not tried with these scripts; remove it{_did_you_mean(name)}"
            raise UserError(f"{where}: {name}: {advice}")


def _did_you_mean(name: str) -> str:
    close = nearest(name, DEEPSPEED)
    return f" (did you mean {close}?)" if close else ""


_MEETING: list[Any] = []  # the store, which rank 0 serves to the others as long as the process lives


def meet(patience: timedelta = PATIENCE) -> None:
    """Waits until all processes of the launcher have started; raises ``UserError`` where they do not within ``patience``.

    torch alone would wait as long as for a collective, in an evaluation for days, and for a host without an address too.
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
            missing = [number for number in range(size) if not store.check([str(number)])]
            raise UserError(
                f"{size} processes were to meet at {place}, but rank {', '.join(map(str, missing[:8]))} has not come within "
                f"{patience}; see what became of it, or correct WORLD_SIZE (num_processes, num_machines)"
            ) from None
    except OSError as error:
        raise _no_meeting(f"{place}: the host has no address here ({error.strerror})") from None
    except RuntimeError as error:  # DistNetworkError, DistStoreError
        reason = " ".join(str(error).split())
        if "EADDRINUSE" in reason or "address already in use" in reason.lower():
            raise _no_meeting(
                f"{place}: the port is in use; choose another MASTER_PORT (--main_process_port)"
            ) from None
        raise _no_meeting(f"{place}: rank {rank} does not reach rank 0 within {patience} ({reason[:160]})") from None
    finally:
        told.cancel()


def _no_meeting(reason: str) -> UserError:
    error = UserError(f"{reason}; the address and port are those of rank 0, the same for all processes")
    error.every_rank = False
    return error
