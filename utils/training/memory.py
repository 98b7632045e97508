"""Estimates the memory of a LORE step on one device, under DDP and every stage of DeepSpeed's ZeRO.

Activations and temporaries are counted on fake tensors, which have shapes and lifetimes but no data. Weights, gradients
and optimizer follow from DeepSpeed's source. docs/memory.md compares this with real runs. GB is 10^9 bytes.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from utils.methods.attacks import frozen, pgd
from utils.methods.lagrangian import Multiplier
from utils.methods.lore import MicroBatch, Problem
from utils.models.encoders import ImageEncoder, enable_gradient_checkpointing, keep_weights_in
from utils.processes.progress import RunProgress, wide_console

GB = 10**9
DEVICES = (24, 40, 80, 141)  # GB
FLOAT32 = 4  # bytes
COUNTED = 4  # blocks that are counted; deeper towers are extrapolated
KINDS = ["weights", "reference", "optimizer", "gradients", "buckets", "gathered weights", "pixels, perturbations"]
KINDS += ["activations", "temporaries"]

# The image towers of OpenAI's models (B, L: quick_gelu) and LAION's (H, bigG: gelu). The heads do not change the bytes.
_FIELDS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size"]
_FIELDS += ["projection_dim", "hidden_act"]
TOWERS: dict[str, tuple[Any, ...]] = {
    "ViT-B/32": (768, 12, 12, 3072, 32, 224, 512, "quick_gelu"),
    "ViT-B/16": (768, 12, 12, 3072, 16, 224, 512, "quick_gelu"),
    "ViT-L/14": (1024, 24, 16, 4096, 14, 224, 768, "quick_gelu"),
    "ViT-L/14-336": (1024, 24, 16, 4096, 14, 336, 768, "quick_gelu"),
    "ViT-H/14": (1280, 32, 16, 5120, 14, 224, 1024, "gelu"),
    "ViT-bigG/14": (1664, 48, 16, 8192, 14, 224, 1280, "gelu"),
}


def tower_config(name: str) -> CLIPVisionConfig:
    """The config of one of ``TOWERS``."""
    return CLIPVisionConfig(**dict(zip(_FIELDS, TOWERS[name], strict=True)))


def random_encoder(config: CLIPVisionConfig, compute_dtype: torch.dtype) -> ImageEncoder:
    """The image tower of this config, with random weights, or fake ones inside ``FakeTensorMode``."""
    model, third = CLIPVisionModelWithProjection(config), [1 / 3] * 3
    side: Any = config.image_size
    encoder = ImageEncoder(model.vision_model, model.visual_projection, side, third, third, compute_dtype)
    encoder.vision_model.config._attn_implementation = "sdpa"  # flash attention, as on a GPU, in every precision
    return encoder


class LiveBytes(TorchDispatchMode):
    """Counts memory inside the block: ``live`` is the bytes of all storages in use, ``peak`` the highest so far.

    Memory that a kernel allocates and frees internally is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.history: list[tuple[Any, int]] = []  # (operation, live bytes after it)
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":  # meta tensors have no memory
                self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.history.append((func, self.live))
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()  # the key is unique while the storage lives
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size


@dataclass(frozen=True)
class StepCount:
    """The memory of one step of an image tower besides weights, reference and optimizer, for any batch size.

    ``phases`` maps each name to an array (operations, 3): after each operation the live bytes with no images, the
    further bytes per image, and the gradients' part of the first number.
    """

    phases: dict[str, np.ndarray]
    parameters: list[int]  # elements of each parameter of the encoder
    reference_bytes: int
    layer_bytes: int  # weights of one transformer block, float32
    reference_layer_bytes: int
    data_bytes: int  # per image: pixels, perturbation, reference embedding, margin


@dataclass
class _Segment:
    """The operations of one pass through the blocks, forward or backward: names, and bytes as in ``StepCount``."""

    phase: str
    names: list[Any]
    bytes: np.ndarray


def count_step(
    config: CLIPVisionConfig,
    *,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
    reference_dtype: str = "float32",
    clean_in_primal: bool = True,
    momentum: bool = False,
) -> StepCount:
    """Counts a LORE step of the image tower of this config, without making weights or computing anything.

    ``clean_in_primal``: whether updates also encode the clean images (LORE, not FARE). ``momentum``: the attack's.
    The same operations run at every batch size: the live bytes after each are a + b * images, and two sizes give a, b.
    All blocks are alike, so two depths give every depth, exactly and many times faster.
    """
    problem = Problem(constraint="embedding" if clean_in_primal else "none")

    def encoders(depth: int) -> tuple[ImageEncoder, ImageEncoder]:
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = depth
        # The reference is built, not copied: fake tensors cannot be deep-copied.
        encoder, reference = (random_encoder(shallow, compute_dtype) for _ in range(2))
        if gradient_checkpointing:
            enable_gradient_checkpointing(encoder)
        return encoder.train(), keep_weights_in(reference_dtype, reference).eval().requires_grad_(False)

    def segments(depth: int) -> list[_Segment]:
        traces = []
        for batch_size in (2, 3):
            with FakeTensorMode(), LiveBytes() as tensors:
                traces.append(_trace(tensors, *encoders(depth), problem, batch_size, momentum))
        for few, many in zip(*traces, strict=True):
            live, per_image = few.bytes[:, 0], many.bytes[:, 0] - few.bytes[:, 0]
            few.bytes = np.stack([live - 2 * per_image, per_image, few.bytes[:, 1]], axis=1)
        return traces[0]

    counted = min(config.num_hidden_layers, COUNTED)
    more = config.num_hidden_layers - counted
    found = segments(counted)
    if more:
        for shorter, segment in zip(segments(counted - 1), found, strict=True):
            segment.bytes = _deepen(shorter, segment, more)
    with FakeTensorMode():
        encoder, reference = encoders(counted)
    block, reference_block = (one.vision_model.get_submodule("encoder.layers.0") for one in (encoder, reference))
    return StepCount(
        phases={
            phase: np.concatenate([segment.bytes for segment in found if segment.phase == phase])
            for phase in dict.fromkeys(segment.phase for segment in found)
        },
        parameters=_sizes(encoder) + more * _sizes(block),
        reference_bytes=_bytes(reference) + more * _bytes(reference_block),
        layer_bytes=_bytes(block),
        reference_layer_bytes=_bytes(reference_block),
        data_bytes=FLOAT32 * (2 * 3 * encoder.image_size**2 + encoder.embed_dim + 1),
    )


def _deepen(shorter: _Segment, longer: _Segment, more: int) -> np.ndarray:
    """The bytes of a segment with ``more`` blocks than ``longer``, which has one block more than ``shorter``.

    Counted from the start or from the end, operation i is the same at both depths; its bytes are linear in the depth.
    """
    block = len(longer.names) - len(shorter.names)
    parts = []
    for direction in (1, -1):
        pairs = zip(shorter.names[::direction], longer.names[::direction])
        alike = next((place for place, (one, other) in enumerate(pairs) if one != other), len(shorter.names))
        alike -= block  # operations after the last block may by chance have the same names
        near, far = (segment.bytes[::direction][:alike] for segment in (shorter, longer))
        parts.append(far + more * (far - near))
    return np.concatenate(parts)


def _trace(
    tensors: LiveBytes,
    encoder: ImageEncoder,
    reference: ImageEncoder,
    problem: Problem,
    batch_size: int,
    momentum: bool,
) -> list[_Segment]:
    """One step: after each operation the live bytes besides weights and reference, and the gradients' part of them."""
    history, resident = tensors.history, tensors.live
    ends = [len(history)]  # ends of the passes in this phase, as numbers of operations
    encoder.register_forward_pre_hook(lambda *_: ends.append(len(history)))
    encoder.register_forward_hook(lambda *_: ends.append(len(history)))
    made: list[tuple[int, int]] = []  # for each gradient: number of operations before it, bytes
    for parameter in encoder.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: made.append((len(history), p.grad.nbytes)))
    cuts: list[tuple[str, int, int]] = []
    for phase in _step(encoder, reference, problem, batch_size, momentum):
        ends.append(len(history))
        cuts += [(phase, first, end) for first, end in itertools.pairwise(ends)]
        ends[:] = ends[-1:]

    rows = np.array([(live - resident, 0) for _, live in history], dtype=np.float64)
    for operation, size in made:
        rows[operation:, 1] += size
    found = [_Segment(phase, [name for name, _ in history[first:end]], rows[first:end]) for phase, first, end in cuts]
    for segment in found:
        if segment.phase != "first backward":  # older gradients are counted in device_bytes
            segment.bytes[:, 1] = 0
        if segment.phase == "further backward":
            segment.bytes[:, 0] -= _bytes(encoder)
    return found


def _step(
    encoder: ImageEncoder, reference: ImageEncoder, problem: Problem, batch_size: int, momentum: bool
) -> Iterator[str]:
    """The step of train_lore.py with two attack steps and two updates. Yields each phase's name at its end."""
    multiplier = Multiplier("scalar", encoder.embed_dim)
    batch = MicroBatch(torch.zeros(batch_size, 3, encoder.image_size, encoder.image_size))
    with torch.no_grad():
        batch.ref_image_embeds = reference(batch.pixel_values)
        batch.margin = problem.margin(batch.ref_image_embeds)
    yield "reference"
    options: dict[str, Any] = {
        "eps": 1 / 255,
        "step_size": 1 / 255,
        "num_steps": 2,
        "momentum": 0.9 if momentum else 0.0,
    }
    with frozen(encoder):  # not by ``attack``: it draws starts image by image, so operations depend on the batch
        start = torch.zeros_like(batch.pixel_values)
        batch.delta = pgd(lambda x: problem.loss(encoder(x), batch), batch.pixel_values, start=start, **options)
        del start
    yield "attack"
    for phase in ("first backward", "further backward"):  # the first creates the gradients, the second adds to them
        problem.primal(encoder, batch, multiplier).loss.backward()
        yield phase
    encoder.zero_grad()
    problem.dual(encoder, batch, multiplier)
    yield "dual"


def _sizes(module: torch.nn.Module) -> list[int]:
    return [parameter.numel() for parameter in module.parameters()]


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@dataclass(frozen=True)
class Layout:
    """How a run is split over its devices. Bucket sizes are in elements, as in accelerate_configs/deepspeed."""

    stage: int = 0  # ZeRO stage; 0 is DDP or a single process
    processes: int = 1
    optimizer: str = "adamw"
    accumulation: int = 1
    gather_for_attack: bool = True  # ZeRO-3: the whole weights are on the device during the attack
    shard_reference: bool = False  # ZeRO-3: the reference is partitioned too, and gathered a block at a time
    reduce_bucket_size: int = 50_000_000
    prefetch_bucket_size: int = 50_000_000
    max_reuse_distance: int = 1_000_000_000
    param_persistence_threshold: int = 100_000


def optimizer_bytes(optimizer: str, parameters: Sequence[int]) -> int:
    """Bytes of AdamW's two states for parameters with these numbers of elements.

    bitsandbytes: from 4,096 elements on 8 bits each, and a float32 scale per 256. Paged states count in full.
    """
    if optimizer == "adamw":
        return 8 * sum(parameters)
    return sum(2 * (size + 4 * math.ceil(size / 256)) if size >= 4096 else 8 * size for size in parameters)


Phase = tuple[str, dict[str, int], np.ndarray]


def device_bytes(count: StepCount, layout: Layout) -> list[Phase]:
    """The bytes on a device in each phase: (name, bytes by kind at any batch size, counted bytes as in ``StepCount``).

    Sources: torch's DistributedDataParallel; deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and
    partitioned_param_coordinator.py of DeepSpeed 0.19. Padding of partitions is ignored.
    """
    numel, stage = sum(count.parameters), layout.stage
    weights = FLOAT32 * numel
    share = FLOAT32 * math.ceil(numel / layout.processes)
    owned = [share // FLOAT32] if stage else count.parameters  # elements that this device's optimizer updates
    bucket = FLOAT32 * layout.reduce_bucket_size
    filled = min(bucket, weights)  # gradients that are reduced together, from one copy
    always = {
        "weights": weights,
        "reference": count.reference_bytes,
        "optimizer": optimizer_bytes(layout.optimizer, owned) + (share if stage else 0),  # plus DeepSpeed's master copy
    }
    nothing = np.zeros((1, 3))
    first, further = count.phases["first backward"], count.phases["further backward"]
    gathered = {"reference": 0, "attack": 0, "dual": 0}  # bytes of gathered weights, under ZeRO-3
    accumulated: dict[str, int] | None = None  # present in every backward pass of a step but the first
    phases: list[Phase]

    if stage == 0 and layout.processes > 1:
        always["gradients"] = weights  # gradients are views of DDP's buckets, which stay allocated
        phases = [("updates", {}, further), ("optimizer", {}, nothing)]
    elif stage == 0:
        accumulated = {"gradients": weights}
        phases = [("updates", {}, first), ("optimizer", accumulated, nothing)]
    elif stage <= 2:
        # ZeRO-1 keeps the whole gradients until the last backward pass of a step is over, then reduces them.
        kept = weights if stage == 1 else share
        accumulated = {"buckets": bucket + (0 if stage == 1 else filled), "gradients": kept}
        phases = [
            ("updates", {"buckets": bucket}, first if stage == 1 else _reduced(first, layout, filled)),
            ("updates", {"buckets": bucket + filled, "gradients": kept}, nothing),
            ("optimizer", {"gradients": share, "temporaries": share}, nothing),
        ]
    else:
        always |= {"weights": share, "gradients": share, "buckets": bucket}
        small = sum(size for size in count.parameters if size < layout.param_persistence_threshold)  # never partitioned
        ahead = FLOAT32 * (small + layout.prefetch_bucket_size)
        streamed = min(weights, ahead + count.layer_bytes)
        gathered = {
            "reference": FLOAT32 * small,
            "attack": weights if layout.gather_for_attack else streamed,
            "dual": streamed,
        }
        if layout.shard_reference:
            always["reference"] = math.ceil(count.reference_bytes / layout.processes)
            gathered["reference"] += count.reference_layer_bytes
        # A gathered weight is kept if it is needed again within the reuse distance. From a block in the forward pass to
        # the same block in the backward pass, the distance is twice the weights of all later blocks.
        reused = min(weights, ahead + FLOAT32 * layout.max_reuse_distance // 2)
        phases = [
            ("updates", {"gathered weights": reused}, _reduced(first, layout, filled)),
            ("updates", {"buckets": filled}, nothing),
            ("optimizer", {"temporaries": share}, nothing),
        ]
    phases += [(name, {"gathered weights": size}, count.phases[name]) for name, size in gathered.items()]
    if accumulated and layout.accumulation > 1:
        phases.append(("updates", accumulated, further))
    waiting = np.array([0, (layout.accumulation - 1) * count.data_bytes, 0])  # the other micro-batches
    return [
        (name, {kind: always.get(kind, 0) + more.get(kind, 0) for kind in always | more}, counted + waiting)
        for name, more, counted in phases
    ]


def _reduced(first: np.ndarray, layout: Layout, filled: int) -> np.ndarray:
    """The first backward pass if each gradient moves to the bucket at once and at most the device's part is kept."""
    kept = 1 / layout.processes if layout.stage == 2 else 0  # ZeRO-3 has memory for its part anyway
    gradients = first[:, 2]
    gone = gradients * (1 - kept)
    copied = np.where(gradients >= FLOAT32 * layout.reduce_bucket_size, filled, 0)
    return first - np.stack([gone - copied, 0 * gone, gone], axis=1)


def peak_bytes(count: StepCount, layout: Layout, batch_size: int) -> dict[str, Any]:
    """The peak of a step, in bytes by kind: ``phase`` is when, ``total`` is the sum of the others."""
    data = batch_size * layout.accumulation * count.data_bytes
    peaks = []
    for name, kinds, counted in device_bytes(count, layout):
        fixed, per_image, gradients = counted[int((counted[:, 0] + counted[:, 1] * batch_size).argmax())]
        images = batch_size * per_image
        kinds = kinds | {
            "gradients": int(kinds.get("gradients", 0) + gradients),
            "pixels, perturbations": int(min(images, data)),
            "activations": int(max(0, images - data)),
            "temporaries": kinds.get("temporaries", 0) + int(fixed - gradients),
        }
        peaks.append({"phase": name, "total": sum(kinds.values())} | kinds)
    return max(peaks, key=lambda peak: peak["total"])


def largest_batch(count: StepCount, layout: Layout, capacity: float) -> int:
    """The most images per micro-batch that fit on a device of ``capacity`` bytes; 0 if not even one fits."""
    largest = math.inf
    for _, kinds, counted in device_bytes(count, layout):
        free = capacity - sum(kinds.values()) - counted[:, 0]
        if free.min() < 0:
            return 0
        grows = counted[:, 1] > 0
        largest = min(largest, (free[grows] / counted[grows, 1]).min(initial=math.inf))
    return math.floor(largest)


def print_estimate(
    model: tuple[str, CLIPVisionConfig] | None,
    run: Layout,
    *,
    batch_size: int,
    gradient_checkpointing: bool,
    **counted: Any,
) -> None:
    """Prints the peak of a step on one device, the largest batches, and the parts of the peak.

    Covers all ``TOWERS`` and ``model`` (name and config), if given. The parts are shown for that model, else for
    ViT-L/14. ``run`` is estimated under every stage; ``counted`` goes to ``count_step``.
    """
    configs = {tower: tower_config(tower) for tower in TOWERS} | dict([model] if model else [])
    shown, counts = model[0] if model else "ViT-L/14", {}
    with RunProgress("counting", 2 * len(configs), transient=True) as progress:
        for tower, gc in itertools.product(configs, (False, True)):
            counts[tower, gc] = count_step(configs[tower], gradient_checkpointing=gc, **counted)
            progress.update(len(counts))
    names = ["one process" if run.processes == 1 else "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    layouts = {name: replace(run, stage=stage) for stage, name in enumerate(names)}

    console = wide_console()
    step = (
        f"{run.processes} processes, {batch_size} images each per micro-batch (x {run.accumulation}), {run.optimizer}"
    )
    dtypes = f"blocks in {str(counted['compute_dtype']).removeprefix('torch.')}, reference {counted['reference_dtype']}"
    console.print(f"{step}, {dtypes}. GB = 10^9 bytes. + gc: gradient checkpointing.")

    def smallest_device(count: StepCount, layout: Layout) -> str:
        need = peak_bytes(count, layout, batch_size)["total"] / GB
        return f"{need:.1f} -> {next((size for size in DEVICES if size >= need), 'none')}"

    def largest(count: StepCount, layout: Layout) -> str:
        return " / ".join(str(largest_batch(count, layout, size * GB)) for size in DEVICES)

    rows = [["image tower", *layouts, *(f"{name} + gc" for name in layouts)]]
    for tower in configs:
        columns = itertools.product((False, True), layouts.values())
        rows.append([tower, *(smallest_device(counts[tower, gc], layout) for gc, layout in columns)])
    _print_table(console, "Peak of a step per device, GB -> the smallest device that holds it", rows)

    devices = " / ".join(map(str, DEVICES))
    for gc in (False, True):
        rows = [["image tower", *layouts]]
        rows += [[tower, *(largest(counts[tower, gc], layout) for layout in layouts.values())] for tower in configs]
        title = f"Largest --per_device_train_batch_size on {devices} GB, gradient checkpointing {'on' if gc else 'off'}"
        _print_table(console, title, rows)

    peaks = [peak_bytes(counts[shown, gradient_checkpointing], layout, batch_size) for layout in layouts.values()]
    rows = [["", *layouts], ["during", *(peak["phase"] for peak in peaks)]]
    rows += [[kind, *(f"{peak.get(kind, 0) / GB:.2f}" for peak in peaks)] for kind in (*KINDS, "total")]
    _print_table(console, f"Peak of {shown}, GB" + (", gradient checkpointing" if gradient_checkpointing else ""), rows)


def _print_table(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first row has the headings."""
    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
