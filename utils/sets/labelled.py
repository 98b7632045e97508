"""Labelled sets: shards of images with class names, prompt templates and, for fairness, attributes."""

from __future__ import annotations

import itertools
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from utils.data.digests import shards_digest, text_digest
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, ShardIndex, ShardReader, index_shards, read_label
from utils.data.skipped import BadSample
from utils.data.sources import expand_shards, is_remote, read_text, sibling
from utils.errors import UserError
from utils.redaction import display_url
from utils.text_files import holds_controls, parse_json, text_lines

logger = logging.getLogger(__name__)

IMAGENET = "imagenet"  # --classnames imagenet
LONGEST_NAME, LONGEST_ATTRIBUTE = 1000, 200  # characters; CLIP reads the first 77 tokens
PROMPTS = Path(__file__).parents[1] / "prompts"


def composed(name: str) -> str:
    """The name in NFC: ``é`` is one character, not two (NFD, as in file names of macOS)."""
    return unicodedata.normalize("NFC", name)


def fold(name: str) -> str:
    """The folded name, without case, extra spaces, underscores and invisible characters; equal for the same word."""
    visible = "".join(letter for letter in name.replace("_", " ") if unicodedata.category(letter) != "Cf")
    return composed(composed(" ".join(visible.split())).casefold())


def twins(names: Sequence[str]) -> list[list[int]]:
    """The places of names that fold to the same word, one list per word: ImageNet has two sunglasses."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(fold(name), []).append(place)
    return [group for group in places.values() if len(group) > 1]


def warn_of_twins(names: Sequence[str], where: str) -> None:
    """Warns of classes whose names are the same word, such as "classes 657 'missile' and 744 'missile'"."""
    groups = twins(names)
    if groups:
        shown = "; ".join(" and ".join(f"{place} {names[place]!r}" for place in group[:4]) for group in groups[:3])
        more = f", and {len(groups) - 3} more" if len(groups) > 3 else ""
        why = "no text tower can tell them apart; rename one, unless you compare with published figures"
        logger.warning("%s: classes %s%s have one name: %s", where, shown, more, why)


def same_classes(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """The place of each name in ``wanted``; None if the lists are equal. ValueError says why they do not match."""
    if list(names) == list(wanted):
        return None
    for name, count in (Counter(names) | Counter(wanted)).items():
        if count > 1:
            raise ValueError(f"{name!r} names two classes")
    places = {name: place for place, name in enumerate(wanted)}
    for name in names:
        if name not in places:
            raise ValueError(f"{name!r} is in one list alone")
    return [places[name] for name in names]


def _lines(path: str | Path | None, cache_dir: str | None) -> list[str] | None:
    """The lines of a text file without outer spaces; None if there is no such file."""
    text = None if path is None else read_text(str(path), cache_dir)
    return None if text is None else [line.strip() for line in text_lines(text, display_url(str(path)))]


def read_classnames(path: str | Path, cache_dir: str | None = None) -> list[str]:
    """Reads one class name per line, in NFC; line number = class. Outer spaces and empty last lines are ignored."""
    lines, where = _lines(path, cache_dir), display_url(str(path))
    if lines is None:
        raise UserError(f"{where}: no such file; expected class names, one per line, line number = class")
    names = list(map(composed, lines))
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{where}: holds no class names; expected one per line")
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{where}: line {number} is empty; expected a class name on every line")
        if len(name) > LONGEST_NAME or holds_controls(name):
            odd = "too long, or with control characters"
            raise UserError(f"{where}: line {number} is no class name: {odd}: {name[:40]!r}")
    return names


def read_templates(path: str | Path | None, cache_dir: str | None = None) -> list[str]:
    """Reads prompt templates, one per line, ``{c}`` for the class name; without a file, CLIP's simplest template."""
    templates = list(filter(None, _lines(path, cache_dir) or []))
    for template in templates:
        if "{c}" not in template or len(template) > LONGEST_NAME or holds_controls(template.replace("\t", " ")):
            odd = "has no {c}, the place of the class name, is too long or holds control characters"
            raise UserError(f"{display_url(str(path))}: template {template[:100]!r} {odd}; correct it")
    return templates or ["a photo of a {c}."]


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """CLIP's names of ImageNet's 1000 classes, in class order, and its 80 templates (utils/prompts/LICENCE.md)."""
    prompts = json.loads((PROMPTS / "imagenet.json").read_text(encoding="utf-8"))
    return prompts["classnames"], prompts["templates"]


def interpretability_templates() -> list[str]:
    """150 everyday captions with ``{c}`` for the class name, for the interpretability measure."""
    return text_lines((PROMPTS / "interpretability_templates.txt").read_text(encoding="utf-8"))


def find_classes(
    shards: Sequence[str], classnames: str | None, flag: str, cache_dir: str | None = None
) -> tuple[list[str], list[str]]:
    """Class names and templates of a set, from ``classnames``, else from the file beside the shards or one folder up.

    A label must have one meaning: UserError if shards of several folders have different lists.
    """
    if classnames == IMAGENET and not os.path.isfile(classnames):
        return imagenet_prompts()
    one_of_folder = {sibling(shard, "classnames.txt"): shard for shard in shards}
    lists = [classnames] if classnames else [_list_of(shard, cache_dir) for shard in one_of_folder.values()]
    path = lists[0]
    if path is None:
        todo = "write one name per line, or name one with --classnames (--classnames imagenet: CLIP's names)"
        raise UserError(f"{flag}: no classnames.txt beside {display_url(shards[0])} or one folder up; {todo}")
    names = read_classnames(path, cache_dir)
    for other in dict.fromkeys(lists[1:]):
        if other not in (path, None) and read_classnames(other, cache_dir) != names:
            both = f"{display_url(path)} and {display_url(other)}"
            raise UserError(f"{flag}: {both} are not the same; give equal ones, or one for all with --classnames")
    return names, read_templates(sibling(path, "zeroshot_classification_templates.txt"), cache_dir)


def _list_of(shard: str, cache_dir: str | None) -> str | None:
    """The classnames.txt beside a shard, else one folder up, else None."""
    place = shard if is_remote(shard) else os.path.abspath(shard)
    paths = (sibling(place, "classnames.txt"), sibling(place.rpartition("/")[0], "classnames.txt"))
    return next((path for path in paths if path and read_text(path, cache_dir) is not None), None)


@dataclass
class LabelledSet:
    """Shards with their class names and prompt templates; both lists are empty if the shards have no labels."""

    index: ShardIndex
    classnames: list[str]
    templates: list[str]


def open_set(
    patterns: Sequence[str],
    *,
    flag: str,
    with_classes: bool,
    classnames: str | None = None,
    cache_dir: str | None = None,
    cache_limit_gb: float | None = None,
    allow_pipe_urls: bool = False,
) -> LabelledSet:
    """Finds the shards given by a flag, counts their samples and reads their class names. Raises ``UserError``."""
    urls = expand_shards(patterns, flag=flag, allow_pipe_urls=allow_pipe_urls, cache_dir=cache_dir)
    names, templates = find_classes(urls, classnames, flag, cache_dir) if with_classes else ([], [])
    warn_of_twins(names, f"{flag} {display_url(patterns[0])}")
    index = index_shards(urls, cache_dir=cache_dir, cache_limit_gb=cache_limit_gb, flag=flag)
    return LabelledSet(index, names, templates)


def classes_without_samples(data: LabelledSet, num_samples: int) -> list[str]:
    """The names of the classes that none of the first ``num_samples`` has. Reads labels alone, until all are found."""
    missing = dict(enumerate(data.classnames))
    places = ((shard, sample) for shard, size in enumerate(data.index.sizes) for sample in range(size))
    with closing(ShardReader(data.index)) as reader:
        for shard, sample in itertools.islice(places, num_samples):
            if not missing:
                break
            with suppress(BadSample):  # it is reported when the set is read
                _, members = reader.read(shard, sample, ("cls",))
                missing.pop(read_label(members, len(data.classnames)), None)
    return list(missing.values())


def set_digest(accelerator: Accelerator, data: LabelledSet, num_samples: int) -> str:
    """A digest of an evaluation's inputs: the shards of the first ``num_samples``, class names and templates."""
    shards = shards_digest(accelerator, data.index, num_samples)
    return text_digest([shards, *data.classnames, "", *data.templates])


class AttributeDataset(ShardDataset):
    """Labelled images with ``attribute`` from the .json {"attribute": "woman"}; a batch has ``attributes``."""

    def __init__(self, index: ShardIndex, transform: ImageTransform, *, num_classes: int) -> None:
        super().__init__(index, transform, order="sequential", with_labels=True, num_classes=num_classes)

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        _, members = reader.read(shard, sample, ("json",))
        expected = 'expected {"attribute": "..."} in the .json member'
        if "json" not in members:
            raise BadSample("missing attribute", members.where, f"{members.lacking('json')}; {expected}")
        try:
            attribute = parse_json(members["json"])["attribute"]
        except (ValueError, KeyError, TypeError):
            attribute = None
        named = isinstance(attribute, str) and attribute.strip() and attribute.isprintable()
        if not named or len(attribute) > LONGEST_ATTRIBUTE:
            detail = f"attribute {repr(attribute)[:100]} cannot name a group; {expected}"
            raise BadSample("bad attribute", members.where, detail)
        # Words that differ only in Unicode form or in spaces are one group.
        return super().load(reader, shard, sample, epoch) | {"attribute": composed(" ".join(attribute.split()))}
