"""Preference data: images with a chosen and a rejected text, and clean images on which the model should not change.

A sample becomes one or more *rows*. A row is a picture with a chosen text, rejected texts and candidates, or (``reg``)
a picture for the regulariser. In the typographic task a clean image is a row for the regulariser, and each copy with a
wrong word on it is a preference. General pairs come as a ``.json`` member or in a sample name ``label=X_text=Y``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.data.digests import files_state
from utils.data.folders import LeftOut, describe, leave, pictures
from utils.data.images import MAX_IMAGE_BYTES, ImageError, ImageTransform, as_shard_member
from utils.data.shards import ShardDataset, ShardIndex, ShardReader
from utils.data.skipped import BadSample, Skipped
from utils.data.sources import default_cache_dir, digest, known_path
from utils.errors import UserError
from utils.sets.labelled import composed, fold
from utils.sets.typographic import Draws, WordStyle, merge_names, write_word, wrong_words
from utils.text_files import parse_json
from utils.whole_files import whole_file

logger = logging.getLogger(__name__)

# Limits on the texts of a pair and on their characters: a batch holds a mask of (pictures, all its texts).
MOST_TEXTS, LONGEST_TEXT = 10_000, 10_000
NAMED_PAIR = re.compile(r"label=(.+?)_text=(.+)")
PAIR_FORM = '{"chosen": text, "rejected": [text, ...], "candidates": [text, ...], "reg": true or false}'

say_once = lru_cache(logger.warning)  # because a folder is opened several times in a run


@dataclass
class Row:
    """One picture and its texts. If ``candidates`` is None, all texts of the task are candidates."""

    image: Tensor  # uint8 (3, H, W), or image_embeds float32 (D,)
    chosen: str | None
    rejected: list[str] = field(default_factory=list)
    candidates: list[str] | None = None
    reg: bool = False


class PreferenceDataset(ShardDataset):
    """Samples as ``rows``. ``texts``: all texts of the task, or None if each row has its own candidates."""

    texts: list[str] | None = None

    @property
    def collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], Any]:
        return partial(collate_rows, texts=self.texts, no_images=self.no_images)


class TypographicDataset(PreferenceDataset):
    """A labelled set: each image clean, and ``attacks_per_image`` copies with a wrong class name written on them.

    An attack depends only on (seed, epoch, key); with ``fixed_epoch`` every epoch gets the attacks of that epoch.
    Classes with the same folded name share one text. UserError if there are too few texts.
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
        super().__init__(index, transform, order=order, seed=seed, with_labels=True, num_classes=len(classnames))
        self.texts, self.word_of_class = merge_names(classnames)
        self.style, self.attacks_per_image, self.fixed_epoch = style, attacks_per_image, fixed_epoch
        if len(self.texts) < 2:
            raise UserError(f"{flag}: one class only ({self.texts[0]}); a wrong word takes at least two names")
        if attacks_per_image >= len(self.texts):
            words = f"{len(self.texts)} class names leave {len(self.texts) - 1} wrong words for an image"
            raise UserError(f"--attacks_per_image {attacks_per_image}: {words}; lower it")

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

    also_read = ("json",)

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        key, members = reader.read(shard, sample, self._extensions)
        lacking = "" if "json" in members else members.lacking("json")
        row, dropped = parse_pair(members.get("json"), key, members.where, lacking)
        if dropped:
            detail = f"{dropped} of the rejected texts equal the chosen one and are left out"
            reader.notices.append(Skipped("chosen among rejected", members.where, detail, samples=0))
        row.image = self._image(members)
        return {"key": key, "rows": [row]}


def parse_pair(text: bytes | None, key: str, where: str, lacking: str = "no .json member") -> tuple[Row, int]:
    """Parses a row without its picture from the .json (``PAIR_FORM``), else from the key.

    Also returns how many rejected texts were dropped because they equal the chosen one. With ``reg`` only candidates
    are required, and ``chosen`` is the right one among them; otherwise chosen and rejected are. ``BadSample`` for
    anything else; ``lacking``: the error text if there is no .json.
    """

    def bad(detail: str, kind: str = "bad pair") -> BadSample:
        return BadSample(kind, where, detail)

    def texts(name: str, value: Any) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise bad(f"{name}: expected {PAIR_FORM}")
        if len(value) > MOST_TEXTS or max(map(len, value), default=0) > LONGEST_TEXT:
            raise bad(f"{name}: more than {MOST_TEXTS} texts, or one of more than {LONGEST_TEXT} characters")
        try:
            "".join(value).encode()
        except UnicodeEncodeError:  # half a surrogate pair, as from a file name that is not UTF-8: tokenizers fail
            raise bad(f"{name}: a text is not valid Unicode") from None
        return list(map(composed, value))  # the two ways to encode é are one text

    if text is None:
        named = NAMED_PAIR.fullmatch(key.rsplit("/", 1)[-1])
        if named is None:
            raise bad(f"{lacking}, and it is not named label=X_text=Y", "missing pair")
        words = (" ".join(composed(part).replace("_", " ").split()) for part in named.groups())
        label, written = (f"a photo of a {word}." for word in words)
        fields: Any = {"chosen": label, "rejected": [written]}
    else:
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise bad(f"the .json cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise bad(f"expected {PAIR_FORM}")
    chosen, rejected, candidates = (fields.get(name) for name in ("chosen", "rejected", "candidates"))
    reg = fields.get("reg", False)
    rejected = texts("rejected", [rejected] if isinstance(rejected, str) else rejected or [])
    candidates = None if candidates is None else texts("candidates", candidates)
    chosen = None if chosen is None else texts("chosen", [chosen])[0]
    if not isinstance(reg, bool):
        raise bad(f"reg: expected {PAIR_FORM}")
    if candidates is not None and not candidates:
        raise bad("candidates: the list is empty; leave it out or name the texts")
    if reg and candidates is None:
        raise bad("reg without candidates: over which texts shall the model stay as it is?")
    if not reg and not (chosen and rejected):
        raise bad("needs a chosen and at least one rejected text, or reg with candidates")
    distinct = [] if reg else list(dict.fromkeys(rejected))
    kept = [item for item in distinct if fold(item) != fold(chosen or "")]
    if distinct and not kept:
        raise bad(repr(chosen), "chosen equals rejected")
    candidates = list(dict.fromkeys([chosen, *kept] if candidates is None else candidates))
    for name, item in (("chosen", chosen), *(("rejected", item) for item in kept)):
        if item is not None and item not in candidates:
            raise bad(f"{name} {item!r} is not among the candidates")
    return Row(torch.empty(0), chosen, kept, candidates, reg), len(distinct) - len(kept)


def collate_rows(samples: Sequence[dict[str, Any]], *, texts: list[str] | None, no_images: Tensor) -> dict[str, Any]:
    """Samples -> one batch of N rows: first R rows for the regulariser, then P rows with a preference.

    Returns:
        images: uint8 (N, 3, H, W), or image_embeds float32 (N, D); ``no_images`` for N = 0. texts: the T texts of the
        batch. The next are int64 places in ``texts``: reg_chosen (R,), -1 for none; chosen (P,); rejected (P, most per
        row), padded with -1. reg_candidates (R, T), candidates (P, T): bool, or None if all texts are candidates.
        reg_positions (R,), positions (P,): int64, of the rows' samples. num_samples, keys, sample_positions: of all
        samples with rows. skipped: as in ``utils.data.shards.collate``.
    """
    present = [sample for sample in samples if "rows" in sample]
    rows = [(sample["position"], row) for sample in present for row in sample["rows"]]
    reg = [(position, row) for position, row in rows if row.reg]
    pairs = [(position, row) for position, row in rows if not row.reg]
    named = dict.fromkeys(text for _, row in rows for text in row.candidates) if texts is None else texts
    places = {text: place for place, text in enumerate(named)}
    whole_numbers = partial(torch.tensor, dtype=torch.int64)

    def candidates(part: list[tuple[int, Row]]) -> Tensor | None:
        if texts is not None:
            return None
        mask = torch.zeros(len(part), len(places), dtype=torch.bool)
        for line, (_, row) in zip(mask, part):
            line[[places[text] for text in row.candidates or ()]] = True
        return mask

    rejected = [[places[text] for text in row.rejected] for _, row in pairs]
    most = max(map(len, rejected), default=1)
    return {
        "images": torch.stack([row.image for _, row in (*reg, *pairs)]) if rows else no_images,
        "texts": list(places),
        "reg_chosen": whole_numbers([places.get(row.chosen, -1) for _, row in reg]),
        "reg_candidates": candidates(reg),
        "reg_positions": whole_numbers([position for position, _ in reg]),
        "chosen": whole_numbers([places[row.chosen] for _, row in pairs]),
        "rejected": whole_numbers([line + [-1] * (most - len(line)) for line in rejected]).view(-1, most),
        "candidates": candidates(pairs),
        "positions": whole_numbers([position for position, _ in pairs]),
        "num_samples": len(present),
        "keys": [sample["key"] for sample in present],
        "sample_positions": [sample["position"] for sample in present],
        "skipped": [record for sample in samples for record in sample["skipped"]],
    }


def pair_shards(patterns: Sequence[str], cache_dir: str | None) -> list[str]:
    """The patterns of --train_shards and similar flags, with each folder of named pictures replaced by its shard."""
    folders = [Path(known_path(pattern)) for pattern in patterns]
    packed = [pack_pair_folder(folder, cache_dir) if folder.is_dir() else None for folder in folders]
    return [shard or pattern for shard, pattern in zip(packed, patterns)]


def pack_pair_folder(folder: Path, cache_dir: str | None) -> str | None:
    """Packs pictures named ``label=X_text=Y.png`` into one shard in the cache; None if the folder has none.

    The shard is made anew when names, sizes or times of the pictures change. A broken picture is packed too, and later
    skipped and counted as a sample. A warning names all other entries of the folder.
    """
    left_out: LeftOut = {}
    named = []
    for entry in pictures(folder, left_out, folder):
        if NAMED_PAIR.fullmatch(Path(entry.name).stem):
            named.append(Path(entry.path))
        else:
            leave(left_out, entry, folder)
    if not named:
        if any(NAMED_PAIR.match(path) for paths in left_out.values() for path in paths):
            raise UserError(f"{folder}: named label=X_text=Y, but none of a format that is read: {describe(left_out)}")
        return None
    if left_out:
        say_once(f"{folder}: {len(named)} pictures named label=X_text=Y; not taken: {describe(left_out)}")
    # The 2 is the version of the shard's format.
    made_of = digest(json.dumps([2, str(folder.resolve()), [path.name for path in named], files_state(named)[0]]))
    shard = Path(cache_dir or default_cache_dir()) / "pair_folders" / f"{folder.resolve().name}-{made_of}.tar"
    if not shard.exists():
        try:
            with whole_file(shard) as aside:
                _write_shard(named, aside)
        except OSError as error:
            todo = f"the pictures of {folder} are packed into a shard in --cache_dir"
            raise UserError(f"{error.filename or shard}: {error.strerror}; {todo}") from None
    return str(shard)


def _write_shard(paths: Sequence[Path], shard: Path) -> None:
    import webdataset  # only here: reading shards does not need it

    last_key = None
    with shard.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for number, path in enumerate(paths):
            # A dot would end the sample's key. Adjacent pictures with the same key (.jpg and .png) would be one sample.
            key = path.stem.replace(".", " ")
            key = f"{number}/{key}" if key == last_key else key
            with path.open("rb") as picture:  # one byte above the limit, so that reading skips it
                data = picture.read(MAX_IMAGE_BYTES + 1)
            try:
                extension, data = as_shard_member(data)
            except ImageError:
                extension = "png"
            writer.write({"__key__": key, extension: data})
            last_key = key
