"""Image embeddings that are computed once and kept.

Of a preference data set, so that training a head takes seconds; of labelled images, from which a probe or k-NN learns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from utils.data.digests import shards_digest
from utils.data.shards import ShardReader, eval_loader
from utils.data.skipped import BadSample, Skipped
from utils.data.sources import default_cache_dir
from utils.errors import UserError
from utils.models.zeroshot import refuse_non_finite_rows, to_pixel_values
from utils.processes.distributed import gather_objects, on_every_node
from utils.redaction import printable
from utils.sets.pairs import PreferenceDataset, Row
from utils.whole_files import write_whole

logger = logging.getLogger(__name__)


class FeatureDataset(PreferenceDataset):
    """``source`` with image embeddings (D,) from ``compute_features`` in place of pictures."""

    def __init__(self, source: PreferenceDataset, embeds: Tensor, samples: list[dict[str, Any]]) -> None:
        super().__init__(source.index, source.transform, order=source.order, seed=source.seed)
        self.texts, self.embeds, self.samples = source.texts, embeds, samples
        self._starts = [0, *accumulate(source.index.sizes)]  # first sample of each shard
        self._firsts = [0, *accumulate(len(sample.get("rows", ())) for sample in samples)]  # first row of each sample

    @property
    def no_images(self) -> Tensor:
        return self.embeds[:0]

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        position = self._starts[shard] + sample
        found = self.samples[position]
        if "skipped" in found:
            raise BadSample(*found["skipped"])
        reader.notices += [Skipped(*notice) for notice in found["notices"]]
        rows = [Row(self.embeds[row], *texts) for row, texts in enumerate(found["rows"], self._firsts[position])]
        return {"key": found["key"], "rows": rows}


def features(
    accelerator: Accelerator,
    dataset: PreferenceDataset,
    encoder: nn.Module,
    *,
    weights: dict[str, Tensor],
    identity: dict[str, Any],
    num_samples: int,
    **reading: Any,
) -> tuple[FeatureDataset, bool]:
    """The first ``num_samples`` with embedded pictures, and whether they were cached.

    The cache key is the encoder's whole ``weights``, a digest of the shards, and ``identity``: everything else that the
    embeddings depend on. ``reading`` goes to ``compute_features``. The first process of each machine writes, all read.
    """
    folder = Path(dataset.index.cache_dir or default_cache_dir()) / "features"
    shards = shards_digest(accelerator, dataset.index, num_samples)
    name = fingerprint(weights, identity | {"num_samples": num_samples, "shards": shards})
    tensors, texts = folder / f"{name}.safetensors", folder / f"{name}.json"
    # Each machine may have its own cache: it is used only if all of them have the embeddings.
    known = all(gather_objects(accelerator, tensors.exists() and texts.exists()))
    if not known:
        on_every_node(accelerator, lambda: _keep(folder, {}))  # first: fail early if the cache cannot be written
        embeds, samples = compute_features(accelerator, dataset, encoder, num_samples=num_samples, **reading)
        files: dict[str, Callable[[Path], Any]] = {
            tensors.name: lambda path: save_file({"embeds": embeds}, path),
            texts.name: lambda path: path.write_text(json.dumps(samples), encoding="utf-8"),
        }
        on_every_node(accelerator, lambda: _keep(folder, files))
    embeds = load_file(tensors)["embeds"]
    return FeatureDataset(dataset, embeds, json.loads(texts.read_text(encoding="utf-8"))), known


def _keep(folder: Path, files: dict[str, Callable[[Path], Any]]) -> None:
    """Writes each file of ``folder`` whole or not at all, even if two runs write it. Raises ``UserError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as aside:
            for name, write in files.items():
                write(Path(aside, name))
                os.replace(Path(aside, name), folder / name)
    except (OSError, SafetensorError) as error:
        what = f"the embeddings cannot be kept in {folder} ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"--cache_dir: {what}; make room, name another folder, or --cache_features false") from None


@torch.no_grad()
def compute_features(
    accelerator: Accelerator,
    dataset: PreferenceDataset,
    encoder: nn.Module,
    *,
    num_samples: int,
    on_batch: Callable[[int], None],
    **loading: Any,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """image_embeds (rows, D) float32 on the CPU for the first ``num_samples``, and these samples, on every process.

    A sample is its key with its rows and notices, or with the reason why it is skipped. ``on_batch`` is called with the
    number of finished samples; ``loading`` goes to ``eval_loader``.
    """
    loader = eval_loader(
        SampleRows(dataset),
        num_samples=num_samples,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        **loading,
    )
    # (position, sample, embeddings of its rows). NumPy arrays: pickling a slice of a tensor sends the whole tensor.
    own: list[tuple[int, dict[str, Any], np.ndarray]] = []
    for batch in loader:
        rows_of = [sample.get("rows", []) for sample in batch]
        images = [row.image for rows in rows_of for row in rows]
        # A process without images encodes a black one: all processes must call a sharded encoder equally often.
        pixels = torch.stack(images) if images else dataset.no_images.new_zeros(1, *dataset.no_images.shape[1:])
        embeds = encoder(to_pixel_values(pixels, accelerator.device)).cpu()[: len(images)]
        keys = [sample["key"] for sample, rows in zip(batch, rows_of) for _ in rows]
        refuse_non_finite_rows(embeds.norm(dim=1, keepdim=True), keys, "embeddings")
        for sample, part in zip(batch, embeds.split([len(rows) for rows in rows_of])):
            records, found = [dataclasses.astuple(record) for record in sample["skipped"]], {"key": sample["key"]}
            if "rows" in sample:
                found["rows"] = [[row.chosen, row.rejected, row.candidates, row.reg] for row in sample["rows"]]
                found["notices"] = records
            else:
                found["skipped"] = records[0][:3]
            own.append((sample["position"], found, part.numpy()))
        on_batch(min(num_samples, len(own) * accelerator.num_processes))
    gathered = sorted((each for part in gather_objects(accelerator, own) for each in part), key=lambda each: each[0])
    parts = [torch.from_numpy(part) for _, _, part in gathered if len(part)]
    return torch.cat(parts) if parts else torch.empty(0, 1), [found for _, found, _ in gathered]


class SampleRows(PreferenceDataset):
    """The samples of ``source`` in order; a batch is a list of samples."""

    def __init__(self, source: PreferenceDataset) -> None:
        super().__init__(source.index, source.transform, order="sequential", seed=source.seed)
        self.source = source

    @property
    def collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]:
        return list

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        return self.source.load(reader, shard, sample, epoch)


def fingerprint(weights: dict[str, Tensor], identity: dict[str, Any]) -> str:
    """A digest of all weights and of ``identity``. Raises RuntimeError for weights that are not whole."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        if not tensor.numel():
            raise RuntimeError(f"{name} is partitioned: its weights are not known here")
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps(identity, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def write_features(path: Path, embeds: Tensor, labels: Tensor, identity: str) -> None:
    """Writes embeddings (N, D) and labels (N,), whole or not at all. ``identity`` is all that they depend on."""
    tensors = {"features": embeds.float().contiguous(), "labels": labels.long().contiguous()}
    again = "mend that, then give the same command again"
    write_whole(path, save(tensors, {"identity": identity}), again)


def read_features(path: Path, identity: str, embed_dim: int) -> tuple[Tensor, Tensor] | None:
    """What ``write_features`` wrote, (N, D) float32 and (N,) int64; None if no such file is there, or one of others."""
    if not path.exists():
        return None
    try:
        # By the descriptor: safetensors opens only paths in UTF-8, but an output directory may have any name.
        with path.open("rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            if (file.metadata() or {}).get("identity") != identity:
                raise ValueError("of another model, set or transform")
            features, labels = file.get_tensor("features"), file.get_tensor("labels")
        if features.dtype != torch.float32 or labels.dtype != torch.int64:
            raise ValueError(f"of {features.dtype} with labels of {labels.dtype}")
        if features.shape != (len(labels), embed_dim):
            raise ValueError(f"{tuple(features.shape)} and {len(labels)} labels, expected dimension {embed_dim}")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        fault = f"{path}: kept features that cannot be used ({str(error)[:160]})"
        logger.warning("%s; the images are embedded again", printable(fault))
        return None
    return features, labels
