"""LORE: fine-tunes a vision encoder to resist l_inf attacks and holds every clean embedding near the pretrained one.

  python train_lore.py --model_name_or_path openai/clip-vit-base-patch32 \\
    --train_shards data/imagenet/train --eps 4 --rho 0.1 --output_dir runs/lore4

  accelerate launch --config_file accelerate_configs/zero2.yaml train_lore.py \\
    --model_name_or_path openai/clip-vit-large-patch14 \\
    --train_shards "data/imagenet/train-{000000..001281}.tar" --eps 4 --rho 0.1 --output_dir runs/lore4-l14

Other methods are settings: FARE is --constraint none --primal_steps 1; TeCoA is --objective tecoa --constraint none;
--config recipes/<name>.yaml holds the settings of one of the paper's experiments, except --eps and --rho.
A model is an id of the hub, a directory, or a file of weights and its CLIP, NAME@BASE: docs/encoders.md has them all.
Precision (bf16, fp16, no) and sharding are set in the accelerate config. Radii are in 1/255.
"""

from __future__ import annotations

import dataclasses
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
from utils.models.hub import find_config
from utils.models.published import (
    ModelName,
    check_model,
    has_own_head,
    has_text,
    image_transform,
    load_model,
    save_model,
    set_image_size,
)
from utils.models.zeroshot import predictions, set_classifier, to_pixel_values
from utils.processes.distributed import (
    MIXED_PRECISIONS,
    gathered,
    mean_over_processes,
    shard_frozen,
)
from utils.sets.labelled import LabelledSet
from utils.training.memory import Layout, print_estimate
from utils.training.metrics import forward_flops, lore_flops_per_image, violation_statistics
from utils.training.optimization import ADAMW, accumulation_steps, make_optimizer
from utils.training.prefetch import prefetch_training
from utils.training.run import Run, Trained
from utils.training.settings import RunSettings, data_flag, method_flag, optimisation_flag, output_flag

attack_flag, memory_flag = partial(flag, group="attack"), partial(flag, group="memory")
KEEP_BEST = ("eval_accuracy_clean", "eval_accuracy_pgd")


@dataclass
class Settings(RunSettings):
    """All settings of a run; those that both trainers have are in utils/training/settings.py."""

    objective: str = method_flag(
        "embedding",
        "what the attack maximises: squared embedding distance, or cross-entropy with the labels",
        choices=tuple(OBJECTIVES),
    )
    constraint: str = method_flag("embedding", "what holds clean images in place", choices=CONSTRAINTS)
    multiplier: str = method_flag("network", "form of the Lagrange multiplier", choices=("network", "linear", "scalar"))
    margin: str = method_flag("relative", "relative: to ||z0||^2 (kl: to the entropy)", choices=("relative", "fixed"))
    rho: float = method_flag(0.1, "tolerance: a clean embedding may move by this times the margin", minimum=0)
    primal_steps: int = method_flag(5, "K, encoder updates per batch", minimum=1)
    penalty: float = method_flag(
        0.0, "c of the augmented Lagrangian: a violated constraint weighs c x violation / margin more", minimum=0
    )
    clean_weight: float = method_flag(0.0, "with --constraint none: fixed weight of the clean distance", minimum=0)

    eps: float = attack_flag(4.0, "radius of the l_inf attack, in 1/255", above=0, maximum=255)
    attack_steps: int = attack_flag(10, "PGD steps", minimum=1)
    attack_step_size: float | None = attack_flag(None, "PGD step, in 1/255 (default: eps/4)", above=0)
    attack_momentum: float = attack_flag(0.0, "of the gradient's sign (FARE's recipe: 0.9)", minimum=0)
    gather_for_attack: bool = attack_flag(True, "ZeRO-3: gather parameters once an attack, not in every pass")

    eval_pgd: bool = data_flag(True, "evaluate under PGD too: ten forward and backward passes more")
    linear_head: str | None = data_flag(
        None,
        "safetensors of weight (C, D), maybe bias (C,), for encoders without text (default: the model's own)",
        path=True,
    )
    learning_rate: float = optimisation_flag(1e-5, "of the encoder (AdamW), cosine to 0", minimum=0)
    weight_decay: float = optimisation_flag(1e-4, "AdamW's, of the encoder", minimum=0)
    optimizer: str = optimisation_flag("adamw", "8 bit needs bitsandbytes", choices=ADAMW)
    keep_best: str | None = output_flag(None, "best/ keeps the model with the highest value of this", choices=KEEP_BEST)

    estimate_memory: bool = memory_flag(
        False, "only print what a step needs on a device; needs no data", waives_required=True
    )
    estimate_processes: int = memory_flag(8, "of the run that is estimated", minimum=1)
    estimate_precision: str = memory_flag("bf16", "its mixed_precision", choices=("bf16", "fp16", "no"))

    @property
    def pgd(self) -> dict[str, Any]:
        """The arguments of ``attack``, eps and step_size as fractions of the pixel range."""
        return {
            "eps": self.eps / 255,
            "step_size": (self.attack_step_size or self.eps / 4) / 255,
            "num_steps": self.attack_steps,
            "momentum": self.attack_momentum,
        }


FREE_SETTINGS = ("eval_pgd", "gather_for_attack", "estimate_memory", "estimate_processes", "estimate_precision")
SHOWN = {
    "multiplier": "multiplier_mean",
    "violation": "violation_ratio_mean",
    "clean": "eval_accuracy_clean",
    "pgd": "eval_accuracy_pgd",
}  # shown on the progress line: word -> key of the row


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    problem = Problem(
        settings.objective,
        settings.constraint,
        settings.margin,
        settings.rho,
        settings.clean_weight,
        settings.penalty,
    )
    if settings.estimate_memory:
        return estimate_memory(settings, problem)
    sets = settings.shard_options("train_shards", problem.needs_labels), settings.shard_options("eval_shards", True)
    if settings.prefetch:
        return prefetch_training(settings, sets)
    run = Run(settings, __file__, method=problem.name, updates=settings.primal_steps, free=FREE_SETTINGS)
    accelerator, device = run.accelerator, run.device
    train_set, eval_set = run.open_sets(*sets)

    # The encoder phi and its frozen reference phi0: pixels in [0,1] to un-normalised embeddings.
    model, processor, encoder, reference = load_encoders(run, settings, problem)
    forward, steps = forward_flops(reference), (settings.attack_steps, settings.primal_steps)
    sees = problem.clean_in_primal, problem.constrained, problem.needs_reference
    flops = lore_flops_per_image(forward, *steps, *sees)
    if settings.shard_reference:
        reference = shard_frozen(accelerator, reference)
    # The classifier turns embeddings (B, D) into logits (B, C), by class texts or a linear head, both frozen.
    classifier = partial(set_classifier, model, processor, encoder, device=device, linear_head=settings.linear_head)
    if problem.needs_labels:
        problem = dataclasses.replace(problem, classifier=classifier(train_set))
    eval_classifier = classifier(eval_set) if eval_set else None
    pgd = settings.pgd
    if settings.compile:
        encoder.compile(dynamic=False)
        reference.compile(dynamic=False)
        pgd["update"] = torch.compile(ascend, dynamic=False)

    # Only the encoder is prepared. The multiplier stays outside the engine; its own optimizer ascends.
    optimizer = make_optimizer(settings.optimizer, encoder, settings.learning_rate, settings.weight_decay)
    multiplier = Multiplier(settings.multiplier, encoder.embed_dim).to(device)
    dual_optimizer = make_dual_optimizer(multiplier, settings.dual_learning_rate)
    encoder.train()
    encoder, optimizer = run.prepare(encoder, optimizer)
    module = accelerator.unwrap_model(encoder)  # attacks and evaluations bypass the engine: see utils/processes
    write_model = partial(write_trained, run, encoder, model, processor)
    trained = Trained(encoder, optimizer, write_model, {"multiplier": multiplier, "dual_optimizer": dual_optimizer})
    run.restore(trained)

    transform = image_transform(processor)
    drafted = dataclasses.replace(transform, draft=settings.jpeg_draft)
    train_data = labelled_images(train_set, drafted, problem.needs_labels, order="shuffled", seed=settings.seed)
    eval_data = labelled_images(eval_set, transform, order="sequential") if eval_set else None
    batches = run.train_batches(train_data, run.measure_workers(train_data, flops))

    with run.begun(SHOWN):
        if eval_set and not run.resumed:
            run.record(evaluate(run, settings, module, eval_classifier, eval_data, 0))
        for step in run.steps():
            run.set_learning_rates(step, learning_rate=optimizer, dual_learning_rate=dual_optimizer)

            # 1. Reference embeddings and perturbations of all micro-batches, before the encoder changes.
            micro_batches = []
            for loaded in run.take(batches):
                batch = MicroBatch(to_pixel_values(loaded["images"], device))
                if problem.needs_labels:
                    batch.labels = loaded["labels"].to(device, non_blocking=True)
                if problem.needs_reference or step.log:
                    problem.refer(reference, batch)
                seeds = attack_seeds(settings.seed, step.index, loaded["positions"].tolist())
                with gathered(module, settings.gather_for_attack):
                    batch.delta = attack(module, problem, batch, seeds, **pgd)
                if step.log and not problem.clean_in_primal:
                    with torch.no_grad():
                        batch.image_embeds = module(batch.pixel_values)
                micro_batches.append(batch)
            if run.gave_up():
                break

            # 2. K primal updates on the same images and perturbations. The log shows the embeddings of the first.
            measured: list[Tensor] = []
            for update in range(settings.primal_steps):
                measure = step.log and update == 0
                for batch in micro_batches:
                    with accelerator.accumulate(encoder):
                        primal = problem.primal(encoder, batch, multiplier)
                        run.update(primal.loss, primal.terms, encoder, optimizer, measure=measure)
                    if measure:
                        measured.append(problem.measure(primal, batch, multiplier))

            # 3. One dual update on the mean over the global batch, with the violation of the updated encoder.
            if problem.constrained:
                for batch in micro_batches:
                    (problem.dual(module, batch, multiplier) / len(micro_batches)).backward()
                run.update_outside(multiplier, dual_optimizer)

            if run.trained(step):
                row = run.row(step, summary(run, measured, settings.rho)) if step.log else {}
                if step.evaluate:
                    row |= evaluate(run, settings, module, eval_classifier, eval_data, step.done)
                run.record(row, step)
                run.save(step, row, trained)
        if run.stopped():
            run.leave(trained)
    run.finish(trained)


def check_settings(settings: Settings) -> None:
    """Raises ``UserError`` for settings that do not go together."""
    if settings.clean_weight > 0 and settings.constraint != "none":
        raise UserError(
            f"--clean_weight {settings.clean_weight} with --constraint {settings.constraint}: the naive regulariser "
            "stands in for the constraint; add --constraint none or leave --clean_weight at 0"
        )
    if settings.penalty > 0 and settings.constraint != "embedding":
        raise UserError(
            f"--penalty {settings.penalty:g} with --constraint {settings.constraint}: it augments the constraint on "
            "embeddings; leave it at 0 or use --constraint embedding"
        )
    if settings.keep_best and not settings.eval_shards:
        raise UserError(
            f"--keep_best {settings.keep_best}: nothing is evaluated; name labelled shards with --eval_shards"
        )
    if settings.keep_best == "eval_accuracy_pgd" and not settings.eval_pgd:
        raise UserError(
            "--keep_best eval_accuracy_pgd with --eval_pgd false: PGD accuracy is not measured; leave one of them out"
        )


def load_encoders(run: Run, settings: Settings, problem: Problem) -> tuple[Any, Any, Any, nn.Module]:
    """The model, its processor, its image encoder, and the frozen reference on the device."""
    start, other = run.fetch_models()
    if problem.needs_labels or run.eval_set:
        run.everywhere(lambda: refuse_without_classes(settings, start))
    model, processor = run.everywhere(lambda: load_model(start))
    encoder = make_encoder(model, processor, run.compute_dtype)
    reference, _ = run.everywhere(lambda: load_reference(other, encoder))
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(encoder)
    return model, processor, encoder, keep_weights_in(settings.reference_dtype, reference).to(run.device)


def refuse_without_classes(settings: Settings, start: ModelName) -> None:
    """Raises ``UserError`` if labels are used but there is neither a text tower nor a linear head to classify with."""
    config = check_model(start, "--model_name_or_path")
    if settings.linear_head is not None and not Path(settings.linear_head).is_file():
        raise UserError(f"--linear_head {settings.linear_head}: no such file; expected safetensors with weight (C, D)")
    if settings.linear_head is None and not has_text(config) and not has_own_head(config):
        raise UserError(
            f"--model_name_or_path {settings.model_name_or_path}: a {config.model_type} has no text tower and no head "
            "of its own, which --eval_shards, tecoa and kl need to tell classes apart; give it one with --linear_head"
        )


def labelled_images(
    labelled: LabelledSet, transform: ImageTransform, with_labels: bool = True, **options: Any
) -> ShardDataset:
    """The samples of a set; ``options`` are order and seed."""
    num_classes = len(labelled.classnames)
    return ShardDataset(labelled.index, transform, with_labels=with_labels, num_classes=num_classes, **options)


def summary(run: Run, measured: list[Tensor], rho: float) -> dict[str, float]:
    """Statistics over the global batch, for the encoder before its updates. Synchronises."""
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
    """Accuracy on clean and attacked images. Empty if the run was told to stop and a batch did not arrive."""
    accuracies = {}
    radii = {"clean": None} | ({"pgd": settings.eps / 255} if settings.eval_pgd else {})
    for name, radius in radii.items():
        eager = torch.compiler.set_stance("force_eager")  # the last batch may be smaller: not worth compiling for
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
    said = {"clean": "clean", "pgd": f"under PGD at eps {settings.eps:g}/255"}
    values = [f"{accuracies[f'eval_accuracy_{name}']:.3f} {said[name]}" for name in radii]
    run.progress.note(f"step {step}: accuracy {', '.join(values)}")
    return accuracies


def write_trained(run: Run, encoder: nn.Module, model: Any, processor: Any, directory: Path) -> None:
    """Writes a directory that ``from_pretrained`` loads. Call on all processes."""
    weights = run.accelerator.get_state_dict(encoder)  # ZeRO-3 gathers here
    if run.accelerator.is_main_process:
        save_model(directory, model, processor, weights)
        about = (
            "The image tower was fine-tuned to resist l_inf perturbations of the pixels; the rest is the base model's."
        )
        run.complete(directory, model, about=about, tag="adversarial-robustness")


def estimate_memory(settings: Settings, problem: Problem) -> None:
    """Prints the memory that a step with these settings needs on a device. Loads the model's config, no weights."""
    compute_dtype = MIXED_PRECISIONS[settings.estimate_precision]
    check_reference_dtype(settings.reference_dtype, compute_dtype)
    accumulation = accumulation_steps(
        settings.global_batch_size,
        settings.per_device_train_batch_size,
        settings.estimate_processes,
        settings.gradient_accumulation_steps,
    )
    (flag, name), model = settings.models[0], None
    if name is not None:
        _, config = find_config(name, flag, ("clip",))
        if config is None:
            raise UserError(f"{flag} {name}: a repository of weights alone; name its --base_model, or download it")
        config.vision_config.projection_dim = config.projection_dim
        label = Path(name.path).resolve().name if Path(name.path).exists() else name.path
        if settings.image_size is not None:
            set_image_size(config, settings.image_size)
            label += f", {settings.image_size} px"
        model = label, config.vision_config
    elif settings.image_size is not None:
        raise UserError(f"--image_size {settings.image_size}: of which model? name it with {flag}")
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
