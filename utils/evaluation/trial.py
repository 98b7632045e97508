"""One model on one data set: both of them, passes over the images, and findings gathered from all processes.

All processes make the same calls here and get the same results. Up to rounding, no figure depends on the number of
processes or the batch size.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, eval_loader
from utils.data.skipped import SkipCounter, count_skipped
from utils.errors import UserError
from utils.evaluation.results import Cell, Finding, mean_interval, wilson_interval
from utils.models.encoders import ImageEncoder
from utils.models.policy import TextTable, row_names
from utils.models.published import logit_scale
from utils.models.zeroshot import ensemble, refuse_non_finite_rows, to_pixel_values
from utils.processes.distributed import default_num_workers, gather_objects
from utils.processes.progress import RunProgress
from utils.sets.corruptions import CorruptedDataset, PublishedCorruptions
from utils.sets.labelled import LabelledSet

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60  # between progress lines without a terminal

Rows = list[tuple[int, Any]]  # (position in the set, value)


@dataclass
class EvalSet:
    """One of --data: labelled splits; or pairs, in ``attack`` and ``clean`` or in one split; or published files."""

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
    clip: Any = None
    processor: Any = None
    with_head: Any = None  # the whole model, if it has its own classifier
    tables: dict[tuple, TextTable] = field(default_factory=dict)  # so that no text is encoded twice

    @property
    def logit_scale(self) -> float:
        return logit_scale(self.clip)

    def texts(self, templates: Sequence[str], *, per_prompt: bool = False) -> TextTable:
        """The model's text embeddings in these templates; ``per_prompt`` is for a model whose head is unfolded."""
        templates = list(templates) or ["{c}"]
        key = (*templates, per_prompt)
        if key not in self.tables:
            self.tables[key] = TextTable(self.clip, self.processor, templates, self.device, per_prompt=per_prompt)
        return self.tables[key]

    def embed(
        self, table: TextTable, weight: Tensor | None, images: Tensor, texts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images (uint8, or image_embeds) and texts, both after a head ``weight`` (D, D)."""
        image_embeds, prompt_embeds = images.to(self.device), table(texts)
        if images.dtype == torch.uint8:
            image_embeds = self.encoder(to_pixel_values(images, self.device))
        if weight is not None:
            image_embeds, prompt_embeds = image_embeds @ weight.T, prompt_embeds @ weight.T
        return F.normalize(image_embeds, dim=-1), ensemble(prompt_embeds)

    @torch.no_grad()
    def embed_images(self, batch: dict[str, Any]) -> Tensor:
        """A batch's images, uint8 (N, 3, H, W), N >= 0 -> image_embeds (N, D). Raises ``NonFiniteError``."""
        images = batch["images"]
        if not len(images):
            return torch.empty(0, self.encoder.embed_dim, device=self.device)
        image_embeds = self.encoder(to_pixel_values(images, self.device))
        names = row_names(batch) if "reg_positions" in batch else batch["keys"]
        refuse_non_finite_rows(image_embeds.norm(dim=1, keepdim=True), names, f"embeddings by {self.name}")
        return image_embeds


@cache
def say_once(line: str) -> None:
    """Logs a warning once. Many passes read the same set, but its skipped samples are reported once."""
    logger.warning(line)


@dataclass
class Batches:
    """The batches of one pass. The bar counts the samples read; with ``by_hand`` the caller moves it by ``show``."""

    loader: DataLoader
    skips: SkipCounter
    progress: RunProgress
    world_size: int
    by_hand: bool
    judged: int = 0
    right: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in count_skipped(self.loader, self.skips):
            yield batch
            if not self.by_hand:
                self.show(self.skips.seen)

    def show(self, done: float) -> None:
        """Moves the bar to ``done`` samples of this process. During an attack the shown accuracy can only fall."""
        progress, done = self.progress, min(self.progress.total, int(done * self.world_size))
        fields = {"accuracy": 1 - (self.judged - self.right) / self.skips.seen} if self.judged else {}
        due = time.monotonic() - progress.spoken > SECONDS_BETWEEN_LINES
        progress.update(done, fields, report=due and done < progress.total)


@dataclass
class Trial:
    """One model on one data set."""

    settings: Any
    accelerator: Accelerator
    model: Model
    data: EvalSet
    reference: Model | None = None  # for retention and fidelity
    classifier: Callable[[Tensor], Tensor] | None = None  # for a labelled set: image_embeds (B, D) -> logits (B, C)

    @contextmanager
    def read(
        self,
        dataset: ShardDataset,
        cell: Cell,
        *,
        at_once: int = 1,
        num_samples: int | None = None,
        by_hand: bool = False,
    ) -> Iterator[Batches]:
        """One pass over a set with a bar, ``at_once`` batches in one. Checks the skipped samples at its end."""
        settings, accelerator = self.settings, self.accelerator
        num_samples = min(num_samples or settings.num_samples or len(dataset), len(dataset))
        skips = SkipCounter(dataset.index, settings.max_bad_fraction, say_once, num_samples)
        loader = eval_loader(
            dataset,
            num_samples=num_samples,
            batch_size=settings.batch_size * at_once,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=default_num_workers(8) if settings.num_workers is None else settings.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        with RunProgress(title_of(cell), num_samples, enabled=accelerator.is_main_process) as progress:
            batches = Batches(loader, skips, progress, accelerator.num_processes, by_hand)
            yield batches
            counts = skips.state(), batches.judged, batches.right
            states, judged, right = zip(*gather_objects(accelerator, counts))
            skips = skips.merge(states)
            skips.check()
            if skips.summary() and accelerator.is_main_process:
                say_once(f"{cell['dataset']}: left out: " + "; ".join(skips.summary().splitlines()))
            fields = {"accuracy": sum(right) / sum(judged)} if sum(judged) else {}
            progress.update(num_samples, fields, report=True)

    def images(self, split: str, **options: Any) -> ShardDataset:
        """A split's images in order, transformed for the encoder, without labels or words."""
        return ShardDataset(self.data.splits[split].index, self.model.transform, order="sequential", **options)

    def labelled_images(self, corruption: Any = None, severity: Any = None) -> ShardDataset:
        """The images of a labelled set, transformed for the encoder, and corrupted if a corruption is given."""
        data, settings, transform = self.data, self.settings, self.model.transform
        if data.published is not None:
            return data.published.dataset(transform, corruption, severity)
        num_classes = len(data.classnames)
        if corruption is None:
            return self.images(settings.split, with_labels=True, num_classes=num_classes)
        options = {"severity": severity, "seed": settings.seed, "num_classes": num_classes}
        return CorruptedDataset(data.splits[settings.split].index, transform, corruption=corruption, **options)

    def merge(self, own: Mapping[str, Rows]) -> dict[str, Rows]:
        """The rows of all processes in the set's order; empty for a name that no process has."""
        merged: dict[str, Rows] = defaultdict(list)
        for part in gather_objects(self.accelerator, dict(own)):
            for name, rows in part.items():
                merged[name] += rows
        for rows in merged.values():
            rows.sort(key=lambda row: row[0])
        return merged

    def embedded(
        self, dataset: ShardDataset, cell: Cell, *columns: str, num_samples: int | None = None
    ) -> tuple[list[int], Tensor, dict[str, Any]]:
        """Positions, image_embeds (N, D) on the CPU and ``columns`` of the batches, for all images in set order."""
        own: list[tuple[Any, ...]] = []
        with self.read(dataset, cell, num_samples=num_samples) as batches:
            for batch in batches:
                # Copy: a tensor from a data worker keeps a file open as long as it exists.
                arrays = [np.array(batch[name]) for name in ("positions", *columns)]
                own.append((*arrays, self.model.embed_images(batch).cpu().numpy()))
        parts = [part for parts in gather_objects(self.accelerator, own) for part in parts if len(part[0])]
        if not parts:
            raise nothing_read(cell)
        positions, *found, embeds = map(np.concatenate, zip(*parts))
        order = positions.argsort()
        of_images = {name: values[order] for name, values in zip(columns, found)}
        return positions[order].tolist(), torch.from_numpy(embeds[order]), of_images


def title_of(cell: Cell) -> str:
    """The title of a cell's bar."""
    strength = [f"{name} {cell[name]}" for name in ("eps", "sigma", "corruption", "severity") if cell[name]]
    return "  ".join([cell["model"], cell["dataset"], cell["measure"], cell["attack"], *strength])


def values(rows: Rows) -> list[Any]:
    return [value for _, value in rows]


def nothing_read(cell: Cell) -> UserError:
    return UserError(f"--data {cell['dataset']}: no readable sample for {cell['measure']}, {cell['attack']}")


def share(cell: Cell, outcomes: Sequence[bool], **kept: Any) -> Finding:
    """The share of successes with its Wilson interval."""
    if not len(outcomes):
        raise nothing_read(cell)
    successes = int(sum(outcomes))
    return Finding(cell, successes / len(outcomes), wilson_interval(successes, len(outcomes)), len(outcomes), **kept)


def mean_of(cell: Cell, rows: Rows) -> Finding:
    """The mean over images with its normal interval."""
    if not rows:
        raise nothing_read(cell)
    kept = [{"position": position, "value": value} for position, value in rows]
    return Finding(cell, sum(values(rows)) / len(rows), mean_interval(values(rows)), len(rows), kept)
