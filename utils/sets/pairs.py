"""Preference data: images with a preferred and a dispreferred text, and clean images on which nothing shall change.

Both tasks of train_po.py become *rows*: a picture with a chosen text, rejected texts and candidates, or (``reg``) a picture
for the regulariser. The typographic task makes them from a labelled set: the clean image is the regulariser's, each
copy with a wrong word on it is a preference. General pairs come with a ``.json`` member

    {"chosen": str, "rejected": [str, ...], "candidates": optional [str, ...], "reg": optional bool}

or a sample name ``label=X_text=Y``. Where ``reg`` is true, ``candidates`` are needed, and ``chosen``, the right one among them,
only serves evaluation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.data.folders import LeftOut, describe, entries_of, is_picture, kind_of, leave
from utils.data.images import MAX_IMAGE_BYTES, ImageError, ImageTransform, as_shard_member
from utils.data.shards import IMAGE_EXTENSIONS, ShardDataset, ShardIndex, ShardReader
from utils.data.skipped import BadSample, Skipped
from utils.data.sources import default_cache_dir, known_path
from utils.errors import UserError
from utils.sets.class_names import composed, fold
from utils.sets.typographic import Draws, WordStyle, merge_names, write_word, wrong_words
from utils.text_files import parse_json

logger = logging.getLogger(__name__)

# A batch holds a row of marks over all its texts for each of its pictures.
MOST_TEXTS, LONGEST_TEXT = 10_000, 10_000  # of a pair, characters
NAMED_PAIR = re.compile(r"label=(?P<label>.+?)_text=(?P<text>.+)")
NAME_TEMPLATE = "a photo of a {c}."  # the texts of label=X_text=Y


@dataclass
class Row:
    """One picture and its texts. ``candidates`` None: all texts of the task."""

    image: Tensor  # uint8 (3, H, W), or image_embeds float32 (D,)
    chosen: str | None
    rejected: list[str] = field(default_factory=list)
    candidates: list[str] | None = None
    reg: bool = False


class PreferenceDataset(ShardDataset):
    """Samples as ``rows``, for the loaders of ``utils/data/shards.py``. ``texts`` are those of the whole task where it has such."""

    texts: list[str] | None = None

    @property
    def no_images(self) -> Tensor:
        """The images of a batch without rows, of the shape and dtype of others."""
        return torch.empty(0, 3, *(self.transform.output_size or (0, 0)), dtype=torch.uint8)

    @property
    def collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], Any]:
        return partial(collate_rows, texts=self.texts, no_images=self.no_images)


class TypographicDataset(PreferenceDataset):
    """A labelled set, each image clean and with ``attacks_per_image`` (0 for none) wrong class names written on copies.

    The same (seed, epoch, key) always gives the same attack; ``fixed_epoch`` gives every epoch the attacks of one. Classes
    whose names are equal after folding (``class_names.fold``) are one. UserError where fewer than two are left.
    """

    texts: list[str]

    def __init__(
        self,
        index: ShardIndex,
        transform: ImageTransform,
        *,
        order: str,
        classnames: Sequence[str],
        style: WordStyle,
        attacks_per_image: int = 1,
        seed: int = 0,
        fixed_epoch: int | None = None,
        flag: str = "--train_shards",
    ) -> None:
        super().__init__(
            index, transform, order=order, seed=seed, with_labels=True, num_classes=len(classnames)
        )  # fmt: skip
        self.texts, self.word_of_class = merge_names(classnames)
        self.style, self.attacks_per_image, self.fixed_epoch = style, attacks_per_image, fixed_epoch
        if len(self.texts) < 2:
            raise UserError(
                f"{flag}: one class only ({self.texts[0]}); a wrong word takes at least two classes of different names"
            )
        if attacks_per_image >= len(self.texts):
            raise UserError(
                f"--attacks_per_image {attacks_per_image}: {len(self.texts)} class names leave {len(self.texts) - 1} "
                "wrong words for an image; lower it"
            )

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        item = super().load(reader, shard, sample, epoch)
        word = self.word_of_class[item["label"]]
        draws = Draws(self.seed, epoch if self.fixed_epoch is None else self.fixed_epoch, item["key"])
        rows = [Row(item["image"], self.texts[word], reg=True)]
        for wrong in wrong_words(word, len(self.texts), self.attacks_per_image, draws):
            attacked = write_word(item["image"], self.texts[wrong], self.style, draws)
            rows.append(Row(attacked, self.texts[word], [self.texts[wrong]]))
        return {"key": item["key"], "rows": rows}


class PairDataset(PreferenceDataset):
    """General preference data: each sample is one row."""

    def __init__(self, index: ShardIndex, transform: ImageTransform, *, order: str, seed: int = 0) -> None:
        super().__init__(index, transform, order=order, seed=seed)
        self._extensions = (*IMAGE_EXTENSIONS, "json")

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        key, members = reader.read(shard, sample, self._extensions)
        where = self._where(shard, key)
        lacking = "" if "json" in members else members.lacking("json")
        row, dropped = parse_pair(members.get("json"), key, where, lacking)
        if dropped:
            detail = f"{dropped} of the rejected texts equal the chosen one and are left out"
            reader.notices.append(Skipped("chosen among rejected", where, detail, samples=0))
        row.image = self._image(members, where)
        return {"key": key, "rows": [row]}


def parse_pair(text: bytes | None, key: str, where: str, lacking: str = "no .json member") -> tuple[Row, int]:
    """A sample's texts as a row without its picture, and how many rejected texts equal to the chosen one were dropped.

    Raises ``BadSample``: what is there cannot be a preference. ``lacking``: the words for no text.
    """
    if text is None:
        named = NAMED_PAIR.fullmatch(key.rsplit("/", 1)[-1])
        if named is None:
            raise BadSample("missing pair", where, f"{lacking}, and it is not named label=X_text=Y")
        label, written = (
            NAME_TEMPLATE.replace("{c}", " ".join(composed(named[part]).replace("_", " ").split()))
            for part in ("label", "text")
        )
        fields: Any = {"chosen": label, "rejected": [written]}
    else:
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise BadSample("bad pair", where, f"the .json cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise BadSample("bad pair", where, 'expected {"chosen": text, "rejected": [text, ...]}')
    chosen, rejected, candidates = (fields.get(name) for name in ("chosen", "rejected", "candidates"))
    reg = fields.get("reg", False)
    rejected = [rejected] if isinstance(rejected, str) else rejected or []
    for name, value in (("rejected", rejected), ("candidates", candidates)):
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise BadSample("bad pair", where, f"{name}: expected a list of texts")
        if value is not None and (len(value) > MOST_TEXTS or max(map(len, value), default=0) > LONGEST_TEXT):
            raise BadSample("bad pair", where, f"{name}: more than {MOST_TEXTS} texts, or one of more characters")
    if not isinstance(chosen, str | None) or not isinstance(reg, bool):
        raise BadSample("bad pair", where, "chosen: expected a text; reg: expected true or false")
    if len(chosen or "") > LONGEST_TEXT:
        raise BadSample("bad pair", where, f"chosen: more than {LONGEST_TEXT} characters")
    try:
        "".join([chosen or "", *rejected, *(candidates or [])]).encode()
    except UnicodeEncodeError:  # no tokenizer takes half a surrogate pair, or a file name that is not UTF-8
        raise BadSample("bad pair", where, "a text is not valid Unicode") from None
    # Two ways to write é are one text.
    chosen, rejected = chosen and composed(chosen), list(map(composed, rejected))
    candidates = None if candidates is None else list(map(composed, candidates))
    if candidates is not None and not candidates:
        raise BadSample("bad pair", where, "candidates: the list is empty; leave it out or name the texts")
    if reg and candidates is None:
        raise BadSample("bad pair", where, "reg without candidates: over which texts shall the model stay as it is?")
    if not reg and not (chosen and rejected):
        raise BadSample("bad pair", where, "needs a chosen and at least one rejected text, or reg with candidates")
    kept = [item for item in dict.fromkeys(rejected) if chosen is None or fold(item) != fold(chosen)]
    if not reg and not kept:
        raise BadSample("chosen equals rejected", where, repr(chosen))
    candidates = list(dict.fromkeys([chosen, *kept] if candidates is None else candidates))
    for name, item in (("chosen", chosen), *(("rejected", item) for item in kept if not reg)):
        if item is not None and item not in candidates:
            raise BadSample("bad pair", where, f"{name} {item!r} is not among the candidates")
    empty = torch.empty(0)
    return Row(empty, chosen, [] if reg else kept, candidates, reg), 0 if reg else len(set(rejected)) - len(kept)


def collate_rows(samples: Sequence[dict[str, Any]], *, texts: list[str] | None, no_images: Tensor) -> dict[str, Any]:
    """Samples -> one batch; the rows of the regulariser come first. R of N rows regularise, P express a preference.

    ``no_images``: the images of a batch without rows, of the shape and dtype of others.

    Returns:
        images: uint8 (N, 3, H, W), or image_embeds float32 (N, D). texts: the T texts of the batch.
        reg_chosen: (R,) int64, -1 where there is none; chosen (P,), rejected (P, most per row), filled up with -1.
        reg_candidates (R, T), candidates (P, T): bool, or None where every text is a candidate of every row.
        reg_positions, positions: of the rows' samples, int64; sample_positions, a list, of the samples; keys and skipped as in ``utils.data.shards.collate``.
    """
    rows = [(sample["position"], row) for sample in samples for row in sample.get("rows", ())]
    reg = [(position, row) for position, row in rows if row.reg]
    pairs = [(position, row) for position, row in rows if not row.reg]
    if texts is None:
        named = dict.fromkeys(text for _, row in rows for text in row.candidates)
        places = {text: place for place, text in enumerate(named)}
    else:
        places = {text: place for place, text in enumerate(texts)}
    most = max([len(row.rejected) for _, row in pairs], default=1)

    def candidates(part: list[tuple[int, Row]]) -> Tensor | None:
        if texts is not None:
            return None
        mask = torch.zeros(len(part), len(places), dtype=torch.bool)
        for line, (_, row) in zip(mask, part):
            line[[places[text] for text in row.candidates or ()]] = True
        return mask

    rejected = [[places[text] for text in row.rejected] for _, row in pairs]
    return {
        "images": torch.stack([row.image for _, row in (*reg, *pairs)]) if rows else no_images,
        "texts": list(places),
        "reg_chosen": torch.tensor([places.get(row.chosen, -1) for _, row in reg], dtype=torch.int64),
        "reg_candidates": candidates(reg),
        "reg_positions": torch.tensor([position for position, _ in reg], dtype=torch.int64),
        "chosen": torch.tensor([places[row.chosen] for _, row in pairs], dtype=torch.int64),
        "rejected": torch.tensor([line + [-1] * (most - len(line)) for line in rejected], dtype=torch.int64).view(
            -1, most
        ),
        "candidates": candidates(pairs),
        "positions": torch.tensor([position for position, _ in pairs], dtype=torch.int64),
        "num_samples": sum("rows" in sample for sample in samples),
        "keys": [sample["key"] for sample in samples if "rows" in sample],
        "sample_positions": [sample["position"] for sample in samples if "rows" in sample],
        "skipped": [record for sample in samples for record in sample["skipped"]],
    }


def pair_shards(patterns: Sequence[str], cache_dir: str | None) -> list[str]:
    """The patterns of --train_shards and the like, folders of named pictures replaced by a shard of them."""
    folders = [Path(known_path(pattern)) for pattern in patterns]
    packed = [pack_pair_folder(folder, cache_dir) if folder.is_dir() else None for folder in folders]
    return [shard or pattern for shard, pattern in zip(packed, patterns)]


@lru_cache
def say_once(text: str) -> None:
    """A warning; a folder is opened several times in a run."""
    logger.warning(text)


def pack_pair_folder(folder: Path, cache_dir: str | None) -> str | None:
    """A folder of pictures named ``label=X_text=Y.png`` as one shard in the cache; None where it holds no such pictures.

    The shard is made once and again whenever names, sizes or times of the pictures change. A broken picture stays what it
    is, a sample that is skipped and counted. What else lies in the folder is named in a warning.
    """
    left_out: LeftOut = {}
    pictures = []
    for entry in entries_of(folder):
        path = Path(entry.path)
        if kind_of(entry) == "file" and is_picture(entry.name) and NAMED_PAIR.fullmatch(path.stem):
            pictures.append(path)
        else:
            leave(left_out, entry, folder)
    if not pictures:
        if any(NAMED_PAIR.match(path) for paths in left_out.values() for path in paths):
            raise UserError(
                f"{folder}: files named label=X_text=Y, but none of a format that is read: {describe(left_out)}"
            )
        return None
    if left_out:
        say_once(f"{folder}: {len(pictures)} pictures named label=X_text=Y; not taken: {describe(left_out)}")
    import webdataset  # here alone: reading shards does not need it

    states = [(path.name, path.stat()) for path in pictures]
    # The 2: pictures of other formats are written anew. ctime too: a picture that is replaced may keep its size and its date.
    listing = [2, *((name, of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino) for name, of in states)]
    digest = hashlib.blake2b(json.dumps([str(folder.resolve()), listing]).encode(), digest_size=12).hexdigest()
    shard = Path(cache_dir or default_cache_dir()) / "pair_folders" / f"{folder.resolve().name}-{digest}.tar"
    if not shard.exists():
        aside, last_key = shard.with_suffix(f".{os.getpid()}.tmp"), None
        try:
            shard.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
                for number, path in enumerate(pictures):
                    # A dot in a name would end the sample's key; neighbours of one key (.jpg beside .png) would be one.
                    key = path.stem.replace(".", " ")
                    key = f"{number}/{key}" if key == last_key else key
                    with path.open("rb") as picture:  # one byte too many is one sample that is skipped
                        data = picture.read(MAX_IMAGE_BYTES + 1)
                    try:
                        extension, data = as_shard_member(data)
                    except ImageError:
                        extension = "png"
                    writer.write({"__key__": key, extension: data})
                    last_key = key
            os.replace(aside, shard)
        except OSError as error:
            raise UserError(
                f"{error.filename or shard}: {error.strerror}; the pictures of {folder} are packed into a shard in --cache_dir"
            ) from None
    return str(shard)
