"""How the figures of an evaluation are measured: a pass over a set, a record per sample, figures from the records.

Every function here is called by all processes alike and returns on all of them what they found together. No figure depends
on how many they are, nor on the batch size, but for rounding.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from utils.data.images import ImageTransform
from utils.data.shards import SampleDataset, ShardDataset, eval_loader
from utils.data.skipped import SkipCounter, count_skipped
from utils.errors import UserError
from utils.evaluation.apgd import Point, make_points, run_apgd
from utils.evaluation.fairness import fairness_figures
from utils.evaluation.results import Cell, Row
from utils.evaluation.square import square
from utils.methods.attacks import attack_seeds, frozen, gaussian_noise
from utils.methods.head import head_power, head_powers, load_head, neutral_t, unfolded
from utils.models.encoders import ImageEncoder, logit_scale
from utils.models.policy import TextTable, judge, row_names
from utils.models.zeroshot import (
    Classified,
    classified,
    ensemble,
    pgd_images,
    prompt_embeddings,
    refuse_non_finite_rows,
    to_pixel_values,
)
from utils.processes.distributed import default_num_workers, gather_objects
from utils.processes.progress import RunProgress
from utils.sets.attributes import AttributeDataset
from utils.sets.class_names import same_classes, twins
from utils.sets.corruptions import CorruptedDataset, PublishedCorruptions
from utils.sets.labelled import LabelledSet, interpretability_templates
from utils.sets.pairs import PairDataset, PreferenceDataset, TypographicDataset
from utils.sets.typographic import word_style
from utils.training.metrics import mean_interval, wilson_interval

PICTURES = 6  # kept of every attack
RETRIEVED = 10  # images of every query
SQUARE_GROUP = 8  # batches that the Square attack works on together, so that survivors fill batches
SECONDS_BETWEEN_UPDATES = 0.2  # of the bar
SECONDS_BETWEEN_LINES = 60  # of progress, where there is no terminal

Logits = Callable[[Tensor], Tensor]

logger = logging.getLogger(__name__)


@dataclass
class EvalSet:
    """One of --data. Labelled: class names and splits; pairs: ``attack`` and ``clean``, or one split; or published files."""

    labelled: bool
    splits: dict[str, LabelledSet]
    classnames: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    published: PublishedCorruptions | None = None


@dataclass
class Model:
    """One of --model, on the device. ``clip`` and ``processor`` are None for an encoder without a text tower."""

    name: str
    encoder: ImageEncoder
    transform: ImageTransform
    device: torch.device
    clip: PreTrainedModel | None = None
    processor: Any = None
    with_head: PreTrainedModel | None = None  # the whole model, where it brings a classifier of its own
    tables: dict[tuple, TextTable] = field(default_factory=dict)  # so that no text is encoded twice

    @property
    def with_text(self) -> PreTrainedModel:
        """``clip``, where texts are asked for. Raises ``ValueError`` without a text tower."""
        if self.clip is None:
            raise ValueError(f"{self.name} has no text tower")
        return self.clip

    @property
    def logit_scale(self) -> float:
        return logit_scale(self.with_text)

    def texts(self, templates: Sequence[str], *, per_prompt: bool = False) -> TextTable:
        """The model's texts in these templates. With ``per_prompt`` they are of a model whose head is unfolded."""
        templates = list(templates) or ["{c}"]
        key = (*templates, per_prompt)
        if key not in self.tables:
            self.tables[key] = TextTable(self.with_text, self.processor, templates, self.device, per_prompt=per_prompt)
        return self.tables[key]

    def class_embeds(self, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit embeddings of classes, (C, D)."""
        return ensemble(self.texts(templates)(classnames))

    def embed(self, table: TextTable, weight: Tensor | None = None) -> Callable:
        """(images, texts) -> unit embeddings, both through a head ``weight`` (D, D) where one is given."""

        def embeds(images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            image_embeds = images.to(self.device)
            if images.dtype == torch.uint8:
                image_embeds = self.encoder(to_pixel_values(images, self.device))
            prompt_embeds = table(texts)
            if weight is not None:
                image_embeds, prompt_embeds = image_embeds @ weight.T, prompt_embeds @ weight.T
            return F.normalize(image_embeds, dim=-1), ensemble(prompt_embeds)

        return embeds


class Picture(NamedTuple):
    """A sample whose prediction an attack changed; pixels (3, H, W) in [0,1] as NumPy arrays, which travel."""

    position: int
    clean: Any
    attacked: Any
    caption: dict[str, str]


class Finding(NamedTuple):
    """A measured cell with what is kept beside its value."""

    cell: Cell
    value: float | None
    interval: Sequence[float] | None
    n: int
    rows: Sequence[Row] = ()
    pictures: Sequence[Picture] = ()
    warnings: Sequence[str] = ()


@cache
def say_once(line: str) -> None:
    """Many passes read the same set: what was left out of it is said in the first one alone."""
    logger.warning(line)


class reading:
    """The batches of one pass over a set, with a progress bar; on leaving, what was skipped is weighed.

    The bar counts the samples read; with ``decided_alone`` whoever decides moves it by ``show``.
    """

    def __init__(
        self,
        settings: Any,
        accelerator: Accelerator,
        dataset: SampleDataset,
        cell: Cell,
        *,
        batch_size: int | None = None,
        num_samples: int | None = None,
        decided_alone: bool = False,
    ) -> None:
        self.accelerator, self.dataset, self.decided_alone = accelerator, dataset, decided_alone
        self.name = cell["dataset"]
        self.num_samples = min(num_samples or settings.num_samples or len(dataset), len(dataset))
        self.skips = SkipCounter(dataset.index, settings.max_bad_fraction, say_once, self.num_samples)
        self.loader: DataLoader = eval_loader(
            dataset,
            num_samples=self.num_samples,
            batch_size=batch_size or settings.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=default_num_workers(8) if settings.num_workers is None else settings.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        strength = [f"{name} {cell[name]}" for name in ("eps", "sigma", "corruption", "severity") if cell[name]]
        title = "  ".join([cell["model"], cell["dataset"], cell["measure"], cell["attack"], *strength])
        self.progress = RunProgress(title, self.num_samples, enabled=accelerator.is_main_process)
        self.seen = self.judged = self.right = 0
        self.last_line = self.last_shown = time.monotonic()

    def __enter__(self) -> reading:
        self.progress.__enter__()
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in count_skipped(self.loader, self.skips):
            self.seen += len(batch["keys"])
            yield batch
            if not self.decided_alone:
                self.show(self.seen)

    def decided(self, count: int, right: int) -> None:
        """``count`` more samples have been judged, ``right`` of them are classified rightly."""
        self.judged += count
        self.right += right

    def show(self, done: float) -> None:
        """Moves the bar to ``done`` samples of this process; the accuracy shown can only fall while an attack goes on."""
        now = time.monotonic()
        if now - self.last_shown < SECONDS_BETWEEN_UPDATES:
            return
        self.last_shown = now
        due = now - self.last_line > SECONDS_BETWEEN_LINES
        if due:
            self.last_line = now
        fields = {"accuracy": 1 - (self.judged - self.right) / self.seen} if self.judged else {}
        done = min(self.num_samples, int(done * self.accelerator.num_processes))
        self.progress.update(done, fields, report=due and done < self.num_samples)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            states, judged, right = zip(
                *gather_objects(self.accelerator, (self.skips.state(), self.judged, self.right))
            )
            skips = self.skips.merge(states)
            skips.check()
            if skips.summary() and self.accelerator.is_main_process:
                say_once(f"{self.name}: left out: " + "; ".join(skips.summary().splitlines()))
            fields = {"accuracy": sum(right) / sum(judged)} if sum(judged) else {}
            self.progress.update(self.num_samples, fields, report=True)
        self.progress.__exit__(kind, *error)


Rows = list[tuple[int, Any]]  # (position in the set, what was found there)


def merge_rows(accelerator: Accelerator, own: dict[str, Rows]) -> dict[str, Rows]:
    """The rows of all processes in the set's order."""
    parts = gather_objects(accelerator, own)
    names = sorted({name for part in parts for name in part})
    return {
        name: sorted((row for part in parts for row in part.get(name, ())), key=lambda row: row[0]) for name in names
    }


def merge_arrays(accelerator: Accelerator, cell: Cell, positions: Sequence[int], *parts: Sequence[Any]) -> list[Any]:
    """Arrays over this process's images to arrays over all images, in the set's order; the positions come first.

    Each of ``parts`` is a list of tensors (B, ...) of batches, or of lists of texts. One object travels, not one an image.
    """
    own: list[np.ndarray] = [np.asarray(positions, dtype=np.int64)]
    for batches in parts:
        tensors = [
            batch.cpu().numpy() if isinstance(batch, Tensor) else np.asarray(batch, dtype=object) for batch in batches
        ]
        own.append(np.concatenate(tensors) if tensors else np.empty(0))
    gathered = [part for part in gather_objects(accelerator, own) if len(part[0])]
    if not gathered:
        raise UserError(f"--data {cell['dataset']}: no readable sample for {cell['measure']}")
    merged = [np.concatenate(arrays) for arrays in zip(*gathered)]
    order = merged[0].argsort()
    return [array[order].tolist() if array.dtype == object else torch.from_numpy(array[order]) for array in merged]


def values(rows: Rows) -> list[Any]:
    return [value for _, value in rows]


def share(cell: Cell, outcomes: Sequence[bool], **kept: Any) -> Finding:
    """A share of successes with its Wilson interval."""
    if not len(outcomes):
        raise UserError(f"--data {cell['dataset']}: no readable sample for {cell['measure']}, {cell['attack']}")
    successes = int(sum(outcomes))
    interval = wilson_interval(successes, len(outcomes))
    return Finding(cell, successes / len(outcomes), interval, len(outcomes), **kept)


# Accuracy, clean and attacked


def measure_accuracy(
    settings: Any, accelerator: Accelerator, model: Model, classifier: Callable, data: EvalSet, cell: Cell
) -> Finding:
    """Whether each image of a labelled set is classified rightly under the cell's attack.

    ``classifier`` maps image_embeds (B, D) to logits (B, C). The figure is always judged in float32.
    """
    dataset = labelled_dataset(settings, model, data, cell)
    apgd = cell["attack"] == "apgd"
    batch_size = settings.batch_size * (SQUARE_GROUP if cell["attack"] == "square" else 1)

    def logits_fn(pixel_values: Tensor) -> Tensor:
        parts = pixel_values.split(settings.batch_size)  # Square brings several batches
        return torch.cat([classifier(model.encoder(part)) for part in parts])

    with (
        frozen(model.encoder),
        reading(settings, accelerator, dataset, cell, batch_size=batch_size, decided_alone=apgd) as batches,
    ):
        rows, pictures, warnings = (apgd_rows if apgd else batch_rows)(
            settings, batches, cell, data.classnames, logits_fn, attacked_logits(settings, model, classifier)
        )
    merged = values(merge_rows(accelerator, {"rows": rows}).get("rows", []))
    pictures = first_pictures(gather_objects(accelerator, pictures))
    if cell["corruption"] is not None:
        pictures = beside_clean(settings, model, logits_fn, data, pictures)
    flat = sum(row.pop("zero_gradient", False) for row in merged)
    if flat:
        warnings = [
            *warnings,
            f"{flat} of {len(merged)} images have no gradient at all where the targeted attack starts: the model may hide "
            "its gradients (rounding, saturation), and gradient-based attacks then overstate its accuracy",
        ]
    return share(cell, [row["correct"] for row in merged], rows=merged, pictures=pictures, warnings=warnings)


def labelled_dataset(settings: Any, model: Model, data: EvalSet, cell: Cell) -> SampleDataset:
    """The images that a cell asks for, as the encoder sees them."""
    if data.published is not None:
        return data.published.dataset(model.transform, cell["corruption"], cell["severity"])
    index, num_classes = data.splits[settings.split].index, len(data.classnames)
    if cell["corruption"] is not None:
        return CorruptedDataset(
            index,
            model.transform,
            corruption=cell["corruption"],
            severity=cell["severity"],
            seed=settings.seed,
            num_classes=num_classes,
        )
    return ShardDataset(index, model.transform, order="sequential", with_labels=True, num_classes=num_classes)


def batch_rows(
    settings: Any, batches: reading, cell: Cell, classnames: Sequence[str], logits_fn: Logits, attacked_fn: Logits
) -> tuple[Rows, list[Picture], list[str]]:
    """Rows of a pass in which every image is changed once and judged once, or not changed at all."""
    rows: Rows = []
    pictures: list[Picture] = []
    warnings: list[str] = []
    changed = partial(perturbed, settings, cell, logits_fn, attacked_fn)
    for found in classified(logits_fn, batches, device=batches.accelerator.device, perturb=changed):
        if not len(found.labels):
            continue
        if not rows:
            warnings += random_outputs(logits_fn, found.pixel_values)
        predicted, labels = found.logits.argmax(dim=1), found.labels
        correct = (predicted == labels).tolist()
        top5 = found.logits.topk(min(5, found.logits.shape[1]), dim=1).indices.tolist()
        for position, key, label, guess, right, likeliest in zip(
            found.positions, found.keys, labels.tolist(), predicted.tolist(), correct, top5, strict=True
        ):
            row = {"position": position, "key": key, "label": label, "predicted": guess, "correct": right}
            rows.append((position, row | {"top5": likeliest}))
        batches.decided(len(correct), sum(correct))
        strongest = cell["corruption"] is None or cell["severity"] == max(settings.severities)
        if cell["attack"] != "clean" and strongest and len(pictures) < PICTURES:
            pictures += kept_pictures(
                found, logits_fn, classnames, any_answer=cell["attack"] in ("gaussian_noise", "corruptions")
            )
    return rows, pictures, warnings


def perturbed(
    settings: Any,
    cell: Cell,
    logits_fn: Logits,
    attacked_fn: Logits,
    pixel_values: Tensor,
    labels: Tensor,
    positions: Sequence[int],
) -> Tensor:
    """The images of one batch under the cell's attack (APGD works on a stream, not on batches).

    Gradients are followed through ``attacked_fn``, answers come from ``logits_fn``.
    """
    if cell["attack"] == "gaussian_noise":
        seeds = attack_seeds(settings.seed, f"noise {cell['sigma']:g}", positions)
        return gaussian_noise(pixel_values, cell["sigma"] / 255, seeds)
    if cell["attack"] == "pgd":
        return pgd_images(
            attacked_fn,
            pixel_values,
            labels,
            positions,
            eps=cell["eps"] / 255,
            step_size=cell["settings"]["attack_step_size"] / 255,
            num_steps=settings.attack_steps,
            seed=settings.seed,
        )
    if cell["attack"] == "square":
        with torch.no_grad():
            rows = (logits_fn(pixel_values).argmax(dim=1) == labels).nonzero()[:, 0]
        attacked = pixel_values.clone()
        if len(rows):
            attacked[rows] = square(
                logits_fn,
                pixel_values[rows],
                labels[rows],
                [positions[row] for row in rows.tolist()],
                eps=cell["eps"] / 255,
                num_queries=settings.square_queries,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
        return attacked
    if cell["attack"] in ("clean", "corruptions"):  # corrupted as they are read
        return pixel_values
    raise ValueError(f"{cell['attack']}: no attack on a batch is defined")


def attacked_logits(settings: Any, model: Model, classifier: Callable) -> Logits:
    """Logits as gradient attacks see them: in float32, or with the transformer blocks in --attack_dtype."""
    encoder = copy.copy(model.encoder)  # the same modules
    encoder.compute_dtype = getattr(torch, settings.attack_dtype)
    return lambda pixel_values: classifier(encoder(pixel_values))


def apgd_rows(
    settings: Any, batches: reading, cell: Cell, classnames: Sequence[str], logits_fn: Logits, attacked_fn: Logits
) -> tuple[Rows, list[Picture], list[str]]:
    """Rows of APGD-CE and APGD-T: images stream in as places get free, and leave as soon as they are broken."""
    rows: Rows = []
    pictures: list[Picture] = []
    warnings: list[str] = []
    keys: dict[int, str] = {}
    under_attack: dict[int, Point] = {}

    def add(position: int, label: int, predicted: int, broken_by: str | None, forwards: int, **more: Any) -> None:
        row = {"position": position, "key": keys.pop(position), "label": label, "predicted": predicted}
        row |= {"correct": broken_by is None, "broken_by": broken_by, "forwards": forwards}
        rows.append((position, row | more))
        under_attack.pop(position, None)
        batches.decided(1, broken_by is None)

    def points() -> Iterator[Point]:
        for found in classified(logits_fn, batches, device=batches.accelerator.device):
            if not len(found.labels):
                continue
            if not rows and not keys:
                warnings.extend(random_outputs(logits_fn, found.pixel_values))
            keys.update(zip(found.positions, found.keys))
            predicted = found.logits.argmax(dim=1)
            right = predicted == found.labels
            for i in (~right).nonzero()[:, 0].tolist():
                add(found.positions[i], int(found.labels[i]), int(predicted[i]), "clean", 1)
            chosen = right.nonzero()[:, 0]
            for point in make_points(
                [found.positions[i] for i in chosen.tolist()],
                found.pixel_values[chosen],
                found.labels[chosen],
                found.logits[chosen],
                settings.apgd_targets,
            ):
                under_attack[point.position] = point
                yield point

    most = (settings.apgd_steps + 1) * (1 + min(settings.apgd_targets, len(classnames) - 1))

    def watched(pixel_values: Tensor) -> Tensor:
        # Who holds out counts by the share of its forwards: else the bar would stand still while survivors remain.
        batches.show(len(rows) + sum(sum(point.spent) for point in under_attack.values()) / most)
        return attacked_fn(pixel_values)

    exact = settings.attack_dtype == "float32"
    for point in run_apgd(
        points(),
        watched,
        eps=cell["eps"] / 255,
        num_steps=settings.apgd_steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        judge=None if exact else logits_fn,
    ):
        broken_by = None
        if point.broken_by is not None:
            broken_by = f"target {point.broken_by}" if point.broken_by else "cross-entropy"
            early = len(pictures) < PICTURES or point.position < pictures[-1].position
            if early and point.adversarial is not None:  # copies to the host are few
                names = classnames[point.label], classnames[point.label], classnames[point.predicted]
                pictures.append(picture(point.position, point.pixel_values, point.adversarial, *names))
                pictures = first_pictures([pictures])
        more = {"zero_gradient": True} if point.zero_gradient else {}
        add(point.position, point.label, point.predicted, broken_by, point.forwards + 1, **more)
    return rows, pictures, warnings


def kept_pictures(
    found: Classified, logits_fn: Logits, classnames: Sequence[str], *, any_answer: bool
) -> list[Picture]:
    """The first images of a batch whose right answer the attack turned; with ``any_answer`` the first ones as they come.

    Noise is shown on the same images at every strength.
    """
    predicted = found.logits.argmax(dim=1)
    rows = torch.arange(len(predicted), device=predicted.device)
    rows = rows[:PICTURES] if any_answer else rows[predicted != found.labels]
    if not len(rows):
        return []
    with torch.no_grad():
        clean = logits_fn(found.pixel_values[rows]).argmax(dim=1)
    if not any_answer:
        rows, clean = rows[clean == found.labels[rows]], clean[clean == found.labels[rows]]
    return [
        picture(
            found.positions[row],
            found.pixel_values[row],
            found.attacked[row],
            *(classnames[int(answer)] for answer in (found.labels[row], before, predicted[row])),
        )
        for row, before in list(zip(rows.tolist(), clean.tolist()))[:PICTURES]
    ]


def picture(position: int, clean: Tensor, attacked: Tensor, label: str, before: str, after: str) -> Picture:
    """``before`` and ``after``: the classes predicted for the two."""
    caption = {"label": label, "predicted_clean": before, "predicted": after}
    return Picture(position, clean.cpu().numpy(), attacked.cpu().numpy(), caption)


@torch.no_grad()
def beside_clean(
    settings: Any, model: Model, logits_fn: Logits, data: EvalSet, pictures: Sequence[Picture]
) -> list[Picture]:
    """One picture of a corruption, beside the image before it was corrupted; none of published files, which lack it."""
    if data.published is not None or not pictures:
        return []
    dataset = labelled_dataset(settings, model, data, {"corruption": None})
    image = dataset[0, pictures[0].position, pictures[0].position]["image"]
    pixel_values = to_pixel_values(image[None], model.device)
    before = data.classnames[int(logits_fn(pixel_values).argmax())]
    caption = pictures[0].caption | {"predicted_clean": before}
    return [pictures[0]._replace(clean=pixel_values[0].cpu().numpy(), caption=caption)]


def first_pictures(parts: Iterable[Sequence[Picture]]) -> list[Picture]:
    """The ones that come first in the set, so that they are the same for any number of processes."""
    return sorted((one for part in parts for one in part), key=lambda one: one.position)[:PICTURES]


@torch.no_grad()
def random_outputs(logits_fn: Logits, pixel_values: Tensor) -> list[str]:
    """A warning where two forwards of the same images differ: attacks that follow gradients then chase noise."""
    logits = logits_fn(pixel_values[:16]), logits_fn(pixel_values[:16])
    unit = [F.normalize(found.double(), dim=1) for found in logits]
    difference = float((unit[0] - unit[1]).norm(dim=1).max())
    if difference <= 1e-4:
        return []
    return [
        f"the model answers the same images differently (logits by {difference:.2g} of their length): attacks need gradients "
        "averaged over many forwards, which these are not, so the attacked accuracy is too high"
    ]


# Texts: words on images, preference pairs, retention


def preference_dataset(
    settings: Any, model: Model, data: EvalSet, *, split: str | None = None, attacks: int = 1
) -> PreferenceDataset:
    """A labelled set with words written on it, or a split of pairs: ``split`` if there is one of this name."""
    if not data.labelled:
        chosen = data.splits[split if split in data.splits else settings.split]
        return PairDataset(chosen.index, model.transform, order="sequential")
    labelled = data.splits[settings.split]
    return TypographicDataset(
        labelled.index,
        model.transform,
        order="sequential",
        classnames=labelled.classnames,
        style=word_style(settings),
        attacks_per_image=attacks,
        seed=settings.seed,
        fixed_epoch=-1,
        flag="--data",
    )


def judged(
    settings: Any,
    accelerator: Accelerator,
    model: Model,
    data: EvalSet,
    dataset: PreferenceDataset,
    cell: Cell,
    *,
    reference: Model | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Rows]:
    """``choices`` of the model on every row, in the set's order. ``watch`` sees every batch of this process."""
    with reading(settings, accelerator, dataset, cell) as batches:

        def watched() -> Iterator[dict[str, Any]]:
            for batch in batches:
                if watch is not None:
                    watch(batch)
                yield batch

        own = judge(
            watched(),
            model.embed(model.texts(data.templates)),
            reference.embed(reference.texts(data.templates)) if reference else None,
            model.logit_scale,
        )
    return merge_rows(accelerator, own)


def measure_pairs(
    settings: Any, accelerator: Accelerator, model: Model, data: EvalSet, job: Sequence[Cell]
) -> list[Finding]:
    """Accuracy on attacked images and how often the rejected text wins, or accuracy on a pair set's clean images."""
    if job[0]["attack"] != "typographic":
        # The clean half of a pair set is judged by the same texts; in a single split, the rows of the regulariser are.
        dataset = preference_dataset(settings, model, data, split="clean")
        found = judged(settings, accelerator, model, data, dataset, job[0])
        rows = found.get("chosen" if "clean" in data.splits else "clean", [])
        return [share(job[0], values(rows), rows=correct_rows(rows))]
    dataset = preference_dataset(settings, model, data, split="attack")
    originals: list[tuple[int, Any, Any, str, str]] = []

    def watch(batch: dict[str, Any]) -> None:
        places = {position: i for i, position in enumerate(batch["reg_positions"].tolist())}
        for i, position in enumerate(batch["positions"].tolist()):
            if data.labelled and len(originals) < PICTURES and position in places:
                attacked = batch["images"][len(batch["reg_positions"]) + i].numpy() / 255
                label, word = (batch["texts"][int(batch[name][i].flatten()[0])] for name in ("chosen", "rejected"))
                originals.append((position, batch["images"][places[position]].numpy() / 255, attacked, label, word))

    found = judged(settings, accelerator, model, data, dataset, job[0], watch=watch)
    chosen, rejected = found.get("chosen", []), found.get("rejected", [])
    follows = dict(rejected)
    right = dict(chosen)
    pictures = []
    for position, clean, attacked, label, word in sorted(
        (entry for part in gather_objects(accelerator, originals) for entry in part), key=lambda entry: entry[0]
    )[:PICTURES]:
        predicted = label if right[position] else word if follows[position] else "another class"
        caption = {"label": label, "predicted_clean": "", "predicted": predicted}
        pictures.append(Picture(position, clean, attacked, caption))
    return [
        share(job[0], values(chosen), rows=correct_rows(chosen), pictures=pictures),
        share(job[1], values(rejected), rows=correct_rows(rejected)),
    ]


def correct_rows(rows: Rows) -> list[Row]:
    return [{"position": position, "correct": value} for position, value in rows]


def measure_retention(
    settings: Any, accelerator: Accelerator, model: Model, reference: Model, data: EvalSet, cell: Cell
) -> Finding:
    """Mean KL(pi_ref || pi) over the classes, on clean images."""
    refuse_other_images(model, reference, cell)
    dataset = preference_dataset(settings, model, data, attacks=0)
    return mean_of(cell, judged(settings, accelerator, model, data, dataset, cell, reference=reference).get("kl", []))


def refuse_other_images(model: Model, reference: Model, cell: Cell) -> None:
    """Two models are compared on the same pixels."""
    if model.transform != reference.transform:
        sizes = [one.transform.output_size for one in (model, reference)]
        raise UserError(
            f"--measure {cell['measure']}: {model.name} sees images of {sizes[0]} px, {reference.name} of {sizes[1]} px, or "
            "resized in another way; name the model that it was fine-tuned from"
        )


def mean_of(cell: Cell, rows: Rows) -> Finding:
    if not rows:
        raise UserError(f"--data {cell['dataset']}: no readable sample for {cell['measure']}")
    found = values(rows)
    kept = [{"position": position, "value": value} for position, value in rows]
    return Finding(cell, sum(found) / len(found), mean_interval(found), len(found), kept)


# Embeddings: interpretability, fidelity, features


@torch.no_grad()
def embed_images(model: Model, batch: dict[str, Any]) -> Tensor:
    """A batch's images, uint8 (N, 3, H, W) -> image_embeds (N, D); no image gives no embedding. Raises ``UserError``."""
    images = batch["images"]
    if not len(images):
        return torch.empty(0, model.encoder.embed_dim, device=model.device)
    image_embeds = model.encoder(to_pixel_values(images, model.device))
    names = row_names(batch) if "reg_positions" in batch else batch["keys"]
    refuse_non_finite_rows(image_embeds.norm(dim=1, keepdim=True), names, f"embeddings by {model.name}")
    return image_embeds


def measure_interpretability(
    settings: Any, accelerator: Accelerator, model: Model, data: EvalSet, cell: Cell
) -> Finding:
    """Cosine of an image to 150 descriptions of its true class, mean over them and then over images."""
    prompts = prompt_embeddings(
        model.with_text, model.processor, data.classnames, interpretability_templates(), model.device
    )
    described = F.normalize(prompts, dim=-1).mean(dim=1)  # a mean of cosines is the cosine to nothing: not made unit
    rows: Rows = []
    with reading(settings, accelerator, labelled_dataset(settings, model, data, cell), cell) as batches:
        for batch in batches:
            unit = F.normalize(embed_images(model, batch), dim=-1)
            cosines = (unit * described[batch["labels"].to(model.device)]).sum(dim=-1)
            rows += zip(batch["positions"].tolist(), cosines.tolist())
    return mean_of(cell, merge_rows(accelerator, {"rows": rows}).get("rows", []))


def measure_fidelity(
    settings: Any,
    accelerator: Accelerator,
    model: Model,
    reference: Model,
    data: EvalSet,
    job: Sequence[Cell],
) -> list[Finding]:
    """||phi(x) - phi0(x)||^2 / ||phi0(x)||^2, its mean and quantiles, and the cosine between the two."""
    refuse_other_images(model, reference, job[0])
    if model.encoder.embed_dim != reference.encoder.embed_dim:
        raise UserError(
            f"--measure fidelity: {model.name} embeds into {model.encoder.embed_dim} dimensions, {reference.name} into "
            f"{reference.encoder.embed_dim}; name the model that it was fine-tuned from"
        )
    own: Rows = []
    with reading(settings, accelerator, labelled_dataset(settings, model, data, job[0]), job[0]) as batches:
        for batch in batches:
            found, ref = embed_images(model, batch), embed_images(reference, batch)
            distance = (found - ref).square().sum(dim=-1) / ref.square().sum(dim=-1).clamp_min(1e-12)
            cosine = F.cosine_similarity(found, ref, dim=-1)
            own += zip(batch["positions"].tolist(), zip(distance.tolist(), cosine.tolist()))
    rows = merge_rows(accelerator, {"rows": own}).get("rows", [])
    if not rows:
        raise UserError(f"--data {job[0]['dataset']}: no readable sample for fidelity")
    distances, cosines = (torch.tensor([value[i] for _, value in rows], dtype=torch.float64) for i in (0, 1))
    kept = [{"position": position, "value": value, "cosine": cosine} for position, (value, cosine) in rows]
    figures = {
        "fidelity": (float(distances.mean()), mean_interval(distances.tolist())),
        "fidelity_median": (float(distances.median()), None),
        "fidelity_p95": (float(distances.quantile(0.95)), None),
        "fidelity_max": (float(distances.max()), None),
        "fidelity_cosine": (float(cosines.mean()), mean_interval(cosines.tolist())),
    }
    return [
        Finding(cell, *figures[cell["measure"]], len(rows), kept if cell["measure"] == "fidelity" else ())
        for cell in job
    ]


def train_features(
    settings: Any, accelerator: Accelerator, model: Model, data: EvalSet, cell: Cell
) -> tuple[Tensor, Tensor]:
    """image_embeds (N, D) float32 and labels (N,) of the whole --train_split, on the CPU; its classes found by name."""
    labelled = data.splits[settings.train_split]
    dataset = ShardDataset(
        labelled.index, model.transform, order="sequential", with_labels=True, num_classes=len(labelled.classnames)
    )
    cell = cell | {"measure": "features", "attack": settings.train_split}
    positions, embeds, labels = [], [], []
    with reading(settings, accelerator, dataset, cell, num_samples=len(dataset)) as batches:
        for batch in batches:
            positions += batch["positions"].tolist()
            embeds.append(embed_images(model, batch).cpu())
            labels.append(batch["labels"])
    features, labels = merge_arrays(accelerator, cell, positions, embeds, labels)[1:]
    places = same_classes(labelled.classnames, data.classnames)
    return features, labels if places is None else torch.tensor(places)[labels]


# Heads and fairness


def measure_head(
    settings: Any, accelerator: Accelerator, model: Model, data: EvalSet, job: Sequence[Cell]
) -> list[Finding]:
    """Accuracies over the strength of the model's head; the images are embedded once. t* comes from validation pairs."""
    head = load_head(model.name)
    weights = dict(zip(settings.t, head_powers(head["weight"].to(model.device), settings.t)))

    def sweep(dataset: PreferenceDataset) -> dict[float, dict[str, list]]:
        with reading(settings, accelerator, dataset, job[0]) as batches:
            embedded = [batch | {"images": embed_images(model, batch)} for batch in batches]
        found = {
            t: merge_rows(accelerator, judge(embedded, model.embed(table, weight), None, model.logit_scale))
            for t, weight in weights.items()
        }
        return {t: {name: values(rows) for name, rows in by_name.items()} for t, by_name in found.items()}

    with unfolded(model.with_text, head):
        table = model.texts(data.templates, per_prompt=True)
        rows = sweep(preference_dataset(settings, model, data))
        neutral = None
        if not data.labelled:
            val_set = PairDataset(data.splits[settings.val_split].index, model.transform, order="sequential")
            val_rows = sweep(val_set)
            val = {
                name: [sum(val_rows[t][name]) / max(1, len(val_rows[t][name])) for t in settings.t]
                for name in ("pair", "clean")
            }
            neutral = neutral_t(settings.t, val["pair"], val["clean"], settings.task_tolerance)
    names = {"accuracy": "chosen", "follows_word": "rejected", "pair_accuracy": "pair"}
    findings = []
    for cell in job:
        if cell["measure"] == "neutral_t":
            findings.append(Finding(cell, neutral, None, len(val_rows[0.0]["pair"])))
        else:
            name = "clean" if cell["attack"] == "clean" else names[cell["measure"]]
            findings.append(share(cell, rows[cell["settings"]["t"]].get(name, [])))
    return findings


def measure_fairness(
    settings: Any, accelerator: Accelerator, model: Model, data: EvalSet, job: Sequence[Cell]
) -> list[Finding]:
    """Retrieval by the class prompts, and classification, between the images' attributes; over t where the job asks."""
    labelled = data.splits[settings.split]
    dataset = AttributeDataset(labelled.index, model.transform, num_classes=len(labelled.classnames))
    strengths = list(dict.fromkeys(cell["settings"].get("t") for cell in job))
    head = load_head(model.name) if strengths != [None] else None
    positions, embeds, labels, attributes = [], [], [], []
    with unfolded(model.with_text, head) if head else torch.no_grad():
        with reading(settings, accelerator, dataset, job[0]) as batches:
            for batch in batches:
                positions += batch["positions"].tolist()
                embeds.append(embed_images(model, batch).cpu())
                labels.append(batch["labels"])
                attributes.append(batch["attributes"])
        _, images, labels, attributes = merge_arrays(accelerator, job[0], positions, embeds, labels, attributes)
        names = sorted(set(attributes))
        if accelerator.is_main_process and (groups_of_one := twins(names)):
            logger.warning(
                "%s: attributes %s are taken for different groups",
                job[0]["dataset"],
                " and ".join(repr(names[place]) for place in groups_of_one[0]),
            )
        groups = torch.tensor([names.index(attribute) for attribute in attributes])
        if settings.top_k >= len(images):
            raise UserError(
                f"--top_k {settings.top_k}: {job[0]['dataset']} holds {len(images)} images; K must be smaller than the pool, "
                "or MaxSkew no longer depends on the model"
            )
        if len(names) < 2:
            raise UserError(
                f"--measure fairness: {job[0]['dataset']} knows one attribute only ({names[0]}); expected at least two"
            )
        figures, table = {}, model.texts(data.templates, per_prompt=head is not None)
        weights = head_powers(head["weight"].to(model.device), strengths) if head else [None]
        for t, weight in zip(strengths, weights):
            with torch.no_grad():
                unit, texts = model.embed(table, weight)(images, labelled.classnames)
            figures[t] = fairness_figures((texts @ unit.T).cpu(), labels, groups, settings.top_k)
    return [Finding(cell, figures[cell["settings"].get("t")][cell["measure"]], None, len(images)) for cell in job]


def retrieved(
    settings: Any,
    accelerator: Accelerator,
    model: Model,
    data: EvalSet,
    cell: Cell,
    head: dict[str, Tensor] | None,
    strengths: Iterable[float | None],
) -> dict[float | None, list[list[int]]]:
    """t -> positions of the best ``RETRIEVED`` images of every --query; t is None for a model without a head."""
    dataset = ShardDataset(data.splits[settings.split].index, model.transform, order="sequential")
    positions, embeds, found = [], [], {}
    with unfolded(model.with_text, head) if head else torch.no_grad():
        with reading(settings, accelerator, dataset, cell) as batches:
            for batch in batches:
                positions += batch["positions"].tolist()
                embeds.append(embed_images(model, batch).cpu())
        positions, images = merge_arrays(accelerator, cell, positions, embeds)
        for t in strengths:
            weight = None if head is None or t is None else head_power(head["weight"], t).to(model.device)
            with torch.no_grad():
                unit, texts = model.embed(model.texts(["{c}"], per_prompt=True), weight)(images, settings.query)
            best = (texts @ unit.T).argsort(dim=1, descending=True, stable=True)[:, :RETRIEVED]
            found[t] = [positions[line].tolist() for line in best]
    return found
