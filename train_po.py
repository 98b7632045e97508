"""Preference optimisation of a CLIP: prefers the right text on misleading images and stays unchanged on all others.

  python train_po.py --model_name_or_path openai/clip-vit-base-patch32 --preference dpo \\
    --train_shards data/imagenet-100/train --output_dir runs/dpo

  accelerate launch --config_file accelerate_configs/ddp.yaml train_po.py --task pairs --trainable head \\
    --model_name_or_path openai/clip-vit-large-patch14 --train_shards "data/vl-bias/train-{00..15}.tar" \\
    --output_dir runs/head

The first writes wrong class names on labelled images (typographic attacks) and teaches the image tower to ignore them.
The second takes pairs of texts from .json members and trains a head, whose strength t can be set after training.
--config recipes/<name>.yaml holds the settings of one of the paper's experiments.
--constraint embedding --rho 0.1 adds LORE's constraint: every clean embedding stays near the reference's.
A model is an id of the hub, a directory, or a file of weights and its CLIP, NAME@BASE: docs/encoders.md has them all.
Precision (bf16, fp16, no) and sharding are set in the accelerate config.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from utils.cli import flag, parse_settings
from utils.cli import run as start
from utils.data.digests import files_digest
from utils.data.images import ImageTransform
from utils.errors import UserError
from utils.methods.head import Head, fold_head, head_power, orthogonality_penalty, save_head, warn_of_condition
from utils.methods.lagrangian import Multiplier, make_dual_optimizer, multiplier_statistics
from utils.methods.lore import Problem
from utils.methods.preferences import DEFAULT_BETA, MEASURED, PREFERENCES, PreferenceProblem, kto_baseline
from utils.models.encoders import (
    ImageEncoder,
    TextEncoder,
    enable_gradient_checkpointing,
    keep_weights_in,
    load_reference,
    make_encoder,
)
from utils.models.features import features
from utils.models.policy import TRAINABLE, Policy, TextTable, Views, judge, unit_images
from utils.models.published import (
    CONTRASTIVE_MODEL_TYPES,
    ModelName,
    check_model,
    image_transform,
    load_model,
    logit_scale,
    save_model,
)
from utils.models.tokens import refuse_equal_texts
from utils.processes.distributed import (
    gather_objects,
    mean_over_processes,
    on_every_node,
    shard_frozen,
)
from utils.processes.progress import RunProgress
from utils.sets.labelled import LabelledSet
from utils.sets.pairs import PairDataset, PreferenceDataset, TypographicDataset, pair_shards
from utils.sets.typographic import KINDS, PLACES, font_files, merge_names, word_style
from utils.training.metrics import forward_flops, preference_flops_per_sample, violation_statistics
from utils.training.optimization import ADAMW, BetaAverage, make_optimizer
from utils.training.prefetch import prefetch_training
from utils.training.run import Run, Step, Trained
from utils.training.settings import RunSettings, data_flag, method_flag, optimisation_flag, output_flag

EVAL_KEYS = {
    "clean": "eval_accuracy_clean",
    "chosen": "eval_accuracy_attacked",
    "rejected": "eval_follows_rejected",
    "pair": "eval_pair_accuracy",
    "kl": "eval_kl",
}
SHOWN = {
    "margin": "margin_mean",
    "pairs right": "pair_accuracy",
    "kl": "kl",
    "multiplier": "multiplier_mean",
    "violation": "violation_ratio_mean",
    **{f"eval {name}": key for name, key in EVAL_KEYS.items()},
}  # shown on the progress line: word -> key of the row
SETS = ("train_shards", "eval_shards")
KEEP_BEST = ("eval_accuracy_clean", "eval_accuracy_attacked", "eval_pair_accuracy")
DEFAULT_LEARNING_RATE = {"head": 1e-3, "image": 2e-5, "all": 2e-5}
words_flag = partial(flag, group="words")
FONTS = ["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"]


@dataclass
class Settings(RunSettings):
    """All settings of a run; those that both trainers have are in utils/training/settings.py."""

    preference: str = method_flag("dpo", "the loss; ce: cross-entropy of the attacked image", choices=PREFERENCES)
    trainable: str = method_flag("image", "head: a matrix on both embeddings; all: both towers", choices=TRAINABLE)
    beta: float | None = method_flag(None, "strength of the preference (default: dpo 1, ipo 0.1, kto 1.5)", above=0)
    label_smoothing: float = method_flag(
        0.0, "dpo: share of pairs that may be the wrong way round, below 0.5", minimum=0
    )
    reg_weight: float = method_flag(1.0, "weight of KL(reference || policy) on clean images", minimum=0)
    orthogonality_weight: float = method_flag(0.0, "--trainable head: weight of ||W^T W - I||_F^2", minimum=0)
    constraint: str = method_flag("none", "holds clean images in place beside the KL", choices=("none", "embedding"))
    multiplier: str = method_flag("network", "form of the Lagrange multiplier", choices=("network", "linear", "scalar"))
    margin: str = method_flag("relative", "tolerance relative to ||z0||^2, or fixed", choices=("relative", "fixed"))
    rho: float = method_flag(0.1, "tolerance: a clean embedding may move by this times the margin", minimum=0)
    penalty: float = method_flag(
        0.0, "c of the augmented Lagrangian: a violated constraint weighs c x violation / margin more", minimum=0
    )
    export_t: float = method_flag(1.0, "a head: strength t that the saved model has", minimum=-10, maximum=10)

    task: str = data_flag(
        "typographic",
        "write wrong class names on labelled images, or read pairs of texts from .json members",
        choices=("typographic", "pairs"),
    )
    cache_features: bool = data_flag(True, "a head: embed every image once; false draws new words every epoch")
    attacks_per_image: int = words_flag(1, "copies of each image, each with another wrong word", minimum=1)
    fonts: list[str] = words_flag(FONTS, "fonts of matplotlib, Aileron, or .ttf files", path=True)
    word_size_min: float = words_flag(20.0, "smallest letters, in pixels at an image side of 224", above=0)
    word_size_max: float = words_flag(40.0, "largest letters, in the same unit", above=0)
    word_kind: str = words_flag("outlined", "coloured letters with an outline, or a white label", choices=KINDS)
    word_place: str = words_flag("anywhere", "which half of the image words are written in", choices=PLACES)

    optimizer: str = optimisation_flag("adamax", "8 bit needs bitsandbytes", choices=("adamax", *ADAMW))
    learning_rate: float | None = optimisation_flag(None, "cosine to 0 (default: 2e-5, for a head 1e-3)", minimum=0)
    epochs: int = optimisation_flag(3, "passes over the training set", minimum=1)
    weight_average: str = optimisation_flag(
        "none", "save the weights averaged by Beta(0.7, 0.7)", choices=("none", "beta")
    )
    keep_best: str | None = output_flag(None, "best/ keeps the model with the highest value of this", choices=KEEP_BEST)

    def __post_init__(self) -> None:
        if self.beta is None:
            self.beta = DEFAULT_BETA[self.preference]
        if self.learning_rate is None:
            self.learning_rate = DEFAULT_LEARNING_RATE[self.trainable]

    @property
    def head(self) -> bool:
        return self.trainable == "head"


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    problem = PreferenceProblem(
        settings.preference,
        settings.beta,
        settings.label_smoothing,
        settings.reg_weight,
        Problem(
            constraint=settings.constraint, margin_kind=settings.margin, rho=settings.rho, penalty=settings.penalty
        ),
    )
    if settings.prefetch:
        return prefetch_training(settings, [shard_options(settings, name) for name in SETS], CONTRASTIVE_MODEL_TYPES)
    run = Run(settings, __file__, method=method_name(settings), free=["export_t"], supported=CONTRASTIVE_MODEL_TYPES)
    accelerator, device = run.accelerator, run.device
    train_set, eval_set = open_sets(run, settings)

    # The policy and its frozen reference turn pictures and texts into embeddings.
    clip, processor, encoder, views = load_views(run, settings)
    pictures = 1 + settings.attacks_per_image if settings.task == "typographic" else 1
    forward = forward_flops(views.reference)
    flops = preference_flops_per_sample(forward, pictures, settings.head, dual=problem.constrained)
    if settings.shard_reference:
        views.reference = shard_frozen(accelerator, views.reference)
    policy = Policy(
        image_encoder=None if settings.head else encoder,
        text_encoder=TextEncoder(clip, encoder.compute_dtype) if settings.trainable == "all" else None,
        head=Head(encoder.embed_dim) if settings.head else None,
    )
    if settings.compile:
        encoder.compile()
        views.reference.compile()

    # Only the policy is prepared. The multiplier stays outside the engine; its own optimizer ascends.
    optimizer = make_optimizer(settings.optimizer, policy, settings.learning_rate, settings.weight_decay)
    multiplier = dual_optimizer = None
    if problem.constrained:
        multiplier = Multiplier(settings.multiplier, encoder.embed_dim).to(device)
        dual_optimizer = make_dual_optimizer(multiplier, settings.dual_learning_rate)
    policy.train()
    policy, optimizer = run.prepare(policy, optimizer)
    module = accelerator.unwrap_model(policy)  # evaluations and the dual step bypass the engine
    average = BetaAverage(module, run.total_steps) if settings.weight_average == "beta" else None
    others = {"average": average, "multiplier": multiplier, "dual_optimizer": dual_optimizer}
    write_model = partial(write_trained, run, settings, policy, average, clip, processor)
    trained = Trained(policy, optimizer, write_model, others)
    run.restore(trained)

    transform = image_transform(processor)
    drafted = dataclasses.replace(transform, draft=settings.jpeg_draft)
    datasets = {"train": make_dataset(settings, train_set, drafted, order="shuffled")}
    if eval_set:
        datasets["eval"] = make_dataset(settings, eval_set, transform, order="sequential")
    num_workers: int | None = run.measure_workers(datasets["train"], flops)
    if settings.head and settings.cache_features:
        num_workers = None  # the embeddings are in memory
        keep_features(run, settings, datasets, encoder, views.reference)
    batches = run.train_batches(datasets["train"], num_workers)

    with run.begun(SHOWN, "samples"):
        if eval_set and not run.resumed:
            run.record(evaluate(run, datasets["eval"], views, module, average, 0))
        for step in run.steps():
            run.set_learning_rates(step, learning_rate=optimizer, dual_learning_rate=dual_optimizer)

            # 1. One update on the mean over the global batch. A trained text tower sees one template a step.
            micro_batches = run.take(batches)
            if run.gave_up():
                break
            rows = [(len(loaded["chosen"]), len(loaded["reg_chosen"])) for loaded in micro_batches]
            counts = torch.tensor(rows, dtype=torch.float32).sum(dim=0)
            totals = accelerator.reduce(counts.to(device, non_blocking=True))
            template = step.index % len(views.text_table.templates)
            clean_rows, measured = [], []
            for loaded in micro_batches:
                with accelerator.accumulate(policy):
                    batch = views.batch(loaded, template)
                    embeds = views.by_policy(policy, batch.inputs, loaded["texts"], template)
                    logits = views.logits(embeds, loaded)
                    baseline = kto_baseline(batch, logits, accelerator.reduce) if settings.preference == "kto" else None
                    primal = problem.primal(batch, embeds[0], logits, totals, baseline=baseline, multiplier=multiplier)
                    # Each loss is a part of one sum, but the engine averages over processes and micro-batches.
                    loss = primal.loss * run.world_size * settings.gradient_accumulation_steps
                    if settings.orthogonality_weight > 0:
                        loss = loss + settings.orthogonality_weight * orthogonality_penalty(head_weight(module))
                    terms = torch.stack([loss, *primal.terms]).detach()
                    run.update(loss, terms, policy, optimizer, measure=step.log)
                clean_rows.append(primal.clean)
                if step.log:
                    measured.append((problem.measure(primal, batch, logits), primal.measured, baseline))

            # 2. One dual update on the mean over the clean rows, with the violation of the updated policy.
            if problem.constrained:
                for clean in clean_rows:
                    # The factor undoes the mean over processes: the gradient is the mean over all clean rows.
                    dual = problem.held.dual(module.embed_images, clean, multiplier, totals[1].clamp_min(1))
                    (dual * run.world_size).backward()
                run.update_outside(multiplier, dual_optimizer)
            if average:
                average.update(module, step.done)

            if run.trained(step):
                row = logged_row(run, settings, module, step, measured, totals) if step.log else {}
                if step.evaluate:
                    row |= evaluate(run, datasets["eval"], views, module, average, step.done)
                run.record(row, step)
                run.save(step, row, trained)
        if run.stopped():
            run.leave(trained)
    warning = warn_of_condition(head_weight(module).detach()) if settings.head else None
    run.finish(trained, *([f"warning: {warning}"] if warning else []))


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
    """Raises ``UserError`` for settings that do not go together and for words that cannot be written."""
    word_style(settings)
    if settings.label_smoothing > 0 and settings.preference != "dpo":
        raise UserError(
            f"--label_smoothing {settings.label_smoothing:g} with --preference {settings.preference}: only dpo has it; "
            "leave it at 0 or use dpo"
        )
    if settings.penalty > 0 and settings.constraint == "none":
        raise UserError(
            f"--penalty {settings.penalty:g} with --constraint none: it augments a constraint; leave it at 0 or use "
            "--constraint embedding"
        )
    if settings.label_smoothing >= 0.5:
        raise UserError(
            f"--label_smoothing {settings.label_smoothing:g}: expected less than 0.5, where the preference turns round"
        )
    if settings.trainable != "head":
        for name, idle in (("orthogonality_weight", 0.0), ("export_t", 1.0)):
            if getattr(settings, name) != idle:
                raise UserError(
                    f"--{name} {getattr(settings, name):g} with --trainable {settings.trainable}: it belongs to a "
                    "head; add --trainable head or leave it out"
                )
    elif settings.reference_model_name_or_path is not None:
        raise UserError(
            f"--reference_model_name_or_path {settings.reference_model_name_or_path} with --trainable head: the "
            "reference of a head is the model it is trained on; leave it out"
        )
    if settings.keep_best and not settings.eval_shards:
        raise UserError(f"--keep_best {settings.keep_best}: nothing is evaluated; name shards with --eval_shards")


def refuse_head_without_projections(settings: Settings, start: ModelName) -> None:
    """Raises ``UserError`` if a head is to be trained on a model without projections to fold it into."""
    config = check_model(start, "--model_name_or_path", CONTRASTIVE_MODEL_TYPES)
    if settings.trainable == "head" and config.model_type.startswith("siglip"):
        raise UserError(
            f"--trainable head with --model_name_or_path {settings.model_name_or_path}: a {config.model_type} ends "
            "in no linear projection into which a head could be folded; use --trainable image or all, or a CLIP"
        )


def note_idle_terms(settings: Settings, totals: list[float], progress: RunProgress) -> None:
    """Warns if a part of the loss had no sample in a whole step: a set of pairs may lack either kind."""
    num_pairs, num_reg = totals
    if not num_pairs:
        progress.note("warning: this step held no preference; samples with reg alone teach nothing new")
    if not num_reg and (settings.reg_weight > 0 or settings.constraint != "none"):
        idle = "nothing holds the model where it was, and z of kto is 0"
        if settings.constraint != "none":
            idle += f"; --constraint {settings.constraint} constrains such samples alone"
        progress.note(f"warning: this step held no sample with reg: true; {idle}")


def shard_options(settings: Settings, name: str) -> dict[str, Any]:
    """The arguments of ``open_set`` for the set of a flag. Folders of pictures are packed into shards in the cache."""
    patterns = getattr(settings, name)
    if settings.task == "pairs":
        patterns = pair_shards(patterns, settings.cache_dir)
    return settings.shard_options(name, settings.task == "typographic", patterns)


def open_sets(run: Run, settings: Settings) -> tuple[LabelledSet, LabelledSet | None]:
    """The training and the evaluation set."""
    if settings.weight_average != "none" and run.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("--weight_average beta: DeepSpeed keeps the weights to itself; use a DDP config, or none")
    if settings.task == "pairs":  # packs folders of pictures into shards in the cache of every node
        pictures = [*settings.train_shards, *settings.eval_shards]
        on_every_node(run.accelerator, lambda: pair_shards(pictures, settings.cache_dir))
    options = [run.on_main(lambda name=name: shard_options(settings, name)) for name in SETS]
    # Older checkpoints, written before the constraint existed, hold no multiplier.
    return run.open_sets(*options, earlier={"constraint": "none"})


def load_views(run: Run, settings: Settings) -> tuple[Any, Any, ImageEncoder, Views]:
    """The model, its processor, its image encoder, and the views of policy and reference on pictures and texts."""
    start, other = run.fetch_models()
    run.everywhere(lambda: refuse_head_without_projections(settings, start))
    clip, processor = run.everywhere(lambda: load_model(start))
    encoder = make_encoder(clip, processor, run.compute_dtype)
    templates = run.train_set.templates or ["{c}"]
    if settings.task == "typographic":
        refuse_equal_texts(processor, clip.config, merge_names(run.train_set.classnames)[0], templates[0])
    reference, reference_clip = run.everywhere(lambda: load_reference(other, encoder))
    if reference_clip is None:
        reference_clip = copy.deepcopy(clip) if settings.trainable == "all" else clip
    keep_weights_in(settings.reference_dtype, reference).to(run.device)
    # If the text tower is trained, only the tokenizer of its text table is used.
    per_prompt = settings.trainable != "image"
    table = reference_table = TextTable(clip, processor, templates, run.device, per_prompt=per_prompt)
    if reference_clip is not clip:
        reference_table = TextTable(reference_clip, processor, templates, run.device, per_prompt=per_prompt)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(encoder)
    return clip, processor, encoder, Views(reference, table, reference_table, logit_scale(clip), settings.trainable)


def make_dataset(
    settings: Settings, labelled: LabelledSet, transform: ImageTransform, *, order: str
) -> PreferenceDataset:
    """The task's samples. In evaluation and with cached embeddings the words are the same in every epoch."""
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
    """All settings that cached embeddings depend on, besides the encoder's weights and the shards."""
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


def keep_features(
    run: Run, settings: Settings, datasets: dict[str, Any], encoder: ImageEncoder, reference: nn.Module
) -> None:
    """Replaces data sets of pictures by data sets of embeddings: the reference embeds every image once."""
    for name, dataset in datasets.items():
        count = len(dataset) if name == "train" else run.num_eval_samples(dataset)
        with RunProgress(f"embedding {name}", count, enabled=run.accelerator.is_main_process) as embedding:
            datasets[name], known = features(
                run.accelerator,
                dataset,
                reference,
                weights=encoder.state_dict(),  # also the reference's: training a head does not change them
                identity=feature_settings(settings, dataset, encoder),
                num_samples=count,
                batch_size=settings.per_device_train_batch_size,
                num_workers=run.num_workers,
                on_batch=embedding.update,
            )
            embedding.update(count, {"embeddings": "kept from before" if known else "done"}, report=True)


def head_weight(policy: Policy) -> Tensor:
    """W (D, D), computed as the head of the identity: under ZeRO-3 the parameter is empty outside a forward pass."""
    identity = torch.eye(policy.head.embed_dim, device=policy.head.weight.device)
    return policy.head(identity).T


def logged_row(
    run: Run, settings: Settings, policy: Policy, step: Step, measured: list[Any], totals: Tensor
) -> dict[str, Any]:
    """The metrics row of a step, for the policy before its update. Synchronises."""
    if run.logged_step == run.first_step:
        note_idle_terms(settings, totals.tolist(), run.progress)
    row = run.row(step, summary(run, settings, measured, totals))
    if settings.head:
        with torch.no_grad():
            row["orthogonality"] = orthogonality_penalty(head_weight(policy)).item()
    return row


def summary(run: Run, settings: Settings, measured: list[Any], totals: Tensor) -> dict[str, float]:
    """Statistics over the global batch."""
    sums, clean_rows, baselines = zip(*measured)
    num_pairs, num_reg = totals.clamp_min(1).unbind()
    means = run.accelerator.reduce(torch.stack(sums).sum(dim=0))
    means = means / torch.cat([num_pairs.expand(6), num_reg.view(1)])
    found = dict(zip(MEASURED, means.tolist())) | {"kl_baseline": float(baselines[0] or 0)}
    if settings.constraint == "none":
        return found
    held = torch.cat(clean_rows).cpu()
    rows = torch.cat(gather_objects(run.accelerator, held))  # as objects: the processes hold different numbers of rows
    if not len(rows):
        return found
    distance, margins, multipliers = rows.unbind(dim=1)
    return {
        **found,
        "distance_clean": distance.mean().item(),
        **violation_statistics(distance, margins, settings.rho),
        **multiplier_statistics(multipliers),
    }


def evaluate(
    run: Run, dataset: PreferenceDataset, views: Views, policy: Policy, average: BetaAverage | None, step: int
) -> dict[str, float]:
    """Means of ``choices`` over the evaluation set. Empty if the run was told to stop and a batch did not arrive."""
    averaged = average.applied(policy) if average else contextlib.nullcontext()
    with run.evaluating(dataset, "evaluating") as batches, torch.no_grad(), averaged:
        rows = judge(
            batches,
            lambda images, texts: unit_images(views.by_policy(policy, views.inputs(images), texts)),
            lambda images, texts: unit_images(views.by_reference(views.inputs(images), texts)),
            views.logit_scale,
        )
    if run.gave_up():
        return {}
    means = {
        key: mean_over_processes(run.accelerator, torch.tensor([value for _, value in rows.get(name, ())]))
        for name, key in EVAL_KEYS.items()
    }
    run.check_evaluation()
    found = {key: mean for key, mean in means.items() if not math.isnan(mean)}
    shown = ", ".join(f"{key.removeprefix('eval_').replace('_', ' ')} {mean:.3f}" for key, mean in found.items())
    run.progress.note(f"step {step}: {shown}")
    return found


def write_trained(
    run: Run,
    settings: Settings,
    policy: nn.Module,
    average: BetaAverage | None,
    clip: Any,
    processor: Any,
    directory: Path,
) -> None:
    """Writes a directory that ``from_pretrained`` loads, and the head. Call on all processes."""
    module = run.accelerator.unwrap_model(policy)
    with average.applied(module) if average else contextlib.nullcontext():
        state = run.accelerator.get_state_dict(policy)  # ZeRO-3 gathers here
        if average:  # its weights are taken out again
            state = {name: tensor.clone() for name, tensor in state.items()}
    if not run.accelerator.is_main_process:
        return
    if settings.head:
        weight = state["head.weight"].detach().float().cpu()
        save_head(directory, weight, clip)
        exported = copy.deepcopy(clip).cpu()
        fold_head(exported, head_power(weight, settings.export_t))
        save_model(directory, exported, processor, {})
    else:
        towers = {name.split(".", 1)[1]: tensor for name, tensor in state.items()}
        save_model(directory, clip, processor, towers)
    about = ABOUT[settings.trainable].format(t=settings.export_t) + (HELD if settings.constraint != "none" else "")
    run.complete(directory, clip, about=about, tag="preference-optimization")


def method_name(settings: Settings) -> str:
    """The name of the method in tables: the loss and the trained part."""
    what = {"head": "head", "image": "image tower", "all": "both towers"}[settings.trainable]
    constraint = {"none": "", "embedding": " + l2"}[settings.constraint]
    return f"{settings.preference.upper()}{constraint} ({what})"


if __name__ == "__main__":
    start(main)
