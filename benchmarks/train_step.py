"""Measures one training step, written as in published trainers, then with each optimisation of this project added.

  python benchmarks/train_step.py --encoders small ViT-B/32 --batch_size 128 32 --output_dir runs/train-step
  python benchmarks/train_step.py --encoders ViT-B/32 ViT-L/14 --batch_size 448 128 --output_dir runs/train-step-gpu

Encoders have random weights of the published sizes, or are CLIP models on disk. Images are noise or those of --data,
and are on the device before the clock starts. All variants of an encoder and method start from the same weights and see
the same images and random starts. They make one step each in turn, so that other load on the machine affects all of
them. The first step warms up (and compiles).

"plain" runs in float32 with transformers' own layers: parameters require gradients during the attack, clean and
perturbed images are encoded one after the other, perturbation and weights are updated operation by operation. The last
row is train_lore.py as a user starts it with --compile true, including decoding and logging, in a separate process.

"off plain" is the largest relative difference from the plain variant over all steps: of the perturbed images' distance
after the attack, or for PO of the loss. FLOPs are the least that a step needs (52 F for LORE, with F for one forward
pass, see utils/training/metrics.py), the same for all variants. Memory excludes libraries and images: it is weights,
optimizer and reference plus the peak of a step above them, resident on a CPU, allocated on a GPU. Writes results.json
and table.md.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_lore
from benchmarks.comparison import markdown, print_table, what_flag
from benchmarks.memory import TEXT_TOWERS, make_model_and_images
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, train_batches
from utils.errors import UserError
from utils.methods.attacks import ascend, attack_seeds, frozen, project, uniform_start
from utils.methods.lagrangian import Multiplier, primal_lagrangian, violation
from utils.methods.lore import MicroBatch, Problem, attack
from utils.methods.losses import squared_distance
from utils.methods.preferences import preference_loss, retention_kl
from utils.models.encoders import ImageEncoder, enable_gradient_checkpointing, frozen_copy
from utils.models.hub import load
from utils.sets.labelled import open_set
from utils.training.memory import GB, TOWERS, tower_config
from utils.training.metrics import MetricsFile, forward_flops, lore_flops_per_image
from utils.training.optimization import make_optimizer

SMALL = CLIPVisionConfig(
    hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=8,
    projection_dim=128, hidden_act="quick_gelu",
)  # fmt: skip
METHODS = ("LORE", "FARE", "PO image")
EPS, RHO, NUM_TEXTS = 4 / 255, 0.1, 100
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass
class Settings:
    encoders: list[str] = what_flag(
        ["small", "ViT-B/32"],
        f"small, {', '.join(TOWERS)}, or CLIPs: ids, directories or files, or NAME@BASE",
        path=True,
    )
    data: str | None = what_flag(None, "shards of images (default: noise)", path=True)
    batch_size: list[int] = what_flag([128, 32], "images per step: one number, or one for each encoder", minimum=1)
    methods: list[str] = what_flag(list(METHODS), "what a step is of", choices=METHODS)
    variants: list[str] = what_flag([], "only these, by their first words (default: all)")
    gradient_checkpointing: bool = what_flag(False, "in every variant")
    attack_steps: int = flag(10, "PGD steps", group="step", minimum=1)
    primal_steps: int = flag(5, "K of LORE; FARE makes one update", group="step", minimum=1)
    rounds: int = flag(3, "timed steps of every variant, after one that is not", group="run", minimum=1)
    seed: int = flag(0, "of weights, images and starts", group="run", minimum=0)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device", group="run")
    trainer: bool = flag(True, "the last row, of the trainer itself", group="run")
    output_dir: str = required("results.json and table.md are written here", group="run", path=True)


@dataclass(frozen=True)
class Variant:
    """How a step is made. Each variant adds one optimisation to the one before."""

    name: str
    frozen_attack: bool = False  # parameters require no gradient during the attack
    one_forward: bool = False  # clean and perturbed images in one forward pass
    fused: bool = False  # PGD in place, AdamW in one pass
    bf16: bool = False  # transformer blocks in bfloat16
    lean: bool = False  # use_lean_layers instead of transformers' layers
    compiled: bool = False


def ladder() -> list[Variant]:
    rungs = [Variant("plain float32")]
    for name in ("frozen_attack", "one_forward", "fused", "bf16", "lean", "compiled"):
        rungs.append(replace(rungs[-1], name=f"+ {name.replace('_', ' ')}", **{name: True}))
    return rungs


class PlainEncoder(nn.Module):
    """Pixels in [0,1] to image_embeds by transformers' own layers; the patch embedding is float32 even in bfloat16."""

    def __init__(self, model: CLIPVisionModelWithProjection, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        if bf16:
            self.model.vision_model.embeddings.patch_embedding.__class__ = Float32Conv2d

    def forward(self, pixel_values: Tensor) -> Tensor:
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(pixel_values=(pixel_values - self.mean) / self.std).image_embeds.float()


class Float32Conv2d(nn.Conv2d):
    def forward(self, pixel_values: Tensor) -> Tensor:
        with torch.autocast(pixel_values.device.type, enabled=False):
            return super().forward(pixel_values)


class Trainee:
    """An encoder with optimizer and multiplier, made from one seed, that trains by the steps of its variant."""

    def __init__(
        self, variant: Variant, model: CLIPVisionModelWithProjection, method: str, settings: Settings, eps: float = EPS
    ) -> None:
        self.variant, self.method, self.settings, self.eps = variant, method, settings, eps
        self.problem = Problem(constraint="embedding" if method == "LORE" else "none", rho=RHO)
        self.encoder = make_encoder(copy.deepcopy(model), variant)
        self.reference = frozen_copy(self.encoder)
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(getattr(self.encoder, "model", self.encoder))
        self.encoder.to(settings.device).train()
        self.reference.to(settings.device)
        torch.manual_seed(settings.seed)
        self.multiplier = Multiplier("network", model.config.projection_dim).to(settings.device)
        if variant.fused:
            self.optimizer = make_optimizer("adamw", self.encoder, 1e-5, 1e-4)
        else:
            self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=1e-5, weight_decay=1e-4)
        self.dual_optimizer = torch.optim.AdamW(self.multiplier.parameters(), lr=5e-4, weight_decay=0.0, maximize=True)
        self.attack_update = ascend
        if variant.compiled:
            self.encoder.compile(dynamic=False)
            self.reference.compile(dynamic=False)
            self.attack_update = torch.compile(ascend, dynamic=False)
        self.watched: list[Tensor] = []  # per step: distance of the perturbed images, or the loss of PO
        self.seconds: list[float] = []
        self.peak: int | None = None  # bytes

    def step(self, index: int, batch: dict[str, Tensor]) -> None:
        """Makes a step and measures its time and memory."""
        meter = MemoryMeter(self.settings.device)
        synchronise(self.settings.device)
        clock = time.perf_counter()
        (self.po_step if self.method == "PO image" else self.lore_step)(index, batch)
        synchronise(self.settings.device)
        self.seconds.append(time.perf_counter() - clock)
        above = meter.above()
        if index and above is not None:  # the first step compiles
            self.peak = max(self.peak or 0, self.standing() + above)

    def lore_step(self, index: int, batch: dict[str, Tensor]) -> None:
        """This project's step, in which optimisations that the variant lacks are replaced by plain code."""
        pixel_values = batch["images"].float().div_(255)
        seeds = attack_seeds(self.settings.seed, index, range(len(pixel_values)))
        with torch.no_grad():
            ref_image_embeds = self.reference(pixel_values)
            margin = self.problem.margin(ref_image_embeds)
        of = MicroBatch(pixel_values, ref_image_embeds=ref_image_embeds, margin=margin)
        of.delta = self.attack(of, seeds)
        for update in range(self.settings.primal_steps if self.problem.constrained else 1):
            if self.problem.constrained and not self.variant.one_forward:
                loss, distance = self.primal_in_two_forwards(of)
            else:
                primal = self.problem.primal(self.encoder, of, self.multiplier)
                loss, distance = primal.loss, primal.terms[1]
            if update == 0:
                self.watched.append(distance)
            self.update(loss)
        if self.problem.constrained:
            self.problem.dual(self.encoder, of, self.multiplier).backward()
            self.dual_optimizer.step()
            self.dual_optimizer.zero_grad()

    def primal_in_two_forwards(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The loss, and the mean distance of the perturbed images."""
        clean, attacked = self.encoder(batch.pixel_values), self.encoder(batch.pixel_values + batch.delta)
        v = violation(squared_distance(clean, batch.ref_image_embeds), batch.margin, RHO)
        with torch.no_grad():
            multipliers = self.multiplier(batch.ref_image_embeds)
        distance = squared_distance(attacked, batch.ref_image_embeds)
        return primal_lagrangian(distance, v, multipliers), distance.detach().mean()

    def attack(self, batch: MicroBatch, seeds: Sequence[int]) -> Tensor:
        eps, step_size, steps = self.eps, self.eps / 4, self.settings.attack_steps
        if self.variant.fused:
            options = {"eps": eps, "step_size": step_size, "num_steps": steps, "update": self.attack_update}
            return attack(self.encoder, self.problem, batch, seeds, **options)
        delta = uniform_start(batch.pixel_values, eps, seeds)
        for _ in range(steps):
            delta = delta.detach().requires_grad_()
            with frozen(self.encoder) if self.variant.frozen_attack else contextlib.nullcontext():
                embeds = self.encoder(batch.pixel_values + delta)
                loss = squared_distance(embeds, batch.ref_image_embeds).sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = project(delta.detach() + step_size * gradient.sign(), batch.pixel_values, eps)
        return delta

    def po_step(self, index: int, batch: dict[str, Tensor]) -> None:
        """DPO of the image tower on clean images (retention) and equally many attacked ones (preferences)."""
        pixel_values = batch["images"].float().div_(255)
        clean, attacked = pixel_values.chunk(2)

        def logits(image_embeds: Tensor) -> Tensor:
            return 100 * F.normalize(image_embeds, dim=-1) @ batch["texts"].T

        with torch.no_grad():
            if self.variant.one_forward:
                ref_clean, ref_attacked = logits(self.reference(pixel_values)).chunk(2)
            else:
                ref_clean, ref_attacked = logits(self.reference(clean)), logits(self.reference(attacked))
        if self.variant.one_forward:
            of_clean, of_attacked = logits(self.encoder(pixel_values)).chunk(2)
        else:
            of_clean, of_attacked = logits(self.encoder(clean)), logits(self.encoder(attacked))
        chosen, rejected = batch["chosen"], batch["rejected"]
        preference = preference_loss("dpo", of_attacked, ref_attacked, chosen, rejected, beta=1.0).mean()
        loss = preference + retention_kl(ref_clean, of_clean).mean()
        self.watched.append(loss.detach())
        self.update(loss)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def standing(self) -> int:
        """Bytes held between steps: weights, reference, optimizer."""
        held = [*self.encoder.parameters(), *self.reference.parameters()]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in held + states if isinstance(tensor, Tensor))


def load_tower(name: str, seed: int) -> CLIPVisionModelWithProjection:
    """A tower of this size with random weights, or the image tower of a CLIP."""
    if name != "small" and name not in TOWERS:
        clip, _ = load(name, "--encoders", ("clip",))
        config = clip.config.vision_config
        config.projection_dim = clip.config.projection_dim
        model = CLIPVisionModelWithProjection(config)
        model.vision_model, model.visual_projection = clip.vision_model, clip.visual_projection
        return model
    torch.manual_seed(seed)
    return CLIPVisionModelWithProjection(copy.deepcopy(SMALL) if name == "small" else tower_config(name))


def make_encoder(model: CLIPVisionModelWithProjection, variant: Variant) -> nn.Module:
    if not variant.lean:
        return PlainEncoder(model, variant.bf16)
    dtype = torch.bfloat16 if variant.bf16 else torch.float32
    return ImageEncoder(model.vision_model, model.visual_projection, model.config.image_size, MEAN, STD, dtype)


class MemoryMeter:
    """Peak memory above the use when the meter was made: allocated on a GPU, resident on a CPU (Linux), else None."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        self.before = None
        with contextlib.suppress(OSError, AttributeError):  # not Linux, or not permitted
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = resident("VmRSS")

    def above(self) -> int | None:
        if self.before is None:
            return None
        return (torch.cuda.max_memory_allocated() if self.on_gpu else resident("VmHWM")) - self.before


def resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, the best of several. Sizes grow until one takes a twentieth of a second."""
    size, largest, best = 512, 8192 if torch.device(device).type == "cuda" else 2048, float("inf")
    while True:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(10):
            synchronise(device)
            clock = time.perf_counter()
            a @ b
            synchronise(device)
            seconds = time.perf_counter() - clock
            best = min(best, seconds / (2 * size**3))
        if size == largest or seconds > 0.05:
            return 1 / best
        size *= 2


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    sizes = settings.batch_size * (len(settings.encoders) if len(settings.batch_size) == 1 else 1)
    if len(sizes) != len(settings.encoders):
        raise UserError(
            f"--batch_size: {len(sizes)} numbers for {len(settings.encoders)} encoders; give one, or one for each"
        )
    variants = [v for v in ladder() if not settings.variants or any(v.name.startswith(w) for w in settings.variants)]
    if not variants:
        raise UserError(f"--variants {settings.variants}: none is known by these; known: {[v.name for v in ladder()]}")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rates = {str(dtype)[6:]: matmul_rate(settings.device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"settings": vars(settings), "hardware": hardware(settings, rates), "rows": []}
    table = [[
        "encoder, method, batch", "variant", "img/s", "ratio", "s/step",
        "peak GB", "of plain", "GFLOP/s", "of bf16 matmul", "off plain",
    ]]  # fmt: skip
    for encoder, batch_size in zip(settings.encoders, sizes):
        for method in settings.methods:
            rows = measure(encoder, method, batch_size, variants, settings, rates["bfloat16"])
            torch.cuda.empty_cache()  # for the next process
            if settings.trainer and method != "PO image":
                rows.append(measure_trainer(encoder, method, batch_size, settings, rates["bfloat16"]))
            found["rows"] += rows
            for place, row in enumerate(rows):
                table.append([f"{encoder} {method} {batch_size}" if place == 0 else "", *cells(row, rows[0])])
            (output_dir / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            (output_dir / "table.md").write_text(markdown(table), encoding="utf-8")
    rate = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in rates.items())
    print_table(f"Training steps on {found['hardware']['device']}, matmul {rate}", table)


def measure(
    encoder: str, method: str, batch_size: int, variants: list[Variant], settings: Settings, rate: float
) -> list[dict[str, Any]]:
    """Measures all variants of an encoder and a method, one step each in turn."""
    model = load_tower(encoder, settings.seed)
    # Leave out variants that change nothing for this method.
    if method == "FARE":
        variants = [variant for variant in variants if variant.name != "+ one forward"]
    if method == "PO image":
        variants = [variant for variant in variants if variant.name != "+ frozen attack"]
    trainees = [Trainee(variant, model, method, settings) for variant in variants]
    flops = step_flops(model, method, settings)
    for index in range(settings.rounds + 1):
        batch = make_batch(model.config, batch_size, index, settings)
        for trainee in trainees:
            trainee.step(index, batch)
            print(f"{encoder} {method}, step {index}, {trainee.variant.name}: {trainee.seconds[-1]:.2f} s", flush=True)
    rows = []
    for trainee in trainees:
        seconds = statistics.median(trainee.seconds[1:])
        off = [abs(float(a) / float(b) - 1) for a, b in zip(trainee.watched, trainees[0].watched)]
        rows.append(
            {
                "encoder": encoder, "method": method, "batch_size": batch_size, "variant": trainee.variant.name,
                "seconds": seconds, "all_seconds": trainee.seconds, "images_per_second": batch_size / seconds,
                "peak_bytes": trainee.peak, "model_flops_per_second": flops * batch_size / seconds,
                "share_of_bf16_matmul": flops * batch_size / seconds / rate,
                "watched": [float(value) for value in trainee.watched], "largest_difference": max(off),
            }
        )  # fmt: skip
    return rows


def make_batch(config: CLIPVisionConfig, batch_size: int, index: int, settings: Settings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * settings.seed + index)
    size = config.image_size
    if settings.data:
        data = open_set(
            [settings.data], flag="--data", with_classes=False, cache_dir=str(Path(settings.output_dir) / "cache")
        )
        dataset = ShardDataset(data.index, ImageTransform(size, (size, size)), order="shuffled", seed=settings.seed)
        options = {
            "samples_per_epoch": data.index.num_samples,
            "global_batch_size": batch_size,
            "rank": 0,
            "world_size": 1,
        }
        options |= {"per_device_batch_size": batch_size, "first_step": index, "num_steps": index + 1, "num_workers": 0}
        images = next(train_batches(dataset, **options))["images"]
    else:
        images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
    texts = F.normalize(torch.randn(NUM_TEXTS, config.projection_dim, generator=generator), dim=-1)
    chosen, rejected = torch.randint(0, NUM_TEXTS // 2, (2, batch_size - batch_size // 2), generator=generator)
    batch = {"images": images, "texts": texts, "chosen": chosen, "rejected": rejected[:, None] + NUM_TEXTS // 2}
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}


def step_flops(model: CLIPVisionModelWithProjection, method: str, settings: Settings) -> int:
    """The least FLOPs of an image in a step, with F for a forward pass."""
    forward = forward_flops(make_encoder(copy.deepcopy(model), Variant("", lean=True)))
    if method == "PO image":
        return 4 * forward  # reference F, update 3 F
    lore = method == "LORE"
    return lore_flops_per_image(forward, settings.attack_steps, settings.primal_steps if lore else 1, lore, lore)


def measure_trainer(encoder: str, method: str, batch_size: int, settings: Settings, rate: float) -> dict[str, Any]:
    """train_lore.py in a separate process, in bf16 and compiled, like the last variant of the ladder."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        seconds = pool.submit(run_trainer, encoder, method, batch_size, settings).result()
    flops = step_flops(load_tower(encoder, settings.seed), method, settings)
    median = statistics.median(seconds[1:])
    return {
        "encoder": encoder, "method": method, "batch_size": batch_size, "variant": "train_lore.py",
        "seconds": median, "all_seconds": seconds, "images_per_second": batch_size / median,
        "model_flops_per_second": flops * batch_size / median,
        "share_of_bf16_matmul": flops * batch_size / median / rate,
    }  # fmt: skip


def run_trainer(encoder: str, method: str, batch_size: int, settings: Settings) -> list[float]:
    """Seconds of each step of a run of train_lore.py on images of noise."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    directory = Path(settings.output_dir) / "model"
    shutil.rmtree(directory, ignore_errors=True)
    steps = settings.rounds + 1
    config = load_tower(encoder, settings.seed).config
    text_tower = TEXT_TOWERS[encoder[4]] if encoder in TOWERS else (64, 2, 2)
    make_model_and_images(config, text_tower, directory, batch_size * steps)
    train_lore.save_model = lambda *_: None  # saving is not part of a step
    fare = ["--constraint", "none", "--primal_steps", "1"] if method == "FARE" else []
    train_lore.main(
        [
            "--model_name_or_path", str(directory), "--train_shards", str(directory / "images"),
            "--output_dir", str(directory / "run"), "--per_device_train_batch_size", str(batch_size),
            "--max_steps", str(steps), "--logging_steps", "1", "--checkpoint_steps", "0", "--compile", "true",
            "--gradient_checkpointing", str(settings.gradient_checkpointing).lower(), "--report_to", "none",
            "--attack_steps", str(settings.attack_steps), "--primal_steps", str(settings.primal_steps),
            "--cache_dir", str(directory / "cache"), *fare,
        ]
    )  # fmt: skip
    rows = MetricsFile(directory / "run/metrics.jsonl").read()
    shutil.rmtree(directory)
    return [batch_size / row["images_per_second"] for row in rows]


def cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    peak = row.get("peak_bytes")
    difference = row.get("largest_difference")
    return [
        row["variant"],
        f"{row['images_per_second']:.3g}",
        f"{row['images_per_second'] / plain['images_per_second']:.2f}",
        f"{row['seconds']:.3g}",
        "" if peak is None else f"{peak / GB:.2f}",
        "" if peak is None else f"{peak / plain['peak_bytes']:.0%}",
        f"{row['model_flops_per_second'] / 1e9:.0f}",
        f"{row['share_of_bf16_matmul']:.0%}",
        "" if difference is None else f"{difference:.1e}",
    ]


def hardware(settings: Settings, rates: dict[str, float]) -> dict[str, Any]:
    on_gpu = torch.device(settings.device).type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads, {cpu_name()}"
    return {
        "device": name, "matmul_flops": rates, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def cpu_name() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    run(main)
