"""What a launcher, its config and the environment ask for: each setting that would change a run is obeyed or refused.

accelerate reads its settings from the environment, where ``accelerate launch`` puts those of its config. Most were made
for other loops than these: a compiled or sharded model that is not saved as it was trained, gradients that are
accumulated elsewhere. ``RULES`` knows every variable that accelerate reads, ``DEEPSPEED`` the fields of a DeepSpeed
json. An unknown variable changes nothing, an unknown field is refused.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_deepspeed_available

from utils.cli import did_you_mean
from utils.errors import OwnError, UserError
from utils.processes.launcher import launched_processes
from utils.text_files import parse_json, read_text_file

logger = logging.getLogger(__name__)

TRUE = ("true", "1", "yes", "y", "t", "on")  # what accelerate takes for it
FALSE = ("false", "0", "no", "n", "f", "off")
OFF = (*FALSE, "", "none")


class Rule(NamedTuple):
    """What a setting may say, in small letters (None: anything), and what to write in place of anything else."""

    allowed: tuple[str, ...] | None
    instead: str
    setting: str = ""  # what a variable is called in an accelerate config


ANYTHING = Rule(None, "")


def _all(names: str, rule: Rule = ANYTHING) -> dict[str, Any]:
    return dict.fromkeys(names.split(), rule)


_SWITCH = ((*TRUE, *FALSE), "write true or false")
_DEVICE = (("none", "cpu"), "write none or cpu")
_STAGE = (("1", "2", "3"), "write 1, 2 or 3; without sharding: accelerate_configs/ddp.yaml")
NO_FP16 = "fp16 is not supported with DeepSpeed here; use bf16 or no in the accelerate config"
_NO_FSDP = "sharding is DeepSpeed's here: accelerate_configs/zero2.yaml or zero3.yaml"
_NO_LOADER = Rule(OFF, "the scripts deal out the data themselves, by --seed and --global_batch_size")
_NO_TF32 = "use --tf32 true, which leaves the patch embedding in float32"

RULES: dict[str, Rule] = {
    # Without effect, read only with what is refused, or looked at elsewhere here.
    **_all("""
        ACCELERATE_DEEPSPEED_CONFIG_FILE ACCELERATE_CONFIG_DS_FIELDS ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH
        ACCELERATE_DYNAMO_MODE ACCELERATE_ALLOW_CP_STANDALONE ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE
        ACCELERATE_BYPASS_DEVICE_MAP ACCELERATE_INIT_INCLUDE_BUFFERS ACCELERATE_LOG_LEVEL ACCELERATE_ENABLE_RICH
        ACCELERATE_IN_TPU_POD ACCELERATE_NUM_PROCESSES ACCELERATE_DEBUG_RDV_FILE
    """),
    # Obeyed.
    "ACCELERATE_MIXED_PRECISION": Rule(("no", "bf16", "fp16"), "write no, bf16 or fp16", "mixed_precision"),
    "ACCELERATE_USE_CPU": Rule(*_SWITCH, "use_cpu"),
    "ACCELERATE_USE_DEEPSPEED": Rule(("true", "false"), "write true or false", "distributed_type"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": Rule(*_STAGE, "zero_stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": Rule(*_DEVICE, "offload_optimizer_device"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": Rule(*_DEVICE, "offload_param_device"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(None, "", "gradient_accumulation_steps"),  # as the flag says
    "ACCELERATE_GRADIENT_CLIPPING": Rule(None, "", "gradient_clipping"),  # as the flag says
    "ACCELERATE_DEBUG_MODE": Rule(*_SWITCH, "debug"),  # checks shapes in collectives
    "ACCELERATE_CPU_AFFINITY": Rule(*_SWITCH, "enable_cpu_affinity"),
    # Without effect, but accelerate fails at another text.
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": Rule(*_SWITCH, "zero3_init_flag"),  # models are built whole
    **_all("ACCELERATE_DYNAMO_USE_FULLGRAPH ACCELERATE_DYNAMO_USE_DYNAMIC", Rule(*_SWITCH)),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": Rule(*_SWITCH),
    "FORK_LAUNCHED": Rule((*TRUE, *FALSE), "unset it"),
    # Refused, unless they say that they are off.
    "ACCELERATE_DYNAMO_BACKEND": Rule(OFF, "compile with --compile true", "dynamo_config: dynamo_backend"),
    "ACCELERATE_FP8_BACKEND": Rule(("no",), "precision is no, bf16 or fp16", "fp8_config: backend"),
    "ACCELERATE_USE_FSDP": Rule(OFF, _NO_FSDP, "distributed_type: FSDP"),
    "ACCELERATE_USE_MEGATRON_LM": Rule(OFF, _NO_FSDP, "distributed_type: MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Rule(OFF, _NO_FSDP, "parallelism_config"),
    "ACCELERATE_USE_SAGEMAKER": Rule(OFF, "start it on the machine itself", "compute_environment"),
    "ACCELERATE_DOWNCAST_BF16": Rule(OFF, "it is for TPUs; mixed_precision: bf16 is enough", "downcast_bf16"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": Rule(
        OFF, "no encoder here has such layers", "deepspeed_moe_layer_cls_names"
    ),
    "ACCELERATE_TORCH_DEVICE": Rule((), "choose GPUs by CUDA_VISIBLE_DEVICES, the CPU by ACCELERATE_USE_CPU=true"),
    **_all("XLA_USE_BF16 XLA_DOWNCAST_BF16", Rule(OFF, "precision is mixed_precision of the accelerate config")),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Rule(OFF, _NO_TF32),
    "NVIDIA_TF32_OVERRIDE": Rule(("0", ""), _NO_TF32),
    # Of other versions of accelerate, or believed to be: whoever sets them would be deceived.
    "ACCELERATE_USE_IPEX": Rule(OFF, "IPEX is not used", "ipex_config: ipex"),
    "ACCELERATE_USE_XPU": Rule(OFF, "the scripts run on CPUs and CUDA GPUs", "ipex_config: use_xpu"),
    **_all("ACCELERATE_SPLIT_BATCHES ACCELERATE_DISPATCH_BATCHES ACCELERATE_EVEN_BATCHES", _NO_LOADER),
    "ACCELERATE_USE_SEEDABLE_SAMPLER": _NO_LOADER,
    "ACCELERATE_STEP_SCHEDULER_WITH_OPTIMIZER": Rule(OFF, "the scripts set the learning rate, see --warmup_steps"),
}
# Beginnings of variables that accelerate reads only with what is refused.
REFUSED_ELSEWHERE = ("ACCELERATE_DYNAMO_", "ACCELERATE_FP8_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# With a DeepSpeed json, accelerate refuses these beside it.
IN_THE_JSON = {
    *("gradient_accumulation_steps", "gradient_clipping", "mixed_precision", "zero_stage", "zero3_save_16bit_model"),
    *("offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path"),
}
# A DeepSpeed json. "auto" may stand where the scripts, or the precision of the accelerate config, fill it in.
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
        "stage": Rule(*_STAGE),
        "offload_optimizer": {"device": Rule(*_DEVICE), **_all("pin_memory buffer_count fast_init")},
        "offload_param": {"device": Rule(*_DEVICE), **_all("pin_memory buffer_count buffer_size max_in_cpu")},
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
_EXAMPLES = "see accelerate_configs/deepspeed/"
Expected = Mapping[str, float | None]  # what the flags say, by DeepSpeed's names; None where nothing is trained


def check_launch(
    *,
    per_device_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    max_grad_norm: float | None = None,
    compile: bool = False,
) -> int:
    """Processes of the run. Raises ``UserError`` where something is asked for that these scripts would not do.

    The arguments are the run's own; None where nothing is trained. The environment is left as accelerate reads it.
    """
    processes = launched_processes()
    flags: dict[str, tuple[str, float | None]] = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("--gradient_accumulation_steps", gradient_accumulation_steps),
        "ACCELERATE_GRADIENT_CLIPPING": ("--max_grad_norm", max_grad_norm),
    }
    for name in sorted(os.environ):
        rule, value = RULES.get(name), os.environ[name].strip().lower()
        if name in flags:
            _check_number(name, value, *flags[name])
        elif rule:
            if rule.allowed is not None and value not in rule.allowed:
                raise UserError(f"{_said(name)}: {rule.instead}")
        elif name.startswith("ACCELERATE_") and not name.startswith(REFUSED_ELSEWHERE):
            hint = did_you_mean(name, RULES)
            logger.warning("%s is no setting of accelerate that is known here%s; it is not obeyed", name, hint)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        os.environ["ACCELERATE_MIXED_PRECISION"] = os.environ["ACCELERATE_MIXED_PRECISION"].strip().lower()
    _check_gpus()
    if _says("ACCELERATE_USE_DEEPSPEED", TRUE):
        total = processes * (per_device_batch_size or 0) * (gradient_accumulation_steps or 0)
        expected = {
            "train_micro_batch_size_per_gpu": per_device_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_clipping": max_grad_norm,
            "train_batch_size": total or None,
        }
        _check_deepspeed(expected)
    if compile:
        _check_compiler()
    return processes


def _says(name: str, values: tuple[str, ...]) -> bool:
    return os.environ.get(name, "").strip().lower() in values


def _said(name: str) -> str:
    in_config = f"{RULES[name].setting} in the accelerate config, or " if RULES[name].setting else ""
    return f"{name}={os.environ[name]} ({in_config}in the environment)"


def _check_number(name: str, value: str, flag: str, expected: float | None) -> None:
    """accelerate's own accumulation and clipping: refused where they are not what the flag says."""
    if expected is not None and value not in ("auto", "none", ""):
        try:
            same = float(value) == expected
        except ValueError:
            same = False
        if not same:
            meant = f"write {flag} {value} if that is meant"
            raise UserError(f"{_said(name)}, but {flag} is {expected:g}; remove it there, and {meant}")
    del os.environ[name]  # accelerate would let it win, and reads no "auto" outside of DeepSpeed


def _check_gpus() -> None:
    if _says("ACCELERATE_USE_CPU", TRUE):
        return
    if torch.cuda.is_available():
        rank, gpus = os.environ.get("LOCAL_RANK") or "0", torch.cuda.device_count()
        if 1 < gpus <= int(rank):
            where = "num_processes or gpu_ids of the accelerate config, CUDA_VISIBLE_DEVICES"
            raise OwnError(f"LOCAL_RANK={rank}, but {gpus} GPUs are visible; start a process per GPU ({where})")
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    if visible is None or (hidden and not _says("ACCELERATE_USE_CPU", FALSE)):
        return
    found = "hides every GPU and use_cpu of the accelerate config is false" if hidden else "and torch finds no such GPU"
    raise UserError(
        f"CUDA_VISIBLE_DEVICES={visible!r} (or gpu_ids in the accelerate config) {found}; correct it, or use "
        "accelerate_configs/cpu.yaml (ACCELERATE_USE_CPU=true) to run on the CPU"
    )


def _check_compiler() -> None:
    """UserError where torch.compile would do nothing, or fail at the first batch."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name, "") not in ("", "0"):
            raise UserError(f"--compile true: {name}={os.environ[name]} switches it off; unset one of the two")
    compilers = [os.environ.get("CXX") or "g++"]
    if torch.cuda.is_available() and not _says("ACCELERATE_USE_CPU", TRUE):
        if importlib.util.find_spec("triton") is None:
            raise UserError("--compile true: needs the package triton on a GPU; install it, or leave --compile out")
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    if not any(map(shutil.which, compilers)):
        missing = f"no {' or '.join(compilers)} is found"
        raise UserError(f"--compile true: needs a compiler, {missing}; install g++, or leave --compile out")


def _check_deepspeed(expected: Expected) -> None:
    asked = "ACCELERATE_USE_DEEPSPEED=true (DeepSpeed in the accelerate config)"
    if not is_deepspeed_available():
        raise UserError(f"{asked}: it is not installed; install it, or use accelerate_configs/ddp.yaml")
    if "RANK" not in os.environ:
        raise UserError(f"{asked}: DeepSpeed needs a launcher; start with accelerate launch or torchrun")
    if _says("ACCELERATE_USE_CPU", TRUE):
        both = "leave use_cpu out of the config and ACCELERATE_USE_CPU out of the environment"
        raise UserError(f"{asked}, but accelerate leaves it out where the CPU is asked for; {both}")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError(f"mixed_precision: {NO_FP16}")
    if not torch.cuda.is_available():
        for tool, program in (("g++", os.environ.get("CXX", "g++")), ("ninja", "ninja")):
            if not shutil.which(program):
                found = f"DeepSpeed on the CPU compiles its collectives: no {tool} is found"
                raise UserError(f"{found}; install it, or use accelerate_configs/cpu_2proc.yaml")
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return
    where = f"{path} (deepspeed_config_file in the accelerate config)"
    fields = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    if twice := ", ".join(field for field in fields if field in IN_THE_JSON):
        raise UserError(
            f"{twice} in the accelerate config beside {where}, which alone is read; take it out of the config"
        )
    check_deepspeed_json(read_text_file(path, where), where, expected)


def check_deepspeed_json(text: str, where: str, expected: Expected) -> None:
    """Raises ``UserError`` for a DeepSpeed config that is no JSON or asks for what these scripts would not do."""
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); {_EXAMPLES}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(f'{where}: expected an object with "zero_optimization" in it; {_EXAMPLES}')
    if "stage" not in config["zero_optimization"]:
        raise UserError(f"{where}: zero_optimization.stage: missing; write 1, 2 or 3")
    for name, problem in _wrong_fields(config, DEEPSPEED, "", expected):
        raise UserError(f"{where}: {name}: {problem}")
    if config.get("bf16", {}).get("enabled") is False and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        raise UserError(f"{where}: bf16.enabled is false, but mixed_precision is bf16; say the same in both")


def _wrong_fields(
    section: dict[str, Any], rules: dict[str, Any], prefix: str, expected: Expected
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of a section of the json."""
    for key, value in section.items():
        name, rule = prefix + key, rules.get(key)
        off = value is False or value is None
        if isinstance(value, dict):
            off = str(value.get("enabled")).lower() in FALSE
        if name in expected:
            if value not in ("auto", expected[name]) and expected[name] is not None:
                flags = "--per_device_train_batch_size and --gradient_accumulation_steps"
                flags = "--max_grad_norm" if name == "gradient_clipping" else flags
                yield name, f'{value!r}, but {flags} give {expected[name]:g}; write "auto" in the json'
        elif value == "auto" and name not in AUTO:
            yield name, f"'auto' is not filled in here; write a value, {_EXAMPLES}"
        elif isinstance(rule, dict) and not isinstance(value, dict):
            yield name, f"expected an object in braces; {_EXAMPLES}"
        elif off:
            continue
        elif isinstance(rule, dict):
            yield from _wrong_fields(value, rule, f"{name}.", expected)
        elif rule is None:
            yield name, f"not tried with these scripts; remove it{did_you_mean(key, rules, prefix)}"
        elif rule.allowed is not None and str(value).lower() not in rule.allowed:
            yield name, rule.instead
