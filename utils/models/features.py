"""Embeddings of a preference data set, computed once and kept: what makes training a head a matter of seconds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.data.digests import shards_digest
from utils.data.shards import ShardReader, eval_loader
from utils.data.skipped import BadSample, Skipped
from utils.data.sources import default_cache_dir
from utils.errors import UserError
from utils.models.zeroshot import refuse_non_finite_rows, to_pixel_values
from utils.processes.distributed import everywhere, gather_objects
from utils.sets.pairs import PreferenceDataset, Row


class FeatureDataset(PreferenceDataset):
    """``source`` with image embeddings (D,) in place of pictures; the same samples, rows and replacements.

    ``embeds`` (rows, D) float32 and ``samples`` are what ``compute_features`` gives: per sample its key and its rows, or
    why it is skipped.
    """

    def __init__(self, source: PreferenceDataset, embeds: Tensor, samples: list[dict[str, Any]]) -> None:
        super().__init__(source.index, source.transform, order=source.order, seed=source.seed)
        self.texts, self.embeds, self.samples = source.texts, embeds, samples
        self._starts = [0, *accumulate(source.index.sizes)]

    @property
    def no_images(self) -> Tensor:
        return self.embeds[:0]

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        found = self.samples[self._starts[shard] + sample]
        if "skipped" in found:
            raise BadSample(*found["skipped"])
        reader.notices += [Skipped(*notice) for notice in found["notices"]]
        rows = [
            Row(self.embeds[found["first"] + place], *texts) for place, texts in enumerate(found["rows"])
        ]  # fmt: skip
        return {"key": found["key"], "rows": rows}


def features(
    accelerator: Accelerator,
    dataset: PreferenceDataset,
    encoder: nn.Module,
    *,
    weights: dict[str, Tensor],
    identity: dict[str, Any],
    num_samples: int,
    batch_size: int,
    num_workers: int,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[FeatureDataset, bool]:
    """``dataset``, or its first ``num_samples``, with the pictures embedded by ``encoder``, from the cache where it was done before (second value: True).

    The cache is known by the encoder's ``weights``, whole ones, a digest of the shards, and ``identity``, what else the
    embeddings depend on. All processes share the work; the first one of each machine writes, all read. ``UserError``
    on all where it cannot be written.
    """
    folder = Path(dataset.index.cache_dir or default_cache_dir()) / "features"
    shards = shards_digest(accelerator, dataset.index, num_samples)
    name = fingerprint(weights, identity | {"num_samples": num_samples, "shards": shards})
    tensors, texts = folder / f"{name}.safetensors", folder / f"{name}.json"
    # The machines may have caches of their own: it is used where all have it.
    known = all(gather_objects(accelerator, tensors.exists() and texts.exists()))
    if not known:

        def check() -> None:
            with refused_if_unwritable(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder / f"{name}.check", lambda path: None)
                (folder / f"{name}.check").unlink()

        # Before the work: what cannot be kept is not computed.
        everywhere(accelerator, check if accelerator.is_local_main_process else lambda: None)
        embeds, samples = compute_features(
            accelerator,
            dataset,
            encoder,
            num_samples=num_samples,
            batch_size=batch_size,
            num_workers=num_workers,
            on_batch=on_batch,
        )

        def write() -> None:
            with refused_if_unwritable(folder):
                _write(tensors, lambda path: save_file({"embeds": embeds}, path))
                _write(texts, lambda path: Path(path).write_text(json.dumps(samples), encoding="utf-8"))

        everywhere(accelerator, write if accelerator.is_local_main_process else lambda: None)
    embeds = load_file(tensors)["embeds"]
    return FeatureDataset(dataset, embeds, json.loads(texts.read_text(encoding="utf-8"))), known


@contextmanager
def refused_if_unwritable(folder: Path) -> Iterator[None]:
    """``UserError`` in place of what a write raises."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--cache_dir: the embeddings cannot be kept in {folder} ({getattr(error, 'strerror', None) or error}); "
            "make room, name another folder, or --cache_features false"
        ) from None


@torch.no_grad()
def compute_features(
    accelerator: Accelerator,
    dataset: PreferenceDataset,
    encoder: nn.Module,
    *,
    num_samples: int,
    batch_size: int,
    num_workers: int,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """image_embeds (rows, D) float32 on the CPU of the first ``num_samples``, and those in order, on every process."""
    reading = SampleRows(dataset)
    loader = eval_loader(
        reading,
        num_samples=num_samples,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    no_images = dataset.no_images
    own: list[dict[str, Any]] = []
    for batch in loader:
        images = [row.image for sample in batch for row in sample.get("rows", ())]
        # A process that has run out goes on with a black image: a sharded encoder is called equally often by all.
        pixels = torch.stack(images) if images else no_images.new_zeros(1, *no_images.shape[1:])
        found_embeds = encoder(to_pixel_values(pixels, accelerator.device)).cpu()
        keys = [sample["key"] for sample in batch for _ in sample.get("rows", ())]
        refuse_non_finite_rows(found_embeds[: len(keys)].norm(dim=1, keepdim=True), keys, "embeddings")
        embeds = iter(found_embeds)
        for sample in batch:
            found: dict[str, Any] = {"position": sample["position"], "key": sample["key"]}
            if "rows" in sample:
                found["rows"] = [[row.chosen, row.rejected, row.candidates, row.reg] for row in sample["rows"]]
                found["notices"] = [dataclasses.astuple(record) for record in sample["skipped"]]
                found["embeds"] = torch.stack([next(embeds) for _ in sample["rows"]]).numpy()
            else:
                record = sample["skipped"][0]
                found["skipped"] = [record.kind, record.where, record.detail]
            own.append(found)
        if on_batch is not None:
            on_batch(min(num_samples, len(own) * accelerator.num_processes))
    merged = sorted(
        (sample for part in gather_objects(accelerator, own) for sample in part), key=lambda sample: sample["position"]
    )
    first, parts = 0, []
    for sample in merged:
        del sample["position"]
        if "rows" in sample:
            parts.append(torch.from_numpy(sample.pop("embeds")))
            sample["first"] = first
            first += len(sample["rows"])
    return torch.cat(parts) if parts else torch.empty(0, 1), merged


class SampleRows(PreferenceDataset):
    """The samples of ``source`` in order, kept apart in a batch: a list of items."""

    def __init__(self, source: PreferenceDataset) -> None:
        super().__init__(source.index, source.transform, order="sequential", seed=source.seed)
        self.source = source

    @property
    def collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]:
        return list

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        return self.source.load(reader, shard, sample, epoch)


def fingerprint(weights: dict[str, Tensor], identity: dict[str, Any]) -> str:
    """A name that changes with any weight and ``identity``."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        if not tensor.numel():
            raise RuntimeError(f"{name} is partitioned: its weights are not known here")
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps(identity, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _write(path: Path, write: Callable[[str], Any]) -> None:
    """Whole or not at all, also where two runs write the same."""
    descriptor, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(descriptor)
    write(aside)
    os.replace(aside, path)
