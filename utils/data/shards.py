"""Samples in WebDataset .tar shards: index them, read them by number, make the loaders of training and evaluation.

    index = index_shards(expand_shards(["data/imagenet/train-{000000..001281}.tar"]))
    dataset = ShardDataset(index, transform, order="shuffled", seed=0)
    batches = train_batches(dataset, ...)

Samples are read by offset, in the order of ``utils/data/order.py``. So only the samples of a step are read, also after
a resume. An unreadable sample becomes a ``Skipped`` record, which is returned with the batch for a ``SkipCounter``.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import signal
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.data import DataLoader, Dataset

from utils.data.images import MAX_IMAGE_BYTES, ImageError, ImageTransform, decode
from utils.data.order import EpochOrder, EvalBatchSampler, SequentialOrder, TrainBatchSampler
from utils.data.skipped import BadSample, Skipped
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
from utils.data.workers import PatientLoader, worker_died
from utils.errors import UserError, os_errors
from utils.processes.progress import RunProgress
from utils.redaction import display_url
from utils.text_files import parse_json, parse_label

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

OPEN_SHARDS = 256  # open files of a worker: 64 runs are read in turn, each from one or two shards
REPLACEMENTS_TRIED = 100
WORKER_DEATHS = 3  # in a row, without a batch in between

# Limits on the sizes that a tar header states. The largest usable preference pair has 10,000 texts of 100 letters.
MAX_MEMBER_BYTES = {"json": 1 << 20, "cls": 1 << 10}
MAX_SAMPLE_BYTES = MAX_IMAGE_BYTES  # all members together that are read of a sample
MAX_LABEL = 2**31


@dataclasses.dataclass
class ShardIndex:
    """The shards of a data set: ``urls[i]`` should hold ``sizes[i]`` samples; 0 if the shard cannot be read."""

    urls: list[str]
    sizes: list[int]
    skipped: list[Skipped]
    cache_dir: str
    cache_limit_gb: float | None = None

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)


def index_shards(
    urls: Sequence[str],
    *,
    cache_dir: str | os.PathLike | None = None,
    cache_limit_gb: float | None = None,
    flag: str = "--train_shards",
) -> ShardIndex:
    """Counts the samples of every shard: from ``sizes.json`` beside it, else by a pass over its headers.

    sizes.json is trusted until the shard is opened, except for a 0, because such a shard would never be opened. A
    missing or damaged shard becomes a ``Skipped`` record with an estimate of its lost samples; an odd shard becomes a
    notice. A remote shard without sizes.json is fetched. UserError if no sample is left.
    """
    cache_dir = str(cache_dir or default_cache_dir())
    with os_errors(f"--cache_dir {cache_dir}: cannot be made", "name a writable folder"):
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    cache = ShardCache(cache_dir, cache_limit_gb)
    refuse_lacking_shards(urls, cache, flag)
    promises: dict[str | None, dict[str, int]] = {}  # path of a sizes.json -> its contents
    sizes: list[int] = []
    losses: list[tuple[Skipped, int, int | None]] = []  # each with the number of samples found and promised
    whole: list[int] = []  # sizes of the shards without a loss
    notices: list[Skipped] = []
    with RunProgress(f"counting {flag}", len(urls), transient=True) as progress:
        for number, url in enumerate(urls, 1):
            sizes_file = sibling(url, "sizes.json")
            if sizes_file not in promises:
                promises[sizes_file] = _read_sizes(sizes_file, cache_dir)
                notices += _absent_shards(sizes_file, promises[sizes_file], urls)
            promise = promises[sizes_file].get(file_name(url))
            size, loss, more = _count(url, promise, cache)
            sizes.append(size)
            notices += more
            if loss:
                losses.append((loss, size, promise))
            elif size:
                whole.append(size)
            progress.update(number)

    # Assume that a lost shard held as many samples as promised, or else the mean of the undamaged shards.
    usual = round(sum(whole) / len(whole)) if whole else 1
    skipped = []
    for loss, size, promise in losses:
        expected = usual if promise is None else promise
        skipped.append(dataclasses.replace(loss, samples=max(1, loss.samples, expected - size)))
    skipped += notices
    if not sum(sizes):
        first = f"{skipped[0].where} ({skipped[0].detail})" if skipped else f"{display_url(urls[0])} is empty"
        shards = f"{len(urls)} shard{'s' if len(urls) > 1 else ''}"
        raise UserError(
            f"{flag}: no readable sample in {shards}, first: {first}; expected .tar files with <key>.jpg members"
        )
    return ShardIndex(list(urls), sizes, skipped, cache_dir, cache_limit_gb)


def _count(url: str, promise: int | None, cache: ShardCache) -> tuple[int, Skipped | None, list[Skipped]]:
    """The number of samples of a shard, as promised or as found, the record of a loss if any, and notices."""
    if promise and (is_remote(url) or os.path.isfile(url)):
        return promise, None, []
    try:
        with _indexed(url, cache) as (_, found):
            size = len(found)
    except BadSample as bad:
        return 0, bad.skipped, []
    loss = Skipped("damaged shard", display_url(url), found.damage, found.lost) if found.damage else None
    if promise == 0:
        news = [_outdated(url, 0, size, ", which are read"), *_notices(found, url)]
        return size, loss, news if size else []  # no news if the shard is empty, as promised
    return size, loss, _notices(found, url)


@contextmanager
def _indexed(url: str, cache: ShardCache) -> Iterator[tuple[str, TarIndex]]:
    """A shard's path and its index. A cached copy is not evicted in the block. BadSample if it cannot be read."""
    try:
        with cache.local(url) as path:
            yield path, tar_index(path, cache.cache_dir, url if is_remote(url) else None)
    except (UnavailableShard, OSError) as error:
        why = getattr(error, "strerror", None) or (one_line(error) if isinstance(error, OSError) else str(error))
        raise BadSample("missing shard", display_url(url), why) from None


def _notices(found: TarIndex, url: str) -> list[Skipped]:
    """The notes of a shard's index as records."""
    return [Skipped(kind, display_url(url), detail, samples) for kind, detail, samples in found.notes]


def _outdated(url: str, promised: int, held: int, use: str = "", samples: int = 0) -> Skipped:
    detail = f"promises {promised} samples, the shard holds {held}{use}; delete or renew the file"
    return Skipped("outdated sizes.json", display_url(url), detail, samples)


def _absent_shards(sizes_file: str | None, promised: dict[str, int], urls: Sequence[str]) -> list[Skipped]:
    """Notices if a local sizes.json names shards, or nshards.txt beside it counts shards, that are not there."""
    notices: list[Skipped] = []
    folder = Path(sizes_file or "").parent
    if sizes_file is None or is_remote(sizes_file) or not (folder.is_dir() and os.access(folder, os.R_OK)):
        return notices
    there = os.listdir(folder)
    given = {file_name(url) for url in urls if sibling(url, "sizes.json") == sizes_file}
    if absent := sorted({name for name, size in promised.items() if size} - given - {*there}):
        detail = f"names {len(absent)} shards that are not there, the first is {absent[0]}"
        notices.append(Skipped("outdated sizes.json", sizes_file, detail, samples=0))
    with suppress(OSError, ValueError):  # no such file, or not a number: nothing to compare with
        counted = parse_label((folder / "nshards.txt").read_bytes())  # as CLIP_benchmark writes it
        tars = sum(name.lower().endswith(".tar") for name in there)
        if tars < counted:
            detail = f"counts {counted} shards, {tars} lie there"
            notices.append(Skipped("missing shard", os.path.join(folder, "nshards.txt"), detail, samples=0))
    return notices


def keep_sizes(index: ShardIndex, sizes: Sequence[int]) -> None:
    """Gives a resumed run the sizes that were found at its first start, because they determine the order of samples.

    A shard that has become unreadable keeps its place, and its samples are skipped when their turn comes. A shard that
    was unreadable at the first start stays out. UserError if the shards hold other samples than at the start.
    """
    changed = any(now and then and now != then for now, then in zip(index.sizes, sizes))
    if changed or len(index.sizes) != len(sizes):
        raise UserError(
            "--resume_from_checkpoint: the shards hold other samples than when the run was started "
            f"({index.num_samples} in {len(index.sizes)} shards, were {sum(sizes)} in {len(sizes)}); give it the same "
            "shards, or start a new run"
        )
    index.sizes = list(sizes)


def refuse_lacking_shards(urls: Sequence[str], cache: ShardCache, flag: str) -> None:
    """UserError if the hub is offline and the cache lacks a shard. Otherwise the run would fail in the middle."""
    if hub_offline():
        lacking = [url for url in urls if url.startswith("hf://") and not cache.copy_of(url).exists()]
        if lacking:
            raise UserError(
                f"{flag}: HF_HUB_OFFLINE is set and --cache_dir {cache.cache_dir} lacks {len(lacking)} of {len(urls)} "
                f"shards, the first is {display_url(lacking[0])}; {BRING_IT}, and name its --cache_dir"
            )


def _read_sizes(location: str | None, cache_dir: str) -> dict[str, int]:
    """Shard name -> promised number of samples; empty if there is no usable sizes.json."""
    if location is None or (text := read_text(location, cache_dir)) is None:
        return {}
    with suppress(ValueError, AttributeError):
        sizes = parse_json(text)
        # A shard has at most MAX_MEMBERS members; the order of an epoch could not be made of a larger number either.
        if all(type(size) is int and 0 <= size <= MAX_MEMBERS for size in sizes.values()):
            return sizes
    logger.warning('%s: not {"<shard>": samples, ...}; the shards are counted instead', display_url(location))
    return {}


class Members(dict[str, bytes]):
    """Extension -> bytes, for the members read of a sample. where: shard#key. present: all extensions it has."""

    where: str
    present: Sequence[str] = ()

    def lacking(self, *wanted: str) -> str:
        """The error text for a sample that has none of the extensions ``wanted``; it lists those that it has."""
        has = ", ".join(f".{extension}" for extension in self.present) or "no other"
        endings = tuple(f".{extension}" for extension in wanted)
        longer = [name for name in self.present if name.endswith(endings)]
        hint = " (names are cut at the first dot, so that .{} is an extension: rename it to have one dot)"
        return f"no {', '.join(endings)} member; the sample has {has}" + (hint.format(longer[0]) if longer else "")


def read_label(members: Members, num_classes: int) -> int:
    """The class of a sample, 0 ... num_classes - 1. BadSample if it has none."""
    if "cls" not in members:
        raise BadSample("missing label", members.where, members.lacking("cls"))
    try:
        label = parse_label(members["cls"])
    except ValueError:
        raise BadSample("bad label", members.where, f"{members['cls'][:40]!r} is no whole number") from None
    if not 0 <= label < num_classes:
        detail = f"class {label}, there are {num_classes} classes (0 ... {num_classes - 1})"
        raise BadSample("bad label", members.where, detail)
    return label


class ShardReader:
    """Reads members of samples by (shard number, sample number). One per process; files open at the first use.

    ``notices``: records about the shards opened so far; the caller takes them and empties the list.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.cache = ShardCache(index.cache_dir, index.cache_limit_gb)
        self.notices: list[Skipped] = []
        self._open: OrderedDict[int, tuple[BinaryIO, TarIndex]] = OrderedDict()
        self._failed: dict[int, Skipped] = {}

    def read(self, shard: int, sample: int, extensions: Sequence[str] | None = None) -> tuple[str, Members]:
        """(key, {extension: bytes}) of a sample: all members, or those in ``extensions``. BadSample if it is lost."""
        file, index = self._opened(shard, sample)
        url = self.index.urls[shard]
        where = f"{display_url(url)}#{sample}"
        if sample >= len(index):
            if index.damage:
                raise BadSample("damaged shard", where, index.damage)
            raise BadSample("outdated sizes.json", where, _outdated(url, self.index.sizes[shard], len(index)).detail)
        key, places = index.keys[sample], index.members(sample)
        members = Members()
        members.where, members.present = f"{display_url(url)}#{key}", list(places)
        wanted = {name: place for name, place in places.items() if extensions is None or name in extensions}
        # Check the sizes before anything is read.
        claims = [
            (f".{name}", size, MAX_MEMBER_BYTES.get(name, MAX_SAMPLE_BYTES)) for name, (_, size) in wanted.items()
        ]
        claims.append(("all members", sum(size for _, size, _ in claims), MAX_SAMPLE_BYTES))
        for what, size, limit in claims:
            if size > limit:
                raise BadSample("oversized member", members.where, f"{what}: {size} bytes, at most {limit} are read")
        for extension, (offset, size) in wanted.items():
            file.seek(offset)
            members[extension] = file.read(size)
            if len(members[extension]) != size:
                raise BadSample("damaged shard", where, f"{file.name} has become shorter")
        return key, members

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1][0].close()

    def __del__(self) -> None:
        self.close()

    def _opened(self, shard: int, sample: int) -> tuple[BinaryIO, TarIndex]:
        url = self.index.urls[shard]
        if shard in self._open:
            self._open.move_to_end(shard)
            if is_remote(url):
                self.cache.touch(self._open[shard][0].name)
            return self._open[shard]
        if shard not in self._failed:
            try:
                with _indexed(url, self.cache) as (path, found):
                    self._open[shard] = open(path, "rb"), found  # noqa: SIM115
            except BadSample as bad:  # keep it, or every sample of a lost shard would wait for all retries
                self._failed[shard] = bad.skipped
        if failed := self._failed.get(shard):
            raise BadSample(failed.kind, f"{failed.where}#{sample}", failed.detail)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1][0].close()
        promised, more = self.index.sizes[shard], len(found) - self.index.sizes[shard]
        self.notices += _notices(found, url)
        if more > 0:
            self.notices.append(_outdated(url, promised, len(found), "; the rest is not used", more))
        elif found.damage and not more:  # with fewer samples than promised, each lost one gets a record of its own
            self.notices.append(Skipped("damaged shard", display_url(url), found.damage, samples=0))
        return self._open[shard]


class ShardDataset(Dataset[dict[str, Any]]):
    """Samples by (epoch, slot, position), as the samplers of ``utils/data/order.py`` give them.

    A sample is dict(image: uint8 (3, H, W) or None, label: int, position: int, key: str, skipped: list).

    order: "shuffled" for training: an unusable sample is recorded, and the next good sample of its run fills its slot.
    "sequential" for evaluation: an unusable sample is recorded and its ``image`` is None.
    with_labels: samples need a ``.cls`` (0 ... num_classes - 1 as text); otherwise they have no ``label``.

    ShardError after ``REPLACEMENTS_TRIED`` unusable samples in a row.
    """

    also_read: tuple[str, ...] = ()  # extensions to read besides images and labels

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
        self.index, self.transform, self.order, self.seed = index, transform, order, seed
        self.with_labels, self.num_classes = with_labels, num_classes
        self._extensions = (*IMAGE_EXTENSIONS, *self.also_read, *(("cls",) if with_labels else ()))
        self._orders: dict[int, SequentialOrder] = {}
        self._own: tuple[int, ShardReader, _Prefetcher | None] | None = None

    def __len__(self) -> int:
        return self.index.num_samples

    @property
    def collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], Any]:
        """The function that makes a batch of samples."""
        return partial(collate, no_images=self.no_images)

    @property
    def no_images(self) -> torch.Tensor:
        """The images of an empty batch, with the shape and dtype of other batches."""
        return torch.empty(0, 3, *(self.transform.output_size or (0, 0)), dtype=torch.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_orders": {}, "_own": None}

    def __getitem__(self, reference: tuple[int, int, int]) -> dict[str, Any]:
        epoch, slot, position = reference
        order = self.order_of(epoch)
        reader = self._reader_ahead_of(order, epoch, slot)
        skipped: list[Skipped] = []
        candidates = itertools.chain([order.reference(slot)], order.replacements(slot))
        for shard, sample in itertools.islice(candidates, REPLACEMENTS_TRIED):
            try:
                item = self.load(reader, shard, sample, epoch)
                break
            except BadSample as bad:
                skipped.append(bad.skipped)
        else:
            first = skipped[0]
            item = {"image": None, "key": first.where}
            if self.order == "shuffled":
                kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(bad.kind for bad in skipped).items())
                tried = f"{len(skipped)} samples in a row cannot be used ({kinds})"
                raise ShardError(f"{tried}; first {first.where}: {first.detail}; check the shards")
        notices, reader.notices = reader.notices, []
        return {**item, "position": position, "skipped": skipped + notices}

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        """Reads one sample: image, key and label. BadSample if it cannot be used."""
        key, members = reader.read(shard, sample, self._extensions)
        label = {"label": self._label(members)} if self.with_labels else {}
        return {"key": key, **label, "image": self._image(members)}

    def order_of(self, epoch: int) -> SequentialOrder:
        """The order of the samples in an epoch. The orders of two epochs are cached."""
        if epoch not in self._orders:
            if len(self._orders) == 2:
                del self._orders[next(iter(self._orders))]
            shuffled, sizes = self.order == "shuffled", self.index.sizes
            self._orders[epoch] = EpochOrder(sizes, self.seed, epoch) if shuffled else SequentialOrder(sizes)
        return self._orders[epoch]

    def shards_of(self, references: Sequence[tuple[int, int, int]]) -> list[str]:
        """The shards of these samples, as texts that are safe to show."""
        shards = [self.order_of(epoch).reference(slot)[0] for epoch, slot, _ in references]
        return [display_url(self.index.urls[shard]) for shard in dict.fromkeys(shards)]

    def _image(self, members: Members) -> torch.Tensor:
        data = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if data is None:
            raise BadSample("missing image", members.where, members.lacking(*IMAGE_EXTENSIONS))
        try:
            return decode(data, self.transform)
        except ImageError as error:
            raise BadSample("undecodable image", members.where, str(error)) from None

    def _label(self, members: Members) -> int:
        return read_label(members, MAX_LABEL if self.num_classes is None else self.num_classes)

    def _reader_ahead_of(self, order: SequentialOrder, epoch: int, slot: int) -> ShardReader:
        """This process's reader. A thread fetches the remote shards of this block and the next in the background."""
        if self._own is None or self._own[0] != os.getpid():  # a forked worker inherits the parent's: make new ones
            remote = any(map(is_remote, self.index.urls))
            self._own = os.getpid(), ShardReader(self.index), _Prefetcher(self.index) if remote else None
        _, reader, prefetcher = self._own
        stage = epoch, order.block_of(slot)
        if prefetcher is not None and prefetcher.stage != stage:
            ahead = order.shards_of_block(stage[1] + 1)
            if not ahead and self.order == "shuffled":
                ahead = self.order_of(epoch + 1).shards_of_block(0)
            prefetcher.want(stage, [*order.shards_of_block(stage[1]), *ahead])
        return reader


class _Prefetcher:
    """A thread that fetches remote shards ahead of time. Every worker has one; locks stop double downloads."""

    def __init__(self, index: ShardIndex) -> None:
        self.stage: tuple[int, int] | None = None  # epoch and block whose shards are wanted
        self._urls = index.urls
        self._cache = ShardCache(index.cache_dir, index.cache_limit_gb)
        self._wanted: list[str] = []
        self._wake = threading.Condition()
        threading.Thread(target=self._work, name="shard prefetch", daemon=True).start()

    def want(self, stage: tuple[int, int], shards: Sequence[int]) -> None:
        """Replaces the list of shards to fetch; they are fetched in the order given."""
        with self._wake:
            self.stage = stage
            self._wanted = [self._urls[shard] for shard in reversed(shards) if is_remote(self._urls[shard])]
            self._wake.notify()

    def _work(self) -> None:
        failed = set()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._wanted)
                url = self._wanted.pop()
            try:
                if url not in failed:
                    with self._cache.local(url, wait=False):
                        pass
            except Exception:  # the reader gets the same error when it needs the shard, and reports it
                failed.add(url)


def collate(samples: Sequence[dict[str, Any]], *, no_images: torch.Tensor) -> dict[str, Any]:
    """Samples -> dict(images uint8 (B, 3, H, W), positions int64 (B,), keys, skipped, labels int64 (B,), attributes).

    Labels and attributes are present if they were read. Of a sample without an image only ``skipped`` is used.
    """
    good = [sample for sample in samples if sample["image"] is not None]
    batch = {
        "images": torch.stack([sample["image"] for sample in good]) if good else no_images,
        "positions": torch.tensor([sample["position"] for sample in good], dtype=torch.int64),
        "keys": [sample["key"] for sample in good],
        "skipped": [record for sample in samples for record in sample["skipped"]],
    }
    if all("label" in sample for sample in good):
        batch["labels"] = torch.tensor([sample["label"] for sample in good], dtype=torch.int64)
    if all("attribute" in sample for sample in good):
        batch["attributes"] = [sample["attribute"] for sample in good]
    return batch


def train_batches(
    dataset: ShardDataset, *, first_step: int, num_workers: int, pin_memory: bool = False, **share: int
) -> Iterator[dict[str, Any]]:
    """The micro-batches of one rank from ``first_step`` on; ``share``: the other arguments of ``TrainBatchSampler``.

    If data workers are killed (out of memory, or by a signal), new ones continue at the same batch. The order is known,
    so no batch is lost or repeated. ShardError if workers die more than ``WORKER_DEATHS`` times in a row.
    """
    micro_batches = TrainBatchSampler(first_step=first_step, **share).micro_batches
    delivered, deaths = 0, 0
    while True:
        steps, done = divmod(delivered, micro_batches)
        sampler = TrainBatchSampler(first_step=first_step + steps, **share)
        batches = iter(PatientLoader(dataset, sampler, num_workers, pin_memory))
        # torch's handler would raise a worker's death at any point of the main thread. Without it, the next batch does.
        if num_workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for batch in itertools.islice(batches, done, None):  # skip what an interrupted step has delivered
                yield batch
                delivered, deaths = delivered + 1, 0
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not num_workers or not worker_died(error):
                raise
            deaths += 1
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if deaths > WORKER_DEATHS:
                died = f"--num_workers {num_workers}: data workers die again and again ({reason})"
                todo = "if memory runs out, use fewer, then go on with --resume_from_checkpoint latest"
                raise ShardError(f"{died}; {todo}") from None
            logger.warning("a data worker has died (%s); new ones go on with the same batches", reason)


def eval_loader(
    dataset: ShardDataset, *, num_samples: int, num_workers: int, pin_memory: bool = False, **share: int
) -> DataLoader:
    """Loads the first ``num_samples`` samples (or all), each once over all ranks. It can be iterated repeatedly.

    share: the other arguments of ``EvalBatchSampler``. Every rank gets the same number of batches; the last ones may be
    empty.
    """
    sampler = EvalBatchSampler(min(num_samples, len(dataset)), **share)
    return PatientLoader(dataset, sampler, num_workers, pin_memory, persistent=True)
