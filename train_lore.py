"""LORE: fine-tunes a vision encoder to resist l_inf attacks, every clean embedding held near the pretrained one.

  python train_lore.py --model_name_or_path openai/clip-vit-base-patch32 \\
    --train_shards data/imagenet/train --eps 4 --rho 0.1 --output_dir runs/lore4

  accelerate launch --config_file accelerate_configs/zero2.yaml train_lore.py \\
    --model_name_or_path openai/clip-vit-large-patch14 \\
    --train_shards "data/imagenet/train-{000000..001281}.tar" --eps 4 --rho 0.1 --output_dir runs/lore4-l14

Other methods are settings: FARE is --constraint none --primal_steps 1; TeCoA is --objective tecoa --constraint none;
--config recipes/<name>.yaml sets all of an experiment of the paper but --eps and --rho.
Precision (bf16, fp16, no) and sharding live in the accelerate config. Radii are in 1/255.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from utils.cli import flag, launched_rank, parse_settings, required, run
from utils.data.order import TrainBatchSampler
from utils.data.shards import ShardDataset, eval_loader, keep_sizes, train_batches
from utils.data.skipped import SkipCounter, count_skipped
from utils.data.sources import default_cache_dir
from utils.errors import UserError
from utils.methods.attacks import ascend, attack_seeds, frozen, pgd, uniform_start
from utils.methods.lagrangian import (
    Multiplier,
    dual_lagrangian,
    embedding_margin,
    entropy_margin,
    primal_lagrangian,
    violation,
)
from utils.methods.losses import cross_entropy, kl_divergence, squared_distance
from utils.models.encoders import (
    check_model,
    check_reference_dtype,
    enable_gradient_checkpointing,
    has_own_head,
    has_text,
    image_transform,
    keep_weights_in,
    load_model,
    load_reference,
    make_encoder,
    save_model,
)
from utils.models.hub import fetch_model, on_this_node, refuse_mistyped_paths
from utils.models.model_card import model_card, write_card
from utils.models.zeroshot import predictions, set_classifier, to_pixel_values
from utils.processes.distributed import (
    MIXED_PRECISIONS,
    average_gradients,
    compute_dtype,
    end_training,
    everywhere,
    from_main_process,
    gather_objects,
    gathered,
    log_row,
    mean_over_processes,
    shard_frozen,
    start_accelerator,
    start_tracker,
)
from utils.processes.launcher import launched_processes
from utils.processes.progress import RunProgress
from utils.redaction import shown_setting
from utils.sets.labelled import LabelledSet, open_set, set_digest
from utils.training.checkpoint import (
    best_so_far,
    find_checkpoint,
    load_checkpoint,
    publish_model,
    read_state,
    refuse_changed_settings,
    refuse_non_finite,
    refuse_unwritable,
    replace_model,
    save_checkpoint,
    set_aside_later,
    take_output_dir,
)
from utils.training.data_speed import TimedBatches, measured_workers
from utils.training.interruption import GivenUp, StopRequest
from utils.training.memory import print_estimate
from utils.training.metrics import (
    MetricsFile,
    forward_flops,
    lore_flops_per_image,
    peak_flops,
    peak_memory_gib,
    violation_statistics,
)
from utils.training.optimization import (
    accumulation_steps,
    cosine_learning_rate,
    count_steps,
    load_optimizer_state,
    make_optimizer,
    set_learning_rate,
)
from utils.training.prefetch import prefetch_training
from utils.training.state import load_parameters


@dataclass
class Settings:
    """Everything that a run can be told."""

    # fmt: off
    model_name_or_path: str = required("Hugging Face id or local directory: CLIP, SigLIP, DINOv2, or the image half of a CLIP", group="model", path=True)
    reference_model_name_or_path: str | None = flag(None, "frozen reference, for going on from a fine-tuned model (default: the start model)", group="model", path=True)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward passes: less memory, more time", group="model")
    shard_reference: bool = flag(False, "shard the frozen reference over the processes too (DeepSpeed): for encoders too large to copy", group="model")
    reference_dtype: str = flag("float32", "weights of the reference's blocks; bfloat16 halves them, needs mixed_precision bf16 and changes no embedding", group="model", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the encoders and the attack's step: a minute or two at the start, then fewer passes over memory", group="model")
    tf32: bool = flag(False, "NVIDIA GPUs: products that stay float32 run in TF32, the patch embedding excepted; matters with mixed_precision no", group="model")

    estimate_memory: bool = flag(False, "only print what a step of this kind needs on a device, for the usual image towers and, where given, --model_name_or_path; needs no data", group="memory", waives_required=True)
    estimate_processes: int = flag(8, "processes of the run that is estimated", group="memory", minimum=1)
    estimate_precision: str = flag("bf16", "mixed_precision of the run that is estimated", group="memory", choices=("bf16", "fp16", "no"))

    train_shards: list[str] = required("brace-expanded paths, globs, directories, hf:// or https:// URLs of .tar shards", group="data", path=True, many=True)
    eval_shards: list[str] = flag([], "shards with labels for the periodic clean and PGD accuracy (default: no evaluation)", group="data", path=True)
    eval_num_samples: int = flag(1000, "the first N images of the evaluation shards", group="data", minimum=1)
    classnames: str | None = flag(None, "file with one class name per line (default: classnames.txt beside the shards or one folder up)", group="data", path=True)
    linear_head: str | None = flag(None, "safetensors with weight (C, D) and maybe bias (C,): tells classes apart in place of class names, for encoders without text (default: the model's own, where it has one)", group="data", path=True)
    num_workers: int | None = flag(None, "data workers per process (default: measured)", group="data", minimum=0)
    jpeg_draft: bool = flag(False, "decode large JPEGs of the training at reduced size: faster from 896 pixels a side on (for 224), other pixels (about 50 dB)", group="data")
    cache_dir: str | None = flag(None, "where shards behind URLs and shard indexes are kept (default: the system's cache)", group="data", path=True)
    cache_limit_gb: float | None = flag(None, "most that shards behind URLs may take there, in 10^9 bytes (default: no limit)", group="data", above=0)
    max_bad_fraction: float = flag(0.01, "share of unreadable samples past which the run stops", group="data", minimum=0, maximum=1)
    allow_pipe_urls: bool = flag(False, "allow pipe: URLs, which execute shell commands; not in a recipe", group="data", in_recipe=False)
    prefetch: bool = flag(False, "bring everything that the run needs into the caches and stop: for nodes without internet; shards go to --cache_dir, which those nodes have to share, see docs/offline.md", group="data")

    objective: str = flag("embedding", "what the attack maximises: squared embedding distance, or cross-entropy with the labels", group="method", choices=("embedding", "tecoa"))
    constraint: str = flag("embedding", "what holds clean images in place", group="method", choices=("embedding", "kl", "none"))
    multiplier: str = flag("network", "form of the Lagrange multiplier", group="method", choices=("network", "linear", "scalar"))
    margin: str = flag("relative", "tolerance relative to ||z0||^2 (kl: to the entropy), or fixed", group="method", choices=("relative", "fixed"))
    rho: float = flag(0.1, "tolerance: how far a clean embedding may move, as a share of the margin", group="method", minimum=0)
    primal_steps: int = flag(5, "K, encoder updates per batch", group="method", minimum=1)
    clean_weight: float = flag(0.0, "fixed weight of the clean distance (naive regulariser, with --constraint none)", group="method", minimum=0)

    eps: float = flag(4.0, "radius of the l_inf attack, in 1/255", group="attack", above=0, maximum=255)
    attack_steps: int = flag(10, "PGD steps", group="attack", minimum=1)
    attack_step_size: float | None = flag(None, "PGD step, in 1/255 (default: eps/4)", group="attack", above=0)
    attack_momentum: float = flag(0.0, "momentum of the gradient's sign (FARE's recipe: 0.9)", group="attack", minimum=0)
    gather_for_attack: bool = flag(True, "ZeRO-3: keep the parameters whole during an attack, in place of gathering them in every forward and backward", group="attack")

    learning_rate: float = flag(1e-5, "of the encoder (AdamW), cosine to 0", group="optimisation", minimum=0)
    dual_learning_rate: float = flag(5e-4, "of the multiplier (AdamW), same schedule", group="optimisation", minimum=0)
    weight_decay: float = flag(1e-4, "AdamW's, of the encoder", group="optimisation", minimum=0)
    warmup_steps: int = flag(0, "steps of linear warm-up", group="optimisation", minimum=0)
    optimizer: str = flag("adamw", "the 8-bit variants need bitsandbytes", group="optimisation", choices=("adamw", "adamw_8bit", "paged_adamw_8bit"))
    max_grad_norm: float = flag(0.0, "gradient clipping, 0 for none", group="optimisation", minimum=0)
    per_device_train_batch_size: int = flag(128, "images per process and micro-batch", group="optimisation", minimum=1)
    gradient_accumulation_steps: int | None = flag(None, "micro-batches per step (default: 1, or what --global_batch_size needs)", group="optimisation", minimum=1)
    global_batch_size: int | None = flag(None, "images per step over all processes and micro-batches, the same on any number of GPUs (default: what the other two give)", group="optimisation", minimum=1)
    epochs: int = flag(2, "passes over the training set", group="optimisation", minimum=1)
    train_num_samples: int | None = flag(None, "images per epoch (default: all)", group="optimisation", minimum=1)
    max_steps: int | None = flag(None, "steps in all, in place of --epochs; a step is one batch with its K updates", group="optimisation", minimum=1)
    seed: int = flag(0, "of data order, attack starts and multiplier", group="optimisation", minimum=0, maximum=2**32 - 1)

    output_dir: str = required("directory of the run: the trained model, metrics.jsonl, checkpoints/", group="output", path=True)
    eval_steps: int = flag(500, "steps between evaluations; one more at step 0 and at the end", group="output", minimum=1)
    logging_steps: int = flag(10, "steps between log rows", group="output", minimum=1)
    checkpoint_steps: int = flag(500, "steps between checkpoints, 0 for none", group="output", minimum=0)
    checkpoints_total_limit: int = flag(3, "checkpoints kept, 0 for all", group="output", minimum=0)
    resume_from_checkpoint: str | None = flag(None, "a checkpoint directory, or latest (starts anew where there is none yet)", group="output", path=True)
    keep_best: str | None = flag(None, "eval_accuracy_clean or eval_accuracy_pgd: the model with its highest value is kept in best/", group="output", choices=("eval_accuracy_clean", "eval_accuracy_pgd"))
    report_to: str = flag("tensorboard", "tracker; metrics.jsonl is always written", group="output", choices=("tensorboard", "wandb", "none"))
    # fmt: on


# What may differ between a run and its continuation: where and how often, not what is computed.
FREE_SETTINGS = {
    "output_dir", "resume_from_checkpoint", "cache_dir", "cache_limit_gb", "num_workers", "report_to", "allow_pipe_urls", "max_bad_fraction",
    "eval_shards", "eval_num_samples", "eval_steps", "logging_steps", "checkpoint_steps", "checkpoints_total_limit",
    "keep_best", "gradient_checkpointing", "compile", "tf32", "shard_reference", "gather_for_attack", "per_device_train_batch_size", "gradient_accumulation_steps",
    "prefetch", "estimate_memory", "estimate_processes", "estimate_precision",
}  # fmt: skip


@dataclass
class MicroBatch:
    """What the K primal updates of a step see again: pixels, their perturbation, the reference's view of them."""

    pixel_values: Tensor  # (B, 3, H, W), float32 in [0,1]
    labels: Tensor | None  # (B,), int64
    ref_image_embeds: Tensor | None = None  # (B, D), float32
    margin: Tensor | None = None  # (B,), float32
    delta: Tensor | None = None  # (B, 3, H, W), float32
    image_embeds: Tensor | None = None  # (B, D), of the attacked encoder: on logged steps whose updates do not see them


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    if settings.estimate_memory:
        return estimate_memory(settings)
    needs_labels = settings.objective == "tecoa" or settings.constraint == "kl"
    constrained = settings.constraint != "none"
    clean_in_primal = constrained or settings.clean_weight > 0
    needs_reference = settings.objective != "tecoa" or clean_in_primal
    models = [(f"--{name}", getattr(settings, name)) for name in ("model_name_or_path", "reference_model_name_or_path")]
    if settings.prefetch:
        sets = [shard_options(settings, "train_shards", needs_labels), shard_options(settings, "eval_shards", True)]
        return prefetch_training(models, sets, cache_dir=settings.cache_dir, cache_limit_gb=settings.cache_limit_gb)
    eps, step_size = settings.eps / 255, (settings.attack_step_size or settings.eps / 4) / 255

    # Before the accelerator: DeepSpeed has to know it then.
    settings.gradient_accumulation_steps = accumulation_steps(
        settings.global_batch_size,
        settings.per_device_train_batch_size,
        launched_processes(),
        settings.gradient_accumulation_steps,
    )
    accelerator = start_accelerator(
        seed=settings.seed,
        per_device_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        max_grad_norm=settings.max_grad_norm,
        report_to=settings.report_to,
        output_dir=settings.output_dir,
        tf32=settings.tf32,
        compile=settings.compile,
    )
    device, world_size = accelerator.device, accelerator.num_processes
    check_reference_dtype(settings.reference_dtype, compute_dtype(accelerator))

    # Whatever can be wrong with paths, shards and class lists is found before a model is loaded.
    output_dir = Path(settings.output_dir)
    everywhere(accelerator, lambda: refuse_mistyped_paths(models))
    stop = StopRequest(accelerator)
    from_main_process(accelerator, lambda: take_output_dir(output_dir))
    checkpoint = from_main_process(accelerator, lambda: find_checkpoint(output_dir, settings.resume_from_checkpoint))
    from_main_process(accelerator, lambda: refuse_unwritable(output_dir, [Path(__file__).stem]))
    resumed = from_main_process(accelerator, lambda: read_state(checkpoint)) if checkpoint else None
    train_set = from_main_process(accelerator, lambda: open_shards(settings, "train_shards", needs_labels))
    eval_set = from_main_process(accelerator, lambda: open_shards(settings, "eval_shards", True))
    for opened, its_flag in ((train_set, "--train_shards"), (eval_set, "--eval_shards")):
        if opened:
            on_this_node(accelerator, opened.index, [settings.cache_dir or default_cache_dir()], its_flag)
    if resumed:
        keep_sizes(train_set.index, resumed["sizes"])
    samples_per_epoch = settings.train_num_samples or train_set.index.num_samples
    global_batch_size = settings.per_device_train_batch_size * world_size * settings.gradient_accumulation_steps
    total_steps = count_steps(
        samples_per_epoch=samples_per_epoch,
        num_samples=train_set.index.num_samples,
        global_batch_size=global_batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )
    known_settings = dataclasses.asdict(settings) | {"global_batch_size": global_batch_size}
    # Shown and stored without what may be a token.
    known_settings = {name: shown_setting(value) for name, value in known_settings.items()}
    if resumed:
        refuse_changed_settings(resumed["settings"], known_settings, FREE_SETTINGS)
        from_main_process(accelerator, lambda: set_aside_later(output_dir, resumed["step"]))
    # Model files come by the first process of every node; the others find them.
    folder = fetch_model(accelerator, settings.model_name_or_path, "--model_name_or_path")
    if needs_labels or eval_set:
        everywhere(accelerator, lambda: refuse_without_classes(settings, folder))

    # The encoder phi and its frozen reference phi0: pixels in [0,1] to un-normalised embeddings.
    model, processor = everywhere(accelerator, lambda: load_model(folder))
    encoder = make_encoder(model, processor, compute_dtype(accelerator))
    reference_model = settings.reference_model_name_or_path
    if reference_model is not None:
        reference_model = fetch_model(accelerator, reference_model, "--reference_model_name_or_path")
    reference = everywhere(accelerator, lambda: load_reference(reference_model, encoder))
    reference = keep_weights_in(settings.reference_dtype, reference).to(device)
    image_flops = lore_flops_per_image(
        forward_flops(reference),
        settings.attack_steps,
        settings.primal_steps,
        clean_in_primal,
        constrained,
        needs_reference,
    )
    if settings.shard_reference:
        reference = shard_frozen(accelerator, reference)
    # What turns embeddings (B, D) into logits (B, C): texts of the classes, or a linear head, both frozen.
    train_classifier, eval_classifier = (
        set_classifier(model, processor, encoder, labelled, device, settings.linear_head) if labelled else None
        for labelled in (train_set if needs_labels else None, eval_set)
    )
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(encoder)
    if settings.compile:
        encoder.compile(dynamic=False)
        reference.compile(dynamic=False)
    attack_update = torch.compile(ascend, dynamic=False) if settings.compile else ascend

    # Only the encoder is prepared. The multiplier stays outside the engine; its own optimizer ascends.
    optimizer = make_optimizer(settings.optimizer, encoder, settings.learning_rate, settings.weight_decay)
    multiplier = Multiplier(settings.multiplier, encoder.embed_dim).to(device)
    dual_optimizer = torch.optim.AdamW(
        multiplier.parameters(), lr=settings.dual_learning_rate, weight_decay=0.0, maximize=True, fused=True
    )
    encoder.train()
    if resumed:
        load_parameters(encoder, checkpoint)
    encoder, optimizer = accelerator.prepare(encoder, optimizer)
    module = accelerator.unwrap_model(
        encoder
    )  # attacks and evaluations go past the engine: see utils/processes/distributed.py

    of = set_digest(accelerator, eval_set, settings.eval_num_samples) if settings.keep_best else None
    best = {"value": -1.0, "of": of}
    skips = SkipCounter(train_set.index, settings.max_bad_fraction)
    eval_skips = SkipCounter(eval_set.index, settings.max_bad_fraction) if eval_set else None
    if resumed:
        extra_state = load_checkpoint(accelerator, encoder, optimizer, checkpoint, resumed)
        multiplier.load_state_dict(extra_state["multiplier"])
        load_optimizer_state(dual_optimizer, extra_state.get("dual_optimizer", {}))
        skips = skips.merge([resumed["skips"]] if accelerator.is_main_process else [])
        best = best_so_far(resumed, known_settings, output_dir, best)

    # All global batches follow from the seed, the shards' sizes and the global batch size: the step is the position.
    first_step = resumed["step"] if resumed else 0
    transform = image_transform(processor)
    train_data = ShardDataset(
        train_set.index,
        dataclasses.replace(transform, draft=settings.jpeg_draft),
        order="shuffled",
        seed=settings.seed,
        with_labels=needs_labels,
        num_classes=len(train_set.classnames),
    )
    share = {
        "samples_per_epoch": samples_per_epoch,
        "global_batch_size": global_batch_size,
        "per_device_batch_size": settings.per_device_train_batch_size,
        "rank": accelerator.process_index,
        "world_size": world_size,
        "first_step": first_step,
        "num_steps": total_steps,
    }
    num_workers, why_workers = settings.num_workers, None
    if num_workers is None:
        num_workers, why_workers = measured_workers(
            train_data, TrainBatchSampler(**share), image_flops, device, compute_dtype(accelerator)
        )
        known_settings["num_workers"] = num_workers
    batches = train_batches(train_data, **share, num_workers=num_workers, pin_memory=device.type == "cuda")
    batches = TimedBatches(count_skipped(batches, skips))

    # The method: what attacks maximise and updates minimise, what the constraint measures, and its margin; (B,) each.
    def objective(image_embeds: Tensor, batch: MicroBatch) -> Tensor:
        if settings.objective == "tecoa":
            return cross_entropy(train_classifier(image_embeds), batch.labels)
        return squared_distance(image_embeds, batch.ref_image_embeds)

    def clean_distance(image_embeds: Tensor, batch: MicroBatch) -> Tensor:
        if settings.constraint == "kl":
            return kl_divergence(train_classifier(batch.ref_image_embeds), train_classifier(image_embeds))
        return squared_distance(image_embeds, batch.ref_image_embeds)

    def margin(ref_image_embeds: Tensor) -> Tensor:
        if settings.constraint == "kl":
            return entropy_margin(train_classifier(ref_image_embeds), settings.margin)
        return embedding_margin(ref_image_embeds, settings.margin)

    def primal_loss(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What an update descends on, the same and its terms, and the embeddings of the clean and of the perturbed images."""
        adversarial = batch.pixel_values + batch.delta
        if not clean_in_primal:
            adversarial_embeds = encoder(adversarial)
            loss = objective(adversarial_embeds, batch).mean()
            return loss, torch.stack([loss, loss]).detach(), batch.image_embeds, adversarial_embeds
        image_embeds, adversarial_embeds = encoder(torch.cat([batch.pixel_values, adversarial])).chunk(2)
        losses, distance = objective(adversarial_embeds, batch), clean_distance(image_embeds, batch)
        if constrained:
            with torch.no_grad():
                multipliers = multiplier(batch.ref_image_embeds)
            loss = primal_lagrangian(losses, violation(distance, batch.margin, settings.rho), multipliers)
        else:
            loss = (losses + settings.clean_weight * distance).mean()
        terms = torch.stack([loss, losses.mean(), distance.mean()]).detach()
        return loss, terms, image_embeds, adversarial_embeds

    @torch.no_grad()
    def measure(batch: MicroBatch, image_embeds: Tensor, adversarial_embeds: Tensor) -> Tensor:
        """What a log row is made of, (B, 5): distances of perturbed and clean images, what is constrained, margin, lambda."""
        columns = [
            squared_distance(adversarial_embeds, batch.ref_image_embeds),
            squared_distance(image_embeds, batch.ref_image_embeds),
            clean_distance(image_embeds, batch),
            batch.margin,
            multiplier(batch.ref_image_embeds) if constrained else torch.zeros_like(batch.margin),
        ]
        return torch.stack(columns, dim=1)

    def summary(measured: list[Tensor]) -> dict[str, float]:
        """Statistics over the global batch at the attacked encoder. Synchronises."""
        rows = accelerator.gather(torch.cat(measured))
        adversarial, clean, constraint, margins, multipliers = rows.unbind(dim=1)
        return {
            "distance_adv": adversarial.mean().item(),
            "distance_clean": clean.mean().item(),
            **violation_statistics(constraint, margins, settings.rho),
            "multiplier_mean": multipliers.mean().item(),
            "multiplier_min": multipliers.min().item(),
            "multiplier_max": multipliers.max().item(),
        }

    def evaluate(step: int) -> dict[str, float]:
        """Empty where the run was told to stop and a batch did not come."""
        accuracies = {}
        for name, radius in (("eval_accuracy_clean", None), ("eval_accuracy_pgd", eps)):
            loader = eval_loader(
                ShardDataset(
                    eval_set.index,
                    transform,
                    order="sequential",
                    with_labels=True,
                    num_classes=len(eval_set.classnames),
                ),
                num_samples=min(settings.eval_num_samples, eval_set.index.num_samples),
                batch_size=settings.per_device_train_batch_size,
                rank=accelerator.process_index,
                world_size=world_size,
                num_workers=0,
                pin_memory=device.type == "cuda",
            )
            eval_skips.seen = 0  # every pass is weighed by itself
            passing = progress.within(
                f"evaluating {name.removeprefix('eval_accuracy_')}", stop.patiently(loader), len(loader)
            )
            counted = count_skipped(passing, eval_skips)
            eager = torch.compiler.set_stance("force_eager")  # a last batch of its own size is not worth compiling
            with contextlib.suppress(GivenUp), gathered(module, settings.gather_for_attack), eager:
                _, correct = predictions(
                    module, counted, eval_classifier, device=device, eps=radius, seed=settings.seed
                )
            stop.ask()
            if stop.gave_up():
                return {}
            accuracies[name] = mean_over_processes(accelerator, correct)
            eval_skips.merge(gather_objects(accelerator, eval_skips.state())).check()
        progress.note(
            f"step {step}: accuracy {accuracies['eval_accuracy_clean']:.3f} clean, "
            f"{accuracies['eval_accuracy_pgd']:.3f} under PGD at eps {settings.eps:g}/255"
        )
        return accuracies

    def write_model(directory: Path) -> None:
        encoder_state = accelerator.get_state_dict(encoder)  # on all processes: ZeRO-3 gathers here
        if accelerator.is_main_process:
            save_model(directory, model, processor, encoder_state)
            write_card(
                directory,
                lambda: model_card(
                    method=method_name(settings),
                    model_class=type(model).__name__,
                    with_text=has_text(model.config),
                    about="The image tower was fine-tuned to resist l_inf perturbations of the pixels; the rest is the base model's.",
                    tags=[model.config.model_type, "adversarial-robustness"],
                    base_model=settings.model_name_or_path,
                    settings=known_settings,
                    evaluations=[row for row in metrics_file.read() if "eval_accuracy_clean" in row],
                    notes=[f"Skipped samples: {line}." for line in all_skips.summary().splitlines()],
                ),
            )

    def record(row: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            metrics_file.write(row)
        log_row(accelerator, row)

    def check(done: int, grad_norm: Any = None) -> None:
        """Ends the run where a loss since the last check is not finite, or too many samples are lost. Synchronises."""
        nonlocal all_skips
        if losses:
            refuse_non_finite(
                accelerator,
                losses,
                settings.primal_steps * settings.gradient_accumulation_steps,
                done,
                last_good,
                first_step=first_step,
                terms=("objective", "distance of clean images"),
                grad_norm=grad_norm,
            )
            losses.clear()
        all_skips = skips.merge(gather_objects(accelerator, skips.state()))
        all_skips.check()

    def save(done: int) -> Path:
        """The checkpoint of step ``done``, written where it is not there yet."""
        if last_good == output_dir / "checkpoints" / f"step-{done}":
            return last_good
        return save_checkpoint(
            accelerator,
            output_dir,
            done,
            model=encoder,
            optimizer=optimizer,
            state={
                "step": done,
                "settings": known_settings,
                "skips": all_skips.state(),
                "best": best,
                "sizes": train_set.index.sizes,
            },
            extra_state={
                "multiplier": multiplier.state_dict(),
                "dual_optimizer": dual_optimizer.state_dict()["state"],
            },
            write_model=write_model,
            total_limit=settings.checkpoints_total_limit,
        )

    metrics_file = MetricsFile(output_dir / "metrics.jsonl")
    from_main_process(accelerator, lambda: metrics_file.cut_back(first_step if resumed else -1))
    start_tracker(accelerator, settings.report_to, Path(__file__).stem, known_settings, output_dir, first_step)
    progress = RunProgress(method_name(settings), total_steps, done=first_step, enabled=accelerator.is_main_process)
    progress.note(
        f"{method_name(settings)}: {train_set.index.num_samples} images in {len(train_set.index.urls)} shards, global batch "
        f"{global_batch_size}, steps {first_step} to {total_steps}, {world_size} x {device.type}, {module.compute_dtype}"
    )
    if why_workers:
        progress.note(why_workers)
    all_skips = skips
    shown: dict[str, float] = {}
    losses: list[Tensor] = []  # of all updates since they were last checked; on the device until then
    seconds, logged_step, last_good = 0.0, first_step, checkpoint

    with progress:
        stop.loaded()
        if eval_set and not resumed:
            record({"step": 0, "samples": 0, **evaluate(0)})
        stop.ask()
        if first_step < total_steps and (told_to_stop := stop.agreed()):
            stop.leave(told_to_stop, f"before step {first_step + 1}: nothing new to save", progress.note)

        for step in range(first_step, total_steps):
            clock = time.perf_counter()
            done = step + 1
            last = done == total_steps
            log_now = last or done % settings.logging_steps == 0
            rates = {
                name: cosine_learning_rate(step, getattr(settings, name), total_steps, settings.warmup_steps)
                for name in ("learning_rate", "dual_learning_rate")
            }
            set_learning_rate(optimizer, rates["learning_rate"])
            set_learning_rate(dual_optimizer, rates["dual_learning_rate"])

            # 1. Reference embeddings and perturbations of all micro-batches, at the same encoder.
            micro_batches = []
            all_loaded = stop.unless_told(lambda: [next(batches) for _ in range(settings.gradient_accumulation_steps)])
            stop.ask()
            # Under ZeRO-3 an attack gathers: no process begins one while another has no batch. Without it none has to wait.
            if accelerator.distributed_type == DistributedType.DEEPSPEED and stop.gave_up():
                all_loaded = None
            for loaded in all_loaded or ():
                pixel_values = to_pixel_values(loaded["images"], device)
                batch = MicroBatch(
                    pixel_values, loaded["labels"].to(device, non_blocking=True) if needs_labels else None
                )
                if needs_reference or log_now:
                    with torch.no_grad():
                        batch.ref_image_embeds = reference(pixel_values)
                        batch.margin = margin(batch.ref_image_embeds)
                seeds = attack_seeds(settings.seed, step, loaded["positions"].tolist())
                with frozen(module), gathered(module, settings.gather_for_attack):
                    batch.delta = pgd(
                        lambda adversarial, batch=batch: objective(module(adversarial), batch),
                        pixel_values,
                        eps=eps,
                        step_size=step_size,
                        num_steps=settings.attack_steps,
                        start=uniform_start(pixel_values, eps, seeds),
                        momentum=settings.attack_momentum,
                        update=attack_update,
                    )
                if log_now and not clean_in_primal:
                    with torch.no_grad():
                        batch.image_embeds = module(pixel_values)
                micro_batches.append(batch)
            if stop.gave_up():  # back to the last whole step: data did not come, and the run was told to stop
                told_to_stop = stop.agreed()
                if step == first_step:
                    stop.leave(told_to_stop, f"before step {done}: nothing new to save", progress.note)
                check(step)
                last_good = save(step)
                stop.leave(told_to_stop, f"while waiting for data, after step {step}: saved {last_good}", progress.note)

            # 2. K primal updates on the same images and perturbations. The first one's embeddings are what is logged.
            row: dict[str, Any] = {}
            measured: list[Tensor] = []
            for update in range(settings.primal_steps):
                for batch in micro_batches:
                    with accelerator.accumulate(encoder):
                        loss, terms, image_embeds, adversarial_embeds = primal_loss(batch)
                        accelerator.backward(loss)  # under DeepSpeed this is the update too, clipped by its own config
                        losses.append(terms)
                        if log_now and update == 0:
                            measured.append(measure(batch, image_embeds, adversarial_embeds))
                        if accelerator.sync_gradients and (settings.max_grad_norm > 0 or (log_now and update == 0)):
                            norm = accelerator.clip_grad_norm_(encoder.parameters(), settings.max_grad_norm or math.inf)
                            if log_now and update == 0:
                                row["grad_norm"] = norm
                        optimizer.step()
                        optimizer.zero_grad()

            # 3. One dual update on the mean over the global batch, at the violation of the updated encoder.
            if constrained:
                for batch in micro_batches:
                    with torch.no_grad():
                        distance = clean_distance(module(batch.pixel_values), batch)
                    v = violation(distance, batch.margin, settings.rho)
                    dual = dual_lagrangian(v, multiplier(batch.ref_image_embeds))
                    (dual / len(micro_batches)).backward()
                average_gradients(accelerator, multiplier)
                dual_optimizer.step()
                dual_optimizer.zero_grad()

            seconds += time.perf_counter() - clock

            told_to_stop = stop.agreed()
            eval_now = eval_set is not None and (last or done % settings.eval_steps == 0)
            checkpoint_now = settings.checkpoint_steps > 0 and done % settings.checkpoint_steps == 0
            checkpoint_now = checkpoint_now or (told_to_stop is not None and not last)
            if not (log_now or eval_now or checkpoint_now):
                progress.update(done)
                continue

            # Everything below synchronises with the device and with the other processes.
            clock = time.perf_counter()
            updates = settings.primal_steps * len(micro_batches)
            first_loss = torch.stack(losses[-updates:][: len(micro_batches)])[:, 0].mean()
            check(done, row.get("grad_norm"))
            seconds += time.perf_counter() - clock  # a device finishes its queue in here
            if log_now:
                images_per_second = (done - logged_step) * global_batch_size / seconds
                row |= summary(measured) | {
                    "loss": accelerator.reduce(first_loss, reduction="mean").item(),
                    "grad_norm": float(row["grad_norm"]),
                    **rates,
                    "images_per_second": images_per_second,
                    "data_wait_fraction": max(gather_objects(accelerator, batches.wait_fraction(seconds))),
                    "peak_memory_gib": peak_memory_gib(device),
                }
                if peak := peak_flops(device):
                    row["model_flops_utilisation"] = images_per_second * image_flops / (peak * world_size)
                if advice := batches.advice(row["data_wait_fraction"], num_workers):
                    progress.note(advice)
                seconds, logged_step = 0.0, done
                shown |= {
                    "img/s": images_per_second,
                    "loss": row["loss"],
                    "multiplier": row["multiplier_mean"],
                    "violation": row["violation_ratio_mean"],
                }
            if eval_now:
                row |= evaluate(done)
                shown |= {"clean": row.get("eval_accuracy_clean"), "pgd": row.get("eval_accuracy_pgd")}
            if row:
                record({"step": done, "samples": done * global_batch_size, **row})
            progress.update(done, shown, report=log_now)

            if eval_now and stop.gave_up():
                told_to_stop, checkpoint_now = stop.agreed(), True
            if eval_now and settings.keep_best and row.get(settings.keep_best, -1.0) > best["value"]:
                best |= {"step": done, "value": row[settings.keep_best], "metric": settings.keep_best}
                replace_model(accelerator, output_dir / "best", write_model)
            if checkpoint_now:
                last_good = save(done)
            if told_to_stop and not last:
                stop.leave(told_to_stop, f"after step {done}: saved {last_good}", progress.note)

    publish_model(accelerator, output_dir, write_model)
    progress.note(f"saved {output_dir}")
    for line in all_skips.summary().splitlines():
        progress.note(f"skipped in all: {line}")
    if eval_set:
        for line in eval_skips.merge(gather_objects(accelerator, eval_skips.state())).summary().splitlines():
            progress.note(f"skipped in evaluations: {line}")
    end_training(accelerator)
    stop.close()


def check_settings(settings: Settings) -> None:
    """Refuses combinations that no method is made of."""
    if settings.clean_weight > 0 and settings.constraint != "none":
        raise UserError(
            f"--clean_weight {settings.clean_weight} with --constraint {settings.constraint}: the naive regulariser stands "
            "in for the constraint; add --constraint none or leave --clean_weight at 0"
        )
    if settings.keep_best and not settings.eval_shards:
        raise UserError(
            f"--keep_best {settings.keep_best}: nothing is evaluated; name labelled shards with --eval_shards"
        )


def refuse_without_classes(settings: Settings, folder: str) -> None:
    """Raises ``UserError`` where labels are to be used and nothing says which embedding is which class."""
    config = check_model(folder, "--model_name_or_path")
    if settings.linear_head is not None and not Path(settings.linear_head).is_file():
        raise UserError(f"--linear_head {settings.linear_head}: no such file; expected safetensors with weight (C, D)")
    if settings.linear_head is None and not has_text(config) and not has_own_head(config):
        raise UserError(
            f"--model_name_or_path {settings.model_name_or_path}: a {config.model_type} has no text tower and no head of its "
            "own, which --eval_shards, tecoa and kl need to tell classes apart; give it one with --linear_head"
        )


def estimate_memory(settings: Settings) -> None:
    """Prints what a step with these settings needs on a device; the model is not loaded, its config is."""
    check_reference_dtype(settings.reference_dtype, MIXED_PRECISIONS[settings.estimate_precision])
    accumulation = accumulation_steps(
        settings.global_batch_size,
        settings.per_device_train_batch_size,
        settings.estimate_processes,
        settings.gradient_accumulation_steps,
    )
    name, model = settings.model_name_or_path, None
    if name is not None:
        config = check_model(name, "--model_name_or_path", ("clip",))
        config.vision_config.projection_dim = config.projection_dim
        model = Path(name).resolve().name if Path(name).exists() else name, config.vision_config
    if launched_rank():
        return
    print_estimate(
        model,
        batch_size=settings.per_device_train_batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        processes=settings.estimate_processes,
        optimizer=settings.optimizer,
        accumulation=accumulation,
        compute_dtype=MIXED_PRECISIONS[settings.estimate_precision],
        reference_dtype=settings.reference_dtype,
        clean_in_primal=settings.constraint != "none" or settings.clean_weight > 0,
        momentum=settings.attack_momentum > 0,
        gather_for_attack=settings.gather_for_attack,
        shard_reference=settings.shard_reference,
    )


def open_shards(settings: Settings, name: str, with_classes: bool) -> LabelledSet | None:
    """The set of --train_shards or --eval_shards; None where none was named."""
    options = shard_options(settings, name, with_classes)
    return open_set(**options) if options["patterns"] else None


def shard_options(settings: Settings, name: str, with_classes: bool) -> dict[str, Any]:
    """The arguments of ``open_set`` for the set of a flag."""
    return {
        "patterns": getattr(settings, name),
        "flag": f"--{name}",
        "with_classes": with_classes,
        "classnames": settings.classnames,
        "cache_dir": settings.cache_dir,
        "cache_limit_gb": settings.cache_limit_gb,
        "allow_pipe_urls": settings.allow_pipe_urls,
    }


def method_name(settings: Settings) -> str:
    """The field's name for this combination of objective and constraint."""
    if settings.objective == "embedding":
        if settings.constraint == "embedding":
            return "LORE"
        if settings.constraint == "none":
            return "FARE + clean distance" if settings.clean_weight > 0 else "FARE"
    name = "TeCoA" if settings.objective == "tecoa" else settings.objective
    if settings.clean_weight > 0:
        return f"{name} + clean distance"
    return name + {"none": "", "embedding": " + l2", "kl": " + KL"}[settings.constraint]


if __name__ == "__main__":
    run(main)
