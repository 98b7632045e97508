"""Labelled images whose .json member names an attribute, such as {"attribute": "woman"}: what fairness is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, ShardIndex, ShardReader, collate
from utils.data.skipped import BadSample
from utils.sets.class_names import composed
from utils.text_files import parse_json

LONGEST_NAME = 200  # characters


class AttributeDataset(ShardDataset):
    """Items and batches of ``ShardDataset`` in order, with ``attribute``: str, in a batch ``attributes``: list[str].

    In NFC, with single spaces: two ways to write a word are one group.
    """

    def __init__(self, index: ShardIndex, transform: ImageTransform, *, num_classes: int) -> None:
        super().__init__(index, transform, order="sequential", with_labels=True, num_classes=num_classes)
        self._extensions = (*self._extensions, "json")

    @property
    def collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
        return partial(collate_attributes, image_size=self.transform.output_size)

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        key, members = reader.read(shard, sample, ("json",))
        where = self._where(shard, key)
        if "json" not in members:
            raise BadSample("missing attribute", where, f'{members.lacking("json")}; expected {{"attribute": "..."}}')
        try:
            attribute = parse_json(members["json"])["attribute"]
        except (ValueError, KeyError, TypeError):
            raise BadSample("bad attribute", where, 'expected {"attribute": "..."} in the .json member') from None
        if not isinstance(attribute, str) or not attribute.strip():
            found = "empty" if isinstance(attribute, str) else f"a {type(attribute).__name__}"
            raise BadSample("bad attribute", where, f"attribute is {found}, not a text")
        if len(attribute) > LONGEST_NAME or not attribute.isprintable():  # it names a group in tables
            raise BadSample("bad attribute", where, f"attribute {attribute[:100]!r} is no name")
        return super().load(reader, shard, sample, epoch) | {"attribute": composed(" ".join(attribute.split()))}


def collate_attributes(samples: Sequence[dict[str, Any]], *, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """``utils.data.shards.collate`` and the attributes of the good samples."""
    attributes = [sample["attribute"] for sample in samples if sample["image"] is not None]
    return collate(samples, image_size=image_size) | {"attributes": attributes}
