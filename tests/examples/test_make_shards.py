"""examples/make_shards.py: folders, datasets and shards become shards: whole, complete, the same every time."""

from __future__ import annotations

import errno
import filecmp
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image, ImageCms
from scipy.io import savemat

import train_lore
from examples import make_shards
from tests.conftest import ROOT, later_wins, run_script
from tests.examples.test_example_sets import call, read_split
from tests.shard_maker import image_bytes, write_shard
from utils.data.images import OWN_FORMATS, ImageTransform, decode
from utils.data.order import SequentialOrder
from utils.data.shards import ShardDataset
from utils.data.tars import scan_tar
from utils.errors import UserError
from utils.sets.labelled import imagenet_prompts, open_set
from utils.sets.pairs import PairDataset

FULL = ImageTransform(None, None)
CLASSES = ["big_cat", "dog", "owl"]


def write_folder(root: Path, counts: dict[str, int], classes: list[str] = CLASSES) -> dict[str, bytes]:
    """<root>/<split>/<class>/<number>.jpg; path from the root -> bytes, all different."""
    files = {}
    for split, count in counts.items():
        for name in classes:
            for number in range(count):
                path = root / split / name / f"{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                files[f"{split}/{name}/{path.name}"] = image_bytes(len(files), (24, 20))
                path.write_bytes(files[f"{split}/{name}/{path.name}"])
    return files


def make(data: Path, out: Path, *arguments: object) -> Path:
    given = () if "--num_workers" in arguments else ("--num_workers", 1)
    call(
        make_shards, "--data", data, "--output_dir", out,
        "--cache_dir", out.parent / "cache", *given, *map(str, arguments),
    )  # fmt: skip
    return out


def shard_files(out: Path) -> dict[str, bytes]:
    """All that a set is made of, but for the lock."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "pictures"
    write_folder(folder, {"train": 9, "val": 3})
    return folder


def plan_of(out: Path, split: str) -> list[list[str]]:
    """[shard, key, label, source] of every sample."""
    return [line.split("\t") for line in (out / f"make_shards/{split}.tsv").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------- from a folder


def test_a_folder_becomes_a_set_that_the_project_and_webdataset_read(pictures: Path, tmp_path: Path) -> None:
    out = make(pictures, tmp_path / "out", "--samples_per_shard", 5)
    for split, per_class in (("train", 9), ("val", 3)):
        labelled = open_set([str(out / split)], flag="--data", with_classes=True, cache_dir=str(tmp_path / "cache"))
        assert labelled.classnames == ["big cat", "dog", "owl"]
        assert not labelled.index.skipped
        assert json.loads((out / split / "sizes.json").read_text()) == {
            path.name: len(scan_tar(path)) for path in sorted((out / split).glob("*.tar"))
        }
        sources = {key: (int(label), source) for _, key, label, source in plan_of(out, split)}
        data = ShardDataset(labelled.index, ImageTransform(None, None), order="sequential", with_labels=True)
        items = [data[0, slot, slot] for slot in range(len(data))]
        assert len({item["key"] for item in items}) == len(items) == 3 * per_class
        assert [item["key"] for item in items] == [key for _, key, *_ in plan_of(out, split)]
        for item in items:
            label, source = sources.pop(item["key"])
            assert item["label"] == label == CLASSES.index(source.split("/")[1])
            assert torch.equal(item["image"], decode((pictures / source).read_bytes(), data.transform))
        assert not sources

        urls = [str(path) for path in sorted((out / split).glob("*.tar"))]
        read = {
            sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        }
        assert len(read) == 3 * per_class
        for _, key, label, source in plan_of(out, split):
            assert read[key]["jpg"] == (pictures / source).read_bytes()
            assert read[key]["cls"] == label.encode()
    assert SequentialOrder(labelled.index.sizes).reference(8) == (1, 3)


def test_training_samples_are_mixed_and_the_order_of_others_is_kept(pictures: Path, tmp_path: Path) -> None:
    out = make(pictures, tmp_path / "out", "--samples_per_shard", 9)
    of_shard: dict[str, Counter] = {}
    for shard, _, label, _ in plan_of(out, "train"):
        of_shard.setdefault(shard, Counter())[label] += 1
    assert all(len(counts) == 3 for counts in of_shard.values())
    assert [source for *_, source in plan_of(out, "val")] == sorted(source for *_, source in plan_of(out, "val"))
    other = make(pictures, tmp_path / "other", "--samples_per_shard", 9, "--seed", 1, "--shuffle", "all")
    for split in ("train", "val"):
        assert plan_of(other, split) != plan_of(out, split)
        assert sorted(line[1:] for line in plan_of(other, split)) == sorted(line[1:] for line in plan_of(out, split))
    kept = make(pictures, tmp_path / "kept", "--shuffle", "none")
    assert [source for *_, source in plan_of(kept, "train")] == sorted(source for *_, source in plan_of(kept, "train"))


def test_a_share_of_each_class_becomes_the_test_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"pictures": 20})
    out = make(tmp_path / "pictures", tmp_path / "out", "--test_fraction", 0.1, "--samples_per_shard", 4)
    train, test = ([line[1:] for line in plan_of(out, split)] for split in ("train", "test"))
    assert Counter(label for _, label, _ in test) == {"0": 2, "1": 2, "2": 2}
    assert [label for _, label, _ in test] != sorted(label for _, label, _ in test)  # mixed
    assert len(train) == 54
    assert len({source for _, _, source in train + test}) == 60
    again = make(tmp_path / "pictures", tmp_path / "again", "--test_fraction", 0.1, "--samples_per_shard", 4)
    assert shard_files(out) == shard_files(again)
    other = make(tmp_path / "pictures", tmp_path / "other", "--test_fraction", 0.1, "--seed", 1)
    assert {line[3] for line in plan_of(other, "test")} != {source for _, _, source in test}
    with pytest.raises(UserError, match="leaves 60 images for train and 0 for test"):
        make(tmp_path / "pictures", tmp_path / "none", "--test_fraction", 0.01)
    write_folder(tmp_path / "splits", {"train": 2, "test": 2})
    with pytest.raises(UserError, match="becomes train, test; expected train alone"):
        make(tmp_path / "splits", tmp_path / "two", "--test_fraction", 0.5)


def test_what_is_written_depends_on_the_bytes_not_on_the_names(tmp_path: Path) -> None:
    folder = tmp_path / "data/one class"
    (folder / "deeper").mkdir(parents=True)
    gif = image_bytes(3, (9, 7), "GIF")
    files = {
        "a.b.JPEG": image_bytes(0),
        "b.jpg": image_bytes(1, format="PNG"),
        "deeper/c.webp": image_bytes(2, format="WEBP"),
        "d.gif": gif,
        "ünï.png": image_bytes(4, format="PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "b.txt").write_text("a caption")
    (folder / "notes.md").write_text("no image")
    (tmp_path / "data/.hidden").mkdir()
    out = make(tmp_path / "data", tmp_path / "out", "--splits", "test")
    samples = read_split(out / "test")
    assert {key: set(sample) for key, sample in samples.items()} == {
        "a_b": {"jpg", "cls"},
        "b": {"png", "cls", "txt"},
        "c": {"webp", "cls"},
        "d": {"png", "cls"},
        "ünï": {"png", "cls"},
    }
    assert samples["a_b"]["jpg"] == files["a.b.JPEG"]
    assert samples["b"] == {"png": files["b.jpg"], "cls": b"0", "txt": b"a caption"}
    transform = ImageTransform(None, None)
    assert torch.equal(decode(samples["d"]["png"], transform), decode(gif, transform))
    index = open_set([str(out / "test")], flag="--data", with_classes=True, cache_dir=str(tmp_path / "cache")).index
    assert index.num_samples == 5


def test_only_larger_images_are_made_smaller(tmp_path: Path) -> None:
    files = {"wide": image_bytes(0, (90, 60)), "small": image_bytes(1, (30, 40)), "exact": image_bytes(2, (50, 40))}
    (tmp_path / "data/thing").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / f"data/thing/{name}.jpg").write_bytes(data)
    samples = read_split(make(tmp_path / "data", tmp_path / "out", "--image_size", 40) / "train")
    assert samples["small"]["jpg"] == files["small"]
    assert samples["exact"]["jpg"] == files["exact"]
    found = Image.open(io.BytesIO(samples["wide"]["jpg"]))
    assert found.size == (60, 40)
    expected = Image.open(io.BytesIO(files["wide"])).resize((60, 40), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 3


def test_unlabelled_images_have_no_classes(pictures: Path, tmp_path: Path) -> None:
    out = make(pictures, tmp_path / "out", "--labelled", "false", "--splits", "train")
    samples = read_split(out / "train")
    assert len(samples) == 27
    assert all(set(sample) == {"jpg"} for sample in samples.values())
    assert not (out / "classnames.txt").exists()


# ------------------------------------------------------------------------------------- the same bytes, whatever happens


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose shards take a while, and its shards as one process makes them without a break."""
    root = tmp_path_factory.mktemp("many")
    for number in range(120):
        path = root / f"data/train/{CLASSES[number % 3]}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, (640, 640)))
    damaged = root / "data/train/dog/100.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    return root / "data", make(root / "data", root / "whole", *MANY)


MANY = ("--samples_per_shard", 3, "--max_bad_fraction", 0.1)


def test_workers_do_not_change_the_bytes(many: tuple[Path, Path], tmp_path: Path) -> None:
    data, whole = many
    files = shard_files(make(data, tmp_path / "out", *MANY, "--num_workers", 3))
    assert files == shard_files(whole)
    assert sum(name.endswith(".tar") for name in files) == 40


def make_on_a_slow_disk(data: Path, out: Path) -> None:
    """In a process of its own: time enough to be killed in the middle, however busy the machine is."""
    sync = make_shards.os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.05)
        sync(descriptor)

    make_shards.os.fsync = slow
    make(data, out, *MANY, "--num_workers", 2)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("shards", [1, 12])
def test_killed_and_started_again_it_makes_the_same_bytes(many: tuple[Path, Path], tmp_path: Path, shards: int) -> None:
    data, whole = many
    out = tmp_path / "out"
    # A process of its own, that need not import everything anew.
    process = multiprocessing.get_context("fork").Process(target=make_on_a_slow_disk, args=(data, out))
    process.start()
    limit = time.monotonic() + 60
    while len(list(out.glob("train/*.tar"))) < shards:
        assert process.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.002)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    while any(map(alive, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    orphans = [worker for worker in workers if alive(worker)]
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    assert not orphans  # workers do not outlive the run

    left = sorted(out.glob("train/*.tar"))
    assert shards <= len(left) < 40
    for path in left:
        assert filecmp.cmp(path, whole / "train" / path.name, shallow=False)
    assert not (out / "train/sizes.json").exists()
    before = {path: path.stat().st_mtime_ns for path in left}
    make(data, out, *MANY)
    assert shard_files(out) == shard_files(whole)
    assert {path: path.stat().st_mtime_ns for path in left} == before


def test_a_shard_that_was_damaged_since_is_made_again(pictures: Path, tmp_path: Path) -> None:
    out = make(pictures, tmp_path / "out", "--samples_per_shard", 4)
    files = shard_files(out)
    (out / "train/000001.tar").write_bytes(files["train/000001.tar"][:2000])
    (out / "train/000002.tar").unlink()
    (out / "train/.000003.tar.1.part").write_bytes(b"left by a killed run")
    assert shard_files(make(pictures, out, "--samples_per_shard", 4)) == files


def test_a_full_disk_ends_in_one_line_and_the_shards_go_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shard_files(make(pictures, tmp_path / "whole", "--samples_per_shard", 4))
    calls = iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(make_shards.os, "fsync", full)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=re.escape(f"--output_dir {out}: No space left on device; make room")):
        make(pictures, out, "--samples_per_shard", 4)
    monkeypatch.undo()
    left = {name: data for name, data in shard_files(out).items() if name.endswith(".tar")}
    assert left
    assert left.items() < whole.items()
    assert not list(out.rglob("*.part"))
    assert shard_files(make(pictures, out, "--samples_per_shard", 4)) == whole


def test_other_settings_or_data_over_the_same_directory_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", {"train": 2})
    out = make(tmp_path / "data", tmp_path / "out")
    files = shard_files(out)
    make(tmp_path / "data", out, "--max_bad_fraction", 0.5, "--num_workers", 2)  # change no byte
    for arguments, expected in (
        (("--seed", 1), "seed was 0, is 1"),
        (("--samples_per_shard", 7), "samples_per_shard was 1000, is 7"),
        (("--image_size", 7), "image_size was None, is 7"),
        (("--classes", "owl", "dog"), "the classes differ: 3 then, 2 now"),
        (("--splits", "train=test"), "the splits were train, are test"),
    ):
        with pytest.raises(
            UserError, match=re.escape(f"--output_dir {out}: begun with other settings or data ({expected}")
        ):
            make(tmp_path / "data", out, *arguments)
    (tmp_path / "data/train/owl/0000.jpg").rename(tmp_path / "data/train/owl/0009.jpg")
    with pytest.raises(UserError, match="the images of train differ: 6 then, 6 now"):
        make(tmp_path / "data", out)
    assert shard_files(out) == files


# ----------------------------------------------------------------------------------------------------------- bad images


def test_a_bad_image_is_left_out_and_named(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "data", {"train": 10})
    bad = {"train/dog/0003.jpg": files["train/dog/0003.jpg"][:-60], "train/owl/0004.jpg": b"no image at all"}
    for name, data in bad.items():
        (tmp_path / "data" / name).write_bytes(data)
    arguments = (tmp_path / "data", tmp_path / "out", "--samples_per_shard", 4)
    with pytest.raises(UserError, match=r"--max_bad_fraction 0.01: .* undecodable image: .*skipped.txt names them"):
        make(*arguments)
    out = make(*arguments, "--max_bad_fraction", 0.2)
    named = [line.split("\t") for line in (out / "skipped.txt").read_text().splitlines()]
    assert {(kind, where) for kind, where, _ in named} == {
        ("undecodable image", str(tmp_path / "data" / name)) for name in bad
    }
    assert any("truncated" in detail for *_, detail in named)
    assert " object at 0x" not in (out / "skipped.txt").read_text()  # two runs leave the same bytes
    data = {sample["jpg"] for sample in read_split(out / "train").values()}
    assert data == {data for name, data in files.items() if name not in bad}
    assert sum(json.loads((out / "train/sizes.json").read_text()).values()) == 28
    unverified = make(tmp_path / "data", tmp_path / "unverified", "--verify", "false", "--max_bad_fraction", 0.2)
    assert bad["train/dog/0003.jpg"] in {sample["jpg"] for sample in read_split(unverified / "train").values()}


# -------------------------------------------------------------------------------------------------------------- classes


def test_wordnet_ids_are_in_the_order_of_the_names() -> None:
    ids, names = make_shards.imagenet_wordnet_ids(), imagenet_prompts()[0]
    assert len(ids) == len(set(ids)) == len(names) == 1000
    assert ids == sorted(ids)
    known = {
        "n01440764": "tench", "n01530575": "brambling", "n02099601": "Golden Retriever", "n02123045": "tabby cat",
        "n02504458": "African bush elephant", "n03000684": "chainsaw", "n03417042": "garbage truck",
        "n03888257": "parachute", "n07753592": "banana", "n09472597": "volcano", "n15075141": "toilet paper",
    }  # fmt: skip
    assert {name: names[ids.index(name)].lower() for name in known} == {k: v.lower() for k, v in known.items()}


WORDNET = ["n02123045", "n01440764", "n07753592", "n02099601"]
NAMES = ["tabby cat", "tench", "banana", "Golden Retriever"]


def test_a_class_list_of_a_folder_gives_its_labels_and_imagenets_names(tmp_path: Path) -> None:
    """Few of the thousand folders, chosen in an order of one's own: the names still are those of the ids."""
    files = write_folder(tmp_path / "data", {"train": 2, "val": 1}, sorted(WORDNET))
    (tmp_path / "list.txt").write_text("n07753592\nn02123045\nn01440764\n")
    out = make(tmp_path / "data", tmp_path / "out", "--classes", tmp_path / "list.txt")
    assert (out / "classnames.txt").read_text().splitlines() == ["banana", "tabby cat", "tench"]
    assert (out / make_shards.TEMPLATES_FILE).read_text().splitlines() == imagenet_prompts()[1]
    for split in ("train", "val"):
        plan = {key: source for _, key, _, source in plan_of(out, split)}
        found = {plan[key]: sample for key, sample in read_split(out / split).items()}
        order = ["n07753592", "n02123045", "n01440764"]
        expected = {
            name: data for name, data in files.items() if name.startswith(split) and name.split("/")[1] in order
        }
        assert {name: sample["jpg"] for name, sample in found.items()} == expected
        assert all(int(sample["cls"]) == order.index(name.split("/")[1]) for name, sample in found.items())
    by_name = make(tmp_path / "data", tmp_path / "by-name", "--classes", "banana", "tabby cat", "tench")
    assert shard_files(by_name) == shard_files(out)


def test_a_class_list_of_shards_in_imagenets_order_takes_wordnet_ids(tmp_path: Path) -> None:
    labels = [make_shards.imagenet_wordnet_ids().index(name) for name in WORDNET]
    samples = [
        (f"{label}-{n}", {"jpg": image_bytes(10 * label + n), "cls": str(label).encode(), "json": b"{}"})
        for label in labels
        for n in range(3)
    ]
    write_shard(tmp_path / "set/train/0.tar", samples)
    (tmp_path / "list.txt").write_text("\n".join(WORDNET[2:]) + "\n")
    out = make(tmp_path / "set", tmp_path / "out", "--classes", tmp_path / "list.txt", "--classnames", "imagenet")
    assert (out / "classnames.txt").read_text().splitlines() == NAMES[2:]
    assert len((out / make_shards.TEMPLATES_FILE).read_text().splitlines()) == 80
    assert read_split(out / "train") == {
        key: {**members, "cls": str(labels[2:].index(int(members["cls"]))).encode()}
        for key, members in samples
        if int(members["cls"]) in labels[2:]
    }


def test_names_come_from_a_file_in_the_order_of_the_sorted_folders(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("lion\nhound\nbarn owl\n")
    out = make(pictures, tmp_path / "out", "--classnames", tmp_path / "names.txt", "--classes", "owl", "lion")
    assert (out / "classnames.txt").read_text().splitlines() == ["barn owl", "lion"]
    assert {source.split("/")[1]: label for _, _, label, source in plan_of(out, "val")} == {"owl": "0", "big_cat": "1"}


# ---------------------------------------------------------------------------------------------------------- from shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three classes in three splits, with members beside image and class, and templates."""
    root = tmp_path_factory.mktemp("sets") / "set"
    for split, sizes in (("train", [5, 4]), ("val", [4]), ("test", [3])):
        for shard, size in enumerate(sizes):
            keys = [f"{split}-{shard}-{n}" for n in range(size)]
            samples = [
                (key, {"webp": image_bytes(n, format="WEBP"), "cls": b"%d" % (n % 3), "json": b'{"n": %d}' % n})
                for n, key in enumerate(keys)
            ]
            write_shard(root / split / f"{shard}.tar", samples)
    (root / "classnames.txt").write_text("one\ntwo\nseven\n")
    (root / make_shards.TEMPLATES_FILE).write_text("the number {c}.\n")
    return root


def test_selected_classes_keep_their_bytes_and_get_new_labels(shards: Path, tmp_path: Path) -> None:
    out = make(shards, tmp_path / "out", "--classes", "seven", "one", "--samples_per_shard", 2, "--shuffle", "none")
    assert (out / "classnames.txt").read_text() == "seven\none\n"
    assert (out / make_shards.TEMPLATES_FILE).read_text() == "the number {c}.\n"
    for split in ("train", "val", "test"):
        new = {b"2": b"0", b"0": b"1"}
        expected = {
            key: {**sample, "cls": new[sample["cls"]]}
            for key, sample in read_split(shards / split).items()
            if sample["cls"] in new
        }
        found = read_split(out / split)
        assert found == expected
        assert list(found) == list(expected)


def test_keys_that_come_again_in_another_shard_stay_two_samples(tmp_path: Path) -> None:
    images = [image_bytes(n) for n in range(3)]
    write_shard(
        tmp_path / "set/train/0.tar", [("1", {"jpg": images[0], "cls": b"0"}), ("0", {"jpg": images[1], "cls": b"1"})]
    )
    write_shard(tmp_path / "set/train/1.tar", [("0", {"jpg": images[2], "cls": b"0"})])
    (tmp_path / "set/classnames.txt").write_text("a\nb\n")
    found = read_split(make(tmp_path / "set", tmp_path / "out", "--classes", "b", "a", "--shuffle", "none") / "train")
    assert found == {
        key: {"jpg": image, "cls": label} for key, image, label in zip(("1", "0", "0-1"), images, (b"1", b"0", b"1"))
    }


@pytest.mark.parametrize("kind", ["shards", "folder", "parquet", "one file"])
def test_the_source_that_exists_as_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """datasets#7468: ``x[1]`` was read as a pattern for ``x1``, by us and by the library datasets."""
    monkeypatch.chdir(tmp_path)
    pictures = {"x[1]": image_bytes(1), "x1": image_bytes(2)}
    for name, data in pictures.items():
        if kind == "shards":
            write_shard(Path(name, "train/0.tar"), [("0", {"jpg": data, "cls": b"0"})])
            Path(name, "classnames.txt").write_text("a\n")
        elif kind == "folder":
            Path(name, "train/a.tar").mkdir(parents=True)  # no shard
            Path(name, "train/a.tar/0.jpg").write_bytes(data)
        else:
            datasets = pytest.importorskip("datasets", reason="read with the library datasets")
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
            rows = datasets.Dataset.from_dict(
                {"image": [{"bytes": data, "path": None}], "label": [0]}, features=features
            )
            rows.to_parquet("rows.parquet")
            Path(name).mkdir()
            Path("rows.parquet").rename(Path(name, "train.parquet"))
    source = Path("x[1]/train.parquet") if kind == "one file" else Path("x[1]")
    (sample,) = read_split(make(source, tmp_path / "out") / "train").values()
    assert sample["jpg"] == pictures["x[1]"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "sevn"], "--classes 'sevn': no such class in set; did you mean 'seven'?"),
        (["--data", "twins", "--classes", "crane"], "--classes 'crane': the name of 2 classes of twins"),
        (["--splits", "dev"], "--splits dev: no such split in set; there is train, val, test"),
        (["--data", "bare"], "bare/classnames.txt: no such file"),
        (["--output_dir", "set"], "is where the samples come from"),
        (["--data", "unlabelled"], "--data unlabelled/train/0.tar#0: no .cls member; the sample has .png"),
        (["--data", "beyond"], "--data beyond/train/0.tar#0: .cls is '2'; expected 0 ... 1"),
        (["--data", "broken"], "--data broken/train/0.tar: damaged shard"),
        (["--data", "short"], "outdated sizes.json: promises 2 samples, the shard holds 1"),
        (["--data", "long"], "outdated sizes.json: promises 1 samples, the shard holds 2"),
        (["--data", "others"], "--data others: no image of these classes in its train"),
    ],
)
def test_mistakes_of_a_selection_are_named_in_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").symlink_to(shards)
    before = shard_files(shards)
    for name, keys, members in (
        ("twins", "0", {"png": b"", "cls": b"0"}),
        ("bare", "0", {"png": b"", "cls": b"0"}),
        ("unlabelled", "0", {"png": b""}),
        ("beyond", "0", {"png": b"", "cls": b"2"}),
        ("broken", "012", {"png": b"", "cls": b"1"}),
        ("short", "0", {"png": b"", "cls": b"1"}),
        ("long", "01", {"png": b"", "cls": b"1"}),
        ("others", "0", {"png": b"", "cls": b"0"}),
    ):
        write_shard(Path(name, "train/0.tar"), [(key, members) for key in keys])
        if name != "bare":
            names = "crane\none\ncrane\n" if name == "twins" else "zero\none\n"
            Path(name, "classnames.txt").write_text(names)
    for name, promised in (("short", 2), ("long", 1)):
        Path(name, "train/sizes.json").write_text(json.dumps({"0.tar": promised}))
    broken = Path("broken/train/0.tar")
    broken.write_bytes(broken.read_bytes()[: 2 * 1536] + b"x" * 600)
    defaults = {"--data": ["set"], "--classes": ["one"], "--output_dir": ["out"], "--cache_dir": ["cache"]}
    given = [word for name, words in defaults.items() if name not in arguments for word in (name, *words)]
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        call(make_shards, *given, *arguments)
    assert "\n" not in str(error.value)
    assert not Path("out").exists()
    assert shard_files(shards) == before


# --------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("form", ["saved", "saved_alone", "parquet", "parquet_file"])
def test_a_hugging_face_dataset_keeps_bytes_labels_and_names(tmp_path: Path, form: str) -> None:
    datasets = pytest.importorskip("datasets", reason="read with the library datasets")
    formats = ("JPEG", "PNG", "WEBP")
    extensions = dict(zip(formats, ("jpg", "png", "webp")))
    splits, expected = {}, {}
    for split, count in (("train", 8), ("test", 4)):
        data = [image_bytes(100 * len(splits) + n, (20, 16), formats[n % 3]) for n in range(count)]
        features = {
            "picture": datasets.Image(),
            "label": datasets.ClassLabel(names=["big_cat", "dog"]),
            "text": datasets.Value("string"),
        }
        rows = {
            "picture": [{"bytes": image, "path": None} for image in data],
            "label": [n * n % 2 for n in range(count)],
            "text": [f"picture {n}" for n in range(count)],
        }
        splits[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        expected[split] = {
            f"{n:08d}": {extensions[formats[n % 3]]: image, "cls": str(n % 2).encode(), "txt": f"picture {n}".encode()}
            for n, image in enumerate(data)
        }
    source = tmp_path / "source"
    if form == "saved":
        datasets.DatasetDict(splits).save_to_disk(source)
    elif form == "saved_alone":
        splits["train"].save_to_disk(source)
    else:
        for split, dataset in splits.items():
            (source / "data").mkdir(parents=True, exist_ok=True)
            dataset.to_parquet(source / f"data/{split}-00000-of-00001.parquet")
    if form == "parquet_file":
        source = source / "data/train-00000-of-00001.parquet"
    if form in ("saved_alone", "parquet_file"):
        expected.pop("test")
    out = make(source, tmp_path / "out", "--caption_column", "text", "--samples_per_shard", 3, "--num_workers", 2)
    assert (out / "classnames.txt").read_text().splitlines() == ["big_cat", "dog"]
    assert sorted(path.name for path in out.glob("t*/")) == sorted(expected)
    assert {split: read_split(out / split) for split in expected} == expected
    few = make(source, tmp_path / "few", "--classes", "dog", "--caption_column", "text")
    for split, samples in expected.items():
        dogs = {key: {**sample, "cls": b"0"} for key, sample in samples.items() if sample["cls"] == b"1"}
        assert read_split(few / split) == dogs


def test_mistakes_with_a_hugging_face_dataset_end_in_one_line(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="read with the library datasets")
    picture = {"bytes": image_bytes(0), "path": None}
    features = datasets.Features(
        {"a": datasets.Image(), "b": datasets.Image(), "label": datasets.ClassLabel(names=["x"])}
    )
    rows = datasets.Dataset.from_dict({"a": [picture], "b": [picture], "label": [-1]}, features=features)
    rows.save_to_disk(tmp_path / "set")
    for arguments, expected in (
        ((), "--image_column: missing, a, b could be it; name one of a, b, label"),
        (("--image_column", "c"), "--image_column c: no such column; there are a, b, label"),
        (("--image_column", "a"), "row 0: label is -1; expected 0 ... 0"),
        (("--image_column", "a", "--label_column", "lable"), "did you mean label?"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            make(tmp_path / "set", tmp_path / "out", *arguments)
    with pytest.raises(UserError, match="--data no/such: no such directory, and the library datasets cannot read it"):
        make(Path("no/such"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_library_or_with_one_that_runs_scripts_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ModuleType("datasets")
    old.__version__ = "3.6.0"
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(UserError, match=r"datasets 3.6.0 may run code .* expected 4 or later"):
        make(Path("no/such"), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"--data no/such: nothing is there, .* not installed; correct the path, or pip"
    ):
        make(Path("no/such"), tmp_path / "out")


# ---------------------------------------------------------------------------------------------- the recipes of the docs


def recipe(word: str) -> str:
    """The Python block of docs/data.md that holds ``word``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return block


def test_the_recipe_of_pairs_makes_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    people = [("man", "riding a horse"), ("woman", "riding a horse"), ("woman", "playing tennis")]
    Path("images").mkdir()
    for number in range(3):
        Path(f"images/{number}.jpg").write_bytes(image_bytes(number))
    lines = [f"images/{number}.jpg,{activity},{gender}" for number, (gender, activity) in enumerate(people)]
    Path("images.csv").write_text("\n".join(["path,activity,gender", *lines, ""]))
    exec(recipe("images.csv"), {})
    out = make(Path("pairs"), Path("out"), "--labelled", "false")
    index = open_set([str(out / "train")], flag="--data", with_classes=False, cache_dir="cache").index
    data = PairDataset(index, ImageTransform(None, None), order="sequential")
    rows = {item["key"]: item["rows"][0] for item in (data[0, slot, slot] for slot in range(6))}
    assert sorted(rows) == [f"{number:06d}-{kind}" for number in range(3) for kind in ("neutral", "pair")]
    for number, (gender, activity) in enumerate(people):
        pair, clean = rows[f"{number:06d}-pair"], rows[f"{number:06d}-neutral"]
        other = {"man": "woman", "woman": "man"}[gender]
        assert pair.chosen == f"a photo of a {other} {activity}."
        assert pair.rejected == [f"a photo of a {gender} {activity}."]
        assert clean.reg
        assert clean.candidates == ["a photo of a person playing tennis.", "a photo of a person riding a horse."]
        assert torch.equal(pair.image, clean.image)
        assert torch.equal(pair.image, decode(image_bytes(number), ImageTransform(None, None)))


def test_the_recipe_of_imagenets_validation_images_sorts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A development kit of the official form: its numbers do not follow the WordNet ids; groups come after them."""
    monkeypatch.chdir(tmp_path)
    kit = Path("ILSVRC2012_devkit_t12/data")
    kit.mkdir(parents=True)
    synsets = [(1, "n02123045", 0), (2, "n01440764", 0), (3, "n07753592", 0), (4, "n00001740", 3)]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(kit / "meta.mat", {"synsets": np.array(synsets, dtype=fields)[:, None]})
    truth = [3, 1, 2, 1]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{label}\n" for label in truth))
    Path("imagenet/val").mkdir(parents=True)
    for number in range(1, 5):
        Path(f"imagenet/val/ILSVRC2012_val_{number:08d}.JPEG").write_bytes(image_bytes(number))
    exec(recipe("meta.mat"), {})
    samples = read_split(make(Path("imagenet"), Path("out")) / "val")
    assert Path("out/classnames.txt").read_text().splitlines() == ["tench", "tabby cat", "banana"]
    labels = {1: b"1", 2: b"0", 3: b"2"}
    assert samples == {
        f"ILSVRC2012_val_{number:08d}": {"jpg": image_bytes(number), "cls": labels[label]}
        for number, label in enumerate(truth, 1)
    }


# ------------------------------------------------------------------- what a shard is made of, and when it is made again


def replace_picture(root: Path) -> None:
    (root / "train/dog/0001.jpg").write_bytes(image_bytes(77, (24, 20)))


def touch_picture(root: Path) -> None:
    """Other content of the same size, as an editor leaves it: the time alone is new."""
    path = root / "train/dog/0001.jpg"
    before = path.stat()
    data = next(data for seed in range(70, 200) if len(data := image_bytes(seed, (24, 20))) <= before.st_size)
    path.write_bytes(data.ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def add_caption(root: Path) -> None:
    (root / "train/dog/0001.txt").write_text("a dog")


@pytest.mark.parametrize("change", [replace_picture, touch_picture, add_caption])
def test_a_changed_source_makes_its_shard_again_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture, change
) -> None:
    """A picture replaced later kept its old pixels (img2dataset#174)."""
    write_folder(tmp_path / "data", {"train": 4})
    arguments = (tmp_path / "data", tmp_path / "out", "--samples_per_shard", 3, "--shuffle", "none")
    out = make(*arguments)
    before = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    change(tmp_path / "data")
    capsys.readouterr()
    make(*arguments)
    assert {path.name for path, time in before.items() if path.stat().st_mtime_ns != time} == {"000001.tar"}
    assert "1 shards were there and were made again" in capsys.readouterr().out
    fresh = make(tmp_path / "data", tmp_path / "fresh", "--samples_per_shard", 3, "--shuffle", "none")
    assert shard_files(out) == shard_files(fresh)
    make(*arguments)
    assert "made again" not in capsys.readouterr().out


def test_a_mended_picture_is_taken_by_the_same_command(tmp_path: Path) -> None:
    """The script stopped with "mend the shards", and again after they were mended."""
    files = write_folder(tmp_path / "data", {"train": 4})
    broken, hidden = tmp_path / "data/train/dog/0001.jpg", tmp_path / "data/train/owl/0002.jpg"
    broken.write_bytes(b"no image")
    kept = hidden.rename(tmp_path / "kept.jpg")
    hidden.symlink_to(tmp_path / "gone.jpg")  # its time stays the same when what it points to comes back
    arguments = (tmp_path / "data", tmp_path / "out", "--samples_per_shard", 3)
    with pytest.raises(UserError, match=r"skipped.txt names them; .* those of mended images made again"):
        make(*arguments)
    broken.write_bytes(files["train/dog/0001.jpg"])
    kept.rename(tmp_path / "gone.jpg")
    out = make(*arguments)
    assert not (out / "skipped.txt").exists()
    assert {sample["jpg"] for sample in read_split(out / "train").values()} == set(files.values())


def test_another_pillow_makes_again_what_it_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "data", {"train": 2}, ["dog"])
    (tmp_path / "data/train/dog/9.bmp").write_bytes(image_bytes(1, format="BMP"))
    arguments = (tmp_path / "data", tmp_path / "out", "--samples_per_shard", 1, "--shuffle", "none")
    out = make(*arguments)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    monkeypatch.setattr(make_shards.PIL, "__version__", "99.0.0")
    make(*arguments)
    again = {path.name for path in out.glob("train/*.tar") if path.stat().st_mtime_ns != before[path.name]}
    assert again == {"000002.tar"}  # copied bytes do not depend on it


def test_a_changed_shard_or_dataset_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="read with the library datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    outside = tmp_path / "outside.png"

    def dataset(picture: dict) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"image": [picture], "label": [0]}, features=features)

    of_paths = dataset({"bytes": None, "path": str(outside)})
    for seed in (0, 50):
        data, written = image_bytes(seed, format="PNG"), image_bytes(seed, format="BMP")
        outside.write_bytes(data)
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        dataset({"bytes": data, "path": None}).save_to_disk(tmp_path / "saved")
        write_shard(tmp_path / "shards/train/0.tar", [("0", {"bmp": written, "cls": b"0"})])
        (tmp_path / "shards/classnames.txt").write_text("a\n")
        for name, original in (("saved", data), ("paths", data), ("shards", written)):
            with monkeypatch.context() as patch:
                if name == "paths":  # saved, they would be put into the dataset
                    patch.setattr(make_shards, "load_dataset", lambda *arguments: of_paths)
                out = make(tmp_path / ("shards" if name == "shards" else "saved"), tmp_path / f"out-{name}")
            (sample,) = read_split(out / "train").values()
            assert torch.equal(decode(sample["png"], FULL), decode(original, FULL)), (name, seed)


# --------------------------------------------------------------------------------------------------------------- pixels


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """Pictures whose pixels need more than eight bits of RGB to be read, by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise).resize((90, 60), Image.Resampling.BICUBIC)
    rgb, profile = rgba.convert("RGB"), display_p3()
    ramp = Image.fromarray(np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16))
    frames = [rgb, rgb.transpose(Image.Transpose.ROTATE_180)]
    return {
        "turned.jpg": encoded(rgb, "JPEG", quality=95, exif=exif),
        "turned.png": encoded(rgb, "PNG", exif=exif),
        "turned.webp": encoded(rgb, "WEBP", lossless=True, exif=exif),
        "turned.tif": encoded(rgb, "TIFF", exif=exif),
        "turned.avif": encoded(rgb, "AVIF", quality=100, exif=exif),
        "grey16.png": encoded(ramp, "PNG"),
        "grey16.tiff": encoded(ramp, "TIFF"),
        "wide.jpg": encoded(rgb, "JPEG", quality=95, icc_profile=profile),
        "wide.png": encoded(rgb, "PNG", icc_profile=profile),
        "wide.tif": encoded(rgb, "TIFF", icc_profile=profile),
        "ink.jpg": encoded(rgb.convert("CMYK"), "JPEG", quality=95, icc_profile=profile[:16] + b"CMYK" + profile[20:]),
        "alpha.png": encoded(rgba, "PNG"),
        "grey-alpha.png": encoded(rgba.convert("LA"), "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG", transparency=3),
        "bits.png": encoded(rgb.convert("1"), "PNG"),
        "frames.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "frames.webp": encoded(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]),
        "frames.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "named.jfif": encoded(rgb, "JPEG", quality=95),
        "NAMED.JPE": encoded(rgb, "JPEG", quality=94),
        "NAMED.BMP": encoded(rgb, "BMP"),
    }  # fmt: skip


@lru_cache
def display_p3() -> bytes:
    """sRGB's profile under another name: what is kept is bytes."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    return bytes(profile) + b"Display P3"


@pytest.mark.parametrize("source", ["folder", "datasets"])
@pytest.mark.parametrize("image_size", [None, 40])
def test_what_is_read_from_shards_is_what_the_pictures_show(
    tmp_path: Path, source: str, image_size: int | None
) -> None:
    """Turned, 16 bits, wide gamut, transparent (datasets#6252, 11ty/image#49, Pillow#2574): the same from both."""
    pictures = odd_pictures()
    (tmp_path / "data/x").mkdir(parents=True)
    if source == "folder":
        for name, data in pictures.items():
            (tmp_path / "data/x" / name).write_bytes(data)
    else:
        datasets = pytest.importorskip("datasets", reason="read with the library datasets")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"])})
        rows = {"image": [{"bytes": data, "path": None} for data in pictures.values()], "label": [0] * len(pictures)}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    out = make(tmp_path / "data", tmp_path / "out", *([] if image_size is None else ["--image_size", image_size]))
    assert not (out / "skipped.txt").exists()
    samples = read_split(out / "train")
    assert len(samples) == len(pictures)
    transform = ImageTransform(image_size, None)
    for _, key, _, reference in plan_of(out, "train"):
        name = Path(reference).name if source == "folder" else list(pictures)[int(reference)]
        (data,) = (data for extension, data in samples[key].items() if extension != "cls")
        expected, found = decode(pictures[name], transform, OWN_FORMATS), decode(data, FULL)
        assert found.shape == expected.shape, name
        if image_size is None:
            assert torch.equal(found, expected), name
        else:
            assert (found.int() - expected.int()).abs().float().mean() < (8 if name == "bits.png" else 3), name
            assert Image.open(io.BytesIO(data)).getexif().get(0x0112) is None
        if image_size is None and name.endswith((".jpg", ".png", ".webp", ".jfif", ".JPE")):
            assert data == pictures[name]
        kept = Image.open(io.BytesIO(data)).info.get("icc_profile")
        if name.startswith("wide"):
            assert kept == display_p3()
        elif image_size is not None:
            assert kept is None


# ----------------------------------------------------------------------------------------------------- names of classes

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_labels_of_splits_with_other_orders_are_read_by_name(tmp_path: Path, form: str) -> None:
    """The first split's list was taken for all (dmvr#6)."""
    datasets = pytest.importorskip("datasets", reason="read with the library datasets")
    lists = {"train": ["cat", NFC], "test": [NFD, "owl", "cat"]}
    splits, truth = {}, {}
    for split, names in lists.items():
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        data = [image_bytes(len(truth) + n) for n in range(len(names))]
        truth |= {image: unicodedata.normalize("NFC", name) for image, name in zip(data, names)}
        rows = {"image": [{"bytes": image, "path": None} for image in data], "label": list(range(len(names)))}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    if form == "saved":
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        for split, dataset in splits.items():
            dataset.to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    out = make(tmp_path / "data", tmp_path / "out")
    names = (out / "classnames.txt").read_text().splitlines()
    assert names == ["cat", NFC, "owl"]
    found = {sample["jpg"]: names[int(sample["cls"])] for split in lists for sample in read_split(out / split).values()}
    assert found == truth
    alone = make(tmp_path / "data", tmp_path / "alone", "--splits", "test", "--classes", NFD, "owl")
    assert {sample["jpg"]: sample["cls"] for sample in read_split(alone / "test").values()} == {
        image: b"%d" % [NFC, "owl"].index(name) for image, name in list(truth.items())[2:4]
    }


def test_parquet_files_of_one_split_with_other_orders_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="read with the library datasets")
    (tmp_path / "data").mkdir()
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": image_bytes(number), "path": None}], "label": [0]}
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.to_parquet(tmp_path / f"data/train-{number:05d}-of-00002.parquet")
    with pytest.raises(UserError, match=r"train-00001.* has other class names, or another order of them"):
        make(tmp_path / "data", tmp_path / "out")


def test_folders_of_one_name_in_two_forms_are_one_class(tmp_path: Path) -> None:
    for number, place in enumerate(
        (f"train/{NFC}", "train/dog", f"train/{NFD}", f"test/{NFD}", "test/ant", "test/dog")
    ):
        (tmp_path / "data" / place).mkdir(parents=True)
        (tmp_path / "data" / place / f"{number}.jpg").write_bytes(image_bytes(number))
    out = make(tmp_path / "data", tmp_path / "out")
    assert (out / "classnames.txt").read_text().splitlines() == ["ant", NFC, "dog"]
    labels = {key: int(sample["cls"]) for split in ("train", "test") for key, sample in read_split(out / split).items()}
    assert labels == {"0": 1, "1": 2, "2": 1, "3": 1, "4": 0, "5": 2}
    chosen = make(tmp_path / "data", tmp_path / "chosen", "--classes", NFD)
    assert set(read_split(chosen / "train")) == {"0", "2"}


def test_shards_whose_splits_have_their_own_lists_are_read_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        samples = [(f"{name}-{split}", {"jpg": image_bytes(n), "cls": b"%d" % n}) for n, name in enumerate(names)]
        write_shard(tmp_path / f"set/{split}/0.tar", samples)
        (tmp_path / f"set/{split}/classnames.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "set/train/1.tar.gz").touch()
    (tmp_path / "set/val").mkdir()
    out = make(tmp_path / "set", tmp_path / "out")
    assert (out / "classnames.txt").read_text() == "cat\ndog\n"
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not taken: 1 .gz files (train/1.tar.gz), 1 folders without .tar files (val/)." in printed
    for split in ("train", "test"):
        found = {key: sample["cls"] for key, sample in read_split(out / split).items()}
        assert found == {f"cat-{split}": b"0", f"dog-{split}": b"1"}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["hot dog", "hot_dog"], "the classes 'hot dog' and 'hot_dog' have one name, 'hot dog'"),
        (["hot_dog", "hot__dog"], "the classes 'hot__dog' and 'hot_dog' have one name, 'hot dog'"),
        (["dog", "dog "], "the classes 'dog' and 'dog ' have one name, 'dog'"),
        (["A", "a"], None),  # letters are classes; a text tower does not tell them apart, which is said
        (["dog", "d\u200bog"], None),
    ],
)
def test_two_classes_of_one_name_do_not_pass_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folders: list[str], expected: str | None
) -> None:
    """Duplicate names after normalisation (CuPL#2)."""
    for number, name in enumerate(folders):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.jpg").write_bytes(image_bytes(number))
    if expected is None:
        make(tmp_path / "data", tmp_path / "out")
        assert f"classes 0 {sorted(folders)[0]!r} and 1 {sorted(folders)[1]!r} have one name" in caplog.text
    else:
        with pytest.raises(UserError, match=expected):
            make(tmp_path / "data", tmp_path / "out")
        (tmp_path / "names.txt").write_text("sausage\npet\n")
        make(tmp_path / "data", tmp_path / "out", "--classnames", tmp_path / "names.txt")


# ---------------------------------------------------------------------------------------------------- what is not taken


def test_all_that_is_not_taken_is_counted_and_links_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Symlinked folders were skipped (pytorch/vision#1580), @eaDir and the like were classes."""
    data = tmp_path / "data"
    inside = [
        "dog/a.jpg", "dog/deep/b.JPG", "dog/@eaDir/a.jpg/thumb.jpg",
        "dog/.hidden.jpg", "dog/c.HEIC", "dog/d.heic", "dog/e.txt", "dog/f",
    ]  # fmt: skip
    junk = [
        "@eaDir", "__MACOSX", "$RECYCLE.BIN", ".ipynb_checkpoints",
        "lost+found", "#recycle", "System Volume Information",
    ]  # fmt: skip
    elsewhere = ["../more/g.jpeg", "../whole/h.png", "../one.webp"]
    for number, name in enumerate([*inside, *(f"{folder}/x.jpg" for folder in junk), *elsewhere, "loose.jpg"]):
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    (data / "empty").mkdir()
    (data / "dog/more").symlink_to(tmp_path / "more")
    (data / "dog/one.webp").symlink_to(tmp_path / "one.webp")
    (data / "owl").symlink_to(tmp_path / "whole")
    (data / "dog/deep/circle").symlink_to("..")
    (data / "dog/top").symlink_to(data)
    (data / "self").symlink_to("self")
    (data / "round").symlink_to(data)
    (data / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(data / "dog/pipe.jpg")  # opened, it would be waited for
    out = make(data, tmp_path / "out")
    assert (out / "classnames.txt").read_text().splitlines() == ["dog", "empty", "owl"]
    sources = {source.split("/", 1)[0] + "/" + Path(source).name for *_, source in plan_of(out, "train")}
    assert sources == {"dog/a.jpg", "dog/b.JPG", "dog/g.jpeg", "dog/one.webp", "owl/h.png"}
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "8 hidden folders, or a system's own (#recycle/, $RECYCLE.BIN/, .ipynb_checkpoints/, ...)",
        "2 .heic files (dog/c.HEIC, dog/d.heic)",
        "3 links to folders that are read already (dog/deep/circle/, dog/top/, round/)",
        "2 broken links (gone, self)",
        "1 .jpg files (loose.jpg)",
        "1 .txt files without an image (dog/e.txt)",
        "1 files without a suffix (dog/f)",
        "1 hidden files (dog/.hidden.jpg)",
        "1 pipes, sockets or devices (dog/pipe.jpg)",
        "Class folders without an image, which stay classes: empty.",
    ):
        assert expected in printed
    assert "images of these classes" not in printed


def test_where_nothing_is_taken_the_line_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "data/dog").mkdir(parents=True)
    for number in range(4):
        (tmp_path / f"data/dog/{number}.HEIC").write_bytes(b"")
    with pytest.raises(UserError, match=re.escape("expected at least one (not taken: 4 .heic files (dog/0.HEIC, ")):
        make(tmp_path / "data", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "no/such/place"], "--data no/such/place: no such directory"),
        (["--data", "empty"], "--data empty: no class folders"),
        (["--data", "bare"], "no image of these classes in its train"),
        (
            ["--data", "capitals"],
            "capitals: Train/ holds folders and would be one class; expected splits in small letters",
        ),
        (["--data", "flat", "--splits", "train", "test"], "flat has no folder of a split"),
        (["--data", "tars"], "--data tars: .tar files without a split"),
        (["--splits", "valid"], "--splits valid: no such split in pictures; there is train, val"),
        (["--splits", "train=x", "val=x"], "--splits val=x: 'x' is no name for a folder here, or given twice"),
        (["--splits", "train=../x"], "'../x' is no name"),
        (["--classes", "owll"], "--classes 'owll': no such class in pictures; did you mean 'owl'?"),
        (["--classes", "owl", "owl"], "--classes 'owl': given twice"),
        (["--classes", "list.txt"], "--classes list.txt 'wolf': no such class"),
        (["--classnames", "two.txt"], "--classnames two.txt: 2 names for 3 classes"),
        (["--classnames", "twins.txt", "--classes", "bird"], "'bird': the name of 2 classes"),
        (["--classnames", "imagenet"], "--classnames imagenet: pictures has 3 classes, the first is 'big_cat'"),
        (["--labelled", "false", "--classes", "owl"], "--labelled false: has no classes"),
        (["--templates", "nowhere.txt"], "--templates nowhere.txt: no such file"),
        (["--output_dir", "used"], "--output_dir used: not empty, and not begun by make_shards.py"),
        (["--output_dir", "two.txt"], "--output_dir two.txt: is a file"),
        (["--output_dir", "pictures/shards"], "is where the samples come from"),
        (["--num_workers", "0"], "--num_workers: 0 is too small"),
        (["--shufle", "all"], "did you mean --shuffle"),
    ],
)
def test_mistakes_are_named_in_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").symlink_to(pictures)
    Path("empty").mkdir()
    Path("bare/train/dog").mkdir(parents=True)
    Path("flat/dog").mkdir(parents=True)
    Path("capitals/Train/dog").mkdir(parents=True)
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    write_shard(Path("tars/0.tar"), [("0", {"png": b""})])
    Path("two.txt").write_text("a\nb\n")
    Path("twins.txt").write_text("bird\ndog\nbird\n")
    Path("list.txt").write_text("owl\nwolf\n")
    defaults = {"--data": ["pictures"], "--output_dir": ["out"], "--cache_dir": ["cache"], "--num_workers": ["1"]}
    given = [word for name, words in defaults.items() if name not in arguments for word in (name, *words)]
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        call(make_shards, *given, *arguments)
    assert "\n" not in str(error.value)
    assert not list(Path().glob("out/*/*.tar"))
    assert [path.name for path in Path("used").iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in pictures.iterdir()) == ["train", "val"]


def test_a_mistake_ends_the_script_with_status_2(pictures: Path, tmp_path: Path) -> None:
    output = run_script(
        "examples/make_shards.py", "--data", pictures, "--classes", "owll", "--output_dir", tmp_path / "out", status=2
    )
    assert len(output.splitlines()) == 1
    assert "did you mean 'owl'?" in output


# ------------------------------------------------------------------------------------------------------ it trains on it


def test_lore_trains_on_the_result(
    pictures: Path, small_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By the command that the script prints, with a small model and one step."""
    out = make(pictures, tmp_path / "out", "--samples_per_shard", 9)
    command = next(line.split() for line in capsys.readouterr().out.splitlines() if "train_lore.py" in line)
    assert command[:3] == ["python", "train_lore.py", "--model_name_or_path"]
    assert command[4:8] == ["--train_shards", str(out / "train"), "--eval_shards", str(out / "val")]
    changes = ["--model_name_or_path", small_clip, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"]
    changes += ["--max_steps", 1, "--per_device_train_batch_size", 4, "--attack_steps", 1, "--eval_steps", 1]
    changes += ["--report_to", "none", "--num_workers", "0"]
    train_lore.main(later_wins(command[2:], [str(word) for word in changes]))
    (*_, row) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert 0 <= row["eval_accuracy_clean"] <= 1
    assert (tmp_path / "run/model.safetensors").is_file()
