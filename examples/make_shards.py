r"""Turns an image folder, a Hugging Face dataset or some classes of existing shards into a set of shards.

    python examples/make_shards.py --data pictures --test_fraction 0.1 --output_dir data/pictures
    python examples/make_shards.py --data ILSVRC/imagenet-1k --splits train validation=test --classnames imagenet \
      --output_dir data/imagenet
    python examples/make_shards.py --data data/imagenet --classes imagenet100.txt --output_dir data/imagenet-100

--data is an image folder (<split>/<class>/*, or <class>/* alone), shards in the project's layout (<split>/*.tar), or what
the library `datasets` reads: a saved dataset, .parquet files, a name on the hub. Images are copied byte for byte. Each
is decoded once; one that cannot be is left out and named in skipped.txt.

What goes where is planned first and kept in <output_dir>/make_shards: started again after any interruption, the script
keeps the shards that are there, which are always whole, and makes those that are missing. The same images, flags and
seed give the same bytes, with any number of workers. docs/data.md has recipes for the usual sets.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.checkpoint import take_output_dir
from utils.cli import flag, nearest, parse_settings, required, run
from utils.data_order import permutation
from utils.errors import UserError
from utils.images import ImageError, ImageTransform, decode
from utils.progress import RunProgress, wide_console
from utils.shard_sources import expand_shards, one_line
from utils.shards import IMAGE_EXTENSIONS, ShardIndex, ShardReader, index_shards
from utils.skipped import BadSample, SkipCounter, Skipped
from utils.tar_index import scan_tar
from utils.zeroshot import (
    IMAGENET,
    LONGEST_NAME,
    imagenet_prompts,
    imagenet_wordnet_ids,
    read_classnames,
    read_templates,
)

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # what utils/images.py decodes
SIDECARS = ("txt", "json")  # of an image, beside it: its caption; its attribute, or the texts of a preference pair
TEST = "test"
SPLIT_NAMES = ("train", "val", "valid", "validation", TEST)
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
PLAN_FOLDER = "make_shards"
JPEG_QUALITY = 95  # of what --image_size makes smaller
FULL_SIZE = ImageTransform(resize=None, crop=None)
# Flags that say where and how fast, or whose effect is in the classes and samples of the plan.
NOT_IN_PLAN = {"data", "splits", "classes", "classnames", "templates", "cache_dir", "max_bad_fraction", "output_dir", "num_workers"}  # fmt: skip


@dataclass
class Settings:
    # fmt: off
    data: str = required("an image folder, a set of shards, a saved Hugging Face dataset, .parquet files, or a dataset's name on the hub", group="data", path=True)
    splits: list[str] | None = flag(None, "splits to take, as NAME or NAME=NEW_NAME; default those that are there; of a folder of classes alone, the one split that it becomes", group="data")
    labelled: bool = flag(True, "write the class of each image; false: all images below a split's folder, and no classes", group="data")
    dataset_config: str | None = flag(None, "configuration of a dataset on the hub that has several", group="data")
    image_column: str | None = flag(None, "of a Hugging Face dataset (default: its only column of images)", group="data")
    label_column: str | None = flag(None, "of a Hugging Face dataset (default: its only column of class labels, or the one named label)", group="data")
    caption_column: str | None = flag(None, "of a Hugging Face dataset: texts to be written as .txt", group="data")
    cache_dir: str | None = flag(None, "where indexes of shards, and what the library datasets prepares, are kept (default: the user's caches)", group="data", path=True)

    classes: list[str] | None = flag(None, "classes to take, in the order of the new labels: names, folders or ImageNet's WordNet ids, or one file with one a line (default: all)", group="classes", path=True)
    classnames: str | None = flag(None, "file with a name per class of --data, in the order of its labels, or imagenet for CLIP's names of the 1000 classes (default: that where all classes are WordNet ids of ImageNet's, else the set's own names or the folders', underscores as spaces)", group="classes", path=True)
    templates: str | None = flag(None, "file of prompt templates to be put beside the names, or imagenet for CLIP's 80 (default: the set's own; imagenet where the names are)", group="classes", path=True)

    verify: bool = flag(True, "decode every image fully once", group="images")
    image_size: int | None = flag(None, f"make the shorter edge of larger images so many pixels long, bicubic, JPEG of quality {JPEG_QUALITY} (default: bytes stay as they are)", group="images", minimum=1, maximum=4096)
    max_bad_fraction: float = flag(0.01, "share of images left out past which the script stops", group="images", minimum=0, maximum=1)

    output_dir: str = required("where the set goes; the same flags go on with an interrupted one", group="output", path=True)
    samples_per_shard: int = flag(1000, "samples per .tar", group="output", minimum=1)
    shuffle: str = flag("train", "splits whose samples are shuffled over their shards; others keep the order", group="output", choices=("train", "all", "none"))
    test_fraction: float = flag(0.0, "share of each class that a set without a test split gives up for one, at most 0.9; what is drawn depends on --seed alone", group="output", minimum=0, maximum=0.9)
    seed: int = flag(0, "of the shuffling, and of what --test_fraction draws", group="output", minimum=0)
    num_workers: int | None = flag(None, "processes (default: one per CPU core)", group="output", minimum=1)
    # fmt: on


@dataclass
class Sample:
    """reference: what the source finds it by, as a text."""

    key: str
    label: int | None
    reference: str


@dataclass
class Shard:
    """One .tar to be made: all that a worker has to know."""

    split: str  # the source's name of it
    path: Path
    record: Path  # what was left out of it
    samples: list[Sample]
    verify: bool
    image_size: int | None


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    source = open_source(settings)
    check_apart(output_dir, settings, source)
    check_used(output_dir)

    # Everything is decided here, from names and labels alone; no image has been read yet.
    names, new_labels = choose_classes(source, settings)
    templates = choose_templates(source, settings)
    shards: dict[str, list[Shard]] = {}
    unshuffled: list[str] = []
    for split, new_name in source.splits.items():
        samples = source.samples(split, new_labels)
        if not samples:
            raise UserError(f"--data {settings.data}: no image of these classes in its {split}; expected at least one")
        if settings.test_fraction:
            samples, shards[TEST] = hold_out(samples, split, settings, source)
        if settings.shuffle == "all" or (settings.shuffle == "train" and new_name == "train"):
            samples = [samples[place] for place in permutation(len(samples), settings.seed)]
        elif len(samples) > 1 and is_sorted([sample.label for sample in samples]):
            unshuffled.append(new_name)
        shards[new_name] = deal(samples, split, new_name, settings)
    shards = dict(sorted(shards.items(), key=lambda item: split_rank(item[0])))

    take_output_dir(output_dir)
    try:
        for leftover in output_dir.rglob(".*.part"):  # of a killed run
            leftover.unlink(missing_ok=True)
        keep_plan(output_dir, shards, names, settings)
        kept = make(shards, source, settings)
        for split, made in shards.items():
            sizes = {shard.path.name: read_record(shard)["samples"] for shard in made}
            write_whole(output_dir / split / "sizes.json", json.dumps(sizes, indent=1) + "\n")
        if names:
            write_whole(output_dir / "classnames.txt", "\n".join(names) + "\n")
        if templates:
            write_whole(output_dir / TEMPLATES_FILE, "\n".join(templates) + "\n")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
            raise
        raise UserError(
            f"--output_dir {output_dir}: {error.strerror}; make room, or mend it, and start again: finished shards are kept"
        ) from None
    print_summary(output_dir, shards, names, source, unshuffled, kept)


# ------------------------------------------------------------------------------------------------------------ sources


def open_source(settings: Settings) -> FolderSource | ShardSource | DatasetSource:
    """What --data is, by what lies there."""
    path = Path(settings.data).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return DatasetSource(settings)
        if any(path.glob("*/*.tar")):
            return ShardSource(path, settings)
        if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
            return DatasetSource(settings)
        if any(path.glob("*.tar")):
            raise UserError(
                f"--data {settings.data}: .tar files without a split; expected <split>/*.tar: move them into a folder train"
            )
        return FolderSource(path, settings)
    if path.suffix == ".parquet" or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", settings.data):
        return DatasetSource(settings)
    raise UserError(
        f"--data {settings.data}: no such directory, and no name on the hub; expected an image folder, a set of shards, "
        "a saved dataset, a .parquet file, or <org>/<name>"
    )


class FolderSource:
    """<root>/<split>/<class>/*, where a folder has the name of a usual or given split; else <root>/<class>/*.

    The number of a class is its place among the sorted folders of all splits. Images are searched in subfolders too.
    <image>.txt and <image>.json beside an image come along.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.labelled = root, settings.labelled
        self.kind = "an image folder"
        self.others: list[str] = []  # what is not taken: files that are no images, folders beside the splits
        wanted = parse_splits(settings.splits)
        # A class may be called train: as a split it would have folders of its own.
        present = [
            name
            for name in subfolders(root)
            if (name in SPLIT_NAMES or name in wanted) and (subfolders(root / name) or not self.labelled)
        ]
        if present:
            self.splits = pick_splits(settings, sorted(present, key=split_rank))
            self.folders = {split: root / split for split in self.splits}
            all_folders = [root / name for name in present]
        else:
            if len(wanted) > 1:
                raise UserError(
                    f"--splits {' '.join(settings.splits)}: {root} has no folder of a split; expected "
                    f"<split>/<class>/*, or one split that all of <class>/* become"
                )
            name = next(iter(wanted.values()), "train")
            self.splits, self.folders, all_folders = {name: name}, {name: root}, [root]
        self.others += [f"{name}/" for name in subfolders(root) if present and name not in present]
        self.class_ids = (
            sorted({name for folder in all_folders for name in subfolders(folder)}) if self.labelled else []
        )
        if self.labelled and not self.class_ids:
            raise UserError(
                f"--data {root}: no class folders; expected <split>/<class>/* or <class>/*, or --labelled false"
            )
        self.names = [clean_name(name.replace("_", " "), f"folder {name!r}") for name in self.class_ids]
        self.templates: list[str] = []

    def samples(self, split: str, new_labels: dict[int, int]) -> list[Sample]:
        root, found = self.folders[split], []
        classes = [(name, label) for label, name in enumerate(self.class_ids) if label in new_labels]
        with RunProgress(f"listing {split}", max(1, len(classes)), transient=True) as progress:
            for done, (name, label) in enumerate(classes if self.labelled else [("", None)], 1):
                for path in self._images(root / name):
                    found.append((name, new_labels.get(label), path))
                progress.update(done)
        stems = [path.rpartition("/")[2].rpartition(".")[0] for _, _, path in found]
        if len(set(stems)) < len(stems):  # such as cat/0001.jpg and dog/0001.jpg
            stems = [path.removeprefix(f"{split}/").rpartition(".")[0].replace("/", "-") for _, _, path in found]
        keys = unique_keys(map(usable_key, stems))
        return [Sample(key, label, path) for key, (_, label, path) in zip(keys, found)]

    def read(self, split: str, reference: str) -> tuple[str, bytes, dict[str, bytes]]:
        path = self.root / reference
        beside = {extension: path.with_suffix(f".{extension}") for extension in SIDECARS}
        try:
            members = {extension: text.read_bytes() for extension, text in beside.items() if text.is_file()}
            return "", path.read_bytes(), members
        except OSError as error:
            raise BadSample("missing image", self.where(split, reference), error.strerror or one_line(error)) from None

    def where(self, split: str, reference: str) -> str:
        return str(self.root / reference)

    def _images(self, folder: Path) -> list[str]:
        """The images below ``folder``, sorted, as paths from the root. UserError where a folder cannot be read."""

        def unreadable(error: OSError) -> None:
            raise UserError(f"--data {error.filename}: cannot be read ({error.strerror}); mend it and start again")

        found = []
        for place, folders, files in os.walk(folder, onerror=unreadable if folder.exists() else None):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = os.path.relpath(os.path.join(place, name), self.root).replace(os.sep, "/")
                if name.startswith("."):
                    continue
                if name.lower().endswith(FOLDER_SUFFIXES):
                    found.append(path)
                elif not name.endswith(tuple(f".{extension}" for extension in SIDECARS)):
                    self.others.append(path)
        return sorted(found)


class ShardSource:
    """Shards in the project's layout. All members of a sample are copied, only the class is written anew."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.labelled, self.cache_dir = root, settings.labelled, settings.cache_dir
        self.kind = "a set of shards"
        self.others: list[str] = []
        present = sorted((path.name for path in root.iterdir() if any(path.glob("*.tar"))), key=split_rank)
        self.splits = pick_splits(settings, present)
        self.class_ids, self.templates = [], []
        if self.labelled and ((root / "classnames.txt").is_file() or settings.classnames is None):
            self.class_ids = read_classnames(root / "classnames.txt")
        if (root / TEMPLATES_FILE).is_file():
            self.templates = read_templates(root / TEMPLATES_FILE)
        self.names = self.class_ids
        self.indexes: dict[str, ShardIndex] = {}
        self._readers: dict[str, ShardReader] = {}

    def samples(self, split: str, new_labels: dict[int, int]) -> list[Sample]:
        """UserError at a sample that is lost or has no valid label: nothing is left out of a set in silence."""
        urls = expand_shards([str(self.root / split)], flag="--data")
        with RunProgress(f"counting {split}", len(urls), transient=True) as progress:
            index = index_shards(
                urls, cache_dir=self.cache_dir, progress=lambda done, _: progress.update(done), flag="--data"
            )
        stop_at_loss(index.skipped)
        self.indexes[split] = index
        reader, found = ShardReader(index), []
        with RunProgress(f"reading the classes of {split}", index.num_samples, transient=True) as progress:
            try:
                for shard, size in enumerate(index.sizes):
                    for number in range(size):
                        key, members = reader.read(shard, number, ["cls"])
                        label = self._label(members, f"{index.urls[shard]}#{key}") if self.labelled else None
                        if not self.labelled or label in new_labels:
                            found.append((key, new_labels.get(label), f"{shard}/{number}"))
                    progress.update(sum(index.sizes[: shard + 1]))
                stop_at_loss(reader.notices)
            except BadSample as bad:
                stop_at_loss([bad.skipped])
            finally:
                reader.close()
        keys = unique_keys(key for key, _, _ in found)
        return [Sample(key, label, reference) for key, (_, label, reference) in zip(keys, found)]

    def read(self, split: str, reference: str) -> tuple[str, bytes, dict[str, bytes]]:
        shard, number = map(int, reference.split("/"))
        if split not in self._readers:  # in the process that reads: descriptors are not shared
            self._readers[split] = ShardReader(self.indexes[split])
        _, members = self._readers[split].read(shard, number)
        members.pop("cls", None)
        extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
        if extension is None:
            raise BadSample("missing image", self.where(split, reference), "no image member")
        return extension, members.pop(extension), members

    def where(self, split: str, reference: str) -> str:
        shard, _, number = reference.partition("/")
        return f"{self.indexes[split].urls[int(shard)]}#{number}"

    def _label(self, members: dict[str, bytes], where: str) -> int:
        text = members.get("cls", b"").decode("ascii", "replace").strip()
        num_classes = len(self.names)
        if not (text.isdecimal() and len(text) <= 9) or int(text) >= num_classes:
            raise UserError(
                f"--data {where}: .cls is {text[:40]!r}; expected 0 ... {num_classes - 1}, a line of its class names"
            )
        return int(text)


class DatasetSource:
    """A Hugging Face dataset: a saved one, .parquet files, or a name on the hub. Images as the bytes that are stored."""

    def __init__(self, settings: Settings) -> None:
        self.labelled, self.caption_column = settings.labelled, settings.caption_column
        self.kind = "a Hugging Face dataset"
        self.others: list[str] = []
        self.templates: list[str] = []
        datasets = import_datasets(settings.data)
        loaded = load_dataset(datasets, settings)
        if isinstance(loaded, datasets.Dataset):
            wanted = parse_splits(settings.splits)
            loaded = {next(iter(wanted), str(loaded.split or "train")): loaded}
        self.splits = pick_splits(settings, sorted(loaded, key=split_rank))
        features = loaded[next(iter(self.splits))].features
        self.image_column = pick_column(
            "image_column",
            settings.image_column,
            features,
            [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        )
        self.class_ids, self.names, self.label_column = [], [], None
        if self.labelled:
            labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
            labels = labels or [name for name in ("label", "labels", "cls") if name in features]
            self.label_column = pick_column("label_column", settings.label_column, features, labels)
            self.class_ids = list(getattr(features[self.label_column], "names", None) or [])
            self.names = [clean_name(name, f"class {name!r}") for name in self.class_ids]
        if self.caption_column is not None:
            pick_column("caption_column", self.caption_column, features, [])
        # Not decoded: what is stored is what is written.
        self.loaded = {
            split: loaded[split].cast_column(self.image_column, datasets.Image(decode=False)) for split in self.splits
        }
        columns = [self.image_column, *([self.caption_column] if self.caption_column else [])]
        self.rows = {split: dataset.select_columns(columns) for split, dataset in self.loaded.items()}

    def samples(self, split: str, new_labels: dict[int, int]) -> list[Sample]:
        count = len(self.loaded[split])
        if not self.labelled:
            return [Sample(f"{row:08d}", None, str(row)) for row in range(count)]
        labels = self.loaded[split].select_columns([self.label_column])[:][self.label_column]
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < len(self.names):
                raise UserError(
                    f"--data, {split}, row {row}: {self.label_column} is {label!r}; expected 0 ... {len(self.names) - 1}; a "
                    "split without labels is left out by naming the others with --splits, or needs --labelled false"
                )
        return [Sample(f"{row:08d}", new_labels[label], str(row)) for row, label in enumerate(labels) if label in new_labels]  # fmt: skip

    def read(self, split: str, reference: str) -> tuple[str, bytes, dict[str, bytes]]:
        row = self.rows[split][int(reference)]
        image = row[self.image_column] or {}
        data = image.get("bytes")
        try:
            if data is None and image.get("path"):
                data = Path(image["path"]).read_bytes()
        except OSError as error:
            raise BadSample("missing image", self.where(split, reference), error.strerror or one_line(error)) from None
        if data is None:
            raise BadSample("missing image", self.where(split, reference), "the row has none")
        caption = row[self.caption_column] if self.caption_column else None
        if isinstance(caption, list):  # of several the first
            caption = caption[0] if caption else None
        return "", data, {} if caption is None else {"txt": str(caption).encode()}

    def where(self, split: str, reference: str) -> str:
        return f"{split}, row {reference}"


def import_datasets(data: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {data}: {'' if Path(data).exists() else 'nothing is there, and '}a Hugging Face dataset is read with the library "
            "datasets, which is not installed; correct the path, or pip install datasets"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        # They run a script that comes with a dataset; later ones refuse it.
        raise UserError(
            f"--data {data}: datasets {datasets.__version__} may run code of a dataset's author; expected 4 or later: pip install -U datasets"
        )
    return datasets


def load_dataset(datasets: Any, settings: Settings) -> Any:
    """The splits by name, or one alone. UserError for whatever the library says."""
    path = Path(settings.data).expanduser()
    cache = settings.cache_dir and str(Path(settings.cache_dir) / "datasets")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)}, cache_dir=cache)["train"]
        where = str(path) if path.is_dir() else settings.data
        return datasets.load_dataset(where, settings.dataset_config, cache_dir=cache)
    except Exception as error:  # its own errors, the hub's, pyarrow's, OSError
        raise UserError(
            f"--data {settings.data}: {'' if path.exists() else 'no such directory, and '}the library datasets cannot read it "
            f"({one_line(error)}); correct the path or the name; a gated one needs its terms accepted on its page and `hf auth login`"
        ) from None


# ------------------------------------------------------------------------------------------- splits, classes and names


def parse_splits(asked: list[str] | None) -> dict[str, str]:
    """["train", "validation=test"] -> {"train": "train", "validation": "test"}."""
    splits = {}
    for word in asked or []:
        name, _, new_name = word.partition("=")
        new_name = new_name or name
        if not re.fullmatch(r"\w[\w.-]*", new_name) or new_name == PLAN_FOLDER or new_name in splits.values():
            raise UserError(f"--splits {word}: {new_name!r} is no name for a folder here, or given twice; expected NAME or NAME=NEW_NAME")  # fmt: skip
        splits[name] = new_name
    return splits


def pick_splits(settings: Settings, present: list[str]) -> dict[str, str]:
    """Name in --data -> name of the new split: those asked for, else all."""
    for name in (wanted := parse_splits(settings.splits)):
        if name not in present:
            raise UserError(
                f"--splits {name}: no such split in {settings.data}; there is {', '.join(present) or 'none'}"
            )
    return wanted or parse_splits(present)


def split_rank(name: str) -> tuple[int, str]:
    """train first, test last, others between."""
    return SPLIT_NAMES.index(name) if name in SPLIT_NAMES else 1, name


def pick_column(flag_name: str, asked: str | None, features: dict[str, Any], candidates: list[str]) -> str:
    if asked is not None:
        if asked not in features:
            match = nearest(asked, list(features))
            hint = f"; did you mean {match}?" if match else ""
            raise UserError(f"--{flag_name} {asked}: no such column; there are {', '.join(features)}{hint}")
        return asked
    if len(candidates) != 1:
        found = f"{', '.join(candidates)} could be it" if candidates else "none can be told to be it"
        other = "" if flag_name == "image_column" else ", or say --labelled false"
        raise UserError(f"--{flag_name}: missing, {found}; name one of {', '.join(features)}{other}")
    return candidates[0]


def choose_classes(source: Any, settings: Settings) -> tuple[list[str], dict[int, int]]:
    """Names of the new classes, and label in the source -> new label. Tells the source what its classes are called.

    ImageNet's names follow from the WordNet ids where the classes have them, however few they are, else from the label.
    """
    if not source.labelled:
        if settings.classes or settings.classnames:
            raise UserError("--labelled false: has no classes; leave --classes and --classnames out")
        return [], {}
    ids, imagenet_ids = source.class_ids, imagenet_wordnet_ids()
    by_id = bool(ids) and set(ids) <= set(imagenet_ids)
    aliases = [ids]
    if settings.classnames == IMAGENET or (settings.classnames is None and by_id):
        names, source.templates = imagenet_prompts()
        if by_id:
            names = [names[imagenet_ids.index(name)] for name in ids]
        elif ids and len(ids) != len(names):
            raise UserError(
                f"--classnames imagenet: {settings.data} has {len(ids)} classes, the first is {ids[0]!r}; expected folders "
                "named by WordNet ids such as n01440764, or 1000 classes in ImageNet's order; give a file of names"
            )
        else:
            aliases.append(imagenet_ids)
    elif settings.classnames is not None:
        names = read_classnames(settings.classnames)
        if ids and len(names) != len(ids):
            raise UserError(
                f"--classnames {settings.classnames}: {len(names)} names for {len(ids)} classes; expected one for each, in "
                f"order: {', '.join(ids[:3])}, ..."
            )
    elif source.names:
        names = source.names
        if names == imagenet_prompts()[0]:
            aliases.append(imagenet_ids)
    else:
        raise UserError(f"--data {settings.data}: its labels have no names; give a file with --classnames")
    source.names = names
    if not settings.classes:
        return names, {label: label for label in range(len(names))}
    return renumber(settings, [*aliases, names])


def renumber(settings: Settings, aliases: list[list[str]]) -> tuple[list[str], dict[int, int]]:
    """The classes of --classes by any of their names; the last of ``aliases`` are those that are written."""
    wanted, flag_text = settings.classes, "--classes"
    if len(wanted) == 1 and os.path.isfile(wanted[0]):
        flag_text, wanted = f"--classes {wanted[0]}", read_classnames(wanted[0])
    new_labels: dict[int, int] = {}
    for word in wanted:
        found = {label for names in aliases for label, name in enumerate(names) if name == word}
        if not found:
            match = nearest(word, [name for names in aliases for name in names])
            hint = f"did you mean {match!r}?" if match else f"expected one of its {len(aliases[-1])} classes"
            raise UserError(f"{flag_text} {word!r}: no such class in {settings.data}; {hint}")
        if len(found) > 1:
            raise UserError(
                f"{flag_text} {word!r}: the name of {len(found)} classes of {settings.data}; give their folders or WordNet "
                "ids, or make the names differ"
            )
        label = found.pop()
        if label in new_labels:
            raise UserError(f"{flag_text} {word!r}: given twice; every class has one label")
        new_labels[label] = len(new_labels)
    return [aliases[-1][label] for label in new_labels], new_labels


def choose_templates(source: Any, settings: Settings) -> list[str]:
    if settings.templates == IMAGENET:
        return imagenet_prompts()[1]
    if settings.templates is None:
        return source.templates
    if not os.path.isfile(settings.templates):
        raise UserError(f"--templates {settings.templates}: no such file; expected templates with {{c}}, one per line")
    return read_templates(settings.templates)


def clean_name(name: str, where: str) -> str:
    """A class name as one line of classnames.txt."""
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise UserError(f"--data, {where}: no class name: empty, too long or with control characters; rename it")
    return name


def usable_key(stem: str) -> str:
    """A file's name as a key: up to the first dot it names the sample, so that it must have none."""
    key = re.sub(r"[.\x00-\x1f\x7f/\\]", "_", stem.encode("utf-8", "replace").decode())
    return key if len(key) <= 200 else f"{key[:180]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def unique_keys(keys: Iterable[str]) -> list[str]:
    """The keys in their order; one that was there before gets the lowest free number behind it."""
    taken: dict[str, int] = {}
    unique = []
    for key in keys:
        name = key
        while name in taken:
            taken[key] += 1
            name = f"{key}-{taken[key]}"
        taken[name] = 0
        unique.append(name)
    return unique


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))
        )


def is_sorted(labels: Sequence[int | None]) -> bool:
    """Whether there is more than one class, and each ends before the next begins."""
    return None not in labels and labels[0] != labels[-1] and all(a <= b for a, b in zip(labels, labels[1:]))


def stop_at_loss(skipped: Sequence[Skipped]) -> None:
    """UserError that names the first of ``skipped``, if there is one."""
    if skipped:
        raise UserError(f"--data {skipped[0].where}: {skipped[0].kind}: {skipped[0].detail}; mend it and start again")


# ----------------------------------------------------------------------------------------------------------- the plan


def check_apart(output_dir: Path, settings: Settings, source: Any) -> None:
    """UserError where the new set would lie in the one that is read."""
    root, new = Path(settings.data).expanduser().resolve(), output_dir.resolve()
    if isinstance(source, ShardSource):
        inside = any(new / name == root / split for split in source.splits for name in source.splits.values())
    else:
        inside = root.is_dir() and (new == root or root in new.parents)
    if inside:
        raise UserError(f"--output_dir {output_dir}: is where the samples come from; give another directory")


def check_used(output_dir: Path) -> None:
    """UserError where something lies in ``output_dir`` that no earlier start of this script began."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; give a directory")
    begun = (output_dir / PLAN_FOLDER).is_dir()
    if output_dir.is_dir() and not begun and any(path.name != ".lock" for path in output_dir.iterdir()):
        raise UserError(
            f"--output_dir {output_dir}: not empty, and not begun by make_shards.py; give another directory"
        )


def deal(samples: list[Sample], split: str, new_name: str, settings: Settings) -> list[Shard]:
    """The samples in order, ``samples_per_shard`` to each of 000000.tar, 000001.tar, ..."""
    output_dir, size = Path(settings.output_dir), settings.samples_per_shard
    return [
        Shard(
            split,
            output_dir / new_name / f"{number:06d}.tar",
            output_dir / PLAN_FOLDER / new_name / f"{number:06d}.json",
            samples[start : start + size],
            settings.verify,
            settings.image_size,
        )
        for number, start in enumerate(range(0, len(samples), size))
    ]


def hold_out(samples: list[Sample], split: str, settings: Settings, source: Any) -> tuple[list[Sample], list[Shard]]:
    """What is left for training, in its order, and the shards of the test split, whose classes are mixed."""
    if list(source.splits.values()) != ["train"]:
        raise UserError(
            f"--test_fraction {settings.test_fraction:g}: {settings.data} becomes {', '.join(source.splits.values())}; expected "
            "train alone to take a test split from"
        )
    order = permutation(len(samples), settings.seed, 1)
    by_class: dict[int | None, list[int]] = {}
    for place in order:
        by_class.setdefault(samples[place].label, []).append(place)
    held = {place for places in by_class.values() for place in places[: round(settings.test_fraction * len(places))]}
    if not held or len(held) == len(samples):
        raise UserError(
            f"--test_fraction {settings.test_fraction:g}: leaves {len(samples) - len(held)} images for train and {len(held)} for "
            "test; expected some of both: give a larger or a smaller share"
        )
    left = [sample for place, sample in enumerate(samples) if place not in held]
    return left, deal([samples[place] for place in order if place in held], split, TEST, settings)


def keep_plan(output_dir: Path, shards: dict[str, list[Shard]], names: list[str], settings: Settings) -> None:
    """Writes the plan, or compares it with the one that is there. UserError where they differ.

    make_shards/<split>.tsv: shard, key, label, source of every sample; make_shards/plan.json: settings, class names, and
    the SHA-256 of each .tsv.
    """
    digests = {split: hashlib.sha256() for split in shards}
    for split, made in shards.items():
        for line in plan_lines(made):
            digests[split].update(line.encode("utf-8", "backslashreplace"))
    plan = {
        "format": 1,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_IN_PLAN},
        "classes": names,
        "splits": {
            split: {"samples": sum(len(shard.samples) for shard in made), "sha256": digests[split].hexdigest()}
            for split, made in shards.items()
        },
    }
    path = output_dir / PLAN_FOLDER / "plan.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        differences = plan_differences(before, plan)
    except FileNotFoundError:
        differences = []
        for split, made in shards.items():
            (output_dir / split).mkdir(exist_ok=True)
            (output_dir / PLAN_FOLDER / split).mkdir(parents=True, exist_ok=True)
            write_whole(output_dir / PLAN_FOLDER / f"{split}.tsv", plan_lines(made))
        write_whole(path, json.dumps(plan, indent=1) + "\n")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; give another --output_dir, or delete this one") from None
    if differences:
        raise UserError(
            f"--output_dir {output_dir}: begun with other settings or data ({'; '.join(differences)}); give the same ones, or "
            "another directory"
        )


def plan_lines(made: list[Shard]) -> Iterator[str]:
    for shard in made:
        for sample in shard.samples:
            label = "" if sample.label is None else sample.label
            yield f"{shard.path.name}\t{sample.key}\t{label}\t{sample.reference}\n"


def plan_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if before["format"] != now["format"]:
        return ["it was made by another version of the script"]
    found = [
        f"{name} was {before['settings'].get(name)}, is {value}"
        for name, value in now["settings"].items()
        if before["settings"].get(name) != value
    ]
    if before["classes"] != now["classes"]:
        found.append(f"the classes differ: {len(before['classes'])} then, {len(now['classes'])} now")
    if list(before["splits"]) != list(now["splits"]):
        found.append(f"the splits were {', '.join(before['splits'])}, are {', '.join(now['splits'])}")
    elif not found and before["splits"] != now["splits"]:
        split = next(split for split in now["splits"] if before["splits"][split] != now["splits"][split])
        counts = [plan["splits"][split]["samples"] for plan in (before, now)]
        found.append(f"the images of {split} differ: {counts[0]} then, {counts[1]} now")
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def make(shards: dict[str, list[Shard]], source: Any, settings: Settings) -> int:
    """Makes the shards that are missing, keeps count of what is left out, writes skipped.txt; returns how many it kept.

    UserError past ``max_bad_fraction``, on a full disk, where a worker dies. Shards that are done stay.
    """
    work = [shard for made in shards.values() for shard in made]
    total = sum(len(shard.samples) for shard in work)
    list_file = Path(settings.output_dir) / "skipped.txt"
    skips = SkipCounter(ShardIndex([], [total], [], ""), settings.max_bad_fraction, report=None)
    num_workers = min(len(work), settings.num_workers or len(os.sched_getaffinity(0)))
    kept, left_out, said_at = 0, 0, time.monotonic()
    try:
        with (
            contextlib.closing(results(work, source, num_workers)) as records,
            RunProgress("writing", total) as progress,
        ):
            for record in records:
                kept += record["kept"]
                left_out += len(record["skipped"])
                skips.seen += record["samples"] + len(record["skipped"])
                skips.add([Skipped(*entry) for entry in record["skipped"]])
                report = time.monotonic() - said_at > 10 or skips.seen == total
                said_at = time.monotonic() if report else said_at
                progress.update(skips.seen, {"skipped": left_out}, report=report)
                try:
                    skips.check()
                except UserError as error:
                    raise UserError(f"{error}; {list_file} names them; finished shards are kept") from None
    finally:
        write_skipped(list_file, work)
    return kept


def results(work: list[Shard], source: Any, num_workers: int) -> Iterator[dict[str, Any]]:
    """The records of all shards, in the order in which they are done."""
    if num_workers == 1:
        yield from (write_shard(source, shard) for shard in work)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), initializer=start_worker, initargs=(source,)
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(write_in_worker, shard) for shard in work]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            f"--num_workers {num_workers}: a worker has died, perhaps for want of memory; use fewer and start again: finished "
            "shards are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


worker_source: Any = None  # of this worker process


def start_worker(source: Any) -> None:
    """Ctrl-C is for the main process, and a worker whose main process was killed must not go on.

    One thread each: a forked process waits forever for OpenMP threads that its parent had and it has not.
    """
    global worker_source
    worker_source = source
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_in_worker(shard: Shard) -> dict[str, Any]:
    return write_shard(worker_source, shard)


def write_shard(source: Any, shard: Shard) -> dict[str, Any]:
    """{"samples": how many are in it, "skipped": [[kind, where, detail], ...], "kept": whether it was there already}.

    A shard that is there, with a record that fits what its headers say, is kept. Otherwise it is written aside, its headers
    are read again and compared with the plan, and it gets its name when it lies on the disk.
    """
    kept = finished(shard)
    if kept is not None:
        return kept | {"kept": True}
    # Two processes never write one file: a worker of a killed run may live on for a moment.
    aside = shard.path.with_name(f".{shard.path.name}.{os.getpid()}.part")
    skipped: list[Skipped] = []
    keys = []
    try:
        # A fixed time and owner: the bytes depend on the samples alone. pax: keys of any length and alphabet.
        with aside.open("wb") as file:
            with webdataset.TarWriter(
                file, mtime=0, user="root", group="root", encoder=False, format="PAX_FORMAT"
            ) as tar:
                for sample in shard.samples:
                    try:
                        members = make_members(source, shard, sample)
                    except BadSample as bad:
                        skipped.append(bad.skipped)
                        continue
                    tar.write({"__key__": sample.key, **members})
                    keys.append(sample.key)
            file.flush()
            os.fsync(file.fileno())
        found = scan_tar(aside)
        if found.damage or found.keys != keys:
            raise UserError(
                f"{aside}: holds {len(found)} samples ({found.damage or 'other keys'}), {len(keys)} were written; check the "
                "disk and start again"
            )
        record = {"samples": len(keys), "skipped": [[entry.kind, entry.where, entry.detail] for entry in skipped]}
        write_whole(shard.record, json.dumps(record) + "\n")
        os.replace(aside, shard.path)
    finally:
        aside.unlink(missing_ok=True)
    return record | {"kept": False}


def read_record(shard: Shard) -> dict[str, Any]:
    return json.loads(shard.record.read_text(encoding="utf-8"))


def finished(shard: Shard) -> dict[str, Any] | None:
    """The record of a shard that is there and holds what the plan says, but for what the record says is left out."""
    try:
        record = read_record(shard)
        found = scan_tar(shard.path)
        places = {where for _, where, _ in record["skipped"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = found.damage is None and len(found) == record["samples"] == len(shard.samples) - len(places)
    return record if whole and set(found.keys) <= {sample.key for sample in shard.samples} else None


def make_members(source: Any, shard: Shard, sample: Sample) -> dict[str, bytes]:
    """Extension -> bytes of a sample. BadSample where its image cannot be used."""
    extension, data, members = source.read(shard.split, sample.reference)
    try:
        if shard.image_size is not None:
            smaller = decode(data, ShrinkOnly(resize=shard.image_size, crop=None))
            if smaller is not None:
                extension, data = "jpg", encode(smaller, "JPEG", quality=JPEG_QUALITY)
        elif shard.verify:
            decode(data, FULL_SIZE)
        if not extension:
            extension = known_format(data)
        if not extension:  # GIF, BMP: not in the layout; PNG loses nothing
            extension, data = "png", encode(decode(data, FULL_SIZE), "PNG")
    except ImageError as error:
        raise BadSample("undecodable image", source.where(shard.split, sample.reference), str(error)) from None
    label = {} if sample.label is None else {"cls": str(sample.label).encode()}
    return {extension: data, **label, **members}


class ShrinkOnly(ImageTransform):
    """None for an image, decoded fully, whose shorter edge is not longer than ``resize``."""

    def __call__(self, image: Image.Image) -> Any:
        if min(image.size) > self.resize:
            return super().__call__(image)
        image.load()
        return None


def known_format(data: bytes) -> str:
    """jpg, png or webp by the first bytes, whatever the file's name says; "" for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def encode(pixels: Any, format: str, **options: Any) -> bytes:
    """uint8 tensor (3, H, W) -> an encoded image."""
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(stream, format, **options)
    return stream.getvalue()


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """The file is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_skipped(path: Path, work: list[Shard]) -> None:
    """skipped.txt: kind, place and reason of every sample left out of the shards that are done, in their order."""
    lines = []
    for shard in work:
        try:
            record = read_record(shard)
        except (OSError, ValueError):
            continue
        lines += ["\t".join(entry) + "\n" for entry in record["skipped"]]
    if lines:
        write_whole(path, lines)
    else:
        path.unlink(missing_ok=True)


def print_summary(
    output_dir: Path,
    shards: dict[str, list[Shard]],
    names: list[str],
    source: Any,
    unshuffled: list[str],
    kept: int,
) -> None:
    table = Table(title=f"{output_dir}: {len(names)} classes, from {source.kind}", title_justify="left")
    for title in ("split", "samples", "left out", "shards", "MiB", "classes"):
        table.add_column(title, justify="left" if title == "split" else "right")
    for split, made in shards.items():
        sizes = json.loads((output_dir / split / "sizes.json").read_text(encoding="utf-8"))
        planned = sum(len(shard.samples) for shard in made)
        found = sum(sizes.values())
        size = sum(shard.path.stat().st_size for shard in made) / 2**20
        labels = {sample.label for shard in made for sample in shard.samples} - {None}
        row = (split, f"{found:,}", f"{planned - found:,}", f"{len(made):,}", f"{size:,.1f}", f"{len(labels):,}")
        table.add_row(*row)
    wide_console().print(table)
    if kept:
        print(f"{kept} shards were there already and were kept.")
    if (output_dir / "skipped.txt").exists():
        print(f"{output_dir / 'skipped.txt'} names the images that were left out.")
    if source.others:
        print(f"Not taken: {len(source.others)} other files or folders, the first is {source.others[0]}.")
    for split in unshuffled:
        print(
            f"{split} is sorted by class: the first N samples of an evaluation are of the first classes; --shuffle all mixes them."
        )
    train = next((split for split in shards if split == "train"), next(iter(shards)))
    evaluated = next((split for split in shards if split in SPLIT_NAMES and split != "train"), None) if names else None
    words = ["python", "train_lore.py", "--model_name_or_path", "openai/clip-vit-base-patch32"]
    words += ["--train_shards", str(output_dir / train)]
    words += ["--eval_shards", str(output_dir / evaluated)] if evaluated else []
    print("Train on it:\n\n    " + shlex.join([*words, "--output_dir", "runs/lore4"]))


if __name__ == "__main__":
    run(main)
