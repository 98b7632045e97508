"""Samples in WebDataset .tar shards: index them, read them by reference, make the loaders of training and evaluation.

    urls = expand_shards(["data/imagenet/train-{000000..001281}.tar"])
    index = index_shards(urls)
    dataset = ShardDataset(index, transform, order="shuffled", seed=0)
    batches = train_batches(dataset, ...)

Samples are read by offset, in the order of ``utils/data/order.py``, so nothing but what a step needs is read, at the
start as after a resume. What cannot be read becomes a ``Skipped`` record that travels with the batch to a
``SkipCounter``; the run goes on until too much is lost.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from utils.data.images import MAX_IMAGE_BYTES, ImageError, ImageTransform, decode
from utils.data.order import EpochOrder, EvalBatchSampler, SequentialOrder, TrainBatchSampler
from utils.data.skipped import BadSample, SampleIndex, Skipped
from utils.data.sources import (
    BRING_IT,
    ShardCache,
    ShardError,
    UnavailableShard,
    default_cache_dir,
    file_name,
    hub_offline,
    is_remote,
    one_line,
    read_text,
    sibling,
)
from utils.data.tars import MAX_MEMBERS, TarIndex, tar_index
from utils.errors import UserError
from utils.processes.interruption import WaitEnded
from utils.redaction import display_url
from utils.text_files import parse_json, parse_label

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# Open files per worker: 64 runs are read side by side, each from one or two shards.
OPEN_SHARDS = 256
REPLACEMENTS_TRIED = 100
SLOW_BATCH = 60.0  # seconds after which waiting for data is said
LONGEST_WAIT = 3600.0  # seconds after which nothing comes any more: a large shard over a slow line takes minutes
LONGEST_SOCKET = 107  # bytes of the path of an AF_UNIX socket
WORKER_DEATHS = 3  # in a row, without a batch in between

# What a sample may claim. Ten thousand texts of a hundred letters are the longest preference pair that can be used.
MAX_MEMBER_BYTES = {"json": 1 << 20, "cls": 1 << 10}
MAX_SAMPLE_BYTES = MAX_IMAGE_BYTES  # of all members that are read together
MAX_LABEL = 2**31


@dataclass
class ShardIndex:
    """The shards of one data set: ``sizes[i]`` samples can be expected in ``urls[i]``, 0 in a shard that is lost."""

    urls: list[str]
    sizes: list[int]
    skipped: list[Skipped]
    cache_dir: str
    cache_limit_gb: float | None = None
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples = sum(self.sizes)


def index_shards(
    urls: Sequence[str],
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_limit_gb: float | None = None,
    flag: str = "--train_shards",
) -> ShardIndex:
    """Counts the samples of every shard: from ``sizes.json`` beside it, else by a pass over its headers, kept as JSON.

    A number of sizes.json is believed until the shard is opened; one that differs is then told and counted (``ShardReader``).
    0 is not believed: the shard would never be opened. A missing or damaged shard becomes a ``Skipped`` record with an
    estimate of the samples lost, whatever is odd in a whole one a record too. A remote shard without sizes.json is
    fetched. ``progress(done, total)`` is called after each shard. UserError where no sample is left.
    """
    cache_dir = str(cache_dir or default_cache_dir())
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--cache_dir {cache_dir}: cannot be made ({error.strerror}); name a folder that can be written"
        ) from None
    cache = ShardCache(cache_dir, cache_limit_gb)
    refuse_lacking_shards(urls, cache, flag)
    promised_by_folder: dict[str | None, dict[str, int]] = {}
    sizes: list[int] = []
    lost: list[
        tuple[str, str, str, int, int, int | None]
    ] = []  # kind, where, detail, lost at least, readable, promised
    notes: list[Skipped] = []
    for number, url in enumerate(urls):
        sizes_file = sibling(url, "sizes.json")
        if sizes_file not in promised_by_folder:
            promised_by_folder[sizes_file] = _read_sizes(sizes_file, cache_dir)
            notes += _named_and_absent(sizes_file, promised_by_folder[sizes_file], urls)
            notes += _counted_and_absent(sizes_file)
        promised = promised_by_folder[sizes_file].get(file_name(url))
        kind: str | None = None
        readable, detail, least = 0, "", 0
        try:
            if promised and (is_remote(url) or os.path.isfile(url)):
                readable = promised
            else:
                with cache.local(url) as path:
                    found = tar_index(path, cache_dir, url if is_remote(url) else None)
                readable = len(found)
                if found.damage:
                    kind, detail, least = "damaged shard", found.damage, found.lost
                if promised == 0 and readable:
                    text = f"promises 0 samples, the shard holds {readable}, which are read; delete or renew the file"
                    notes.append(Skipped("outdated sizes.json", display_url(url), text, samples=0))
                if promised != 0 or readable:  # without samples, as it was said
                    notes += _notes(found, url)
        except UnavailableShard as error:
            kind, detail = "missing shard", str(error)
        except OSError as error:
            kind, detail = "missing shard", error.strerror or one_line(error)
        if kind:
            lost.append((kind, display_url(url), detail, least, readable, promised))
        sizes.append(readable)
        if progress is not None:
            progress(number + 1, len(urls))

    whole = [
        size for size, url in zip(sizes, urls) if size and display_url(url) not in {where for _, where, *_ in lost}
    ]
    usual = round(sum(whole) / len(whole)) if whole else 1
    skipped = [
        Skipped(kind, where, detail, max(1, least, (usual if promised is None else promised) - readable))
        for kind, where, detail, least, readable, promised in lost
    ] + notes
    if not sum(sizes):
        reason = (
            f"first: {skipped[0].where} ({skipped[0].detail})" if skipped else f"first: {display_url(urls[0])} is empty"
        )
        raise UserError(
            f"{flag}: no readable sample in {len(urls)} shard{'s' if len(urls) > 1 else ''}, {reason}; expected .tar "
            "files with <key>.jpg members"
        )
    return ShardIndex(list(urls), sizes, skipped, cache_dir, cache_limit_gb)


def _notes(found: TarIndex, url: str) -> list[Skipped]:
    """What a shard that is opened tells of itself."""
    return [Skipped(kind, display_url(url), detail, samples) for kind, detail, samples in found.notes]


def _named_and_absent(sizes_file: str | None, promised: dict[str, int], urls: Sequence[str]) -> list[Skipped]:
    """A notice where sizes.json in a local folder names shards that neither lie there nor are asked for."""
    if not promised or sizes_file is None or is_remote(sizes_file):
        return []
    there = {file_name(url) for url in urls if sibling(url, "sizes.json") == sizes_file}
    there.update(os.listdir(os.path.dirname(sizes_file) or os.curdir))
    absent = sorted(name for name, size in promised.items() if size and name not in there)
    detail = f"names {len(absent)} shards that are not there, the first is {absent[0]}" if absent else ""
    return [Skipped("outdated sizes.json", sizes_file, detail, samples=0)] if absent else []


def _counted_and_absent(sizes_file: str | None) -> list[Skipped]:
    """A notice where nshards.txt in a local folder, as CLIP_benchmark writes it, counts more shards than lie there."""
    if sizes_file is None or is_remote(sizes_file):
        return []
    folder = os.path.dirname(sizes_file) or os.curdir
    with suppress(OSError, ValueError):  # not there, or no number: nothing to compare with
        counted = parse_label(Path(folder, "nshards.txt").read_bytes())
        there = sum(name.lower().endswith(".tar") for name in os.listdir(folder))
        if there < counted:
            detail = f"counts {counted} shards, {there} lie there"
            return [Skipped("missing shard", os.path.join(folder, "nshards.txt"), detail, samples=0)]
    return []


def keep_sizes(index: ShardIndex, sizes: Sequence[int]) -> None:
    """Gives a resumed run the sizes of its first start, from which its order of samples follows.

    A shard that cannot be read any more keeps its place, and its samples are skipped when their turn comes; one that could
    not be read at the first start stays out. ``UserError`` where the shards hold other samples than at the start.
    """
    known = len(index.sizes) == len(sizes) and all(
        now == then or not (now and then) for now, then in zip(index.sizes, sizes)
    )
    if not known:
        raise UserError(
            f"--resume_from_checkpoint: the shards hold other samples than when the run was started ({sum(index.sizes)} in "
            f"{len(index.sizes)} shards, were {sum(sizes)} in {len(sizes)}), so that their order would change; give it the "
            "same shards, or start a new run"
        )
    index.sizes, index.num_samples = list(sizes), sum(sizes)


def refuse_lacking_shards(urls: Sequence[str], cache: ShardCache, flag: str) -> None:
    """Without the hub a shard that the cache lacks would only be missed in the middle of the run."""
    on_hub = [url for url in urls if url.startswith("hf://")]
    if on_hub and hub_offline():
        lacking = [url for url in on_hub if not cache.copy_of(url).exists()]
        if lacking:
            raise UserError(
                f"{flag}: HF_HUB_OFFLINE is set and --cache_dir {cache.cache_dir} lacks {len(lacking)} of {len(urls)} "
                f"shards, the first is {display_url(lacking[0])}; {BRING_IT}, and name its --cache_dir"
            )


def _read_sizes(location: str | None, cache_dir: str) -> dict[str, int]:
    """Shard name -> promised number of samples; empty where there is no (usable) sizes.json."""
    if location is None or (text := read_text(location, cache_dir)) is None:
        return {}
    try:
        sizes = parse_json(text)
        # More samples than a shard may have members would also be more than the order of an epoch can be made of.
        if not all(type(size) is int and 0 <= size <= MAX_MEMBERS for size in sizes.values()):
            raise ValueError
    except (ValueError, AttributeError):
        logger.warning('%s: not {"<shard>": samples, ...}; the shards are counted instead', display_url(location))
        return {}
    return sizes


class Members(dict[str, bytes]):
    """Extension -> bytes of what was read of a sample; ``present``: all extensions that the shard has of it."""

    present: Sequence[str] = ()

    def lacking(self, *wanted: str) -> str:
        """The words for none of ``wanted`` being there, with what is there in its place."""
        has = ", ".join(f".{extension}" for extension in self.present) or "no other"
        text = f"no {', '.join('.' + extension for extension in wanted)} member; the sample has {has}"
        longer = [name for name in self.present if name.endswith(tuple("." + extension for extension in wanted))]
        if longer:
            text += (
                f" (names are cut at the first dot, so that .{longer[0]} is an extension: rename it to have one dot)"
            )
        return text


class ShardReader:
    """Reads members of samples by (shard number, sample number). One per process; files open at the first use.

    A shard that is opened is compared with what was expected of it; what differs goes to ``notices``.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.cache = ShardCache(index.cache_dir, index.cache_limit_gb)
        self.notices: list[Skipped] = []  # about shards, not about one sample; whoever reads takes them along
        self._open: OrderedDict[int, tuple[int, str, TarIndex]] = OrderedDict()
        self._failed: dict[int, tuple[str, str]] = {}

    def read(self, shard: int, sample: int, extensions: Sequence[str] | None = None) -> tuple[str, Members]:
        """(key, {extension: bytes}) of a sample, all members or those in ``extensions``; BadSample where it is lost."""
        descriptor, path, index = self._opened(shard, sample)
        where = f"{display_url(self.index.urls[shard])}#"
        if sample >= len(index):
            promise = (
                f"promises {self.index.sizes[shard]} samples, the shard holds {len(index)}; delete or renew the file"
            )
            kind, detail = ("damaged shard", index.damage) if index.damage else ("outdated sizes.json", promise)
            raise BadSample(kind, f"{where}{sample}", detail)
        present = index.members(sample)
        wanted = {name: place for name, place in present.items() if extensions is None or name in extensions}
        _check_sizes(wanted, f"{where}{index.keys[sample]}")
        members = Members()
        members.present = list(present)
        for extension, (offset, size) in wanted.items():
            members[extension] = _pread(descriptor, size, offset)
            if len(members[extension]) != size:
                raise BadSample("damaged shard", f"{where}{sample}", f"{path} has become shorter")
        return index.keys[sample], members

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()  # every evaluation makes a reader; without this the descriptors of a long run would run out

    def _opened(self, shard: int, sample: int) -> tuple[int, str, TarIndex]:
        opened = self._open.get(shard)
        url = self.index.urls[shard]
        if opened is not None:
            self._open.move_to_end(shard)
            if is_remote(url):
                self.cache.touch(opened[1])
            return opened
        if shard not in self._failed:
            try:
                opened = self._open[shard] = self._open_shard(url)
            except UnavailableShard as error:
                self._failed[shard] = ("missing shard", str(error))
            except OSError as error:
                self._failed[shard] = ("missing shard", error.strerror or one_line(error))
        if opened is None:
            # Remembered: without that every sample of a lost shard would wait for all retries.
            kind, detail = self._failed[shard]
            raise BadSample(kind, f"{display_url(url)}#{sample}", detail)
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        found, promised = opened[2], self.index.sizes[shard]
        self.notices += _notes(found, url)
        if len(found) > promised:
            detail = f"promises {promised} samples, the shard holds {len(found)}; the rest is not used; delete or renew the file"
            self.notices.append(Skipped("outdated sizes.json", display_url(url), detail, len(found) - promised))
        elif found.damage and len(found) == promised:  # else each sample that is lost says so
            self.notices.append(Skipped("damaged shard", display_url(url), found.damage, samples=0))
        return opened

    def _open_shard(self, url: str) -> tuple[int, str, TarIndex]:
        with self.cache.local(url) as path:
            index = tar_index(path, self.index.cache_dir, url if is_remote(url) else None)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, index


def _check_sizes(members: dict[str, tuple[int, int]], where: str) -> None:
    """BadSample before a byte is read where a member is larger than anything it can be: {extension: (offset, size)}."""
    for extension, (_, size) in members.items():
        limit = MAX_MEMBER_BYTES.get(extension, MAX_SAMPLE_BYTES)
        if size > limit:
            raise BadSample("oversized member", where, f".{extension} of {size} bytes, at most {limit} are read")
    total = sum(size for _, size in members.values())
    if total > MAX_SAMPLE_BYTES:
        raise BadSample("oversized member", where, f"{total} bytes together, at most {MAX_SAMPLE_BYTES} are read")


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:  # a signal, or more than 2 GiB
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class SampleDataset(Dataset[dict[str, Any]]):
    """Samples by (epoch, slot, position), for the batch samplers of ``utils/data/order.py``."""

    index: SampleIndex

    def __init__(self, index: SampleIndex, transform: ImageTransform) -> None:
        self.index, self.transform = index, transform

    def __len__(self) -> int:
        return self.index.num_samples

    @property
    def collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], Any]:
        """Makes batches of items."""
        return partial(collate, image_size=self.transform.output_size)


class ShardDataset(SampleDataset):
    """Samples of shards.

    order: "shuffled" for training: a sample that cannot be used is recorded and its slot filled by the next good one of
    its run. "sequential" for evaluation: it is recorded and its ``image`` is None.
    with_labels: samples need a ``.cls`` (0 ... num_classes - 1 as text); without, labels are not even read.

    An item is dict(image: uint8 (3, H, W) or None, position: int, key: str, skipped: list[Skipped]), and label: int.
    ShardError after 100 unusable samples in a row.
    """

    index: ShardIndex

    def __init__(
        self,
        index: ShardIndex,
        transform: ImageTransform,
        *,
        order: str,
        seed: int = 0,
        with_labels: bool = False,
        num_classes: int | None = None,
    ) -> None:
        if order not in ("shuffled", "sequential"):
            raise ValueError(f"order is 'shuffled' or 'sequential', not {order!r}")
        super().__init__(index, transform)
        self.order, self.seed = order, seed
        self.with_labels, self.num_classes = with_labels, num_classes
        self._extensions: tuple[str, ...] = (*IMAGE_EXTENSIONS, "cls") if with_labels else IMAGE_EXTENSIONS
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        for name in ("_reader", "_prefetcher", "_orders", "_sequence", "_process"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __getitem__(self, reference: tuple[int, int, int]) -> dict[str, Any]:
        epoch, slot, position = reference
        reader, order = self._own_reader(), self._order(epoch)
        self._prefetch(order, epoch, slot)
        skipped: list[Skipped] = []
        for shard, sample in self._candidates(order, slot):
            try:
                item = self.load(reader, shard, sample, epoch)
            except BadSample as bad:
                skipped.append(bad.skipped)
                if self.order == "sequential":
                    item = {"image": None, "key": bad.skipped.where}
                    break
                if len(skipped) < REPLACEMENTS_TRIED:
                    continue
                raise self._give_up(skipped) from None
            break
        else:
            raise self._give_up(skipped)
        skipped += reader.notices
        reader.notices.clear()
        return {**item, "position": position, "skipped": skipped}

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        """The sample itself: image, key and label. BadSample where it cannot be used."""
        key, members = reader.read(shard, sample, self._extensions)
        where = self._where(shard, key)
        item: dict[str, Any] = {"key": key}
        if self.with_labels:
            item["label"] = self._label(members, where)
        item["image"] = self._image(members, where)
        return item

    def shards_of(self, references: Sequence[tuple[int, int, int]]) -> list[str]:
        """The shards from which these samples are read, as they are shown."""
        shards = [self._order(epoch).reference(slot)[0] for epoch, slot, _ in references]
        return [display_url(self.index.urls[shard]) for shard in dict.fromkeys(shards)]

    def _where(self, shard: int, key: str) -> str:
        return f"{display_url(self.index.urls[shard])}#{key}"

    def _image(self, members: Members, where: str) -> torch.Tensor:
        data = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if data is None:
            raise BadSample("missing image", where, members.lacking(*IMAGE_EXTENSIONS))
        try:
            return decode(data, self.transform)
        except ImageError as error:
            raise BadSample("undecodable image", where, str(error)) from None

    def _label(self, members: Members, where: str) -> int:
        text = members.get("cls")
        if text is None:
            raise BadSample("missing label", where, members.lacking("cls"))
        try:
            label = parse_label(text)
        except ValueError:
            raise BadSample("bad label", where, f"{text[:40]!r} is no whole number") from None
        if not 0 <= label < MAX_LABEL:
            raise BadSample("bad label", where, f"{text[:40]!r} is no class")
        if self.num_classes is not None and label >= self.num_classes:
            classes = f"there are {self.num_classes} classes (0 ... {self.num_classes - 1})"
            raise BadSample("bad label", where, f"class {label}, {classes}")
        return label

    def _candidates(self, order: EpochOrder | SequentialOrder, slot: int) -> Iterator[tuple[int, int]]:
        yield order.reference(slot)
        if isinstance(order, EpochOrder):
            yield from order.replacements(slot)

    def _give_up(self, skipped: list[Skipped]) -> ShardError:
        kinds: dict[str, int] = {}
        for record in skipped:
            kinds[record.kind] = kinds.get(record.kind, 0) + 1
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return ShardError(
            f"{len(skipped)} samples in a row cannot be used ({counts}); first {skipped[0].where}: "
            f"{skipped[0].detail}; check the shards"
        )

    def _forget(self) -> None:
        self._process: int | None = None
        self._reader: ShardReader | None = None
        self._prefetcher: _Prefetcher | None = None
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._sequence: SequentialOrder | None = None

    def _own_reader(self) -> ShardReader:
        if self._reader is None or self._process != os.getpid():
            self._forget()  # in a forked worker: descriptors and the thread belong to the parent
            self._process, self._reader = os.getpid(), ShardReader(self.index)
        return self._reader

    def _order(self, epoch: int) -> EpochOrder | SequentialOrder:
        if self.order == "shuffled":
            return self._epoch_order(epoch)
        if self._sequence is None:
            self._sequence = SequentialOrder(self.index.sizes)
        return self._sequence

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            self._orders[epoch] = EpochOrder(self.index.sizes, self.seed, epoch)
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _prefetch(self, order: EpochOrder | SequentialOrder, epoch: int, slot: int) -> None:
        """Tells the prefetch thread which remote shards come next: this block's and the next one's."""
        if self._prefetcher is None:
            self._prefetcher = _Prefetcher(self.index)
        if not self._prefetcher.urls_remote:
            return
        if isinstance(order, SequentialOrder):
            shard = order.reference(slot)[0]
            if self._prefetcher.stage != shard:
                self._prefetcher.want(shard, range(shard, min(shard + 2, len(self.index.urls))))
        else:
            block = order.block_of(slot)
            if self._prefetcher.stage != (epoch, block):
                ahead = order.shards_of_block(block + 1) or self._epoch_order(epoch + 1).shards_of_block(0)
                self._prefetcher.want((epoch, block), [*order.shards_of_block(block), *ahead])


class _Prefetcher:
    """A thread that fetches remote shards before they are asked for. Every worker has one; locks keep them apart."""

    def __init__(self, index: ShardIndex) -> None:
        self.urls_remote = any(map(is_remote, index.urls))
        self.stage: Any = None
        self._urls = index.urls
        self._cache = ShardCache(index.cache_dir, index.cache_limit_gb)
        self._wanted: list[int] = []
        self._failed: set[int] = set()
        self._wake = threading.Condition()
        if self.urls_remote:
            threading.Thread(target=self._work, name="shard prefetch", daemon=True).start()

    def want(self, stage: Any, shards: Sequence[int]) -> None:
        """Replaces the list of shards to fetch, in order; ``stage`` is the caller's mark for it."""
        with self._wake:
            self.stage = stage
            self._wanted = [shard for shard in reversed(shards) if is_remote(self._urls[shard])]
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._wanted)
                shard = self._wanted.pop()
            if shard in self._failed:
                continue
            try:
                self._cache.fetch_ahead(self._urls[shard])
            except Exception:  # the reader meets the same error when it needs the shard, and reports it
                self._failed.add(shard)


def collate(samples: Sequence[dict[str, Any]], *, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Samples -> dict(images uint8 (B, 3, H, W), positions int64 (B,), keys, skipped), and labels int64 (B,) if read.

    A sample without an image only brings its ``skipped`` records. With none left the images are (0, 3, *image_size).
    """
    good = [sample for sample in samples if sample["image"] is not None]
    batch = {
        "images": torch.stack([sample["image"] for sample in good])
        if good
        else torch.empty(0, 3, *(image_size or (0, 0)), dtype=torch.uint8),
        "positions": torch.tensor([sample["position"] for sample in good], dtype=torch.int64),
        "keys": [sample["key"] for sample in good],
        "skipped": [record for sample in samples for record in sample["skipped"]],
    }
    if all("label" in sample for sample in good):
        batch["labels"] = torch.tensor([sample["label"] for sample in good], dtype=torch.int64)
    return batch


def train_batches(
    dataset: ShardDataset,
    *,
    samples_per_epoch: int,
    global_batch_size: int,
    per_device_batch_size: int,
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """The micro-batches of this rank from ``first_step`` up to ``num_steps``, across epochs.

    Data workers that are killed (memory ran out, somebody's signal) are replaced and the same batches go on: the order is
    known, so that nothing is lost or read twice. ShardError where that helps no more. Says when a batch is long in coming.
    """
    micro_batches = global_batch_size // (per_device_batch_size * world_size)
    delivered, deaths = 0, 0
    while True:
        steps, done = divmod(delivered, micro_batches)
        sampler = TrainBatchSampler(
            samples_per_epoch, global_batch_size, per_device_batch_size, rank, world_size, first_step + steps, num_steps
        )
        batches = iter(DataLoader(dataset, **_loading(dataset, sampler, num_workers, pin_memory)))
        # torch would raise a worker's death wherever the main thread is; without its handler it shows at the next batch.
        if num_workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for place in itertools.count():
                with waited_for(partial(_not_delivered, batches, dataset, sampler, place)):
                    batch = next(batches, None)
                if batch is None:
                    return
                if place >= done:  # a step that was cut short is begun again
                    yield batch
                    delivered, deaths = delivered + 1, 0
        except WaitEnded:
            _ABANDONED.append(batches)
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if not num_workers or not _worker_died(error):
                raise
            deaths += 1
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if deaths > WORKER_DEATHS:
                raise ShardError(
                    f"--num_workers {num_workers}: data workers die again and again ({reason}); if memory runs out, use "
                    "fewer, then go on with --resume_from_checkpoint latest"
                ) from None
            logger.warning("a data worker has died (%s); new ones go on with the same batches", reason)


class _Late(WaitEnded):
    """LONGEST_WAIT is over."""


_ABANDONED: list[Any] = []  # loaders whose end would wait for workers that are stuck


@contextmanager
def waited_for(late: Callable[[], str]) -> Iterator[None]:
    """A wait for data is said after SLOW_BATCH seconds and ends after LONGEST_WAIT, in a ShardError of the text ``late()``.

    Only the main thread can be got out of a wait.
    """
    text = "waiting for data since %.0f s: the disk, the network or the decoding is slow; the run goes on when it comes"
    timer = threading.Timer(SLOW_BATCH, logger.warning, (text, SLOW_BATCH))
    timer.daemon = True
    in_main_thread = threading.current_thread() is threading.main_thread()

    def end(number: int, frame: FrameType | None) -> None:
        raise _Late

    try:
        timer.start()
        if in_main_thread:
            before = signal.signal(signal.SIGALRM, end)
            signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT, 5.0)
        try:
            yield
        finally:
            timer.cancel()
            if in_main_thread:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
    except _Late:
        raise ShardError(late()) from None


def _worker_died(error: Exception) -> bool:
    """Whether a worker is gone, and not merely what it was doing failed: that comes as "Caught ... in DataLoader worker"."""
    if "Caught " in str(error):
        return False
    # Its batches may be under way already, as handles that only the living worker could give out.
    if "Pin memory thread exited" in str(error):
        return True
    return "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError, FileNotFoundError))


def _not_delivered(batches: Any, dataset: Any, sampler: Any, place: int) -> str:
    """What is said of the batch at ``place``, counted from the start of ``batches``, that does not come."""
    _ABANDONED.append(batches)
    workers = getattr(batches, "_workers", [])
    number = place % max(1, len(workers))
    who = f"data worker {number} (process {workers[number].pid})" if workers else "reading"
    references = list(itertools.islice(sampler, place, place + 1))
    shards = dataset.shards_of(references[0]) if references and isinstance(dataset, ShardDataset) else []
    names = ", ".join(shards[:3]) + (f" and {len(shards) - 3} more" if len(shards) > 3 else "")
    return (
        f"{who} has delivered nothing for {LONGEST_WAIT:.0f} s; its batch is read from {names or 'the cache'}; look whether "
        "the disk, network or server of these files answers, or bring them near with --prefetch; then go on with "
        "--resume_from_checkpoint latest"
    )


def _short_socket_folder() -> None:
    """Sees to it that data workers can hand over tensors: by sockets in a temporary folder, whose paths have to be short.

    With a longer one a worker's send fails where nobody sees it, and the run waits for ever.
    """
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is not None:
        return
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) + len("/pymp-xxxxxxxx/listener-xxxxxxxx") > LONGEST_SOCKET:
            continue
        with suppress(OSError):
            made = tempfile.mkdtemp(prefix="pymp-", dir=folder)
            multiprocessing.util.Finalize(None, shutil.rmtree, [made], {"ignore_errors": True}, exitpriority=-100)
            config["tempdir"] = made
            return
    raise UserError(
        f"TMPDIR {tempfile.gettempdir()}: data workers need a folder for sockets, with a path of at most "
        f"{LONGEST_SOCKET - 32} bytes, that can be written; set TMPDIR to a shorter one, or --num_workers 0"
    )


@functools.cache
def _kill_workers_at_exit() -> None:
    """multiprocessing tells its children to end by SIGTERM, which these do not hear, and then waits without end."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill)


def _calm_worker(worker: int) -> None:
    """Signals that ask the run to stop are for the process that trains, also where a scheduler sends them to all."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # a worker that is stuck does not look whether that process is still there
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def eval_loader(
    dataset: SampleDataset,
    *,
    num_samples: int,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """The first ``num_samples`` samples (or all there are), once each over all ranks, as often as it is iterated.

    Every rank gets the same number of batches; the last ones of a rank may be empty.
    """
    sampler = EvalBatchSampler(min(num_samples, len(dataset)), batch_size, rank, world_size)
    return _PatientLoader(dataset, **_loading(dataset, sampler, num_workers, pin_memory, persistent=True))


class _PatientLoader(DataLoader):
    """A DataLoader whose batches are waited for as those of the training are."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for place in itertools.count():
            try:
                with waited_for(partial(_not_delivered, batches, self.dataset, self.batch_sampler, place)):
                    batch = next(batches, None)
            except WaitEnded:
                _ABANDONED.append(batches)
                raise
            if batch is None:
                return
            yield batch


def _loading(
    dataset: SampleDataset,
    sampler: TrainBatchSampler | EvalBatchSampler,
    num_workers: int,
    pin_memory: bool,
    persistent: bool = False,
) -> dict[str, Any]:
    """The arguments of a DataLoader."""
    if num_workers:
        _short_socket_folder()
        _kill_workers_at_exit()
    return {
        "batch_sampler": sampler,
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": dataset.collate_fn,
        "persistent_workers": persistent and num_workers > 0,
        "worker_init_fn": _calm_worker,
        # The loader draws a seed for its workers, who draw nothing: from here, not from the run's own random state.
        "generator": torch.Generator(),
    }
