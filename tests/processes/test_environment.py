"""What a launcher asks for is obeyed or refused: accelerate's variables, DeepSpeed's json, ranks that do not meet."""

import contextlib
import json
import os
import re
import socket
import sys
import types
from datetime import timedelta
from pathlib import Path

import accelerate
import pytest
import torch

import evaluate
import train_lore
import train_po
from tests.conftest import ROOT, flags, free_port, run_script
from utils.errors import UserError
from utils.processes import distributed, environment, tracker
from utils.processes.distributed import meet, start_accelerator, warn_of_emulation
from utils.processes.environment import REFUSED_ELSEWHERE, RULES, check_deepspeed_json, check_launch, launched_processes
from utils.processes.tracker import check_tracker, end_training, log_row, start_tracker

RUN = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
GROUP = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DEEPSPEED = GROUP | {"ACCELERATE_USE_DEEPSPEED": "true"}
OF_A_LAUNCHER = re.compile(
    r"ACCELERATE_|RANK|WORLD_SIZE|LOCAL_|MASTER_|PMI_|OMPI_|MV2_|CUDA_VISIBLE|TORCH|FSDP_|WANDB_"
)


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in list(os.environ):
        if OF_A_LAUNCHER.match(name):
            monkeypatch.delenv(name)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


REFUSED = [
    # accelerate#1011, #1207, #3281
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
     r"=3 \(gradient_accumulation_steps in .*--gradient_accumulation_steps is 2"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"}, "write --gradient_accumulation_steps x if that is meant"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, r"--max_grad_norm is 0; remove it"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
     r"dynamo_config: dynamo_backend in the accelerate config.*: compile with --compile true"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, r"\(mixed_precision in the .*: write no, bf16 or fp16"),
    ({"ACCELERATE_MIXED_PRECISION": ""}, "write no, bf16 or fp16"),
    ({"ACCELERATE_MIXED_PRECISION": "float16"}, "write no, bf16 or fp16"),
    ({"ACCELERATE_FP8_BACKEND": "MSAMP"}, "precision is no, bf16 or fp16"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, r"distributed_type: FSDP in .*zero2.yaml"),
    ({"ACCELERATE_USE_FSDP": "1"}, "sharding is DeepSpeed's here"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "sharding is DeepSpeed's here"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, r"\(parallelism_config in"),
    ({"ACCELERATE_USE_SAGEMAKER": "true"}, "on the machine itself"),
    ({"ACCELERATE_DOWNCAST_BF16": "yes"}, r"\(downcast_bf16 in"),
    ({"XLA_USE_BF16": "1"}, "mixed_precision"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "choose GPUs by CUDA_VISIBLE_DEVICES"),
    ({"ACCELERATE_USE_IPEX": "true"}, "IPEX is not used"),
    ({"ACCELERATE_SPLIT_BATCHES": "true"}, "deal out the data themselves"),
    ({"ACCELERATE_DISPATCH_BATCHES": "1"}, "deal out the data themselves"),
    ({"ACCELERATE_STEP_SCHEDULER_WITH_OPTIMIZER": "true"}, "--warmup_steps"),
    ({"ACCELERATE_USE_CPU": "maybe"}, "write true or false"),
    ({"ACCELERATE_DEBUG_MODE": "2"}, "write true or false"),
    ({"ACCELERATE_USE_DEEPSPEED": "1"}, "write true or false"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed needs a launcher"),
    ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, "use --tf32 true"),
    ({"NVIDIA_TF32_OVERRIDE": "1"}, "use --tf32 true"),
    (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, r"\(zero_stage in .*: write 1, 2 or 3"),
    (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
     r"\(offload_optimizer_device in .*: write none or cpu"),
    (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "write none or cpu"),
    (DEEPSPEED | {"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "X"}, "no encoder here has such layers"),
    (DEEPSPEED | {"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 is not supported with DeepSpeed"),
    (DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "--max_grad_norm is 0"),
    (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"},
     r"/nowhere.json \(deepspeed_config_file .*cannot be read"),
    # Ranks. trl#636, accelerate#2295, llama#391
    ({"RANK": "0"}, r"RANK=0 in the environment without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2 in the environment without RANK"),
    ({"LOCAL_RANK": "0"}, "without RANK"),
    ({"RANK": "0", "SLURM_JOB_ID": "7"}, r"under SLURM with srun python slurm/rank.py"),
    (GROUP | {"MASTER_ADDR": ""}, "without MASTER_ADDR"),
    (GROUP | {"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment: expected a whole number from 1 to"),
    (GROUP | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 .*from 1"),
    (GROUP | {"RANK": "2"}, "RANK=2 in the environment: expected a whole number from 0 to 1"),
    (GROUP | {"RANK": "-1"}, "RANK=-1 .*a whole number"),
    (GROUP | {"RANK": "\u0661"}, "a whole number"),
    (GROUP | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=3 .*from 0 to 1"),
    (GROUP | {"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE=two"),
    (GROUP | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    (GROUP | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 .*to 65535"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by MPI"),
    ({"PMI_SIZE": "4"}, "started by MPI"),
    ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"},
     "was asked for several processes and has started one"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_would_not_be_done_is_refused(variables, message, monkeypatch):
    set_all(monkeypatch, variables)
    with pytest.raises(UserError, match=message):
        check_launch(RUN)


OBEYED = [
    {}, {"WORLD_SIZE": "1"}, {"PMI_SIZE": "1"}, GROUP,
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
    {"ACCELERATE_GRADIENT_CLIPPING": "0.0"},
    {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "BF16"},
    {"ACCELERATE_USE_CPU": "True"}, {"ACCELERATE_DEBUG_MODE": "1"}, {"ACCELERATE_CPU_AFFINITY": "1"},
    # What accelerate launch always sets
    {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_DYNAMO_MODE": "default",
     "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"},
    {"ACCELERATE_DOWNCAST_BF16": "no"}, {"ACCELERATE_USE_FSDP": "false"}, {"FSDP_VERSION": "2"},
    {"ACCELERATE_LOG_LEVEL": "info"},
    DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
    DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "accelerate_configs/deepspeed/zero3_cpu.json")},
]  # fmt: skip


@pytest.mark.parametrize("variables", OBEYED, ids=str)
def test_what_is_done_is_accepted(variables, monkeypatch):
    set_all(monkeypatch, variables)
    check_launch(RUN)
    assert os.environ.get("ACCELERATE_MIXED_PRECISION", "no") in distributed.MIXED_PRECISIONS
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ  # accelerate would let it win over the flag


def test_an_evaluation_has_nothing_to_accumulate(monkeypatch):
    set_all(monkeypatch, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "1.0"})
    check_launch({})


def test_what_is_unknown_is_named(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACUMULATION_STEPS", "4")
    check_launch(RUN)
    assert "did you mean ACCELERATE_GRADIENT_ACCUMULATION_STEPS?" in caplog.text


# launched_processes looks at these together.
OF_THE_LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
OF_MPI = ("PMI_", "MPI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
# For HPUs and Macs, speed, and XLA, on which a run is refused.
HARMLESS = OF_THE_LAUNCHER | {
    *("DEEPSPEED_USE_HPU", "PT_HPU_LAZY_MODE", "PYTORCH_ENABLE_MPS_FALLBACK", "USE_TORCH_XLA"),
    *("OMP_NUM_THREADS", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"),
}


def test_every_variable_that_accelerate_reads_is_classified():
    """A new version of it may read more: each has to get its line in ``RULES``."""
    package = Path(accelerate.__file__).parent
    # Not what starts other processes, makes configs or tests accelerate itself, nor trackers that no flag names.
    elsewhere = ("commands/", "test_utils/", "tracking.py", "launchers.py")
    read = re.compile(
        r"(?:environ(?:\.get\(|\[|\.setdefault\()|from_env\(|getenv\()\s*\[?\s*((?:[\"'][A-Z0-9_]+[\"'],?\s*)+)"
    )
    prefixed = re.compile(r"[\"']((?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]*)[\"']")
    found = set()
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix().startswith(elsewhere):
            continue
        text = path.read_text()
        found.update(prefixed.findall(text))
        if path.name != "launch.py":  # which passes variables of other programs on
            found.update(*(re.findall(r"[A-Z0-9_]{3,}", names) for names in read.findall(text)))
    examples = {"ACCELERATE_", "FOO", "FULL_STATE_DICT", "SHARDED_STATE_DICT", "FSDP_SHARDING_STRATEGY"}
    assert {"ACCELERATE_USE_FSDP", "WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"} <= found
    found -= examples | HARMLESS | set(RULES)
    assert sorted(name for name in found if not name.startswith((*REFUSED_ELSEWHERE, *OF_MPI))) == []


def test_all_scripts_refuse_before_they_look_at_paths(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    nowhere = {
        "output_dir": "/nowhere/run",
        "report_to": "none",
        "model_name_or_path": "/nowhere",
        "train_shards": "/nowhere",
    }
    for script in (train_lore, train_po):
        with pytest.raises(UserError, match="sharding is DeepSpeed's here"):
            script.main(flags(nowhere))
    with pytest.raises(UserError, match="sharding is DeepSpeed's here"):
        evaluate.main(flags({"model": "/nowhere", "data": "/nowhere", "output_dir": "/nowhere/run"}))


# ----------------------------------------------------------------------------------------------------- DeepSpeed's json

EXPECTED = RUN | {"train_batch_size": 16}
CONFIGS = sorted((ROOT / "accelerate_configs/deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_jsons_of_this_repository_are_accepted(path):
    check_deepspeed_json(path.read_text(), path.name, EXPECTED)


@pytest.mark.parametrize(
    "change",
    [
        {"train_batch_size": 16}, {"train_batch_size": "auto"}, {"gradient_clipping": 0}, {"steps_per_print": 10},
        {"flops_profiler": {"enabled": True, "profile_step": 1}}, {"fp16": {"enabled": False, "loss_scale": 0}},
        {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, {"curriculum_learning": {"enabled": False}},
        {"amp": {"enabled": False}}, {"zero_force_ds_cpu_optimizer": False}, {"scheduler": None},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_change_nothing_are_accepted(change):
    check_deepspeed_json(json.dumps({"zero_optimization": {"stage": 2}} | change), "x.json", EXPECTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # trl#636, accelerate#2295
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
         r"x.json: optimizer: the optimizer is --optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler: the learning rate follows"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
         r"zero_optimization.reduce_bucket_size: 'auto' is not filled in"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}},
         r"offload_optimizer.device: 'auto'"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization.stage: write 1, 2 or 3"),
        ({"zero_optimization": {}}, r"zero_optimization.stage: missing"),
        ({"zero_optimization": 3}, r'expected an object with "zero_optimization"'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
         r"offload_param.device: write none or cpu"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, r"offload_param: expected an object in braces"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, r"zero_quantized_gradients: not tried"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_sise": 5}},
         r"did you mean zero_optimization.reduce_bucket_size\?"),
        ({"train_micro_batch_size_per_gpu": 8},
         r"train_micro_batch_size_per_gpu: 8, but --per_device_train_batch_size is 4"),
        ({"train_batch_size": 32}, r"train_batch_size: 32, but"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping: 1.0, but --max_grad_norm is 0"),
        ({"gradient_accumulation_steps": 1}, r"gradient_accumulation_steps: 1, but"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled: fp16 is not supported with DeepSpeed"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, r"fp16.enabled: fp16 is not supported"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
         r"bf16.bf16_master_weights_and_grads: not tried"),
        ({"bf16": True}, r"bf16: expected an object in braces"),
        ({"amp": {"enabled": True}}, r"amp: precision is bf16"),
        ({"sparse_attention": {"mode": "fixed"}}, r"sparse_attention: not tried"),
        ({"curriculum_learning": {"enabled": True}}, r"curriculum_learning: not tried"),
        ({"progressive_layer_drop": {"enabled": True}}, r"progressive_layer_drop: not tried"),
        ({"compression_training": {"weight_quantization": {}}}, r"compression_training: not tried"),
        ({"communication_data_type": "fp16"}, r"communication_data_type: gradients are averaged in float32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"data_types.grad_accum_dtype: gradients are kept in float32"),
        ({"zero_force_ds_cpu_optimizer": True}, r"zero_force_ds_cpu_optimizer: the optimizer is --optimizer"),
        ({"activation_checkpointing": {"partition_activations": True}}, r"--gradient_checkpointing true"),
        ({"my_own": 1}, r"my_own: not tried"),
        ({"my_own": "auto"}, r"my_own: 'auto' is not filled in"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_fields_that_would_change_a_run_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_deepspeed_json(json.dumps({"zero_optimization": {"stage": 2}} | change), "x.json", EXPECTED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"), ("{'a': 1}", "not valid JSON"), ('{"a": 1, // b\n}', "not valid JSON"),
        ("[]", "expected an object"), ("{}", "expected an object"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the name 'stage' twice"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_one_line(text, message):
    with pytest.raises(UserError, match=f"x.json: .*{message}"):
        check_deepspeed_json(text, "x.json", EXPECTED)


def test_two_precisions_are_a_contradiction(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"bf16.enabled is false, but mixed_precision is bf16"):
        check_deepspeed_json('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": false}}', "x.json", EXPECTED)


# --------------------------------------------------------------------------------------------- compilers, GPUs, meeting


def test_what_is_compiled_needs_a_compiler(monkeypatch, tmp_path):
    """pytorch#92745: found at the first batch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    check_launch(RUN, compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile true: needs a compiler, no no-such-compiler is found"):
        check_launch(RUN, compile=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no g\+\+ is found"):
        check_launch(RUN, compile=True)
    check_launch(RUN)
    set_all(monkeypatch, DEEPSPEED)
    with pytest.raises(UserError, match=r"DeepSpeed on the CPU compiles its collectives: no g\+\+ is found"):
        check_launch(RUN)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    with pytest.raises(UserError, match="TORCHDYNAMO_DISABLE=1 switches it off"):
        check_launch(RUN, compile=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with pytest.raises(UserError, match="needs the package triton"):
        check_launch(RUN, compile=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "False"}, "leaves no GPU that torch finds"),
        ({"CUDA_VISIBLE_DEVICES": "7"}, "leaves no GPU that torch finds"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1", "ACCELERATE_USE_CPU": "True"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_USE_CPU": "true"}, None),
    ],
)
def test_gpus_that_are_asked_for_are_there(variables, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_all(monkeypatch, variables)
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_launch(RUN)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    set_all(monkeypatch, GROUP | {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"})
    with pytest.raises(UserError, match="LOCAL_RANK=2, but 2 GPUs are visible") as caught:
        check_launch(RUN)
    assert not caught.value.every_rank


def test_a_rank_that_is_wrong_speaks_for_itself(monkeypatch):
    set_all(monkeypatch, GROUP | {"RANK": "5"})
    with pytest.raises(UserError) as caught:
        launched_processes()
    assert not caught.value.every_rank


def test_a_rank_alone_is_one_line():
    """llama#391. Another rank than 0, which else says nothing."""
    words = flags({"model_name_or_path": "/nowhere", "train_shards": "/nowhere", "output_dir": "/nowhere/run"})
    output = run_script("train_lore.py", *words, status=2, RANK="1")
    assert "train_lore.py: error: RANK=1 in the environment without" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, r"rank 1 has not come within 0:00:01|does not reach"),
        ({"RANK": "1"}, r"rank 1 does not reach rank 0 within 0:00:01"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, r"MASTER_ADDR=no-such-host.invalid .*the host has no address here"),
    ],
)
def test_processes_that_do_not_meet_are_named(variables, message, monkeypatch):
    set_all(monkeypatch, GROUP | {"MASTER_PORT": str(free_port())} | variables)
    with pytest.raises(UserError, match=message):
        meet(timedelta(seconds=1))


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        set_all(monkeypatch, GROUP | {"MASTER_PORT": str(taken.getsockname()[1])})
        with pytest.raises(UserError, match=r"the port is in use; choose another MASTER_PORT \(--main_process_port\)"):
            meet(timedelta(seconds=1))


# ------------------------------------------------------------------------------------------------------------- trackers


def test_wandb_without_a_key_is_one_line_before_training(monkeypatch):
    """unsloth#1914"""
    monkeypatch.setattr(tracker, "is_wandb_available", lambda: False)
    with pytest.raises(UserError, match=r"--report_to wandb: needs the package wandb"):
        check_tracker("wandb")
    fake = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracker, "is_wandb_available", lambda: True)
    with pytest.raises(UserError, match=r"--report_to wandb: not logged in; wandb login once, or WANDB_API_KEY"):
        start_accelerator(report_to="wandb")
    monkeypatch.setattr(fake.api, "api_key", "key")
    check_tracker("wandb")
    monkeypatch.setattr(fake.api, "api_key", None)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "key")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_tracker("wandb")


class Failing:
    """An accelerator whose tracker fails in one of its calls."""

    is_main_process = True

    def __init__(self, where, error):
        self.where, self.error, self.trackers, self.logged = where, error, ["tracker"], 0

    def call(self, name):
        if self.trackers and name == self.where:
            raise self.error
        self.logged += name == "log" and bool(self.trackers)

    def init_trackers(self, *_, **__):
        self.call("init_trackers")

    def log(self, *_, **__):
        self.call("log")

    def end_training(self):
        self.call("end_training")


@pytest.mark.parametrize("where", ["init_trackers", "log", "end_training"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("network"), KeyError("x")])
def test_a_tracker_that_fails_ends_no_run(where, error, tmp_path, caplog):
    accelerator = Failing(where, error)
    start_tracker(accelerator, "wandb", "train_lore", {}, tmp_path, 0)
    for step in (1, 2):
        log_row(accelerator, {"step": step, "loss": 1.0})
    end_training(accelerator)
    assert accelerator.trackers == []
    assert len([record for record in caplog.records if "the run goes on without it" in record.message]) == 1
    assert accelerator.logged == (2 if where == "end_training" else 0)


def test_a_key_that_wandb_lacks_is_one_line(tmp_path):
    error = type("UsageError", (Exception,), {})(
        "api_key not configured (no-tty). call wandb.login(key=[your_api_key])"
    )
    with pytest.raises(UserError, match="not logged in"):
        start_tracker(Failing("init_trackers", error), "wandb", "train_lore", {}, tmp_path, 0)


def test_a_writer_that_has_died_is_not_waited_for(tmp_path, caplog, monkeypatch):
    """tensorboardX: its queue is emptied by a thread that ends at an error; then nothing would ever take a row."""
    accelerator = Failing("", None)
    start_tracker(accelerator, "tensorboard", "train_lore", {}, tmp_path, 0)
    monkeypatch.setattr(tracker, "_WRITERS", [types.SimpleNamespace(is_alive=lambda: False)])
    log_row(accelerator, {"step": 1, "loss": 1.0})
    assert accelerator.logged == 0
    assert "its writing thread has ended" in caplog.text


@pytest.mark.parametrize("supported", [True, False])
def test_a_precision_that_the_cpu_emulates_is_said(monkeypatch, caplog, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"),
        distributed_type=accelerate.DistributedType.NO,
        mixed_precision="bf16",
        is_main_process=True,
    )
    warn_of_emulation(accelerator)
    assert ("mixed_precision bf16: this CPU has no instructions for it" in caplog.text) == (not supported)
    caplog.clear()
    accelerator.mixed_precision = "no"
    warn_of_emulation(accelerator)
    assert not caplog.text
