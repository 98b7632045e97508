"""Memory of a LORE step on one device: counted on tensors without data, then laid out as DDP or DeepSpeed's ZeRO lay it out.

What a step holds beside weights, gradients and optimizer is counted, not guessed: ``count_step`` runs the phases of a step
(reference, attack, two primal backward passes, dual) on fake tensors, which have shapes and lifetimes but no data, and
notes the live bytes after every operation. The operations are the same for every batch size, so after each of them the
live bytes are a + b * images, and two batch sizes give both. Which weights, gradients and optimizer states a device holds
besides is arithmetic (``device_bytes``), read from DeepSpeed's source (0.19) and checked against counted runs.

GB is 10^9 bytes, here and in every table.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from utils.methods.attacks import frozen, pgd
from utils.methods.losses import squared_distance
from utils.models.encoders import ImageEncoder, enable_gradient_checkpointing, keep_weights_in, square_side
from utils.processes.progress import RunProgress, wide_console

GB = 10**9
DEVICES = (24, 40, 80, 141)  # GB
FLOAT32 = 4  # bytes

# The image towers of OpenAI's (B, L: quick_gelu) and LAION's models (H, bigG: gelu). Heads do not change the bytes.
_TOWERS = {
    # name: (hidden_size, layers, heads, MLP, patch, image, projection, activation)
    "ViT-B/32": (768, 12, 12, 3072, 32, 224, 512, "quick_gelu"),
    "ViT-B/16": (768, 12, 12, 3072, 16, 224, 512, "quick_gelu"),
    "ViT-L/14": (1024, 24, 16, 4096, 14, 224, 768, "quick_gelu"),
    "ViT-L/14-336": (1024, 24, 16, 4096, 14, 336, 768, "quick_gelu"),
    "ViT-H/14": (1280, 32, 16, 5120, 14, 224, 1024, "gelu"),
    "ViT-bigG/14": (1664, 48, 16, 8192, 14, 224, 1280, "gelu"),
}


def tower_config(name: str) -> CLIPVisionConfig:
    """The config of a published image tower, by its name in ``TOWERS``: transformers' own where OpenAI or LAION give none."""
    hidden_size, layers, heads, mlp, patch, image, projection, activation = _TOWERS[name]
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        patch_size=patch,
        image_size=image,
        projection_dim=projection,
        hidden_act=activation,
    )


TOWERS = tuple(_TOWERS)


class LiveBytes(TorchDispatchMode):
    """Inside the block every tensor is watched: ``live`` is the bytes of all that still exist, ``peak`` their highest.

    A storage counts once, however many tensors view it, from the operation that first returned it until nothing refers to it
    any more. What a kernel allocates and frees within itself is not seen. ``history`` has every operation and the live
    bytes after it; ``keep_history`` false leaves it empty, for long runs.
    """

    def __init__(self, keep_history: bool = True) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.history: list[tuple[Any, int]] = []
        self.keep_history = keep_history
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":  # those have no memory
                self._watch(tensor)
        self.peak = max(self.peak, self.live)
        if self.keep_history:
            self.history.append((func, self.live))
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # one per storage, while it lives
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size


@dataclass(frozen=True)
class StepCount:
    """What one step of an image tower needs beside weights, reference and optimizer, for any batch size.

    ``phases``: by name an array (operations, 3): bytes live after each operation with no images, the further bytes of
    each image, and the bytes of gradients among the former. The other numbers are elements, or bytes where it says so.
    """

    phases: dict[str, np.ndarray]
    parameters: list[int]  # of each parameter of the encoder
    reference_bytes: int
    layer_bytes: int  # of the weights of one transformer block, float32
    reference_layer_bytes: int
    data_bytes: int  # per image: pixels, perturbation, reference embedding, margin


def count_step(
    config: CLIPVisionConfig,
    *,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
    reference_dtype: str = "float32",
    clean_in_primal: bool = True,
    momentum: bool = False,
    whole: bool = False,
) -> StepCount:
    """Counts a LORE step of the image tower of this config on fake tensors: no weights are made, nothing is computed.

    ``clean_in_primal``: whether the updates see the clean images too, a batch of 2B (LORE) and not B (FARE). ``momentum``:
    whether the attack has one. The blocks of a tower are alike, so a deep one is counted at 3 and at 4 blocks and
    continued from there, which is exact and many times as fast; ``whole`` counts all of its blocks.
    """

    def lines(depth: int) -> _Trace:
        """The trace of a tower of this depth with [a, b] in place of live bytes."""
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = depth
        two, three = (
            _trace(shallow, size, compute_dtype, gradient_checkpointing, reference_dtype, clean_in_primal, momentum)
            for size in (2, 3)
        )
        for few, many in zip(two.segments, three.segments, strict=True):
            per_image = many.bytes[:, 0] - few.bytes[:, 0]
            few.bytes = np.stack([few.bytes[:, 0] - 2 * per_image, per_image, few.bytes[:, 1]], axis=1)
        return two

    depth = config.num_hidden_layers
    if whole or depth <= 4:
        segments, deepest = (trace := lines(depth)).segments, trace
    else:
        shorter, deepest = lines(3), lines(4)
        segments = [
            _Segment(longer.phase, [], _deepen(short, longer, depth - 4))
            for short, longer in zip(shorter.segments, deepest.segments, strict=True)
        ]
    phases = {
        name: np.concatenate([segment.bytes for segment in segments if segment.phase == name])
        for name in dict.fromkeys(segment.phase for segment in segments)
    }
    return replace(
        deepest.step,
        phases=phases,
        parameters=deepest.step.parameters + deepest.block * (depth - deepest.depth),
        reference_bytes=deepest.step.reference_bytes + deepest.step.reference_layer_bytes * (depth - deepest.depth),
    )


def _deepen(short: _Segment, longer: _Segment, more: int) -> np.ndarray:
    """The bytes of a segment with ``more`` blocks than the longer one, from two that differ by one block.

    Operation i from the start, and operation i from the end, is the same one at both depths and its bytes grow evenly
    with the depth. Those in the middle of a deep tower lie between: bytes rise or fall evenly from block to block.
    """
    block = len(longer.names) - len(short.names)
    parts = []
    for direction in (1, -1):
        alike = 0
        for one, other in zip(short.names[::direction], longer.names[::direction]):
            if one != other:
                break
            alike += 1
        alike -= block  # by accident the first operations after the last block may be named alike
        near, far = (segment.bytes[::direction][:alike] for segment in (short, longer))
        parts.append(far + more * (far - near))
    return np.concatenate(parts)


@dataclass
class _Segment:
    """Operations of a forward or of a backward pass: their names and what is live after each, (operations, columns)."""

    phase: str
    names: list[Any]
    bytes: np.ndarray


@dataclass
class _Trace:
    segments: list[_Segment]
    step: StepCount
    depth: int
    block: list[int]  # elements of each parameter of a block


def _trace(
    config: CLIPVisionConfig,
    batch_size: int,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
    reference_dtype: str,
    clean_in_primal: bool,
    momentum: bool,
) -> _Trace:
    """One step on fake tensors: live bytes, beside weights and reference, and gradients among them, by operation."""
    with FakeTensorMode(), LiveBytes() as tensors:
        encoder = _random_encoder(config, compute_dtype).train()
        # Another one, not a copy: fake tensors cannot be copied deeply.
        reference = keep_weights_in(reference_dtype, _random_encoder(config, compute_dtype))
        reference = reference.eval().requires_grad_(False)
        if gradient_checkpointing:
            enable_gradient_checkpointing(encoder)
        resident, weights = tensors.live, _bytes(encoder)
        first = len(tensors.history)
        segments: list[_Segment] = []
        made: list[tuple[int, int]] = []  # gradients: operations done before, bytes
        for parameter in encoder.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: made.append((len(tensors.history), parameter.grad.nbytes))
            )

        def cut(phase: str) -> None:
            """Ends a segment of the trace here: what was done since the last cut."""
            nonlocal first
            history = tensors.history[first:]
            live = np.array([live for _, live in history], dtype=np.float64) - resident
            gradients = np.zeros_like(live)
            for operation, size in made:
                gradients[max(0, operation - first) :] += size
            if phase == "further backward":
                live, gradients = live - weights, 0 * live  # those that were there before are counted elsewhere
            segments.append(_Segment(phase, [name for name, _ in history], np.stack([live, gradients], axis=1)))
            first = len(tensors.history)

        pixel_values = torch.zeros(batch_size, 3, encoder.image_size, encoder.image_size)
        with torch.no_grad():
            ref_image_embeds = reference(pixel_values)
            margin = ref_image_embeds.square().sum(dim=-1)
        cut("reference")

        def attacked_loss(adversarial: Tensor) -> Tensor:
            cut("attack")
            loss = squared_distance(encoder(adversarial), ref_image_embeds)
            cut("attack")
            return loss

        with frozen(encoder):
            delta = pgd(
                attacked_loss,
                pixel_values,
                eps=1 / 255,
                step_size=1 / 255,
                num_steps=2,
                start=torch.zeros_like(pixel_values),
                momentum=0.9 if momentum else 0.0,
            )
        cut("attack")
        for phase in ("first backward", "further backward"):  # the first makes the gradients, the second adds to them
            adversarial = pixel_values + delta
            if clean_in_primal:
                image_embeds, adversarial_embeds = encoder(torch.cat([pixel_values, adversarial])).chunk(2)
                distance = squared_distance(image_embeds, ref_image_embeds)
                loss = (squared_distance(adversarial_embeds, ref_image_embeds) + distance - margin).mean()
            else:
                loss = squared_distance(encoder(adversarial), ref_image_embeds).mean()
            cut(phase)
            loss.backward()
            cut(phase)
        encoder.zero_grad()
        made.clear()
        first = len(tensors.history)
        with torch.no_grad():
            squared_distance(encoder(pixel_values), ref_image_embeds)
        cut("dual")
        block, reference_block = (one.vision_model.get_submodule("encoder.layers.0") for one in (encoder, reference))
        step = StepCount(
            phases={},
            parameters=[parameter.numel() for parameter in encoder.parameters()],
            reference_bytes=_bytes(reference),
            layer_bytes=_bytes(block),
            reference_layer_bytes=_bytes(reference_block),
            data_bytes=sum(tensor[0].nbytes for tensor in (pixel_values, delta, ref_image_embeds, margin)),
        )
        return _Trace(segments, step, config.num_hidden_layers, [parameter.numel() for parameter in block.parameters()])


def _random_encoder(config: CLIPVisionConfig, compute_dtype: torch.dtype) -> ImageEncoder:
    model = CLIPVisionModelWithProjection(config)
    side, third = square_side(config.image_size), [1 / 3] * 3
    encoder = ImageEncoder(model.vision_model, model.visual_projection, side, third, third, compute_dtype)
    encoder.vision_model.config._attn_implementation = "sdpa"  # flash attention, as on a GPU, in every precision
    return encoder


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@dataclass(frozen=True)
class Layout:
    """How a run lies on its devices. ``stage``: ZeRO's, 0 for DDP or a single process. Bucket sizes are in elements.

    ``gather_for_attack``: under ZeRO-3 the whole weights are on the device for the length of the attack.
    ``shard_reference``: under ZeRO-3 the reference is partitioned too and gathered a block at a time.
    """

    stage: int = 0
    processes: int = 1
    optimizer: str = "adamw"
    accumulation: int = 1
    gather_for_attack: bool = True
    shard_reference: bool = False
    reduce_bucket_size: int = 50_000_000  # as in accelerate_configs/deepspeed, in elements
    prefetch_bucket_size: int = 50_000_000
    max_reuse_distance: int = 1_000_000_000
    param_persistence_threshold: int = 100_000


def optimizer_bytes(optimizer: str, parameters: Sequence[int]) -> int:
    """Bytes of AdamW's two states for parameters of these many elements.

    bitsandbytes keeps 8 bits of each for parameters of 4,096 elements and more, with a float32 scale for every block of
    256; paged states are counted in full, although they move to the host where the device is short.
    """
    if optimizer == "adamw":
        return 8 * sum(parameters)
    return sum(2 * (size + 4 * math.ceil(size / 256)) if size >= 4096 else 8 * size for size in parameters)


def device_bytes(count: StepCount, layout: Layout) -> list[tuple[str, dict[str, int], np.ndarray]]:
    """What is on a device, by phase of a step: (phase, bytes by kind that do not depend on the batch, counted bytes).

    The counted bytes are an array as in ``StepCount``; the devices are taken to be alike, padding of their shares is left
    out. Sources: torch's DistributedDataParallel; deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and
    partitioned_param_coordinator.py of DeepSpeed 0.19.
    """
    numel, stage = sum(count.parameters), layout.stage
    weights = FLOAT32 * numel
    share = FLOAT32 * math.ceil(numel / layout.processes)
    owned = [share // FLOAT32] if stage else count.parameters  # what the optimizer of this device updates
    bucket = FLOAT32 * layout.reduce_bucket_size
    filled = min(bucket, weights)  # gradients that are reduced together; they are copied once for it
    always = {
        "weights": weights,
        "reference": count.reference_bytes,
        "optimizer": optimizer_bytes(layout.optimizer, owned) + (share if stage else 0),  # with DeepSpeed's master copy
    }
    nothing = np.zeros((1, 3))
    reference, attack, dual = (count.phases[name] for name in ("reference", "attack", "dual"))
    first, further = count.phases["first backward"], count.phases["further backward"]
    accumulating = layout.accumulation > 1
    phases: list[tuple[str, dict[str, int], np.ndarray]]

    if stage == 0:
        if layout.processes > 1:
            always["gradients"] = weights  # DDP's buckets, which the gradients are views of, stay
            phases = [("updates", {}, further), ("optimizer", {}, nothing)]
        else:
            phases = [("updates", {}, first), ("optimizer", {"gradients": weights}, nothing)]
            phases += [("updates", {"gradients": weights}, further)] if accumulating else []
        phases += [("reference", {}, reference), ("attack", {}, attack), ("dual", {}, dual)]
    elif stage == 1:
        # The whole gradients stay until the last backward of a step has made them all; then they are reduced.
        phases = [
            ("updates", {"buckets": bucket}, first),
            ("updates", {"buckets": bucket + filled, "gradients": weights}, nothing),
            ("optimizer", {"gradients": share, "temporaries": share}, nothing),
            ("reference", {}, reference),
            ("attack", {}, attack),
            ("dual", {}, dual),
        ]
        phases += [("updates", {"buckets": bucket, "gradients": weights}, further)] if accumulating else []
    elif stage == 2:
        phases = [
            ("updates", {"buckets": bucket}, _reduced(first, bucket, filled, 1 / layout.processes)),
            ("updates", {"buckets": bucket + filled, "gradients": share}, nothing),
            ("optimizer", {"gradients": share, "temporaries": share}, nothing),
            ("reference", {}, reference),
            ("attack", {}, attack),
            ("dual", {}, dual),
        ]
        if accumulating:
            phases.append(("updates", {"buckets": bucket + filled, "gradients": share}, further))
    else:
        always |= {"weights": share, "gradients": share, "buckets": bucket}
        # A gathered weight is kept where it is needed again within the reuse distance: from a block of the forward pass
        # to the same one of the backward pass it is twice the weights behind that block.
        small = FLOAT32 * sum(
            size for size in count.parameters if size < layout.param_persistence_threshold
        )  # stay whole
        ahead = small + FLOAT32 * layout.prefetch_bucket_size
        kept = min(weights, ahead + FLOAT32 * layout.max_reuse_distance // 2)
        streamed = min(weights, ahead + count.layer_bytes)
        one_block = 0
        if layout.shard_reference:
            always["reference"] = math.ceil(count.reference_bytes / layout.processes)
            one_block = count.reference_layer_bytes
        phases = [
            ("updates", {"gathered weights": kept}, _reduced(first, bucket, filled, 0)),
            ("updates", {"buckets": filled}, nothing),
            ("optimizer", {"temporaries": share}, nothing),
            ("reference", {"gathered weights": small + one_block}, reference),
            ("attack", {"gathered weights": weights if layout.gather_for_attack else streamed}, attack),
            ("dual", {"gathered weights": streamed}, dual),
        ]
    return [
        (
            name,
            {kind: always.get(kind, 0) + more.get(kind, 0) for kind in (always | more)},
            counted + np.array([0, (layout.accumulation - 1) * count.data_bytes, 0]),
        )
        for name, more, counted in phases
    ]


def _reduced(first: np.ndarray, bucket: int, filled: int, kept: float) -> np.ndarray:
    """The first backward where gradients leave for the bucket as they are made, and only the share ``kept`` comes back."""
    gradients = first[:, 2]
    away = gradients * (1 - kept) - np.where(gradients >= bucket, filled, 0)
    return first - np.stack([away, 0 * away, gradients * (1 - kept)], axis=1)


def peak_bytes(count: StepCount, layout: Layout, batch_size: int) -> dict[str, Any]:
    """The highest use of a step by kind, in bytes: ``phase`` is its name, ``total`` the sum of the others."""
    peaks = []
    for name, kinds, counted in device_bytes(count, layout):
        operation = counted[int((counted[:, 0] + counted[:, 1] * batch_size).argmax())]
        data = batch_size * layout.accumulation * count.data_bytes
        images = batch_size * operation[1]
        gradients = kinds.get("gradients", 0) + operation[2]
        kinds = kinds | {
            "gradients": int(gradients),
            "pixels, perturbations": int(min(images, data)),
            "activations": int(max(0, images - data)),
            "temporaries": kinds.get("temporaries", 0) + int(operation[0] - operation[2]),
        }
        peaks.append({"phase": name, "total": sum(kinds.values())} | kinds)
    return max(peaks, key=lambda peak: peak["total"])


def largest_batch(count: StepCount, layout: Layout, capacity: float) -> int:
    """The most images per micro-batch that a device of ``capacity`` bytes holds, 0 where it holds none."""
    largest = math.inf
    for _, kinds, counted in device_bytes(count, layout):
        free = capacity - sum(kinds.values()) - counted[:, 0]
        if free.min() < 0:
            return 0
        grows = counted[:, 1] > 0
        if grows.any():
            largest = min(largest, float((free[grows] / counted[grows, 1]).min()))
    return math.floor(largest)


# What the columns of the tables are, and a run's stage of ZeRO.
_STAGES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}


def print_estimate(
    model: tuple[str, CLIPVisionConfig] | None,
    *,
    batch_size: int,
    gradient_checkpointing: bool,
    processes: int,
    optimizer: str,
    accumulation: int,
    compute_dtype: torch.dtype,
    reference_dtype: str,
    clean_in_primal: bool,
    momentum: bool,
    gather_for_attack: bool = True,
    shard_reference: bool = False,
) -> None:
    """Prints the peak of a step on one device, the largest batches, and what the peak is made of.

    For every tower of ``TOWERS`` and the ``model``, its name and config, where given; the breakdown is that model's, of
    ViT-L/14 where there is none, with the given ``gradient_checkpointing``.
    """
    configs = {tower: tower_config(tower) for tower in TOWERS}
    shown = "ViT-L/14"
    if model is not None:
        shown, config = model
        configs[shown] = config
    counts = {}
    with RunProgress("counting", 2 * len(configs), transient=True) as progress:
        for tower, tower_vision in configs.items():
            for checkpointing in (False, True):
                counts[tower, checkpointing] = count_step(
                    tower_vision,
                    compute_dtype=compute_dtype,
                    gradient_checkpointing=checkpointing,
                    reference_dtype=reference_dtype,
                    clean_in_primal=clean_in_primal,
                    momentum=momentum,
                )
                progress.update(len(counts))
    layouts = {
        stage: Layout(number, processes, optimizer, accumulation, gather_for_attack, shard_reference)
        for stage, number in _STAGES.items()
    }
    if processes == 1:
        layouts["one process"] = layouts.pop("DDP")
        layouts = {"one process": layouts.pop("one process")} | layouts

    console = wide_console()
    console.print(
        f"{processes} processes, {batch_size} images each per micro-batch (x {accumulation}), {optimizer}, blocks in "
        f"{str(compute_dtype).removeprefix('torch.')}, reference {reference_dtype}. GB = 10^9 bytes. + gc: gradient checkpointing."
    )
    columns = [(stage, checkpointing) for checkpointing in (False, True) for stage in layouts]
    table = _table(
        "Peak of a step per device, GB -> the smallest device that holds it",
        "image tower",
        [stage + (" + gc" if checkpointing else "") for stage, checkpointing in columns],
    )
    for tower in configs:
        needed = [peak_bytes(counts[tower, gc], layouts[stage], batch_size)["total"] / GB for stage, gc in columns]
        holds = [next((size for size in DEVICES if size >= need), "none") for need in needed]
        table.add_row(tower, *(f"{need:.1f} -> {size}" for need, size in zip(needed, holds)))
    console.print(table)
    for checkpointing in (False, True):
        table = _table(
            f"Largest --per_device_train_batch_size on {' / '.join(map(str, DEVICES))} GB, gradient checkpointing "
            f"{'on' if checkpointing else 'off'}",
            "image tower",
            list(layouts),
        )
        for tower in configs:
            largest = [
                [largest_batch(counts[tower, checkpointing], layout, size * GB) for size in DEVICES]
                for layout in layouts.values()
            ]
            table.add_row(tower, *(" / ".join(map(str, sizes)) for sizes in largest))
        console.print(table)

    parts = {
        stage: peak_bytes(counts[shown, gradient_checkpointing], layout, batch_size)
        for stage, layout in layouts.items()
    }
    table = _table(
        f"Peak of {shown}, GB" + (", gradient checkpointing" if gradient_checkpointing else ""),
        "",
        list(parts),
    )
    table.add_row("during", *(peak["phase"] for peak in parts.values()))
    for kind in _KINDS:
        table.add_row(kind, *(f"{peak.get(kind, 0) / GB:.2f}" for peak in parts.values()))
    table.add_row("total", *(f"{peak['total'] / GB:.2f}" for peak in parts.values()))
    console.print(table)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


_KINDS = (
    "weights",
    "reference",
    "optimizer",
    "gradients",
    "buckets",
    "gathered weights",
    "pixels, perturbations",
    "activations",
    "temporaries",
)
