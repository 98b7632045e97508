"""Labelled sets: shards with the names of their classes and the templates of prompts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from utils.data.digests import shards_digest, text_digest
from utils.data.shards import ShardIndex, index_shards
from utils.data.sources import default_cache_dir, expand_shards, is_remote, read_text, sibling
from utils.errors import UserError
from utils.processes.progress import RunProgress
from utils.redaction import display_url
from utils.sets.class_names import composed, describe_twins, twins
from utils.text_files import holds_controls, text_lines

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATES = ["a photo of a {c}."]
IMAGENET = "imagenet"  # --classnames imagenet
LONGEST_NAME = 1000  # characters; CLIP reads the first 77 tokens
PROMPTS = Path(__file__).parents[1] / "prompts"


def read_classnames(path: str | Path, cache_dir: str | None = None) -> list[str]:
    """One class name per line, the line number is the class. Raises ``UserError`` for an absent, empty or odd file.

    A name has at most ``LONGEST_NAME`` characters and no control characters, and is given in NFC. A line ends where
    ``text_lines`` says: U+2028 and the like are letters of a name. Spaces around a name and empty lines at the end are no part
    of it.
    """
    text = read_text(str(path), cache_dir or default_cache_dir())
    path = display_url(str(path))
    if text is None:
        raise UserError(f"{path}: no such file; expected class names, one per line, line number = class")
    names = [composed(line.strip()) for line in text_lines(text, str(path))]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{path}: holds no class names; expected one per line")
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty; expected a class name on every line")
    for number, name in enumerate(names, 1):
        if len(name) > LONGEST_NAME or holds_controls(name):
            raise UserError(
                f"{path}: line {number} is no class name: too long, or with control characters: {name[:40]!r}"
            )
    return names


def read_templates(path: str | Path | None, cache_dir: str | None = None) -> list[str]:
    """Prompt templates, one per line, ``{c}`` for the class name; CLIP's simplest one where the file is absent."""
    text = None if path is None else read_text(str(path), cache_dir or default_cache_dir())
    where = display_url(str(path))
    templates = [line.strip() for line in text_lines(text or "", where) if line.strip()]
    for template in templates:
        if "{c}" not in template or len(template) > LONGEST_NAME:
            raise UserError(
                f"{where}: template {template[:100]!r} is too long or has no {{c}}, the place of the class name"
            )
        if holds_controls(template.replace("\t", " ")):
            raise UserError(f"{where}: template {template[:100]!r} holds control characters; take them out")
    return templates or list(DEFAULT_TEMPLATES)


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """CLIP's names of ImageNet's 1000 classes, in class order, and its 80 templates.

    "missile" and "sunglasses" each name two classes, as in the source, of which one can never be told from the other.
    Source: OpenAI's CLIP, MIT License, see utils/prompts/LICENCE.md.
    """
    prompts = json.loads((PROMPTS / "imagenet.json").read_text(encoding="utf-8"))
    return prompts["classnames"], prompts["templates"]


def imagenet_wordnet_ids() -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes, such as n01440764, in class order: the folders of the official files."""
    return (PROMPTS / "imagenet_wordnet_ids.txt").read_text(encoding="utf-8").split()


def interpretability_templates() -> list[str]:
    """150 everyday captions with ``{c}`` for the class name: the texts of the measure of interpretability."""
    return text_lines((PROMPTS / "interpretability_templates.txt").read_text(encoding="utf-8"))


def find_classes(
    shards: Sequence[str], classnames: str | None, flag: str, cache_dir: str | None = None
) -> tuple[list[str], list[str]]:
    """Class names and templates of a set: ``classnames`` if given, else the file beside its shards or one folder up.

    ``classnames`` "imagenet" stands for ``imagenet_prompts()``, where there is no file of this name. UserError where shards of
    several folders have lists that differ: a label has one meaning.
    """
    if classnames == IMAGENET and not os.path.isfile(classnames):
        return imagenet_prompts()
    path = classnames or _list_of(shards[0], cache_dir)
    if path is None:
        raise UserError(
            f"{flag}: no classnames.txt beside {display_url(shards[0])} or one folder up; put one there (one name per "
            "line, line number = class) or name one with --classnames (--classnames imagenet: CLIP's names of ImageNet)"
        )
    names = read_classnames(path, cache_dir)
    if not classnames:
        one_of_folder = {sibling(shard, "classnames.txt"): shard for shard in reversed(shards)}
        for other in dict.fromkeys(_list_of(shard, cache_dir) for shard in one_of_folder.values()):
            if other not in (path, None) and read_classnames(other, cache_dir) != names:
                raise UserError(
                    f"{flag}: {display_url(path)} and {display_url(other)} are not the same, so that one label would name two "
                    "classes; give sets with equal lists, or one list for all with --classnames"
                )
    return names, read_templates(sibling(path, "zeroshot_classification_templates.txt"), cache_dir)


def _list_of(shard: str, cache_dir: str | None) -> str | None:
    """The classnames.txt beside a shard, else one folder up, else None."""
    place = shard if is_remote(shard) else os.path.abspath(shard)
    for path in (sibling(place, "classnames.txt"), sibling(place.rpartition("/")[0], "classnames.txt")):
        if path and read_text(path, cache_dir or default_cache_dir()) is not None:
            return path
    return None


def warn_of_twins(names: Sequence[str], where: str) -> None:
    """Says where classes have one name, or names that differ in case, spaces or underscores alone: ImageNet has four such."""
    if groups := twins(names):
        logger.warning(
            "%s: %s have one name for a text tower, which can never tell them apart; rename one, unless figures of others "
            "with these names are compared",
            where,
            describe_twins(names, groups),
        )


@dataclass
class LabelledSet:
    """Shards and, where they are labelled, their class names and prompt templates."""

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
    """Finds and counts the shards that a flag names, and reads their class names. Raises ``UserError``."""
    urls = expand_shards(patterns, flag=flag, allow_pipe_urls=allow_pipe_urls, cache_dir=cache_dir)
    names, templates = find_classes(urls, classnames, flag, cache_dir) if with_classes else ([], [])
    warn_of_twins(names, f"{flag} {display_url(patterns[0])}")
    with RunProgress(f"counting {flag}", len(urls), transient=True) as progress:
        index = index_shards(
            urls,
            cache_dir=cache_dir,
            progress=lambda done, _: progress.update(done),
            cache_limit_gb=cache_limit_gb,
            flag=flag,
        )
    return LabelledSet(index, names, templates)


def set_digest(accelerator: Accelerator, data: LabelledSet, num_samples: int) -> str:
    """A digest of what an evaluation reads: the shards of the first ``num_samples``, class names and templates."""
    shards = shards_digest(accelerator, data.index, num_samples)
    return text_digest([shards, *data.classnames, "", *data.templates])
