"""Checks the settings of the launcher, its config and the environment: each one is either obeyed or refused.

accelerate reads its settings from environment variables, into which ``accelerate launch`` copies its config. Many of
them do not suit these training loops: a compiled or sharded model would not be saved as it was trained, and gradients
would be accumulated elsewhere. ``RULES`` lists every variable that accelerate reads, ``DEEPSPEED`` the fields of a
DeepSpeed json. An unknown variable is ignored with a warning, an unknown field is refused.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from utils.cli import did_you_mean
from utils.errors import OwnError, UserError
from utils.text_files import parse_json, read_text_file

logger = logging.getLogger(__name__)

TRUE = ("true", "1", "yes", "y", "t", "on")  # the texts that accelerate reads as true
FALSE = ("false", "0", "no", "n", "f", "off")
OFF = (*FALSE, "", "none")


class Rule(NamedTuple):
    """The values that a setting may have, in lower case (None: any), and the advice for every other value."""

    allowed: tuple[str, ...] | None
    instead: str


ANYTHING = Rule(None, "")


def _all(names: str, rule: Rule = ANYTHING) -> dict[str, Any]:
    return dict.fromkeys(names.split(), rule)


_SWITCH = Rule((*TRUE, *FALSE), "write true or false")
_DEVICE = Rule(("none", "cpu"), "write none or cpu")
_STAGE = Rule(("1", "2", "3"), "write 1, 2 or 3; without sharding: accelerate_configs/ddp.yaml")
NO_FP16 = "fp16 is not supported with DeepSpeed here; use bf16 or no in the accelerate config"
_NO_FSDP = Rule(OFF, "sharding is DeepSpeed's here: accelerate_configs/zero2.yaml or zero3.yaml")
_NO_LOADER = Rule(OFF, "the scripts deal out the data themselves, by --seed and --global_batch_size")
_NO_TF32 = "use --tf32 true, which leaves the patch embedding in float32"
_NO_XLA = Rule(OFF, "precision is mixed_precision of the accelerate config")

RULES: dict[str, Rule] = {
    # Allowed: without effect, read only together with a refused setting, or checked elsewhere in this module.
    **_all("""
        ACCELERATE_DEEPSPEED_CONFIG_FILE ACCELERATE_CONFIG_DS_FIELDS ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH
        ACCELERATE_DYNAMO_MODE ACCELERATE_ALLOW_CP_STANDALONE ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE
        ACCELERATE_BYPASS_DEVICE_MAP ACCELERATE_INIT_INCLUDE_BUFFERS ACCELERATE_LOG_LEVEL ACCELERATE_ENABLE_RICH
        ACCELERATE_IN_TPU_POD ACCELERATE_NUM_PROCESSES ACCELERATE_DEBUG_RDV_FILE
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS ACCELERATE_GRADIENT_CLIPPING
    """),
    # Obeyed.
    "ACCELERATE_MIXED_PRECISION": Rule(("no", "bf16", "fp16"), "write no, bf16 or fp16"),
    "ACCELERATE_USE_DEEPSPEED": Rule(("true", "false"), "write true or false"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": _STAGE,
    **_all("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", _DEVICE),
    **_all("ACCELERATE_USE_CPU ACCELERATE_DEBUG_MODE ACCELERATE_CPU_AFFINITY", _SWITCH),
    # Without effect, but accelerate fails for any other text.
    **_all("ACCELERATE_DEEPSPEED_ZERO3_INIT ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION FORK_LAUNCHED", _SWITCH),
    **_all("ACCELERATE_DYNAMO_USE_FULLGRAPH ACCELERATE_DYNAMO_USE_DYNAMIC", _SWITCH),
    # Refused unless they are switched off.
    "ACCELERATE_DYNAMO_BACKEND": Rule(OFF, "compile with --compile true"),
    "ACCELERATE_FP8_BACKEND": Rule(("no",), "precision is no, bf16 or fp16"),
    **_all("ACCELERATE_USE_FSDP ACCELERATE_USE_MEGATRON_LM ACCELERATE_USE_PARALLELISM_CONFIG", _NO_FSDP),
    "ACCELERATE_USE_SAGEMAKER": Rule(OFF, "start it on the machine itself"),
    "ACCELERATE_DOWNCAST_BF16": Rule(OFF, "it is for TPUs; mixed_precision: bf16 is enough"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": Rule(OFF, "no encoder here has such layers"),
    "ACCELERATE_TORCH_DEVICE": Rule((), "choose GPUs by CUDA_VISIBLE_DEVICES, the CPU by ACCELERATE_USE_CPU=true"),
    **_all("XLA_USE_BF16 XLA_DOWNCAST_BF16", _NO_XLA),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Rule(OFF, _NO_TF32),
    "NVIDIA_TF32_OVERRIDE": Rule(("0", ""), _NO_TF32),
    # Refused: this accelerate does not read them, so they would not do what the user expects.
    "ACCELERATE_USE_IPEX": Rule(OFF, "IPEX is not used"),
    "ACCELERATE_USE_XPU": Rule(OFF, "the scripts run on CPUs and CUDA GPUs"),
    **_all("ACCELERATE_SPLIT_BATCHES ACCELERATE_DISPATCH_BATCHES ACCELERATE_EVEN_BATCHES", _NO_LOADER),
    "ACCELERATE_USE_SEEDABLE_SAMPLER": _NO_LOADER,
    "ACCELERATE_STEP_SCHEDULER_WITH_OPTIMIZER": Rule(OFF, "the scripts set the learning rate, see --warmup_steps"),
}
# Settings of an accelerate config that have another name than their variable.
IN_CONFIG = {
    "ACCELERATE_USE_DEEPSPEED": "distributed_type",
    "ACCELERATE_USE_FSDP": "distributed_type: FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "distributed_type: MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "compute_environment",
    "ACCELERATE_DEBUG_MODE": "debug",
    "ACCELERATE_CPU_AFFINITY": "enable_cpu_affinity",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_config: dynamo_backend",
    "ACCELERATE_FP8_BACKEND": "fp8_config: backend",
    "ACCELERATE_USE_IPEX": "ipex_config: ipex",
    "ACCELERATE_USE_XPU": "ipex_config: use_xpu",
}
# Prefixes of variables that accelerate reads only together with a refused setting.
REFUSED_ELSEWHERE = ("ACCELERATE_DYNAMO_", "ACCELERATE_FP8_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# Fields of a DeepSpeed json. "auto" is allowed where the scripts or the accelerate config's precision fill it in.
DEEPSPEED: dict[str, Any] = {
    **_all("steps_per_print wall_clock_breakdown dump_state memory_breakdown flops_profiler comms_logger tensorboard"),
    **_all("wandb csv_monitor comet zero_allow_untested_optimizer aio disable_allgather timers monitor_config"),
    "zero_optimization": {
        **_all("""
            overlap_comm contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
            allgather_partitions allgather_bucket_size round_robin_gradients sub_group_size ignore_unused_parameters
            memory_efficient_linear stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size
            stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_use_all_reduce_for_fetch_params
            stage3_module_granularity_threshold stage3_gather_16bit_weights_on_model_save
        """),
        "stage": _STAGE,
        "offload_optimizer": {"device": _DEVICE, **_all("pin_memory buffer_count fast_init")},
        "offload_param": {"device": _DEVICE, **_all("pin_memory buffer_count buffer_size max_in_cpu")},
    },
    "bf16": {"enabled": Rule((*TRUE, *FALSE, "auto"), "write true or false")},
    "fp16": {"enabled": Rule((*FALSE, "auto"), NO_FP16)},
    "zero_force_ds_cpu_optimizer": Rule(FALSE, "the optimizer is --optimizer, also where its state is offloaded"),
    "communication_data_type": Rule(("fp32", "float32"), "gradients are averaged in float32"),
    "data_types": {"grad_accum_dtype": Rule(("fp32", "float32"), "gradients are kept in float32")},
    "optimizer": Rule((), "the optimizer is --optimizer with --learning_rate and --weight_decay"),
    "scheduler": Rule((), "the learning rate follows --learning_rate, --warmup_steps and a cosine"),
    "amp": Rule((), "precision is bf16 in the json, or mixed_precision"),
    "activation_checkpointing": Rule((), "use --gradient_checkpointing true"),
    "compile": Rule((), "compile with --compile true"),
    "checkpoint": Rule((), "checkpoints are the scripts' own, see --checkpoint_steps"),
}
AUTO = ("bf16.enabled", "fp16.enabled", "zero_optimization.stage3_gather_16bit_weights_on_model_save")
# DeepSpeed's name of a number -> the flag that sets it.
FLAGS = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "train_batch_size": "--global_batch_size",
}
Numbers = Mapping[str, float]  # of a run, by the names in FLAGS; empty if nothing is trained
_EXAMPLES = "see accelerate_configs/deepspeed/"
LAUNCHERS = "accelerate launch or torchrun, under SLURM with srun python slurm/rank.py"


def check_launch(numbers: Numbers, compile: bool = False) -> int:
    """Returns the number of processes. Raises ``UserError`` for a setting that these scripts would not follow.

    Normalises the variables that accelerate reads afterwards.
    """
    processes = launched_processes()
    for field in ("gradient_accumulation_steps", "gradient_clipping"):
        name, flag, number = f"ACCELERATE_{field.upper()}", FLAGS[field], numbers.get(field)
        if number is not None and not _says(name, ("auto", "none", "", f"{number:g}", str(float(number)))):
            meant = f"write {flag} {os.environ[name]} if that is meant"
            raise UserError(f"{_said(name)}, but {flag} is {number:g}; remove it there, and {meant}")
        os.environ.pop(name, None)  # accelerate would prefer it to the flag, and reads "auto" only with DeepSpeed
    for name in sorted(os.environ):
        rule = RULES.get(name)
        if rule and rule.allowed is not None and not _says(name, rule.allowed):
            raise UserError(f"{_said(name)}: {rule.instead}")
        if not rule and name.startswith("ACCELERATE_") and not name.startswith(REFUSED_ELSEWHERE):
            hint = did_you_mean(name, RULES)
            logger.warning("%s is no setting of accelerate that is known here%s; it is not obeyed", name, hint)
        if name == "ACCELERATE_MIXED_PRECISION":
            os.environ[name] = os.environ[name].strip().lower()
    _check_gpus()
    if _says("ACCELERATE_USE_DEEPSPEED", TRUE):
        if numbers:
            micro_batches = processes * numbers["gradient_accumulation_steps"]
            numbers = {**numbers, "train_batch_size": micro_batches * numbers["train_micro_batch_size_per_gpu"]}
        _check_deepspeed(numbers)
    if compile:
        _check_compiler()
    return processes


def _says(name: str, values: tuple[str, ...]) -> bool:
    return os.environ.get(name, "").strip().lower() in values


def _said(name: str) -> str:
    setting = IN_CONFIG.get(name) or re.sub("^ACCELERATE_(DEEPSPEED_)?", "", name).lower()
    in_config = f"{setting} in the accelerate config, or " if name.startswith("ACCELERATE_") else ""
    return f"{name}={os.environ[name]} ({in_config}in the environment)"


def launched_processes() -> int:
    """The number of processes according to the launcher, before they form a group.

    Raises ``UserError`` if the launcher's variables are incomplete or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given or given == {"WORLD_SIZE": "1"}:
        _refuse_lone_processes()
        return 1
    if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise OwnError(
            f"{said} in the environment without {', '.join(missing)}: a part of what a launcher sets; start with "
            f"{LAUNCHERS}, or unset {' and '.join(given)} for a run of one process"
        )
    size = _number("WORLD_SIZE", 1, 2**31)
    _number("RANK", 0, size - 1)
    _number("MASTER_PORT", 1, 2**16 - 1)
    local_size = _number("LOCAL_WORLD_SIZE", 1, 2**31) if "LOCAL_WORLD_SIZE" in os.environ else size
    _number("LOCAL_RANK", 0, local_size - 1)
    return size


def _number(name: str, low: int, high: int) -> int:
    text = os.environ[name]
    if not (re.fullmatch("[0-9]{1,10}", text) and low <= int(text) <= high):
        expected = f"expected a whole number from {low} to {high}"
        raise OwnError(f"{name}={text} in the environment: {expected}; start with {LAUNCHERS}, which set it")
    return int(text)


def _refuse_lone_processes() -> None:
    """UserError if several processes were started, or asked for, other than by accelerate launch or torchrun."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("1", "0", ""):
            said = f"{name}={os.environ[name]} in the environment"
            raise UserError(f"{said}: started by MPI, which is not read here; start with {LAUNCHERS}")
    # accelerate launch sets both variables for --num_processes 2 and more, even if it then starts a single process.
    if os.environ.get("MASTER_ADDR") == "127.0.0.1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and has started one (distributed_type: MULTI_CPU, or "
            "--cpu); use accelerate_configs/cpu_2proc.yaml with --num_processes"
        )


def _check_gpus() -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _says("ACCELERATE_USE_CPU", TRUE):
        return
    if torch.cuda.is_available():
        rank, gpus = os.environ.get("LOCAL_RANK") or "0", torch.cuda.device_count()
        if 1 < gpus <= int(rank):
            where = "num_processes or gpu_ids of the accelerate config, CUDA_VISIBLE_DEVICES"
            raise OwnError(f"LOCAL_RANK={rank}, but {gpus} GPUs are visible; start a process per GPU ({where})")
    elif visible is not None:
        hidden = visible.strip() in ("", "-1", "NoDevFiles")
        if not hidden or _says("ACCELERATE_USE_CPU", FALSE):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible!r} (or gpu_ids in the accelerate config) leaves no GPU that torch "
                "finds; correct it, or use accelerate_configs/cpu.yaml (ACCELERATE_USE_CPU=true) to run on the CPU"
            )


def _check_compiler() -> None:
    """UserError if torch.compile would do nothing, or fail at the first batch."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name, "") not in ("", "0"):
            raise UserError(f"--compile true: {name}={os.environ[name]} switches it off; unset one of the two")
    compilers = [os.environ.get("CXX") or "g++"]
    if torch.cuda.is_available() and not _says("ACCELERATE_USE_CPU", TRUE):
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
        if importlib.util.find_spec("triton") is None:
            raise UserError("--compile true: needs the package triton on a GPU; install it, or leave --compile out")
    if not any(map(shutil.which, compilers)):
        missing = f"no {' or '.join(compilers)} is found"
        raise UserError(f"--compile true: needs a compiler, {missing}; install g++, or leave --compile out")


def _check_deepspeed(numbers: Numbers) -> None:
    if "RANK" not in os.environ:
        asked = "ACCELERATE_USE_DEEPSPEED=true (DeepSpeed in the accelerate config)"
        raise UserError(f"{asked}: DeepSpeed needs a launcher; start with {LAUNCHERS}")
    if _says("ACCELERATE_MIXED_PRECISION", ("fp16",)):
        raise UserError(f"mixed_precision: {NO_FP16}")
    if not torch.cuda.is_available():
        for tool, program in (("g++", os.environ.get("CXX", "g++")), ("ninja", "ninja")):
            if not shutil.which(program):
                found = f"DeepSpeed on the CPU compiles its collectives: no {tool} is found"
                raise UserError(f"{found}; install it, or use accelerate_configs/cpu_2proc.yaml")
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != "none":
        where = f"{path} (deepspeed_config_file in the accelerate config)"
        check_deepspeed_json(read_text_file(path, where), where, numbers)


def check_deepspeed_json(text: str, where: str, numbers: Numbers) -> None:
    """Raises ``UserError`` for a DeepSpeed config that is not JSON or has a setting that these scripts refuse."""
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); {_EXAMPLES}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(f'{where}: expected an object with "zero_optimization" in it; {_EXAMPLES}')
    if "stage" not in config["zero_optimization"]:
        raise UserError(f"{where}: zero_optimization.stage: missing; write 1, 2 or 3")
    _check_fields(config, DEEPSPEED, where, "", numbers)
    if config.get("bf16", {}).get("enabled") is False and _says("ACCELERATE_MIXED_PRECISION", ("bf16",)):
        raise UserError(f"{where}: bf16.enabled is false, but mixed_precision is bf16; say the same in both")


def _check_fields(section: dict[str, Any], rules: dict[str, Any], where: str, prefix: str, numbers: Numbers) -> None:
    for key, value in section.items():
        name, rule, problem = prefix + key, rules.get(key), ""
        of_section, off = isinstance(value, dict), value is False or value is None
        if of_section:
            off = str(value.get("enabled")).lower() in FALSE
        if name in FLAGS:
            if name in numbers and value not in ("auto", numbers[name]):
                problem = f'{value!r}, but {FLAGS[name]} is {numbers[name]:g}; write "auto" in the json'
        elif value == "auto" and name not in AUTO:
            problem = f"'auto' is not filled in here; write a value, {_EXAMPLES}"
        elif isinstance(rule, dict) and not of_section:
            problem = f"expected an object in braces; {_EXAMPLES}"
        elif off:
            continue
        elif isinstance(rule, dict):
            _check_fields(value, rule, where, f"{name}.", numbers)
        elif rule is None:
            problem = f"not tried with these scripts; remove it{did_you_mean(key, rules, prefix)}"
        elif rule.allowed is not None and str(value).lower() not in rule.allowed:
            problem = rule.instead
        if problem:
            raise UserError(f"{where}: {name}: {problem}")
