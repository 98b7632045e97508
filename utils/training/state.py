"""The training state as whole, named tensors, the same under DDP and every ZeRO stage.

A run can resume from them with any number of processes and any stage. The exception is an 8-bit optimizer under ZeRO:
its blocks are made of one process's partition, so each process keeps its own.

    parameters.safetensors                  {parameter: tensor}, float32
    optimizer.<key>.safetensors             {parameter: tensor} for exp_avg, exp_avg_sq, step or other keys
    optimizer.process-<rank>.safetensors    {<share>/<key>: tensor}, 8-bit optimizers under ZeRO only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.errors import UserError
from utils.training.optimization import load_optimizer_state

Tensors = dict[str, Tensor]
OWN_SHARE = "optimizer.process-{rank}"


def flatten(
    nested: dict[Any, Any] | list[Any] | tuple[Any, ...], prefix: str = ""
) -> tuple[Tensors, dict[str, int | float]]:
    """Nested dictionaries and lists -> tensors on the CPU and numbers, both by path ``a/b/c``, without None values."""
    tensors: Tensors = {}
    numbers: dict[str, int | float] = {}
    for key, value in nested.items() if isinstance(nested, dict) else enumerate(nested):
        path = f"{prefix}{key}"
        if isinstance(value, (dict, list, tuple)):
            inner = flatten(value, path + "/")
            tensors |= inner[0]
            numbers |= inner[1]
        elif isinstance(value, Tensor):
            tensors[path] = _own(value)
        elif isinstance(value, (int, float)):
            numbers[path] = value
        elif value is not None:
            raise TypeError(f"{path} is a {type(value).__name__}: neither a tensor nor a number")
    return tensors, numbers


def unflatten(values: dict[str, Any]) -> dict[Any, Any]:
    """Turns paths back into nested dictionaries; keys that are whole numbers become integers again."""
    nested: dict[Any, Any] = {}
    for path, value in values.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def collect(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, write: Callable[[str, Tensors], None]
) -> dict[str, Any]:
    """Passes parameters and optimizer state to ``write(file stem, tensors)``, file by file; returns plain numbers.

    Call on all processes with the prepared model: ZeRO gathers here. The main process writes, and each its own part.
    """
    parameters = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        write("parameters", {name: _own(tensor) for name, tensor in parameters.items()})
    del parameters
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _collect_zero(accelerator, model, write)
    if not accelerator.is_main_process:
        return {}
    names = [name for name, _ in accelerator.unwrap_model(model).named_parameters()]
    tensors, numbers = flatten(optimizer.state_dict()["state"])
    for key, whole in _by_key(tensors, names).items():
        write(f"optimizer.{key.replace('/', '.')}", whole)
    return _by_key(numbers, names)


def _by_key(values: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """{"<index of a parameter>/<key>": value} -> {key: {name of the parameter: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        place, _, key = path.partition("/")
        found.setdefault(key, {})[names[int(place)]] = value
    return found


def _collect_zero(accelerator: Accelerator, engine: Any, write: Callable[[str, Tensors], None]) -> dict[str, Any]:
    zero = engine.optimizer
    states = [zero.optimizer.state.get(share, {}) for share in _shares(zero)]
    if not all(_is_elementwise(share, state) for share, state in zip(_shares(zero), states)):
        tensors, numbers = flatten(states)
        write(OWN_SHARE.format(rank=accelerator.process_index), tensors)
        return {f"process-{accelerator.process_index}": numbers}
    from deepspeed.utils import safe_get_full_optimizer_state

    for key in states[0]:
        whole: Tensors = {}
        for name, parameter in engine.module.named_parameters():
            same = key == "step"  # equal for all parameters; everything else needs a collective
            tensor = torch.as_tensor(states[0][key]) if same else safe_get_full_optimizer_state(parameter, key)
            if accelerator.is_main_process:
                whole[name] = _own(tensor)
        if accelerator.is_main_process:
            write(f"optimizer.{key}", whole)
    return {}


def read_tensors(path: Path) -> Tensors:
    """Reads a file of a checkpoint. Raises ``UserError`` for non-finite values: such a run cannot recover."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            fault = f"{path.name}: {name} holds what is not finite (NaN or infinity)"
            advice = "go on from an earlier checkpoint, or begin anew with a lower --learning_rate"
            raise UserError(f"--resume_from_checkpoint {path.parent}: {fault}; {advice}")
    return tensors


def load_parameters(module: nn.Module, checkpoint: Path) -> None:
    """Loads the checkpoint's parameters into ``module``, before it is prepared: engines copy them when they start."""
    found, wanted = read_tensors(checkpoint / "parameters.safetensors"), module.state_dict()
    names = sorted(found.keys() ^ wanted.keys())
    names += [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if names:
        fault = f"holds other parameters than the model, the first is {names[0]}"
        raise UserError(f"--resume_from_checkpoint {checkpoint}: {fault}; expected a checkpoint of the same model")
    module.load_state_dict(found)


def load_optimizer(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, checkpoint: Path, numbers: dict[str, Any]
) -> None:
    """Loads the state and the ``numbers`` of ``collect`` into the prepared ``optimizer``. Call on all processes."""
    own_shares = list(checkpoint.glob(OWN_SHARE.format(rank="*") + ".safetensors"))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if not own_shares:
            return _load_zero(accelerator, model, checkpoint)
        if len(own_shares) == accelerator.num_processes:
            return _load_own_share(accelerator, model, checkpoint, numbers)
    if own_shares:
        raise _other_shares(checkpoint)
    places = {name: place for place, (name, _) in enumerate(accelerator.unwrap_model(model).named_parameters())}
    values = {key.replace(".", "/"): whole for key, whole in _optimizer_files(checkpoint)}
    paths = {
        f"{places[name]}/{key}": value
        for found in (values, numbers)
        for key, by_name in found.items()
        for name, value in by_name.items()
    }
    load_optimizer_state(optimizer, unflatten(paths))


def _load_own_share(accelerator: Accelerator, engine: Any, checkpoint: Path, numbers: dict[str, Any]) -> None:
    zero, rank = engine.optimizer, accelerator.process_index
    shares = _shares(zero)
    values = read_tensors(checkpoint / f"{OWN_SHARE.format(rank=rank)}.safetensors") | numbers[f"process-{rank}"]
    for place, state in unflatten(values).items():
        if place >= len(shares) or state["state1"].numel() != shares[place].numel():
            raise _other_shares(checkpoint)
        device = shares[place].device
        zero.optimizer.state[shares[place]] = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()
        }


def _load_zero(accelerator: Accelerator, engine: Any, checkpoint: Path) -> None:
    from deepspeed import utils as parts

    zero, device = engine.optimizer, accelerator.device
    keys = []
    for key, tensors in _optimizer_files(checkpoint):
        if not all(tensor.is_floating_point() for tensor in tensors.values()):  # 8-bit blocks of whole parameters
            raise _other_shares(checkpoint)
        keys.append(key)
        count = next(iter(tensors.values()))  # of steps, under "step"; the fused AdamW needs it on the share's device
        for share in _shares(zero):
            zero.optimizer.state[share][key] = (
                count.clone().to(share.device) if key == "step" else torch.zeros_like(share)
            )
    if keys and hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()  # stages 1 and 2 would set it up only after their first step
    for key, tensors in _optimizer_files(checkpoint):
        if key == "step":
            continue
        for name, parameter in engine.module.named_parameters():
            if hasattr(parameter, "ds_id"):
                # Set only the local part: DeepSpeed's setter of whole tensors overruns if the split is uneven.
                size = parts.safe_get_local_optimizer_state(parameter, key).numel()
                first = accelerator.process_index * size
                values = tensors[name].flatten()[first : first + size]
                share = torch.zeros(size)
                share[: len(values)] = values
                parts.safe_set_local_optimizer_state(parameter, share.to(device), key)
            else:
                parts.safe_set_full_optimizer_state(parameter, tensors[name].to(device), key)


def _shares(zero: Any) -> list[Tensor]:
    """This process's flat float32 master parameters, which the inner optimizer updates."""
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups


def _is_elementwise(share: Tensor, state: dict[str, Any]) -> bool:
    """Whether the state is one step count and tensors with one float per parameter."""
    return all(
        key == "step" or (isinstance(value, Tensor) and value.shape == share.shape and value.is_floating_point())
        for key, value in state.items()
    )


def _optimizer_files(checkpoint: Path) -> Iterator[tuple[str, Tensors]]:
    for path in sorted(checkpoint.glob("optimizer.*.safetensors")):
        key = path.name.removeprefix("optimizer.").removesuffix(".safetensors")
        yield key, read_tensors(path)


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU with its own memory: safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _other_shares(checkpoint: Path) -> UserError:
    fault = "8-bit optimizer state fits the sharding that it was saved under alone"
    advice = (
        "go on with the same number of processes and the same zero_stage, or without ZeRO where it was saved without"
    )
    return UserError(f"--resume_from_checkpoint {checkpoint}: {fault}: {advice}")
