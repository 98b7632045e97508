r"""Turns an image folder, a Hugging Face dataset or some classes of existing shards into a set of shards.

    python examples/make_shards.py --data pictures --test_fraction 0.1 --output_dir data/pictures
    python examples/make_shards.py --data ILSVRC/imagenet-1k --splits train validation=test --classnames imagenet \
      --output_dir data/imagenet
    python examples/make_shards.py --data data/imagenet --classes imagenet100.txt --output_dir data/imagenet-100

--data is an image folder (<split>/<class>/*, or only <class>/*), shards in the project's layout (<split>/*.tar), or an
input of the library `datasets`: a saved dataset, .parquet files, a name on the hub. Images are copied byte for byte.
Each image is decoded once. If that fails, the image is left out and listed in skipped.txt.

The script first writes a plan to <output_dir>/make_shards. After an interruption, start it again: it keeps the finished
shards, which are always complete, and makes the missing ones. It also makes a shard again if its images have changed.
The same images, flags and seed give the same bytes, with any number of workers. docs/data.md has recipes for the usual
sets.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
import webdataset
from PIL import Image
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, nearest, parse_settings, required, run
from utils.data.folders import SUFFIXES, LeftOut, describe, is_picture, is_system, leave, subfolders, walk
from utils.data.images import OWN_FORMATS, ImageError, ImageTransform, as_shard_member, decode, encode
from utils.data.order import permutation
from utils.data.shards import IMAGE_EXTENSIONS, Members, ShardIndex, ShardReader, index_shards
from utils.data.skipped import BadSample, SkipCounter, Skipped
from utils.data.sources import default_cache_dir, expand_shards, has_shards, known_path, one_line
from utils.data.tars import scan_tar
from utils.errors import UserError
from utils.processes.progress import RunProgress, wide_console
from utils.sets.labelled import (
    IMAGENET,
    LONGEST_NAME,
    PROMPTS,
    composed,
    imagenet_prompts,
    read_classnames,
    read_templates,
    twins,
    warn_of_twins,
)
from utils.text_files import parse_label
from utils.training.checkpoint import take_output_dir

SIDECARS = ("txt", "json")  # files beside an image: its caption; its attribute, or the texts of a preference pair
TEST = "test"
SPLIT_NAMES = ("train", "val", "valid", "validation", TEST)
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
PLAN_FOLDER = "make_shards"
OF_A_SET = (
    ".tar",
    "sizes.json",
    "classnames.txt",
    TEMPLATES_FILE,
    "skipped.txt",
    ".lock",
)  # files that belong to a set and are not reported as left out
JPEG_QUALITY = 95  # of images that --image_size shrinks; their colours keep the full resolution
FORMAT = 2  # version of the shards' contents; shards of another version are made again
UNREADABLE = "unreadable image"  # the system could not read the file; the next start tries again
FULL_SIZE = ImageTransform(resize=None, crop=None)
# Flags that may change between starts: paths, speed, and those whose effect is in the plan's classes and samples.
NOT_IN_PLAN = {
    "data", "splits", "classes", "classnames", "templates",
    "cache_dir", "max_bad_fraction", "output_dir", "num_workers",
}  # fmt: skip


data_flag, classes_flag = partial(flag, group="data"), partial(flag, group="classes")
images_flag, output_flag = partial(flag, group="images"), partial(flag, group="output")


@dataclass
class Settings:
    data: str = required(
        "an image folder, a set of shards, a saved Hugging Face dataset, .parquet files, or a name on the hub",
        group="data",
        path=True,
    )
    splits: list[str] | None = data_flag(
        None,
        "splits to take, as NAME or NAME=NEW_NAME (default: those that are there; "
        "a folder of classes alone becomes the one split given here)",
    )
    labelled: bool = data_flag(
        True, "write the class of each image; false: all images below a split's folder, and no classes"
    )
    dataset_config: str | None = data_flag(None, "configuration of a dataset on the hub that has several")
    image_column: str | None = data_flag(None, "of a Hugging Face dataset (default: its only column of images)")
    label_column: str | None = data_flag(
        None, "of a Hugging Face dataset (default: its only column of class labels, or the one named label)"
    )
    caption_column: str | None = data_flag(None, "of a Hugging Face dataset: texts to be written as .txt")
    cache_dir: str | None = data_flag(
        None, "for indexes of shards and what the library datasets prepares (default: the user's caches)", path=True
    )

    classes: list[str] | None = classes_flag(
        None,
        "classes to take, in the order of the new labels: names, folders or ImageNet's WordNet ids, "
        "or one file with one a line (default: all)",
        path=True,
    )
    classnames: str | None = classes_flag(
        None,
        "file with a name per class of --data, in the order of its labels, or imagenet for CLIP's names of the "
        "1000 classes (default: imagenet where all classes are its WordNet ids, else the set's own names "
        "or the folders', underscores as spaces)",
        path=True,
    )
    templates: str | None = classes_flag(
        None,
        "file of prompt templates to be put beside the names, or imagenet for CLIP's 80 "
        "(default: the set's own; imagenet where the names are)",
        path=True,
    )

    verify: bool = images_flag(True, "decode every image fully once")
    image_size: int | None = images_flag(
        None,
        f"shrink larger images to this shorter edge in pixels: bicubic, JPEG of quality {JPEG_QUALITY} "
        "(default: bytes stay as they are)",
        minimum=1,
        maximum=4096,
    )
    max_bad_fraction: float = images_flag(
        0.01, "share of images left out past which the script stops", minimum=0, maximum=1
    )

    output_dir: str = required(
        "where the set goes; the same flags go on with an interrupted one", group="output", path=True
    )
    samples_per_shard: int = output_flag(1000, "samples per .tar", minimum=1)
    shuffle: str = output_flag(
        "train",
        "splits whose samples are shuffled over their shards; others keep the order",
        choices=("train", "all", "none"),
    )
    test_fraction: float = output_flag(
        0.0,
        "share of each class that a set without a test split gives up for one, at most 0.9; "
        "what is drawn depends on --seed alone",
        minimum=0,
        maximum=0.9,
    )
    seed: int = output_flag(0, "of the shuffling, and of what --test_fraction draws", minimum=0)
    num_workers: int | None = output_flag(None, "processes (default: one per CPU core)", minimum=1)


@dataclass
class Sample:
    """One image to write. reference: a text by which the source finds it."""

    key: str
    label: int | None
    reference: str


@dataclass
class Shard:
    """One .tar to make, with everything that a worker needs to know."""

    split: str  # its name in the source
    path: Path
    record: Path  # JSON file that says what the shard holds and what was left out
    samples: list[Sample]
    verify: bool
    image_size: int | None


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    source = open_source(settings)
    check_apart(output_dir, settings, source)
    check_used(output_dir)

    # Plan the whole set from names and labels, before any image is read.
    names, new_labels = choose_classes(source, settings)
    warn_of_twins(names, f"--data {settings.data}")
    templates = choose_templates(source, settings)
    shards: dict[str, list[Shard]] = {}
    unshuffled: list[str] = []
    for split, new_name in source.splits.items():
        samples = source.samples(split, new_labels)
        if not samples:
            left_out = f" (not taken: {describe(source.left_out)})" if source.left_out else ""
            raise UserError(
                f"--data {settings.data}: no image of these classes in its {split}; expected at least one{left_out}"
            )
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
        for leftover in output_dir.rglob(".*.part"):  # left by a killed run
            leftover.unlink(missing_ok=True)
        keep_plan(output_dir, shards, names, settings)
        kept, again = make(shards, source, settings)
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
            f"--output_dir {output_dir}: {error.strerror}; make room, or mend it, and start again: "
            "finished shards are kept"
        ) from None
    print_summary(output_dir, shards, names, source, unshuffled, kept, again)


# ------------------------------------------------------------------------------------------------------------ sources


def open_source(settings: Settings) -> FolderSource | ShardSource | DatasetSource:
    """Opens --data as the kind of source that its contents show."""
    path = Path(known_path(settings.data))
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return DatasetSource(settings)
        if any(map(has_shards, path.iterdir())):
            return ShardSource(path, settings)
        if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
            return DatasetSource(settings)
        if has_shards(path):
            raise UserError(
                f"--data {settings.data}: .tar files without a split; expected <split>/*.tar: "
                "move them into a folder train"
            )
        return FolderSource(path, settings)
    if path.suffix == ".parquet" or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", settings.data):
        return DatasetSource(settings)
    raise UserError(
        f"--data {settings.data}: no such directory, and no name on the hub; expected an image folder, "
        "a set of shards, a saved dataset, a .parquet file, or <org>/<name>"
    )


class FolderSource:
    """<root>/<split>/<class>/*, if a folder has the name of a usual or given split; else <root>/<class>/*.

    The number of a class is its place among the sorted folders of all splits, whose names are compared in NFC.
    Subfolders are searched too, and links are followed. <image>.txt and <image>.json beside an image are copied.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.labelled = root, settings.labelled
        self.kind = "an image folder"
        self.left_out: LeftOut = {}
        self.empty: list[str] = []  # class folders without an image
        wanted = parse_splits(settings.splits)
        # A class may be called train too; only a split has subfolders.
        present = [
            name
            for name in subfolders(root)
            if (name in SPLIT_NAMES or name in wanted) and (subfolders(root / name) or not self.labelled)
        ]
        if present:
            self.splits = pick_splits(settings, sorted(present, key=split_rank))
            self.folders = {split: root / split for split in self.splits}
            all_folders = [root / name for name in present]
            beside = [f"{name}/" for name in subfolders(root, self.left_out) if name not in present]
            self.left_out |= {"folders beside the splits": beside} if beside else {}
        else:
            if len(wanted) > 1:
                raise UserError(
                    f"--splits {' '.join(settings.splits)}: {root} has no folder of a split; expected "
                    f"<split>/<class>/*, or one split that all of <class>/* become"
                )
            for name in subfolders(root) if self.labelled else ():
                if name.lower() in SPLIT_NAMES and subfolders(root / name):
                    raise UserError(
                        f"--data {root}: {name}/ holds folders and would be one class; "
                        f"expected splits in small letters; say --splits {name}={name.lower()}, or rename it"
                    )
            name = next(iter(wanted.values()), "train")
            self.splits, self.folders, all_folders = {name: name}, {name: root}, [root]
        self.class_folders: dict[str, set[str]] = {}  # name in NFC -> names on the disk
        for folder in all_folders if self.labelled else ():
            for name in subfolders(folder, self.left_out if folder in self.folders.values() else None, root):
                self.class_folders.setdefault(composed(name), set()).add(name)
        self.class_ids = sorted(self.class_folders)
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
                folders = sorted(self.class_folders.get(name, [""]))
                paths = sorted(path for folder in folders for path in self._images(root / folder))
                if not paths:
                    self.empty.append(os.path.relpath(root / folders[0], self.root))
                found += [(name, new_labels.get(label), path) for path in paths]
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
            raise BadSample(UNREADABLE, self.where(split, reference), error.strerror or one_line(error)) from None

    def where(self, split: str, reference: str) -> str:
        return str(self.root / reference)

    def marks(self, split: str, references: Sequence[str]) -> Iterator[str]:
        for reference in references:
            path = self.root / reference
            yield " ".join([mark(path), *(mark(path.with_suffix(f".{extension}")) for extension in SIDECARS)])

    def _images(self, folder: Path) -> list[str]:
        """The images below ``folder``, as paths relative to the root. UserError if a folder cannot be read."""
        found: list[str] = []
        for _, files in walk(folder, self.left_out, self.root) if folder.is_dir() else ():
            images = [entry for entry in files if is_picture(entry.name)]  # also broken links: they count as bad images
            stems = {os.path.splitext(entry.name)[0] for entry in images}
            found += [os.path.relpath(entry.path, self.root).replace(os.sep, "/") for entry in images]
            for entry in files:
                stem, suffix = os.path.splitext(entry.name)
                if suffix in tuple(f".{extension}" for extension in SIDECARS):
                    if stem not in stems:
                        leave(self.left_out, entry, self.root, f"{suffix} files without an image")
                elif suffix.lower() not in SUFFIXES:
                    leave(self.left_out, entry, self.root)
        return found


class ShardSource:
    """Shards in the project's layout. All members of a sample are copied, except that the class gets its new number."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root, self.labelled, self.cache_dir = root, settings.labelled, settings.cache_dir
        self.kind = "a set of shards"
        self.left_out: LeftOut = {}
        self.empty: list[str] = []
        present = sorted(
            (path.name for path in root.iterdir() if not is_system(path.name) and has_shards(path)), key=split_rank
        )
        self.splits = pick_splits(settings, present)
        found: LeftOut = {}
        for name in subfolders(root, found):
            if name not in present and name != PLAN_FOLDER:
                found.setdefault("folders without .tar files", []).append(f"{name}/")
            elif name in self.splits:
                subfolders(root / name, found, root)
        for kind, paths in found.items():
            if others := [path for path in paths if not path.endswith(OF_A_SET)]:
                self.left_out[kind] = others
        self.class_ids, self.templates = [], []
        self.places: dict[str, list[int]] = {}  # split -> for each of its labels, the label in the whole set
        if self.labelled:
            # The labels of a split refer to the list beside its shards, or else to the list of the whole set.
            listed = {name: root / name / "classnames.txt" for name in present}
            common = root / "classnames.txt"
            lists = {name: read_classnames(path) for name, path in listed.items() if path.is_file()}
            if common.is_file() or (settings.classnames is None and not set(self.splits) <= set(lists)):
                lists = {"": read_classnames(common)} | lists
            self.class_ids, places = one_list(lists, f"--data {root}: classnames.txt", merge=False)
            self.places = {name: places.get(name, places.get("", [])) for name in self.splits}
        if (root / TEMPLATES_FILE).is_file():
            self.templates = read_templates(root / TEMPLATES_FILE)
        self.names = self.class_ids
        self.indexes: dict[str, ShardIndex] = {}
        self._readers: dict[str, ShardReader] = {}

    def samples(self, split: str, new_labels: dict[int, int]) -> list[Sample]:
        """UserError if a sample is lost or has no valid label, so that no sample is left out silently."""
        urls = expand_shards([str(self.root / split)], flag="--data")
        index = index_shards(urls, cache_dir=self.cache_dir, flag="--data")
        stop_at_loss(index.skipped)
        for note in index.skipped:  # notices, which cost no sample
            print(f"--data {note.where}: {note.kind}: {note.detail}")
        self.indexes[split] = index
        reader, found = ShardReader(index), []
        with RunProgress(f"reading the classes of {split}", index.num_samples, transient=True) as progress:
            try:
                for shard, size in enumerate(index.sizes):
                    for number in range(size):
                        key, members = reader.read(shard, number, ["cls"])
                        label = self._label(members, f"{index.urls[shard]}#{key}", split) if self.labelled else None
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
        if split not in self._readers:  # opened in the process that reads: descriptors must not be shared
            self._readers[split] = ShardReader(self.indexes[split])
        _, members = self._readers[split].read(shard, number)
        members.pop("cls", None)
        extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
        if extension is not None:
            return extension, members.pop(extension), members
        extension = next(
            (name for name in members if f".{name}" in SUFFIXES), None
        )  # such as .tiff, which is converted
        if extension is None:
            raise BadSample("missing image", self.where(split, reference), members.lacking(*IMAGE_EXTENSIONS))
        return "", members.pop(extension), members

    def where(self, split: str, reference: str) -> str:
        shard, _, number = reference.partition("/")
        return f"{self.indexes[split].urls[int(shard)]}#{number}"

    def marks(self, split: str, references: Sequence[str]) -> Iterator[str]:
        """For each sample, the mark of the shard that it comes from."""
        urls = self.indexes[split].urls
        marks = {
            shard: f"{Path(urls[shard]).name} {mark(Path(urls[shard]))}"
            for shard in {int(text.partition("/")[0]) for text in references}
        }
        return (marks[int(reference.partition("/")[0])] for reference in references)

    def _label(self, members: Members, where: str, split: str) -> int:
        if "cls" not in members:
            raise UserError(f"--data {where}: {members.lacking('cls')}; mend it, or say --labelled false")
        places = self.places[split]
        num_classes = len(places) or len(self.names)
        try:
            label = parse_label(members["cls"])
        except ValueError:
            label = -1
        if not 0 <= label < num_classes:
            text = members["cls"].decode("utf-8", "replace")
            raise UserError(
                f"--data {where}: .cls is {text[:40]!r}; expected 0 ... {num_classes - 1}, a line of its class names"
            )
        return places[label] if places else label


class DatasetSource:
    """A Hugging Face dataset: a saved one, .parquet files, or a name on the hub. Images are read as stored bytes."""

    def __init__(self, settings: Settings) -> None:
        self.labelled, self.caption_column = settings.labelled, settings.caption_column
        self.kind = "a Hugging Face dataset"
        self.left_out: LeftOut = {}
        self.empty: list[str] = []
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
            # Every split has its own list of names, and its labels are places in that list.
            lists = {
                split: list(map(composed, names))
                for split in sorted(loaded, key=split_rank)
                if (names := getattr(loaded[split].features.get(self.label_column), "names", None))
            }
            self.class_ids, self.places = one_list(lists, f"--data {settings.data}: {self.label_column}", merge=True)
            for split in self.splits:
                if lists and split not in lists:
                    raise UserError(
                        f"--data {settings.data}: {self.label_column} of {split} has no class names, "
                        f"that of {next(iter(lists))} has; leave the split out by naming the others with --splits, "
                        "or give it the names"
                    )
            self.names = [clean_name(name, f"class {name!r}") for name in self.class_ids]
        if self.caption_column is not None:
            pick_column("caption_column", self.caption_column, features, [])
        for split in self.splits:
            for column in filter(None, (self.image_column, self.label_column, self.caption_column)):
                if column not in loaded[split].features:
                    raise UserError(
                        f"--data {settings.data}: its {split} has no column {column}; "
                        "leave the split out by naming the others with --splits"
                    )
        # Do not decode: the stored bytes are written.
        self.loaded = {
            split: loaded[split].cast_column(self.image_column, datasets.Image(decode=False)) for split in self.splits
        }
        columns = [self.image_column, *([self.caption_column] if self.caption_column else [])]
        self.rows = {split: dataset.select_columns(columns) for split, dataset in self.loaded.items()}
        self._paths: dict[str, list[str | None]] = {}

    def samples(self, split: str, new_labels: dict[int, int]) -> list[Sample]:
        count = len(self.loaded[split])
        if not self.labelled:
            return [Sample(f"{row:08d}", None, str(row)) for row in range(count)]
        labels = self.loaded[split].select_columns([self.label_column])[:][self.label_column]
        places = self.places.get(split) or list(range(len(self.names)))
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < len(places):
                raise UserError(
                    f"--data, {split}, row {row}: {self.label_column} is {label!r}; expected 0 ... {len(places) - 1}; "
                    "a split without labels is left out by naming the others with --splits, or needs --labelled false"
                )
        labels = [places[label] for label in labels]
        return [
            Sample(f"{row:08d}", new_labels[label], str(row)) for row, label in enumerate(labels) if label in new_labels
        ]

    def read(self, split: str, reference: str) -> tuple[str, bytes, dict[str, bytes]]:
        row = self.rows[split][int(reference)]
        image = row[self.image_column] or {}
        data = image.get("bytes")
        try:
            if data is None and image.get("path"):
                data = Path(image["path"]).read_bytes()
        except OSError as error:
            raise BadSample(UNREADABLE, self.where(split, reference), error.strerror or one_line(error)) from None
        if data is None:
            raise BadSample("missing image", self.where(split, reference), "the row has none")
        caption = row[self.caption_column] if self.caption_column else None
        if isinstance(caption, list):  # take the first of several
            caption = caption[0] if caption else None
        return "", data, {} if caption is None else {"txt": str(caption).encode()}

    def where(self, split: str, reference: str) -> str:
        return f"{split}, row {reference}"

    def marks(self, split: str, references: Sequence[str]) -> Iterator[str]:
        """The library's fingerprint of the split, the marks of its files, and those of the files that rows point to."""
        dataset = self.rows[split]
        files = sorted(mark(Path(file["filename"])) for file in dataset.cache_files)
        if split not in self._paths:
            flat = dataset.select_columns([self.image_column]).flatten().select_columns([f"{self.image_column}.path"])
            self._paths[split] = flat[:][f"{self.image_column}.path"]
        yield " ".join([dataset._fingerprint, *files])
        yield from (mark(Path(path)) for path in map(self._paths[split].__getitem__, map(int, references)) if path)


def import_datasets(data: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {data}: {'' if Path(data).exists() else 'nothing is there, and '}a Hugging Face dataset is read "
            "with the library datasets, which is not installed; correct the path, or pip install datasets"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        # Versions before 4 run a script that comes with a dataset; later ones refuse to.
        raise UserError(
            f"--data {data}: datasets {datasets.__version__} may run code of a dataset's author; expected 4 or later: "
            "pip install -U datasets"
        )
    return datasets


def load_dataset(datasets: Any, settings: Settings) -> Any:
    """A dict of splits by name, or a single split. Any error of the library becomes a UserError."""
    path = Path(known_path(settings.data))
    cache = settings.cache_dir and str(Path(settings.cache_dir) / "datasets")
    try:
        if path.exists():
            path = without_magic(path, Path(settings.cache_dir or default_cache_dir()))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)}, cache_dir=cache)["train"]
        if path.is_dir() and (files := parquet_files_with_other_classes(datasets, path, settings)):
            return {
                split: datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=cache)
                for split, names in files.items()
            }
        where = str(path) if path.is_dir() else settings.data
        return datasets.load_dataset(where, settings.dataset_config, cache_dir=cache)
    except UserError:
        raise
    except Exception as error:  # the library's own errors, the hub's, pyarrow's, OSError
        raise UserError(
            f"--data {settings.data}: {'' if path.exists() else 'no such directory, and '}the library datasets cannot "
            f"read it ({one_line(error)}); correct the path or the name; a gated one needs its terms accepted on its "
            "page and `hf auth login`"
        ) from None


def without_magic(path: Path, cache_dir: Path) -> Path:
    """The path; or, if the library would read the path as a pattern, a tree of links to its files in the cache."""

    def is_pattern(path: Path) -> bool:
        return glob.has_magic(str(path)) or "::" in str(path)

    whole = path.resolve()
    if not is_pattern(whole):
        return path
    mirror = cache_dir.resolve() / "links" / hashlib.sha256(os.fsencode(whole)).hexdigest()[:24]
    if is_pattern(mirror):
        raise UserError(
            f"--cache_dir {cache_dir}: the library datasets reads it as a pattern; name one without *, ?, [ and ::"
        )
    shutil.rmtree(mirror, ignore_errors=True)
    for file in [whole] if whole.is_file() else filter(Path.is_file, whole.rglob("*")):
        link = mirror / ("file.parquet" if file == whole else file.relative_to(whole))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
        os.utime(link, ns=(0, file.stat().st_mtime_ns), follow_symlinks=False)  # shows the library a change
    return mirror / "file.parquet" if whole.is_file() else mirror


def parquet_files_with_other_classes(datasets: Any, path: Path, settings: Settings) -> dict[str, list[str]]:
    """The .parquet files of each split of a directory, if the splits' class names differ; else an empty dict.

    Each file's schema has the names of its own labels. The library uses the names of the first file for all files and
    does not change the label numbers, which would then be wrong.
    """
    import pyarrow.parquet  # comes with the library

    builder = datasets.load_dataset_builder(str(path), settings.dataset_config)
    files = {str(split): [str(name) for name in names] for split, names in (builder.config.data_files or {}).items()}
    if not all(name.endswith(".parquet") and os.path.isfile(name) for names in files.values() for name in names):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for split, names in files.items():
        for name in names:
            note = json.loads((pyarrow.parquet.read_schema(name).metadata or {}).get(b"huggingface", b"{}"))
            features = note.get("info", {}).get("features") or {}
            classes = {
                column: kind["names"]
                for column, kind in features.items()
                if isinstance(kind, dict) and kind.get("names")
            }
            if classes != found.setdefault(split, classes):
                raise UserError(
                    f"--data {settings.data}: {name} has other class names, or another order of them, than {names[0]}, "
                    "of the same split; write them with one list of names"
                )
    return files if any(classes != next(iter(found.values())) for classes in found.values()) else {}


def mark(path: Path) -> str:
    """A file's size and modification time, which show that its content has changed; "-" if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return "-"
    return f"{status.st_size} {status.st_mtime_ns}"


# ------------------------------------------------------------------------------------------- splits, classes and names


def parse_splits(asked: list[str] | None) -> dict[str, str]:
    """["train", "validation=test"] -> {"train": "train", "validation": "test"}."""
    splits = {}
    for word in asked or []:
        name, _, new_name = word.partition("=")
        new_name = new_name or name
        if not re.fullmatch(r"\w[\w.-]*", new_name) or new_name == PLAN_FOLDER or new_name in splits.values():
            raise UserError(
                f"--splits {word}: {new_name!r} is no name for a folder here, or given twice; "
                "expected NAME or NAME=NEW_NAME"
            )
        splits[name] = new_name
    return splits


def pick_splits(settings: Settings, present: list[str]) -> dict[str, str]:
    """Name in --data -> name of the new split, for the splits given by --splits, or for all."""
    for name in (wanted := parse_splits(settings.splits)):
        if name not in present:
            raise UserError(
                f"--splits {name}: no such split in {settings.data}; there is {', '.join(present) or 'none'}"
            )
    return wanted or parse_splits(present)


def split_rank(name: str) -> tuple[int, str]:
    """Sort key of splits: train first, test last, others between."""
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


def one_list(lists: dict[str, list[str]], where: str, *, merge: bool) -> tuple[list[str], dict[str, list[int]]]:
    """Merges the splits' lists of class names into one, and returns for each list the places of its names in that one.

    merge: a name that occurs twice in a list is one class. Otherwise it is two, and then lists that differ are refused.
    """
    names = list(next(iter(lists.values()), []))
    if not merge:
        if all(other == names for other in lists.values()):
            return names, {split: list(range(len(names))) for split in lists}
        for listed in lists.values():
            if len(set(listed)) < len(listed):
                twice = next(name for name in listed if listed.count(name) > 1)
                raise UserError(
                    f"{where}: the lists of the splits differ, and {twice!r} stands twice in one; make the lists equal"
                )
    whole = list(dict.fromkeys(name for listed in lists.values() for name in listed))
    places = {name: place for place, name in enumerate(whole)}
    return whole, {split: [places[name] for name in listed] for split, listed in lists.items()}


def imagenet_wordnet_ids() -> list[str]:
    """The WordNet ids of ImageNet's classes in class order, such as n01440764; the folders of the official files."""
    return (PROMPTS / "imagenet_wordnet_ids.txt").read_text(encoding="utf-8").split()


def choose_classes(source: Any, settings: Settings) -> tuple[list[str], dict[int, int]]:
    """The names of the new classes, and a dict label in the source -> new label. Also sets ``source.names``.

    ImageNet's names are found by WordNet ids if the classes have them, even if they are few, else by the label.
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
                f"--classnames imagenet: {settings.data} has {len(ids)} classes, the first is {ids[0]!r}; "
                "expected folders named by WordNet ids such as n01440764, or 1000 classes in ImageNet's order; "
                "give a file of names"
            )
        else:
            aliases.append(imagenet_ids)
    elif settings.classnames is not None:
        names = read_classnames(settings.classnames)
        if ids and len(names) != len(ids):
            raise UserError(
                f"--classnames {settings.classnames}: {len(names)} names for {len(ids)} classes; "
                f"expected one for each, in order: {', '.join(ids[:3])}, ..."
            )
    elif source.names:
        names = source.names
        if names == imagenet_prompts()[0]:
            aliases.append(imagenet_ids)
        elif not isinstance(source, ShardSource):
            refuse_twins(source, settings)
    else:
        raise UserError(f"--data {settings.data}: its labels have no names; give a file with --classnames")
    source.names = names
    if not settings.classes:
        return names, {label: label for label in range(len(names))}
    return renumber(settings, [*aliases, names])


def refuse_twins(source: Any, settings: Settings) -> None:
    """UserError if two classes get the same name. Case counts, because some sets have letters as classes."""
    for group in twins(source.names):
        for place in group:
            same = [other for other in group if spaced(source.names[other]) == spaced(source.names[place])]
            if len(same) > 1:
                one, two = (repr(source.class_ids[other]) for other in same[:2])
                raise UserError(
                    f"--data {settings.data}: the classes {one} and {two} have one name, {source.names[place]!r}; "
                    "put them together, rename one, or give a name to each with --classnames"
                )


def spaced(name: str) -> str:
    """The name with underscores as spaces and without extra spaces."""
    return " ".join(name.replace("_", " ").split())


def renumber(settings: Settings, aliases: list[list[str]]) -> tuple[list[str], dict[int, int]]:
    """Finds the classes of --classes by any of their names; the last list of ``aliases`` has the names to write."""
    wanted, flag_text = settings.classes, "--classes"
    if len(wanted) == 1 and os.path.isfile(wanted[0]):
        flag_text, wanted = f"--classes {wanted[0]}", read_classnames(wanted[0])
    new_labels: dict[int, int] = {}
    for word in wanted:
        found = {label for names in aliases for label, name in enumerate(names) if composed(name) == composed(word)}
        if not found:
            match = nearest(word, [name for names in aliases for name in names])
            hint = f"did you mean {match!r}?" if match else f"expected one of its {len(aliases[-1])} classes"
            raise UserError(f"{flag_text} {word!r}: no such class in {settings.data}; {hint}")
        if len(found) > 1:
            raise UserError(
                f"{flag_text} {word!r}: the name of {len(found)} classes of {settings.data}; "
                "give their folders or WordNet ids, or make the names differ"
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
    """A class name as a line of classnames.txt; UserError if it is not usable."""
    name = " ".join(composed(name).split())
    if not name or len(name) > LONGEST_NAME or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise UserError(f"--data, {where}: no class name: empty, too long or with control characters; rename it")
    return name


def usable_key(stem: str) -> str:
    """Makes a key from a file's name. A key has no dot, because it ends at the first dot of a member's name."""
    key = re.sub(r"[.\x00-\x1f\x7f/\\]", "_", stem.encode("utf-8", "replace").decode())
    return key if len(key) <= 200 else f"{key[:180]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def unique_keys(keys: Iterable[str]) -> list[str]:
    """The keys in their order; a repeated key gets the lowest free number as a suffix."""
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


def is_sorted(labels: Sequence[int | None]) -> bool:
    """Whether the samples are sorted by class, and there is more than one class."""
    return None not in labels and labels[0] != labels[-1] and all(a <= b for a, b in zip(labels, labels[1:]))


def stop_at_loss(skipped: Sequence[Skipped]) -> None:
    """UserError for the first record in ``skipped`` that costs a sample, if there is one."""
    for record in skipped:
        if record.samples:
            raise UserError(f"--data {record.where}: {record.kind}: {record.detail}; mend it and start again")


# ----------------------------------------------------------------------------------------------------------- the plan


def check_apart(output_dir: Path, settings: Settings, source: Any) -> None:
    """UserError if the new set would be written into the source."""
    root, new = Path(known_path(settings.data)).resolve(), output_dir.resolve()
    if isinstance(source, ShardSource):
        inside = any(new / name == root / split for split in source.splits for name in source.splits.values())
    else:
        inside = root.is_dir() and (new == root or root in new.parents)
    if inside:
        raise UserError(f"--output_dir {output_dir}: is where the samples come from; give another directory")


def check_used(output_dir: Path) -> None:
    """UserError if ``output_dir`` is not empty and was not begun by this script."""
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
    """The samples left for training, in their order, and the shards of the test split, with its classes mixed."""
    if list(source.splits.values()) != ["train"]:
        raise UserError(
            f"--test_fraction {settings.test_fraction:g}: {settings.data} becomes {', '.join(source.splits.values())}; "
            "expected train alone to take a test split from"
        )
    order = permutation(len(samples), settings.seed, 1)
    by_class: dict[int | None, list[int]] = {}
    for place in order:
        by_class.setdefault(samples[place].label, []).append(place)
    held = {place for places in by_class.values() for place in places[: round(settings.test_fraction * len(places))]}
    if not held or len(held) == len(samples):
        raise UserError(
            f"--test_fraction {settings.test_fraction:g}: leaves {len(samples) - len(held)} images for train and "
            f"{len(held)} for test; expected some of both: give a larger or a smaller share"
        )
    left = [sample for place, sample in enumerate(samples) if place not in held]
    return left, deal([samples[place] for place in order if place in held], split, TEST, settings)


def keep_plan(output_dir: Path, shards: dict[str, list[Shard]], names: list[str], settings: Settings) -> None:
    """Writes the plan, or compares it with an existing one. UserError if they differ.

    make_shards/<split>.tsv: shard, key, label, source of every sample; make_shards/plan.json: settings, class names,
    and the SHA-256 of each .tsv.
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
            f"--output_dir {output_dir}: begun with other settings or data ({'; '.join(differences)}); "
            "give the same ones, or another directory"
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
        pairs = itertools.zip_longest(before["classes"], now["classes"])
        place, (then, new) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
        counts = f"{len(before['classes'])} then, {len(now['classes'])} now"
        found.append(f"the classes differ: {counts}, the first at {place}: {then!r}, now {new!r}")
    if list(before["splits"]) != list(now["splits"]):
        found.append(f"the splits were {', '.join(before['splits'])}, are {', '.join(now['splits'])}")
    elif not found and before["splits"] != now["splits"]:
        split = next(split for split in now["splits"] if before["splits"][split] != now["splits"][split])
        counts = [plan["splits"][split]["samples"] for plan in (before, now)]
        found.append(f"the images of {split} differ: {counts[0]} then, {counts[1]} now")
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def make(shards: dict[str, list[Shard]], source: Any, settings: Settings) -> tuple[int, int]:
    """Makes the shards that are missing or outdated, counts what is left out, and writes skipped.txt.

    Returns how many shards were kept, and how many existed but were made again. UserError if more than
    ``max_bad_fraction`` is left out, or if a worker dies. Finished shards stay.
    """
    work = [shard for made in shards.values() for shard in made]
    total = sum(len(shard.samples) for shard in work)
    list_file = Path(settings.output_dir) / "skipped.txt"
    skips = SkipCounter(ShardIndex([], [total], [], ""), settings.max_bad_fraction, report=None)
    num_workers = min(len(work), settings.num_workers or len(os.sched_getaffinity(0)))
    kept, again, left_out, said_at = 0, 0, 0, time.monotonic()
    try:
        with (
            contextlib.closing(results(work, source, num_workers)) as records,
            RunProgress("writing", total) as progress,
        ):
            for record in records:
                kept += record["kept"]
                again += record["again"]
                left_out += len(record["skipped"])
                skips.seen += record["samples"] + len(record["skipped"])
                skips.add([Skipped(*entry) for entry in record["skipped"]])
                report = time.monotonic() - said_at > 10 or skips.seen == total
                said_at = time.monotonic() if report else said_at
                progress.update(skips.seen, {"skipped": left_out}, report=report)
                try:
                    skips.check()
                except UserError as error:
                    raise UserError(
                        f"{error}; {list_file} names them; finished shards are kept, and those of mended images "
                        "made again"
                    ) from None
    finally:
        write_skipped(list_file, work)
    return kept, again


def results(work: list[Shard], source: Any, num_workers: int) -> Iterator[dict[str, Any]]:
    """Yields the records of all shards, in the order in which they are finished."""
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
            f"--num_workers {num_workers}: a worker has died, perhaps for want of memory; use fewer and start again: "
            "finished shards are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


worker_source: Any = None  # the source, in a worker process


def start_worker(source: Any) -> None:
    """Sets up a worker: it ignores Ctrl-C, which the main process handles, and exits when the main process has died.

    It uses one thread: a forked process would wait for ever for OpenMP threads that only its parent has.
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
    """Makes a shard if needed, and returns its record with "kept": it existed, and "again": it was replaced.

    The record: {"samples": number in the shard, "skipped": [[kind, where, detail], ...], "made_of": ``content_mark``,
    "pillow": Pillow's version if the contents depend on it, else null}. An existing shard is kept if its record matches
    its headers and its present sources. Otherwise the shard is written to a temporary file, its headers are compared
    with the plan, and it is renamed once it is on the disk.
    """
    made_of = content_mark(source, shard)  # before reading, so that the next start notices a change made meanwhile
    kept = finished(shard, made_of)
    if kept is not None:
        return kept | {"kept": True, "again": False}
    again = shard.path.exists()
    # The process id keeps files apart: a worker of a killed run may still be writing for a moment.
    aside = shard.path.with_name(f".{shard.path.name}.{os.getpid()}.part")
    skipped: list[Skipped] = []
    keys = []
    pillow = None
    try:
        # Fixed time and owner, so that the bytes depend only on the samples. pax allows keys of any length and script.
        with aside.open("wb") as file:
            with webdataset.TarWriter(
                file, mtime=0, user="root", group="root", encoder=False, format="PAX_FORMAT"
            ) as tar:
                for sample in shard.samples:
                    try:
                        members, written_anew = make_members(source, shard, sample)
                    except BadSample as bad:
                        skipped.append(bad.skipped)
                        pillow = PIL.__version__
                        continue
                    if written_anew:
                        pillow = PIL.__version__
                    tar.write({"__key__": sample.key, **members})
                    keys.append(sample.key)
            file.flush()
            os.fsync(file.fileno())
        found = scan_tar(aside)
        if found.damage or found.notes or found.keys != keys:
            raise UserError(
                f"{aside}: holds {len(found)} samples ({found.damage or 'other keys'}), {len(keys)} were written; "
                "check the disk and start again"
            )
        record = {
            "samples": len(keys),
            "skipped": [[entry.kind, entry.where, entry.detail] for entry in skipped],
            "made_of": made_of,
            "pillow": pillow,
        }
        shard.path.unlink(missing_ok=True)  # so that an outdated shard is never beside the new record
        write_whole(shard.record, json.dumps(record) + "\n")
        os.replace(aside, shard.path)
    finally:
        aside.unlink(missing_ok=True)
    return record | {"kept": False, "again": again}


def content_mark(source: Any, shard: Shard) -> str:
    """A hash of everything a shard depends on: the samples, the image flags, the sizes and times of the sources."""
    found = hashlib.sha256(f"{FORMAT} {shard.verify} {shard.image_size}".encode())
    for sample in shard.samples:
        found.update(f"\n{sample.key}\t{sample.label}\t{sample.reference}".encode("utf-8", "backslashreplace"))
    for text in source.marks(shard.split, [sample.reference for sample in shard.samples]):
        found.update(f"\n{text}".encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def read_record(shard: Shard) -> dict[str, Any]:
    return json.loads(shard.record.read_text(encoding="utf-8"))


def finished(shard: Shard, made_of: str) -> dict[str, Any] | None:
    """The record of a shard that exists and holds all planned samples, except those that the record lists as skipped.

    None if its sources have changed or could not be read, or if another version of Pillow wrote or refused images.
    """
    try:
        record = read_record(shard)
        if record["made_of"] != made_of or record["pillow"] not in (None, PIL.__version__):
            return None
        if any(kind == UNREADABLE for kind, _, _ in record["skipped"]):
            return None
        found = scan_tar(shard.path)
        places = {where for _, where, _ in record["skipped"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = not (found.damage or found.notes) and len(found) == record["samples"] == len(shard.samples) - len(places)
    return record if whole and set(found.keys) <= {sample.key for sample in shard.samples} else None


def make_members(source: Any, shard: Shard, sample: Sample) -> tuple[dict[str, bytes], bool]:
    """Extension -> bytes of a sample, and whether its image was encoded again. BadSample if the image is unusable."""
    extension, stored, members = source.read(shard.split, sample.reference)
    data = stored
    try:
        smaller = None
        if shard.image_size is not None:
            smaller = decode(stored, ShrinkOnly(resize=shard.image_size, crop=None), OWN_FORMATS)
        elif shard.verify:
            decode(stored, FULL_SIZE, OWN_FORMATS)
        if smaller is not None:
            extension, data = "jpg", encode(smaller, stored, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        elif not extension:
            extension, data = as_shard_member(stored)
    except ImageError as error:
        raise BadSample("undecodable image", source.where(shard.split, sample.reference), str(error)) from None
    label = {} if sample.label is None else {"cls": str(sample.label).encode()}
    return {extension: data, **label, **members}, data is not stored


class ShrinkOnly(ImageTransform):
    """As ``ImageTransform``, but an image whose shorter edge is at most ``resize`` is only decoded, and gives None."""

    def __call__(self, image: Image.Image) -> Any:
        if min(image.size) > self.resize:
            return super().__call__(image)
        image.load()
        return None


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Writes a file completely or not at all."""
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
    """Writes skipped.txt: kind, place and reason of every sample left out of the finished shards, in their order."""
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
    again: int,
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
    if again:
        print(
            f"{again} shards were there and were made again: their images have changed since, or how they are written."
        )
    if source.left_out:
        print(f"Not taken: {describe(source.left_out)}.")
    if source.empty:
        more = ", ..." if len(source.empty) > 5 else ""
        print(f"Class folders without an image, which stay classes: {', '.join(sorted(source.empty)[:5])}{more}.")
    for split in unshuffled:
        print(
            f"{split} is sorted by class: the first N samples of an evaluation are of the first classes; "
            "--shuffle all mixes them."
        )
    train = next((split for split in shards if split == "train"), next(iter(shards)))
    evaluated = next((split for split in shards if split in SPLIT_NAMES and split != "train"), None) if names else None
    words = ["python", "train_lore.py", "--model_name_or_path", "openai/clip-vit-base-patch32"]
    words += ["--train_shards", str(output_dir / train)]
    words += ["--eval_shards", str(output_dir / evaluated)] if evaluated else []
    print("Train on it:\n\n    " + shlex.join([*words, "--output_dir", "runs/lore4"]))


if __name__ == "__main__":
    run(main)
