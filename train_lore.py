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

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.cli import flag, launched_rank, parse_settings
from utils.cli import run as start
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset
from utils.errors import UserError
from utils.methods.attacks import ascend, attack_seeds
from utils.methods.lagrangian import Multiplier, make_dual_optimizer, multiplier_statistics
from utils.methods.lore import CONSTRAINTS, OBJECTIVES, MicroBatch, Problem, attack
from utils.models.encoders import (
    check_reference_dtype,
    enable_gradient_checkpointing,
    keep_weights_in,
    load_reference,
    make_encoder,
)
from utils.models.published import check_model, has_own_head, has_text, image_transform, load_model, save_model
from utils.models.zeroshot import predictions, set_classifier, to_pixel_values
from utils.processes.distributed import (
    MIXED_PRECISIONS,
    average_gradients,
    gathered,
    mean_over_processes,
    shard_frozen,
)
from utils.sets.labelled import LabelledSet
from utils.training.memory import Layout, print_estimate
from utils.training.metrics import forward_flops, lore_flops_per_image, violation_statistics
from utils.training.optimization import accumulation_steps, make_optimizer
from utils.training.prefetch import prefetch_training
from utils.training.run import Run, Trained
from utils.training.settings import RunSettings

KEEP_BEST = ("eval_accuracy_clean", "eval_accuracy_pgd")


@dataclass
class Settings(RunSettings):
    """Everything that a run can be told, beside what utils/training/settings.py has for both trainers."""

    objective: str = flag(
        "embedding",
        "what the attack maximises: squared embedding distance, or cross-entropy with the labels",
        group="method",
        choices=tuple(OBJECTIVES),
    )
    constraint: str = flag("embedding", "what holds clean images in place", group="method", choices=CONSTRAINTS)
    multiplier: str = flag(
        "network", "form of the Lagrange multiplier", group="method", choices=("network", "linear", "scalar")
    )
    margin: str = flag(
        "relative",
        "tolerance relative to ||z0||^2 (kl: to the entropy), or fixed",
        group="method",
        choices=("relative", "fixed"),
    )
    rho: float = flag(0.1, "tolerance: a clean embedding may move by this times the margin", group="method", minimum=0)
    primal_steps: int = flag(5, "K, encoder updates per batch", group="method", minimum=1)
    clean_weight: float = flag(
        0.0, "fixed weight of the clean distance (naive regulariser, with --constraint none)", group="method", minimum=0
    )

    eps: float = flag(4.0, "radius of the l_inf attack, in 1/255", group="attack", above=0, maximum=255)
    attack_steps: int = flag(10, "PGD steps", group="attack", minimum=1)
    attack_step_size: float | None = flag(None, "PGD step, in 1/255 (default: eps/4)", group="attack", above=0)
    attack_momentum: float = flag(0.0, "of the gradient's sign (FARE's recipe: 0.9)", group="attack", minimum=0)
    gather_for_attack: bool = flag(
        True, "ZeRO-3: keep parameters whole during an attack, not gathered in every pass", group="attack"
    )

    linear_head: str | None = flag(
        None,
        "safetensors with weight (C, D), maybe bias (C,): tells classes apart for encoders without text (default: the model's own head)",
        group="data",
        path=True,
    )
    learning_rate: float = flag(1e-5, "of the encoder (AdamW), cosine to 0", group="optimisation", minimum=0)
    weight_decay: float = flag(1e-4, "AdamW's, of the encoder", group="optimisation", minimum=0)
    optimizer: str = flag(
        "adamw",
        "the 8-bit variants need bitsandbytes",
        group="optimisation",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
    )
    keep_best: str | None = flag(
        None, "the model with the highest value of this is kept in best/", group="output", choices=KEEP_BEST
    )

    estimate_memory: bool = flag(
        False, "only print what a step needs on a device; needs no data", group="memory", waives_required=True
    )
    estimate_processes: int = flag(8, "processes of the run that is estimated", group="memory", minimum=1)
    estimate_precision: str = flag(
        "bf16", "mixed_precision of the run that is estimated", group="memory", choices=("bf16", "fp16", "no")
    )


FREE_SETTINGS = ("gather_for_attack", "estimate_memory", "estimate_processes", "estimate_precision")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    problem = Problem(settings.objective, settings.constraint, settings.margin, settings.rho, settings.clean_weight)
    train_options = settings.shard_options("train_shards", problem.needs_labels)
    eval_options = settings.shard_options("eval_shards", True)
    if settings.estimate_memory:
        return estimate_memory(settings, problem)
    if settings.prefetch:
        return prefetch_training(
            settings.models,
            [train_options, eval_options],
            cache_dir=settings.cache_dir,
            cache_limit_gb=settings.cache_limit_gb,
        )
    run = Run(settings, __file__, method=problem.name, updates=settings.primal_steps, free=FREE_SETTINGS)
    accelerator, device = run.accelerator, run.device
    train_set, eval_set = run.open_sets(train_options, eval_options)

    # The encoder phi and its frozen reference phi0: pixels in [0,1] to un-normalised embeddings.
    model, processor, encoder, reference = load_encoders(run, settings, problem)
    flops = lore_flops_per_image(
        forward_flops(reference),
        settings.attack_steps,
        settings.primal_steps,
        problem.clean_in_primal,
        problem.constrained,
        problem.needs_reference,
    )
    if settings.shard_reference:
        reference = shard_frozen(accelerator, reference)
    # What turns embeddings (B, D) into logits (B, C): texts of the classes, or a linear head, both frozen.
    train_classifier, eval_classifier = (
        set_classifier(model, processor, encoder, labelled, device, settings.linear_head) if labelled else None
        for labelled in (train_set if problem.needs_labels else None, eval_set)
    )
    problem = dataclasses.replace(problem, classifier=train_classifier)
    attack_update = ascend
    if settings.compile:
        encoder.compile(dynamic=False)
        reference.compile(dynamic=False)
        attack_update = torch.compile(ascend, dynamic=False)

    # Only the encoder is prepared. The multiplier stays outside the engine; its own optimizer ascends.
    optimizer = make_optimizer(settings.optimizer, encoder, settings.learning_rate, settings.weight_decay)
    multiplier = Multiplier(settings.multiplier, encoder.embed_dim).to(device)
    dual_optimizer = make_dual_optimizer(multiplier, settings.dual_learning_rate)
    encoder.train()
    encoder, optimizer = run.prepare(encoder, optimizer)
    module = accelerator.unwrap_model(encoder)  # attacks and evaluations go past the engine: see utils/processes
    write_model = partial(write_trained, run, encoder, model, processor)
    trained = Trained(encoder, optimizer, write_model, {"multiplier": multiplier, "dual_optimizer": dual_optimizer})
    run.restore(trained)

    transform = image_transform(processor)
    train_data = make_dataset(
        train_set,
        transform,
        draft=settings.jpeg_draft,
        labels=problem.needs_labels,
        order="shuffled",
        seed=settings.seed,
    )
    eval_data = make_dataset(eval_set, transform, order="sequential") if eval_set else None
    batches = run.train_batches(train_data, run.measure_workers(train_data, flops))

    with run.begun():
        if eval_set and not run.resumed:
            run.record(evaluate(run, settings, module, eval_classifier, eval_data, 0))
        for step in run.steps():
            run.set_learning_rates(step, learning_rate=optimizer, dual_learning_rate=dual_optimizer)

            # 1. Reference embeddings and perturbations of all micro-batches, at the same encoder.
            micro_batches = []
            for loaded in run.take(batches):
                batch = MicroBatch(to_pixel_values(loaded["images"], device))
                if problem.needs_labels:
                    batch.labels = loaded["labels"].to(device, non_blocking=True)
                if problem.needs_reference or step.log:
                    with torch.no_grad():
                        batch.ref_image_embeds = reference(batch.pixel_values)
                        batch.margin = problem.margin(batch.ref_image_embeds)
                with gathered(module, settings.gather_for_attack):
                    batch.delta = attack(
                        module,
                        problem,
                        batch,
                        attack_seeds(settings.seed, step.index, loaded["positions"].tolist()),
                        eps=settings.eps / 255,
                        step_size=(settings.attack_step_size or settings.eps / 4) / 255,
                        num_steps=settings.attack_steps,
                        momentum=settings.attack_momentum,
                        update=attack_update,
                    )
                if step.log and not problem.clean_in_primal:
                    with torch.no_grad():
                        batch.image_embeds = module(batch.pixel_values)
                micro_batches.append(batch)
            if run.gave_up():
                break

            # 2. K primal updates on the same images and perturbations. The first one's embeddings are what is logged.
            measured: list[Tensor] = []
            for update in range(settings.primal_steps):
                measure = step.log and update == 0
                for batch in micro_batches:
                    with accelerator.accumulate(encoder):
                        primal = problem.primal(encoder, batch, multiplier)
                        run.update(primal.loss, primal.terms, encoder, optimizer, measure=measure)
                    if measure:
                        measured.append(problem.measure(primal, batch, multiplier))

            # 3. One dual update on the mean over the global batch, at the violation of the updated encoder.
            if problem.constrained:
                for batch in micro_batches:
                    (problem.dual(module, batch, multiplier) / len(micro_batches)).backward()
                average_gradients(accelerator, multiplier)
                dual_optimizer.step()
                dual_optimizer.zero_grad()

            if not run.trained(step):
                continue
            row: dict[str, Any] = {}
            if step.log:
                row = run.row(step, summary(run, measured, settings.rho))
                row |= run.utilisation(row["images_per_second"])
                run.advise(row["data_wait_fraction"])
                run.show(row)
            if step.evaluate:
                row |= evaluate(run, settings, module, eval_classifier, eval_data, step.done)
                run.shown |= {"clean": row.get("eval_accuracy_clean"), "pgd": row.get("eval_accuracy_pgd")}
            run.record(row, step)
            run.save(step, row, trained)
        if run.stopped():
            run.leave(trained)
    run.finish(trained)


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


def load_encoders(run: Run, settings: Settings, problem: Problem) -> tuple[Any, Any, Any, nn.Module]:
    """The model, its processor, its image encoder, and the frozen reference on the device."""
    folder = run.fetch_model(settings.model_name_or_path)
    if problem.needs_labels or run.eval_set:
        run.everywhere(lambda: refuse_without_classes(settings, folder))
    model, processor = run.everywhere(lambda: load_model(folder))
    encoder = make_encoder(model, processor, run.compute_dtype)
    other = run.fetch_model(settings.reference_model_name_or_path, "--reference_model_name_or_path")
    reference, _ = run.everywhere(lambda: load_reference(other, encoder))
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(encoder)
    return model, processor, encoder, keep_weights_in(settings.reference_dtype, reference).to(run.device)


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


def make_dataset(
    labelled: LabelledSet, transform: ImageTransform, *, draft: bool = False, labels: bool = True, **options: Any
) -> ShardDataset:
    """The samples of a set; ``options``: order and seed."""
    return ShardDataset(
        labelled.index,
        dataclasses.replace(transform, draft=draft),
        with_labels=labels,
        num_classes=len(labelled.classnames),
        **options,
    )


def summary(run: Run, measured: list[Tensor], rho: float) -> dict[str, float]:
    """Statistics over the global batch at the attacked encoder. Synchronises."""
    rows = run.accelerator.gather(torch.cat(measured))
    adversarial, clean, constraint, margins, multipliers = rows.unbind(dim=1)
    return {
        "distance_adv": adversarial.mean().item(),
        "distance_clean": clean.mean().item(),
        **violation_statistics(constraint, margins, rho),
        **multiplier_statistics(multipliers),
    }


def evaluate(
    run: Run, settings: Settings, encoder: nn.Module, classifier: Any, dataset: ShardDataset, step: int
) -> dict[str, float]:
    """Accuracy on clean and attacked images. Empty where the run was told to stop and a batch did not come."""
    accuracies = {}
    for name, radius in (("clean", None), ("pgd", settings.eps / 255)):
        eager = torch.compiler.set_stance("force_eager")  # a last batch of its own size is not worth compiling
        with (
            run.evaluating(dataset, f"evaluating {name}") as batches,
            gathered(encoder, settings.gather_for_attack),
            eager,
        ):
            _, correct = predictions(encoder, batches, classifier, device=run.device, eps=radius, seed=settings.seed)
        if run.gave_up():
            return {}
        accuracies[f"eval_accuracy_{name}"] = mean_over_processes(run.accelerator, correct)
        run.check_evaluation()
    run.progress.note(
        f"step {step}: accuracy {accuracies['eval_accuracy_clean']:.3f} clean, "
        f"{accuracies['eval_accuracy_pgd']:.3f} under PGD at eps {settings.eps:g}/255"
    )
    return accuracies


def write_trained(run: Run, encoder: nn.Module, model: Any, processor: Any, directory: Path) -> None:
    """A directory that ``from_pretrained`` loads. Call on all processes."""
    weights = run.accelerator.get_state_dict(encoder)  # ZeRO-3 gathers here
    if run.accelerator.is_main_process:
        save_model(directory, model, processor, weights)
        about = (
            "The image tower was fine-tuned to resist l_inf perturbations of the pixels; the rest is the base model's."
        )
        run.write_card(directory, model, about=about, tag="adversarial-robustness")


def estimate_memory(settings: Settings, problem: Problem) -> None:
    """Prints what a step with these settings needs on a device; the model is not loaded, its config is."""
    compute_dtype = MIXED_PRECISIONS[settings.estimate_precision]
    check_reference_dtype(settings.reference_dtype, compute_dtype)
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
    layout = Layout(
        processes=settings.estimate_processes,
        optimizer=settings.optimizer,
        accumulation=accumulation,
        gather_for_attack=settings.gather_for_attack,
        shard_reference=settings.shard_reference,
    )
    print_estimate(
        model,
        layout,
        batch_size=settings.per_device_train_batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        compute_dtype=compute_dtype,
        reference_dtype=settings.reference_dtype,
        clean_in_primal=problem.clean_in_primal,
        momentum=settings.attack_momentum > 0,
    )


if __name__ == "__main__":
    start(main)
