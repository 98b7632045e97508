"""Preference optimisation of a CLIP: prefer the right text over a wrong one where an image tempts, and stay as before elsewhere.

  python train_po.py --model_name_or_path openai/clip-vit-base-patch32 --preference dpo \\
    --train_shards data/imagenet-100/train --output_dir runs/dpo

  accelerate launch --config_file accelerate_configs/ddp.yaml train_po.py --task pairs --trainable head \\
    --model_name_or_path openai/clip-vit-large-patch14 --train_shards "data/vl-bias/train-{00..15}.tar" --output_dir runs/head

The first writes wrong class names on labelled images (typographic attacks) and teaches the image tower not to follow them.
The second takes pairs of texts from .json members and trains a head, whose strength t can be set after training.
--config recipes/<name>.yaml sets all of an experiment of the paper.
With --constraint embedding --rho 0.1 LORE's constraint holds every clean embedding near the reference's meanwhile.
Precision (bf16, fp16, no) and sharding live in the accelerate config.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor

from utils.cli import flag, parse_settings, required, run
from utils.data.digests import files_digest
from utils.data.images import ImageTransform
from utils.data.order import TrainBatchSampler
from utils.data.shards import eval_loader, keep_sizes, train_batches
from utils.data.skipped import SkipCounter, count_skipped
from utils.data.sources import default_cache_dir
from utils.errors import UserError
from utils.methods.head import Head, fold_head, head_power, orthogonality_penalty, save_head, warn_of_condition
from utils.methods.lagrangian import Multiplier, dual_lagrangian, embedding_margin, primal_lagrangian, violation
from utils.methods.losses import squared_distance
from utils.methods.preferences import (
    DEFAULT_BETA,
    PREFERENCES,
    margin,
    mean_over_rejected,
    preference_loss,
    retention_kl,
    rewards,
)
from utils.models.encoders import (
    CONTRASTIVE_MODEL_TYPES,
    ImageEncoder,
    TextEncoder,
    check_model,
    check_reference_dtype,
    enable_gradient_checkpointing,
    frozen_copy,
    image_transform,
    keep_weights_in,
    load_model,
    logit_scale,
    make_encoder,
    refuse_other_shape,
    save_model,
)
from utils.models.features import features
from utils.models.hub import fetch_model, on_this_node, refuse_mistyped_paths
from utils.models.model_card import model_card, write_card
from utils.models.policy import TRAINABLE, Policy, TextTable, batch_logits, judge
from utils.models.tokens import Tokens, refuse_equal_texts
from utils.models.zeroshot import ensemble, to_pixel_values
from utils.processes.distributed import (
    average_gradients,
    compute_dtype,
    end_training,
    everywhere,
    from_main_process,
    gather_objects,
    log_row,
    mean_over_processes,
    on_every_node,
    shard_frozen,
    start_accelerator,
    start_tracker,
)
from utils.processes.launcher import launched_processes
from utils.processes.progress import RunProgress
from utils.redaction import shown_setting
from utils.sets.labelled import LabelledSet, open_set, set_digest
from utils.sets.pairs import PairDataset, PreferenceDataset, TypographicDataset, pair_shards
from utils.sets.typographic import KINDS, PLACES, font_files, merge_names, word_style
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
from utils.training.metrics import (
    MetricsFile,
    forward_flops,
    peak_memory_gib,
    preference_flops_per_sample,
    violation_statistics,
)
from utils.training.optimization import (
    BetaAverage,
    accumulation_steps,
    cosine_learning_rate,
    count_steps,
    load_optimizer_state,
    make_optimizer,
    set_learning_rate,
)
from utils.training.prefetch import prefetch_training
from utils.training.state import load_parameters

EVAL_KEYS = {"clean": "eval_accuracy_clean", "chosen": "eval_accuracy_attacked", "rejected": "eval_follows_rejected", "pair": "eval_pair_accuracy", "kl": "eval_kl"}  # fmt: skip
DEFAULT_LEARNING_RATE = {"head": 1e-3, "image": 2e-5, "all": 2e-5}


@dataclass
class Settings:
    """Everything that a run can be told."""

    # fmt: off
    model_name_or_path: str = required("Hugging Face id or local directory: CLIP, SigLIP, or another with a text tower", group="model", path=True)
    reference_model_name_or_path: str | None = flag(None, "frozen reference, for going on from a fine-tuned model (default: the start model)", group="model", path=True)
    trainable: str = flag("image", "what is trained: a square matrix on both embeddings, the image tower, or both towers", group="model", choices=TRAINABLE)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward passes: less memory, more time", group="model")
    shard_reference: bool = flag(False, "shard the frozen reference over the processes too (DeepSpeed): for encoders too large to copy", group="model")
    reference_dtype: str = flag("float32", "weights of the image reference's blocks; bfloat16 halves them, needs mixed_precision bf16 and changes no embedding", group="model", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the image encoders", group="model")
    tf32: bool = flag(False, "NVIDIA GPUs: products that stay float32 run in TF32, the patch embedding excepted; matters with mixed_precision no", group="model")

    train_shards: list[str] = required("brace-expanded paths, globs, directories, hf:// or https:// URLs of .tar shards; with --task pairs also folders of label=X_text=Y pictures", group="data", path=True, many=True)
    task: str = flag("typographic", "write wrong class names on labelled images, or read chosen and rejected texts from .json members", group="data", choices=("typographic", "pairs"))
    eval_shards: list[str] = flag([], "shards of the same kind for the periodic evaluation (default: none)", group="data", path=True)
    eval_num_samples: int = flag(1000, "the first N samples of the evaluation shards", group="data", minimum=1)
    classnames: str | None = flag(None, "file with one class name per line (default: classnames.txt beside the shards or one folder up)", group="data", path=True)
    num_workers: int | None = flag(None, "data workers per process (default: measured)", group="data", minimum=0)
    jpeg_draft: bool = flag(False, "decode large JPEGs of the training at reduced size: faster from 896 pixels a side on (for 224), other pixels (about 50 dB)", group="data")
    cache_dir: str | None = flag(None, "where shards behind URLs, shard indexes and embeddings are kept (default: the system's cache)", group="data", path=True)
    cache_limit_gb: float | None = flag(None, "most that shards behind URLs may take there, in 10^9 bytes (default: no limit)", group="data", above=0)
    cache_features: bool = flag(True, "--trainable head: embed every image once and keep the embeddings; false draws new words every epoch", group="data")
    max_bad_fraction: float = flag(0.01, "share of unreadable samples past which the run stops", group="data", minimum=0, maximum=1)
    allow_pipe_urls: bool = flag(False, "allow pipe: URLs, which execute shell commands; not in a recipe", group="data", in_recipe=False)
    prefetch: bool = flag(False, "bring everything that the run needs into the caches and stop: for nodes without internet; shards go to --cache_dir, which those nodes have to share, see docs/offline.md", group="data")

    attacks_per_image: int = flag(1, "copies of each image, each with another wrong word", group="words", minimum=1)
    fonts: list[str] = flag(["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"], "fonts of matplotlib, Aileron, or .ttf files", group="words", path=True)
    word_size_min: float = flag(20.0, "smallest letters, in pixels at an image side of 224", group="words", above=0)
    word_size_max: float = flag(40.0, "largest letters, in the same unit", group="words", above=0)
    word_kind: str = flag("outlined", "coloured letters with an outline, or black on a white label", group="words", choices=KINDS)
    word_place: str = flag("anywhere", "which half of the image words are written in", group="words", choices=PLACES)

    preference: str = flag("dpo", "the loss; ce is the baseline, cross-entropy of the attacked image", group="method", choices=PREFERENCES)
    beta: float | None = flag(None, "strength of the preference (default: dpo 1, ipo 0.1, kto 1.5)", group="method", above=0)
    label_smoothing: float = flag(0.0, "dpo: share of pairs taken to be the wrong way round, below 0.5", group="method", minimum=0)
    reg_weight: float = flag(1.0, "weight of KL(reference || policy) on clean images", group="method", minimum=0)
    orthogonality_weight: float = flag(0.0, "--trainable head: weight of ||W^T W - I||_F^2", group="method", minimum=0)
    constraint: str = flag("none", "what holds clean images in place besides the KL", group="method", choices=("none", "embedding"))
    multiplier: str = flag("network", "form of the Lagrange multiplier", group="method", choices=("network", "linear", "scalar"))
    margin: str = flag("relative", "tolerance relative to ||z0||^2, or fixed", group="method", choices=("relative", "fixed"))
    rho: float = flag(0.1, "tolerance: how far a clean embedding may move, as a share of the margin", group="method", minimum=0)
    export_t: float = flag(1.0, "--trainable head: strength t at which the head is folded into the saved model", group="method", minimum=-10, maximum=10)

    learning_rate: float | None = flag(None, "cosine to 0 (default: 2e-5, for a head 1e-3)", group="optimisation", minimum=0)
    dual_learning_rate: float = flag(5e-4, "of the multiplier (AdamW), same schedule", group="optimisation", minimum=0)
    weight_decay: float = flag(0.0, "of what is trained", group="optimisation", minimum=0)
    warmup_steps: int = flag(0, "steps of linear warm-up", group="optimisation", minimum=0)
    optimizer: str = flag("adamax", "the 8-bit variants need bitsandbytes", group="optimisation", choices=("adamax", "adamw", "adamw_8bit", "paged_adamw_8bit"))
    max_grad_norm: float = flag(0.0, "gradient clipping, 0 for none", group="optimisation", minimum=0)
    per_device_train_batch_size: int = flag(128, "samples per process and micro-batch; a typographic sample is 1 + attacks_per_image pictures", group="optimisation", minimum=1)
    gradient_accumulation_steps: int | None = flag(None, "micro-batches per step (default: 1, or what --global_batch_size needs)", group="optimisation", minimum=1)
    global_batch_size: int | None = flag(None, "samples per step over all processes and micro-batches, the same on any number of GPUs (default: what the other two give)", group="optimisation", minimum=1)
    epochs: int = flag(3, "passes over the training set", group="optimisation", minimum=1)
    train_num_samples: int | None = flag(None, "samples per epoch (default: all)", group="optimisation", minimum=1)
    max_steps: int | None = flag(None, "steps in all, in place of --epochs", group="optimisation", minimum=1)
    weight_average: str = flag("none", "save and evaluate the run's weights averaged with Beta(0.7, 0.7)", group="optimisation", choices=("none", "beta"))
    seed: int = flag(0, "of data order, words and multiplier", group="optimisation", minimum=0, maximum=2**32 - 1)

    output_dir: str = required("directory of the run: the trained model, metrics.jsonl, checkpoints/", group="output", path=True)
    eval_steps: int = flag(500, "steps between evaluations; one more at step 0 and at the end", group="output", minimum=1)
    logging_steps: int = flag(10, "steps between log rows", group="output", minimum=1)
    checkpoint_steps: int = flag(500, "steps between checkpoints, 0 for none", group="output", minimum=0)
    checkpoints_total_limit: int = flag(3, "checkpoints kept, 0 for all", group="output", minimum=0)
    resume_from_checkpoint: str | None = flag(None, "a checkpoint directory, or latest (starts anew where there is none yet)", group="output", path=True)
    keep_best: str | None = flag(None, "the model with the highest value is kept in best/", group="output", choices=("eval_accuracy_clean", "eval_accuracy_attacked", "eval_pair_accuracy"))
    report_to: str = flag("tensorboard", "tracker; metrics.jsonl is always written", group="output", choices=("tensorboard", "wandb", "none"))
    # fmt: on


# What may differ between a run and its continuation: where and how often, not what is computed.
FREE_SETTINGS = {
    "output_dir", "resume_from_checkpoint", "cache_dir", "cache_limit_gb", "num_workers", "report_to", "allow_pipe_urls", "max_bad_fraction",
    "eval_shards", "eval_num_samples", "eval_steps", "logging_steps", "checkpoint_steps", "checkpoints_total_limit", "export_t",
    "keep_best", "gradient_checkpointing", "compile", "tf32", "shard_reference", "per_device_train_batch_size", "gradient_accumulation_steps",
    "prefetch",
}  # fmt: skip


@dataclass
class CleanRows:
    """What the dual step sees again of a micro-batch: R clean pictures, R >= 0, and the reference's view of them."""

    inputs: Tensor  # (R, 3, H, W), float32 in [0,1]; for a head (R, D)
    ref_image_embeds: Tensor  # (R, D), float32, un-normalised
    margin: Tensor  # (R,), float32


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    constrained = settings.constraint != "none"
    if settings.beta is None:
        settings.beta = DEFAULT_BETA[settings.preference]
    if settings.learning_rate is None:
        settings.learning_rate = DEFAULT_LEARNING_RATE[settings.trainable]
    models = [(f"--{name}", getattr(settings, name)) for name in ("model_name_or_path", "reference_model_name_or_path")]
    if settings.prefetch:
        sets = [shard_options(settings, "train_shards"), shard_options(settings, "eval_shards")]
        return prefetch_training(
            models,
            sets,
            cache_dir=settings.cache_dir,
            cache_limit_gb=settings.cache_limit_gb,
            supported=CONTRASTIVE_MODEL_TYPES,
        )

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
    if settings.weight_average != "none" and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("--weight_average beta: DeepSpeed keeps the weights to itself; use a DDP config, or none")

    # Whatever can be wrong with paths, shards and class lists is found before a model is loaded.
    output_dir = Path(settings.output_dir)
    everywhere(accelerator, lambda: refuse_mistyped_paths(models))
    stop = StopRequest(accelerator)
    from_main_process(accelerator, lambda: take_output_dir(output_dir))
    checkpoint = from_main_process(accelerator, lambda: find_checkpoint(output_dir, settings.resume_from_checkpoint))
    from_main_process(accelerator, lambda: refuse_unwritable(output_dir, [Path(__file__).stem]))
    resumed = from_main_process(accelerator, lambda: read_state(checkpoint)) if checkpoint else None
    if settings.task == "pairs":  # folders of pictures become shards in the cache of every node
        pictures = [*settings.train_shards, *settings.eval_shards]
        on_every_node(accelerator, lambda: pair_shards(pictures, settings.cache_dir))
    train_set = from_main_process(accelerator, lambda: open_shards(settings, "train_shards"))
    eval_set = from_main_process(accelerator, lambda: open_shards(settings, "eval_shards"))
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
        # Checkpoints from before there was a constraint have no multiplier to go on with.
        before = {"constraint": "none"} | resumed["settings"]
        refuse_changed_settings(before, known_settings, FREE_SETTINGS)
        from_main_process(accelerator, lambda: set_aside_later(output_dir, resumed["step"]))
    # Model files come by the first process of every node; the others find them.
    folder = fetch_model(accelerator, settings.model_name_or_path, "--model_name_or_path", CONTRASTIVE_MODEL_TYPES)
    everywhere(accelerator, lambda: refuse_head_without_projections(settings, folder))

    # The policy, and its frozen reference: pictures and texts to embeddings.
    clip, processor = everywhere(accelerator, lambda: load_model(folder))
    encoder = make_encoder(clip, processor, compute_dtype(accelerator))
    scale = logit_scale(clip)
    templates = train_set.templates or ["{c}"]
    if settings.task == "typographic":
        refuse_equal_texts(processor, clip.config, merge_names(train_set.classnames)[0], templates[0])
    if settings.reference_model_name_or_path is not None:
        reference_flag = "--reference_model_name_or_path"
        reference_name = settings.reference_model_name_or_path
        reference_folder = fetch_model(accelerator, reference_name, reference_flag, CONTRASTIVE_MODEL_TYPES)
        reference_clip, reference_processor = everywhere(
            accelerator, lambda: load_model(reference_folder, reference_flag)
        )
        reference = frozen_copy(make_encoder(reference_clip, reference_processor, encoder.compute_dtype))
        refuse_other_shape(reference, encoder, settings.reference_model_name_or_path)
    else:
        reference_clip = copy.deepcopy(clip) if settings.trainable == "all" else clip
        reference = frozen_copy(encoder)
    keep_weights_in(settings.reference_dtype, reference).to(device)
    pictures = 1 + settings.attacks_per_image if settings.task == "typographic" else 1
    sample_flops = preference_flops_per_sample(
        forward_flops(reference), pictures, settings.trainable == "head", dual=constrained
    )
    if settings.shard_reference:
        reference = shard_frozen(accelerator, reference)
    # The text table of a tower that is trained serves its tokenizer alone.
    per_prompt = settings.trainable != "image"
    text_table = TextTable(clip, processor, templates, device, per_prompt=per_prompt)
    reference_text_table = text_table
    if reference_clip is not clip:
        reference_text_table = TextTable(reference_clip, processor, templates, device, per_prompt=per_prompt)
    policy = Policy(
        image_encoder=None if settings.trainable == "head" else encoder,
        text_encoder=TextEncoder(clip, encoder.compute_dtype) if settings.trainable == "all" else None,
        head=Head(encoder.embed_dim) if settings.trainable == "head" else None,
    )
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(encoder)
    if settings.compile:
        encoder.compile()
        reference.compile()

    # Only the policy is prepared. The multiplier stays outside the engine; its own optimizer ascends.
    optimizer = make_optimizer(settings.optimizer, policy, settings.learning_rate, settings.weight_decay)
    if constrained:
        multiplier = Multiplier(settings.multiplier, encoder.embed_dim).to(device)
        dual_optimizer = torch.optim.AdamW(
            multiplier.parameters(), lr=settings.dual_learning_rate, weight_decay=0.0, maximize=True, fused=True
        )
    policy.train()
    if resumed:
        load_parameters(policy, checkpoint)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    module = accelerator.unwrap_model(policy)  # evaluations go past the engine
    average = BetaAverage(module, total_steps) if settings.weight_average == "beta" else None

    of = set_digest(accelerator, eval_set, settings.eval_num_samples) if settings.keep_best else None
    best = {"value": -1.0, "of": of}
    skips = SkipCounter(train_set.index, settings.max_bad_fraction)
    eval_skips = SkipCounter(eval_set.index, settings.max_bad_fraction) if eval_set else None
    if resumed:
        extra_state = load_checkpoint(accelerator, policy, optimizer, checkpoint, resumed)
        if average:
            average.load_state_dict(extra_state["average"])
        if constrained:
            multiplier.load_state_dict(extra_state["multiplier"])
            load_optimizer_state(dual_optimizer, extra_state.get("dual_optimizer", {}))
        skips = skips.merge([resumed["skips"]] if accelerator.is_main_process else [])
        best = best_so_far(resumed, known_settings, output_dir, best)

    # All global batches follow from the seed, the shards' sizes and the global batch size: the step is the position.
    first_step = resumed["step"] if resumed else 0
    transform = image_transform(processor)
    train_transform = dataclasses.replace(transform, draft=settings.jpeg_draft)
    datasets = {"train": make_dataset(settings, train_set, train_transform, order="shuffled")}
    if eval_set:
        datasets["eval"] = make_dataset(settings, eval_set, transform, order="sequential")
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
            datasets["train"], TrainBatchSampler(**share), sample_flops, device, encoder.compute_dtype
        )
        known_settings["num_workers"] = num_workers
    kept = settings.trainable == "head" and settings.cache_features
    if kept:
        for name, dataset in datasets.items():
            count = len(dataset) if name == "train" else min(settings.eval_num_samples, len(dataset))
            with RunProgress(f"embedding {name}", count, enabled=accelerator.is_main_process) as embedding:
                datasets[name], known = features(
                    accelerator,
                    dataset,
                    reference,
                    weights=encoder.state_dict(),  # the reference's too: a head leaves them
                    identity=feature_settings(settings, dataset, encoder),
                    num_samples=count,
                    batch_size=settings.per_device_train_batch_size,
                    num_workers=num_workers,
                    on_batch=embedding.update,
                )
                embedding.update(count, {"embeddings": "kept from before" if known else "done"}, report=True)
        num_workers = 0
    batches = train_batches(datasets["train"], **share, num_workers=num_workers, pin_memory=device.type == "cuda")
    batches = TimedBatches(count_skipped(batches, skips))

    # The method. Pictures and texts to embeddings (N, D) and unit (T, D), by the policy and by the reference.
    def to_input(images: Tensor) -> Tensor:
        """uint8 pixels to [0,1], for a head on to embeddings; embeddings stay."""
        if images.dtype != torch.uint8:
            return images.to(device)
        pixel_values = to_pixel_values(images, device)
        if settings.trainable != "head":
            return pixel_values
        with torch.no_grad():
            return reference(pixel_values)

    def texts_of(texts: Sequence[str], template: int | None) -> Tensor | Tokens:
        """Prompts for the policy: embeddings, or for a trained text tower the tokens, in one template or in all."""
        if settings.trainable != "all":
            return text_table(texts)
        return text_table.tokens(texts, templates if template is None else templates[template : template + 1])

    @torch.no_grad()
    def reference_embeds(inputs: Tensor, texts: Sequence[str], template: int | None) -> tuple[Tensor, Tensor]:
        image_embeds = inputs if settings.trainable == "head" else reference(inputs)
        prompt_embeds = reference_text_table(texts)
        if settings.trainable == "all" and template is not None:
            prompt_embeds = prompt_embeds[:, template : template + 1]
        return image_embeds, ensemble(prompt_embeds)

    def unit(image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(image_embeds, dim=-1), text_embeds

    def losses_of(batch: dict[str, Any], template: int, totals: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """A micro-batch's share of the mean loss over the global batch, and what diagnostics and dual step are made of."""
        inputs = to_input(batch["images"])
        chosen, rejected = batch["chosen"].to(device), batch["rejected"].to(device)
        ref_image_embeds, ref_text_embeds = reference_embeds(inputs, batch["texts"], template)
        ref_logits = batch_logits(*unit(ref_image_embeds, ref_text_embeds), scale, batch)
        image_embeds, text_embeds = policy(inputs, texts_of(batch["texts"], template))
        logits = batch_logits(*unit(image_embeds, text_embeds), scale, batch)
        kl = retention_kl(ref_logits.reg, logits.reg)
        baseline = kl_baseline(kl) if settings.preference == "kto" else kl.new_zeros(())
        preference = preference_loss(
            settings.preference,
            logits.pairs,
            ref_logits.pairs,
            chosen,
            rejected,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            baseline=baseline,
        )
        # Sums over the rows here, divided by the rows of the whole global batch: the processes may hold unequally many.
        num_pairs, num_reg = totals.clamp_min(1).unbind()
        terms = {"preference loss": preference.sum() / num_pairs, "kl to the reference": kl.sum() / num_reg}
        parts = {"preference": preference, "kl": kl, "baseline": baseline, "logits": logits, "ref_logits": ref_logits}
        parts |= {"chosen": chosen, "rejected": rejected}
        if constrained:
            inputs, z0, image_embeds = (rows[: len(kl)] for rows in (inputs, ref_image_embeds, image_embeds))
            clean = CleanRows(inputs, z0, embedding_margin(z0, settings.margin))
            distance = squared_distance(image_embeds, z0)
            with torch.no_grad():
                multipliers = multiplier(z0)
            v = violation(distance, clean.margin, settings.rho)
            terms["distance to the reference"] = distance.sum() / num_reg
            held = primal_lagrangian(settings.reg_weight * kl, v, multipliers, num_reg)
            parts |= {"clean": clean, "measured": torch.stack([distance.detach(), clean.margin, multipliers], dim=1)}
        else:
            held = settings.reg_weight * kl.sum() / num_reg
        loss = (preference.sum() / num_pairs + held) * world_size * settings.gradient_accumulation_steps
        if settings.orthogonality_weight > 0:
            loss = loss + settings.orthogonality_weight * orthogonality_penalty(head_weight())
        return loss, parts | {"terms": torch.stack([loss, *terms.values()]).detach(), "names": list(terms)}

    def dual_loss(clean: CleanRows, totals: Tensor) -> Tensor:
        """A micro-batch's share of what the multiplier ascends on, at the violation of the updated policy."""
        inputs, num_clean = clean.inputs, len(clean.inputs)
        if not num_clean:  # a black image: under ZeRO-3 all processes make equal forwards
            inputs = inputs.new_zeros(1, *inputs.shape[1:])
        with torch.no_grad():
            image_embeds = module.embed_images(inputs)[:num_clean]
        v = violation(squared_distance(image_embeds, clean.ref_image_embeds), clean.margin, settings.rho)
        # Gradients become their mean over the processes, and this the mean over the clean rows of the global batch.
        return dual_lagrangian(v, multiplier(clean.ref_image_embeds), totals[1].clamp_min(1)) * world_size

    def kl_baseline(kl: Tensor) -> Tensor:
        """z: mean over the clean images of this micro-batch on all processes, a constant."""
        total, count = accelerator.reduce(torch.stack([kl.detach().sum(), kl.new_tensor(float(len(kl)))])).unbind()
        return (total / count.clamp_min(1)).clamp_min(0)

    def head_weight() -> Tensor:
        """W (D, D), as W^T = the head of the identity: under ZeRO-3 the parameter itself is empty outside a forward."""
        return module.head(torch.eye(encoder.embed_dim, device=device)).T

    @torch.no_grad()
    def measure(parts: list[dict[str, Any]], totals: Tensor) -> dict[str, float]:
        """Diagnostics over the global batch, of the policy before its update. Synchronises: logged steps only."""
        columns = []
        for part in parts:
            logits, ref_logits = part["logits"].pairs, part["ref_logits"].pairs
            chosen, rejected = part["chosen"], part["rejected"]
            h = margin(logits, ref_logits, chosen, rejected)
            ordered = logits.gather(1, chosen[:, None]) > logits.gather(1, rejected.clamp_min(0))
            per_image = [
                part["preference"],
                mean_over_rejected(h, rejected),
                settings.beta * rewards(logits, ref_logits, chosen[:, None])[:, 0],
                settings.beta * mean_over_rejected(rewards(logits, ref_logits, rejected), rejected),
                mean_over_rejected((h > 0).float(), rejected),
                mean_over_rejected(ordered.float(), rejected),
            ]
            columns.append(torch.stack([values.sum() for values in per_image] + [part["kl"].sum()]))
        num_pairs, num_reg = totals.clamp_min(1).unbind()
        sums = accelerator.reduce(torch.stack(columns).sum(dim=0))
        means = sums / torch.cat([num_pairs.expand(6), num_reg.view(1)])
        names = ("preference_loss", "margin_mean", "reward_chosen", "reward_rejected", "reward_accuracy", "pair_accuracy", "kl")  # fmt: skip
        found = dict(zip(names, means.tolist())) | {"kl_baseline": float(parts[0]["baseline"])}
        return found | (measure_constraint(parts) if constrained else {})

    def measure_constraint(parts: list[dict[str, Any]]) -> dict[str, float]:
        """Distances, violations and multipliers over the clean rows of the global batch; empty where it has none."""
        held = torch.cat([part["measured"] for part in parts]).cpu()
        rows = torch.cat(gather_objects(accelerator, held))  # by objects: the processes hold unequally many
        if not len(rows):
            return {}
        distance, margins, multipliers = rows.unbind(dim=1)
        return {
            "distance_clean": distance.mean().item(),
            **violation_statistics(distance, margins, settings.rho),
            "multiplier_mean": multipliers.mean().item(),
            "multiplier_min": multipliers.min().item(),
            "multiplier_max": multipliers.max().item(),
        }

    def evaluate(step: int) -> dict[str, float]:
        """Empty where the run was told to stop and a batch did not come."""
        loader = eval_loader(
            datasets["eval"],
            num_samples=min(settings.eval_num_samples, len(datasets["eval"])),
            batch_size=settings.per_device_train_batch_size,
            rank=accelerator.process_index,
            world_size=world_size,
            num_workers=0,
            pin_memory=device.type == "cuda",
        )
        eval_skips.seen = 0  # every pass is weighed by itself
        averaged = average.applied(module) if average else contextlib.nullcontext()
        with contextlib.suppress(GivenUp), torch.no_grad(), averaged:
            rows = judge(
                count_skipped(progress.within("evaluating", stop.patiently(loader), len(loader)), eval_skips),
                lambda images, texts: unit(*module(to_input(images), texts_of(texts, None))),
                lambda images, texts: unit(*reference_embeds(to_input(images), texts, None)),
                scale,
            )
        stop.ask()
        if stop.gave_up():
            return {}
        means = {
            key: mean_over_processes(accelerator, torch.tensor([value for _, value in rows.get(name, ())]))
            for name, key in EVAL_KEYS.items()
        }
        eval_skips.merge(gather_objects(accelerator, eval_skips.state())).check()
        found = {key: mean for key, mean in means.items() if not math.isnan(mean)}
        shown = ", ".join(f"{key.removeprefix('eval_').replace('_', ' ')} {mean:.3f}" for key, mean in found.items())
        progress.note(f"step {step}: {shown}")
        return found

    def write_model(directory: Path) -> None:
        with average.applied(module) if average else contextlib.nullcontext():
            state = accelerator.get_state_dict(policy)  # on all processes: ZeRO-3 gathers here
            if average:
                state = {
                    name: tensor.clone() for name, tensor in state.items()
                }  # the average goes from the weights again
        if not accelerator.is_main_process:
            return
        if settings.trainable == "head":
            weight = state["head.weight"].detach().float().cpu()
            save_head(directory, weight, clip)
            exported = copy.deepcopy(clip).cpu()
            fold_head(exported, head_power(weight, settings.export_t))
            save_model(directory, exported, processor, {})
        else:
            towers = {name.split(".", 1)[1]: tensor for name, tensor in state.items()}
            save_model(directory, clip, processor, towers)
        write_card(
            directory,
            lambda: model_card(
                method=method_name(settings),
                model_class=type(clip).__name__,
                about=ABOUT[settings.trainable].format(t=settings.export_t) + (HELD if constrained else ""),
                tags=[clip.config.model_type, "preference-optimization"],
                base_model=settings.model_name_or_path,
                settings=known_settings,
                evaluations=[row for row in metrics_file.read() if any(key.startswith("eval_") for key in row)],
                notes=[f"Skipped samples: {line}." for line in all_skips.summary().splitlines()],
            ),
        )

    def dual_state() -> dict[str, Any]:
        return {"multiplier": multiplier.state_dict(), "dual_optimizer": dual_optimizer.state_dict()["state"]}

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
                settings.gradient_accumulation_steps,
                done,
                last_good,
                first_step=first_step,
                terms=part["names"],
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
            model=policy,
            optimizer=optimizer,
            state={
                "step": done,
                "settings": known_settings,
                "skips": all_skips.state(),
                "best": best,
                "sizes": train_set.index.sizes,
            },
            extra_state={
                **({"average": average.state_dict()} if average else {}),
                **(dual_state() if constrained else {}),
            },
            write_model=write_model,
            total_limit=settings.checkpoints_total_limit,
        )

    metrics_file = MetricsFile(output_dir / "metrics.jsonl")
    from_main_process(accelerator, lambda: metrics_file.cut_back(first_step if resumed else -1))
    start_tracker(accelerator, settings.report_to, Path(__file__).stem, known_settings, output_dir, first_step)
    progress = RunProgress(method_name(settings), total_steps, done=first_step, enabled=accelerator.is_main_process)
    progress.note(
        f"{method_name(settings)}: {train_set.index.num_samples} samples in {len(train_set.index.urls)} shards, global batch "
        f"{global_batch_size}, steps {first_step} to {total_steps}, {world_size} x {device.type}, {encoder.compute_dtype}"
    )
    if why_workers:
        progress.note(why_workers)
    all_skips = skips
    shown: dict[str, float] = {}
    losses: list[
        Tensor
    ] = []  # of all micro-batches, with their terms, since they were last checked; on the device until then
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
                for name in ("learning_rate", *(["dual_learning_rate"] if constrained else []))
            }
            set_learning_rate(optimizer, rates["learning_rate"])
            if constrained:
                set_learning_rate(dual_optimizer, rates["dual_learning_rate"])

            # 1. One update on the mean over the rows of the global batch. A trained text tower sees the templates in turn.
            micro_batches = stop.unless_told(
                lambda: [next(batches) for _ in range(settings.gradient_accumulation_steps)]
            )
            stop.ask()
            if stop.gave_up():  # back to the last whole step: data did not come, and the run was told to stop
                told_to_stop = stop.agreed()
                if step == first_step:
                    stop.leave(told_to_stop, f"before step {done}: nothing new to save", progress.note)
                check(step)
                last_good = save(step)
                stop.leave(told_to_stop, f"while waiting for data, after step {step}: saved {last_good}", progress.note)
            rows = [(len(batch["chosen"]), len(batch["reg_chosen"])) for batch in micro_batches]
            totals = accelerator.reduce(torch.tensor(rows, dtype=torch.float32, device=device).sum(dim=0))
            parts, clean_rows, row = [], [], {}
            for batch in micro_batches:
                with accelerator.accumulate(policy):
                    loss, part = losses_of(batch, step % len(templates), totals)
                    accelerator.backward(loss)  # under DeepSpeed this is the update too, clipped by its own config
                    losses.append(part["terms"])
                    if constrained:
                        clean_rows.append(part["clean"])
                    if log_now:
                        parts.append(part)
                    if accelerator.sync_gradients and (settings.max_grad_norm > 0 or log_now):
                        norm = accelerator.clip_grad_norm_(policy.parameters(), settings.max_grad_norm or math.inf)
                        if log_now:
                            row["grad_norm"] = norm
                    optimizer.step()
                    optimizer.zero_grad()

            # 2. One dual update on the mean over the clean rows, at the violation of the updated policy.
            if constrained:
                for clean in clean_rows:
                    dual_loss(clean, totals).backward()
                average_gradients(accelerator, multiplier)
                dual_optimizer.step()
                dual_optimizer.zero_grad()
            if average:
                average.update(module, done)

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
            mean_loss = torch.stack(losses[-settings.gradient_accumulation_steps :])[:, 0].mean()
            check(done, row.get("grad_norm"))
            seconds += time.perf_counter() - clock  # a device finishes its queue in here
            if log_now:
                images_per_second = (done - logged_step) * global_batch_size / seconds
                row |= {
                    "loss": accelerator.reduce(mean_loss, reduction="mean").item(),
                    **measure(parts, totals),
                    "grad_norm": float(row["grad_norm"]),
                    **rates,
                    "images_per_second": images_per_second,
                    "data_wait_fraction": max(gather_objects(accelerator, batches.wait_fraction(seconds))),
                    "peak_memory_gib": peak_memory_gib(device),
                }
                if settings.trainable == "head":
                    with torch.no_grad():
                        row["orthogonality"] = orthogonality_penalty(head_weight()).item()
                if logged_step == first_step:
                    note_idle_terms(settings, totals.tolist(), progress)
                if not kept and (advice := batches.advice(row["data_wait_fraction"], num_workers)):
                    progress.note(advice)
                seconds, logged_step = 0.0, done
                shown |= {
                    "img/s": images_per_second,
                    "loss": row["loss"],
                    "margin": row["margin_mean"],
                    "pairs right": row["pair_accuracy"],
                    "kl": row["kl"],
                }
                if "multiplier_mean" in row:
                    shown |= {"multiplier": row["multiplier_mean"], "violation": row["violation_ratio_mean"]}
            if eval_now:
                row |= evaluate(done)
                shown |= {f"eval {name}": row[key] for name, key in EVAL_KEYS.items() if key in row}
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
    if settings.trainable == "head" and (warning := warn_of_condition(head_weight().detach())):
        progress.note(f"warning: {warning}")
    for line in all_skips.summary().splitlines():
        progress.note(f"skipped in all: {line}")
    if eval_set:
        for line in eval_skips.merge(gather_objects(accelerator, eval_skips.state())).summary().splitlines():
            progress.note(f"skipped in evaluations: {line}")
    end_training(accelerator)
    stop.close()


ABOUT = {
    "head": "A square matrix on both embeddings was trained and is folded into both projections at strength t = {t:g}; "
    "head.safetensors keeps it, for other strengths.",
    "image": "The image tower was fine-tuned; the text tower is the base model's.",
    "all": "Both towers were fine-tuned; the logit scale is the base model's.",
}


HELD = (
    " Lagrange multipliers held the embeddings of clean images near those of the reference; how near they stayed is in "
    "metrics.jsonl."
)


def check_settings(settings: Settings) -> None:
    """Refuses combinations that no method is made of, and words that cannot be written."""
    word_style(settings)
    if settings.label_smoothing > 0 and settings.preference != "dpo":
        raise UserError(
            f"--label_smoothing {settings.label_smoothing:g} with --preference {settings.preference}: only dpo has it; "
            "leave it at 0 or use dpo"
        )
    if settings.label_smoothing >= 0.5:
        raise UserError(
            f"--label_smoothing {settings.label_smoothing:g}: expected less than 0.5, where the preference turns round"
        )
    if settings.trainable != "head":
        for name, idle in (("orthogonality_weight", 0.0), ("export_t", 1.0)):
            if getattr(settings, name) != idle:
                raise UserError(
                    f"--{name} {getattr(settings, name):g} with --trainable {settings.trainable}: it belongs to a head; "
                    "add --trainable head or leave it out"
                )
    elif settings.reference_model_name_or_path is not None:
        raise UserError(
            f"--reference_model_name_or_path {settings.reference_model_name_or_path} with --trainable head: the reference "
            "of a head is the model it is trained on; leave it out"
        )
    if settings.keep_best and not settings.eval_shards:
        raise UserError(f"--keep_best {settings.keep_best}: nothing is evaluated; name shards with --eval_shards")


def refuse_head_without_projections(settings: Settings, folder: str) -> None:
    """Raises ``UserError`` for a head on a model that has no projections to fold it into."""
    config = check_model(folder, "--model_name_or_path", CONTRASTIVE_MODEL_TYPES)
    if settings.trainable == "head" and config.model_type.startswith("siglip"):
        raise UserError(
            f"--trainable head with --model_name_or_path {settings.model_name_or_path}: a {config.model_type} ends in no linear "
            "projection into which a head could be folded; use --trainable image or all, or a CLIP"
        )


def note_idle_terms(settings: Settings, totals: list[float], progress: RunProgress) -> None:
    """Says which part of the loss had no sample in a whole step: a set of pairs may lack either kind."""
    num_pairs, num_reg = totals
    if not num_pairs:
        progress.note("warning: this step held no preference; samples with reg alone teach nothing new")
    if not num_reg and (settings.reg_weight > 0 or settings.constraint != "none"):
        idle = "nothing holds the model where it was, and z of kto is 0"
        if settings.constraint != "none":
            idle += f"; --constraint {settings.constraint} constrains such samples alone"
        progress.note(f"warning: this step held no sample with reg: true; {idle}")


def open_shards(settings: Settings, name: str) -> LabelledSet | None:
    """The set of --train_shards or --eval_shards; None where none was named."""
    options = shard_options(settings, name)
    return open_set(**options) if options["patterns"] else None


def shard_options(settings: Settings, name: str) -> dict[str, Any]:
    """The arguments of ``open_set`` for the set of a flag."""
    patterns = getattr(settings, name)
    return {
        "patterns": pair_shards(patterns, settings.cache_dir) if settings.task == "pairs" else patterns,
        "flag": f"--{name}",
        "with_classes": settings.task == "typographic",
        "classnames": settings.classnames,
        "cache_dir": settings.cache_dir,
        "cache_limit_gb": settings.cache_limit_gb,
        "allow_pipe_urls": settings.allow_pipe_urls,
    }


def make_dataset(
    settings: Settings, labelled: LabelledSet, transform: ImageTransform, *, order: str
) -> PreferenceDataset:
    """The task's samples. Evaluation, and a head on kept embeddings, see the same words in every epoch."""
    if settings.task == "pairs":
        return PairDataset(labelled.index, transform, order=order, seed=settings.seed)
    kept = settings.trainable == "head" and settings.cache_features
    return TypographicDataset(
        labelled.index,
        transform,
        order=order,
        classnames=labelled.classnames,
        style=word_style(settings),
        attacks_per_image=settings.attacks_per_image,
        seed=settings.seed,
        fixed_epoch=-1 if order == "sequential" else 0 if kept else None,
    )


def feature_settings(settings: Settings, dataset: PreferenceDataset, encoder: ImageEncoder) -> dict[str, Any]:
    """What kept embeddings depend on, besides the encoder's weights and the shards."""
    words = dataclasses.asdict(word_style(settings)) | {
        "seed": settings.seed,
        "attacks_per_image": settings.attacks_per_image,
        "texts": dataset.texts,
        "epoch": getattr(dataset, "fixed_epoch", None),
        "font_files": files_digest(font_files(settings.fonts), settings.cache_dir),
    }
    config = encoder.vision_model.config.to_dict()
    return {
        "task": settings.task,
        "transform": dataset.transform,
        "dtype": str(encoder.compute_dtype),
        "tf32": settings.tf32,
        "config": {name: value for name, value in config.items() if name != "_name_or_path"},
        "pixels": [encoder.image_mean.flatten().tolist(), encoder.image_std.flatten().tolist()],
        **(words if settings.task == "typographic" else {}),
    }


def method_name(settings: Settings) -> str:
    """Preference and what it trains, as tables call it."""
    what = {"head": "head", "image": "image tower", "all": "both towers"}[settings.trainable]
    constraint = {"none": "", "embedding": " + l2"}[settings.constraint]
    return f"{settings.preference.upper()}{constraint} ({what})"


if __name__ == "__main__":
    run(main)
