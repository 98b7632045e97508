"""Shards: found, indexed, read once each in the same order for every process, lost ones counted."""

import io
import json
import multiprocessing
import os
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image

from tests.conftest import ROOT
from tests.shard_maker import (
    NUM_CLASSES,
    ShardServer,
    add_member,
    image_bytes,
    labelled_samples,
    make_shards,
    write_shard,
)
from utils.data import shards
from utils.data import sources as shard_sources
from utils.data import tars as tar_index
from utils.data.images import ImageTransform, decode
from utils.data.order import EpochOrder
from utils.data.shards import ShardDataset, ShardReader, eval_loader, index_shards, train_batches
from utils.data.skipped import SkipCounter, Skipped
from utils.data.sources import ShardCache, ShardError, UnavailableShard, display_url, expand_shards, read_text, sibling
from utils.data.tars import scan_tar
from utils.errors import UserError

TRANSFORM = ImageTransform(8, (8, 8))


@pytest.fixture(autouse=True)
def fast_and_local(monkeypatch):
    monkeypatch.setattr(shard_sources, "RETRY_DELAY", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    with ShardServer(folder) as running:
        yield running


def dataset(paths, tmp_path, order="shuffled", **options):
    options = {"with_labels": True, "num_classes": NUM_CLASSES, **options}
    return ShardDataset(index_shards(paths, cache_dir=tmp_path / "cache"), TRANSFORM, order=order, **options)


def training_batches(
    data, *, global_batch_size=12, world_size=1, num_workers=0, first_step=0, num_steps=6, per_device=None
):
    """step -> {position: (key, label, pixels)}, put together from real loaders on every rank, and all skip records."""
    batches, skipped = {}, []
    per_device = per_device or global_batch_size // world_size
    accumulation = global_batch_size // world_size // per_device
    for rank in range(world_size):
        micro = list(train_batches(
            data,
            samples_per_epoch=len(data),
            global_batch_size=global_batch_size,
            per_device_batch_size=per_device,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            num_steps=num_steps,
            num_workers=num_workers,
        ))  # fmt: skip
        assert len(micro) == (num_steps - first_step) * accumulation  # unequal numbers would hang the collectives
        for number, batch in enumerate(micro):
            whole = batches.setdefault(first_step + number // accumulation, {})
            assert len(batch["keys"]) == per_device
            for key, label, position, image in zip(
                batch["keys"], batch["labels"].tolist(), batch["positions"].tolist(), batch["images"]
            ):
                assert position not in whole
                whole[position] = (key, label, image.numpy().tobytes())
            skipped += batch["skipped"]
    return batches, skipped


# ------------------------------------------------------------------------------------------------------ finding shards


def test_patterns_expand_in_the_order_given(tmp_path):
    make_shards(tmp_path / "set", [1] * 12)
    names = [str(tmp_path / "set" / f"{number}.tar") for number in range(12)]
    assert expand_shards([str(tmp_path / "set")]) == names  # 10 after 9, not after 1
    assert expand_shards([str(tmp_path / "set") + "/"]) == names
    assert expand_shards([str(tmp_path / "set" / "*.tar")]) == names
    assert expand_shards([str(tmp_path / "set" / "{3..5}.tar")]) == names[3:6]
    partly_there = str(tmp_path / "set" / "{11..12}.tar")
    last = [names[11], str(tmp_path / "set" / "12.tar"), names[0], names[0]]
    assert expand_shards([partly_there, names[0], names[0]]) == last
    assert expand_shards([str(tmp_path / "s*")]) == names
    assert expand_shards(["https://host/a-{0..1}.tar?v={3,4}"]) == [
        f"https://host/a-{shard}.tar?v={version}" for shard in (0, 1) for version in (3, 4)
    ]
    hub = "hf://datasets/org/name@refs%2Fpr%2F1/test/{000..010}.tar"
    assert len(expand_shards([hub])) == 11  # nothing is asked of the hub


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("set", "name its train/ or test/ folder"),
        ("set/train/{12..14}.tar", "none of the 3 files exists; .* nearest existing folder is .*/set/train \\(3 .tar"),
        ("sets/train/0.tar", "nothing is there; .* nearest existing folder is "),
        ("set/train/9*.tar", "nothing is there"),
        ("set/train/0.tar/x.tar", "nothing is there; .* nearest existing folder is .*/set/train "),
        ("set/train/{0..2.tar", "braces do not match"),
        ("set/train/0.tar.gz", "unpack it"),
        ("pipe:cat set/train/0.tar", "runs a shell command; .* --allow_pipe_urls"),
        ("s3://bucket/0.tar", "s3:// is not supported; expected a path, http"),
        ("https://host/*.tar", "cannot be listed"),
        ("hf://models/org/name/0.tar", "expected hf://datasets/<org>/<name>"),
    ],
)
def test_useless_patterns_are_one_line_that_names_flag_and_pattern(tmp_path, monkeypatch, pattern, message):
    make_shards(tmp_path / "set" / "train", [1, 1, 1])
    make_shards(tmp_path / "set" / "test", [1])
    (tmp_path / "set" / "train" / "0.tar.gz").write_bytes(b"\x1f\x8b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        expand_shards([pattern], flag="--eval_shards")
    assert str(caught.value).startswith("--eval_shards ")
    assert "\n" not in str(caught.value)


def test_one_missing_pattern_among_good_ones_is_an_error(tmp_path):
    (path,) = make_shards(tmp_path, [1])
    with pytest.raises(UserError, match="nothing is there"):
        expand_shards([path, str(tmp_path / "other.tar")])
    with pytest.raises(UserError, match="no shards given"):
        expand_shards([])


def test_files_beside_a_shard():
    assert sibling("data/train/0.tar", "sizes.json") == "data/train/sizes.json"
    assert sibling("0.tar", "sizes.json") == "sizes.json"
    assert sibling("https://h/a/0.tar?key=1", "sizes.json") == "https://h/a/sizes.json?key=1"
    assert sibling("hf://datasets/o/n@r/a/0.tar", "sizes.json") == "hf://datasets/o/n@r/a/sizes.json"
    assert sibling("pipe:cat 0.tar", "sizes.json") is None


# What lies there, a pattern, and the shards it stands for: what exists as written is no pattern (datasets#7468).
AS_WRITTEN = [
    (["v[1]/0.tar", "v1/0.tar"], "v[1]", ["v[1]/0.tar"]),
    (["v[1]/0.tar", "v1/0.tar"], "v[1]/*.tar", ["v[1]/0.tar"]),
    (["v[1]/0.tar", "v[1]/1.tar", "v1/0.tar"], "v[1]/{0..1}.tar", ["v[1]/0.tar", "v[1]/1.tar"]),
    (["v1/0.tar"], "v[1]", ["v1/0.tar"]),  # nothing of this name: a pattern
    (["v[1].tar", "v1.tar"], "v[1].tar", ["v[1].tar"]),
    (["v[1].tar", "v1.tar"], "v?.tar", ["v1.tar"]),
    (["a?.tar", "ab.tar"], "a?.tar", ["a?.tar"]),
    (["*.tar", "0.tar"], "*.tar", ["*.tar"]),
    (["x{a,b}/0.tar", "xa/0.tar"], "x{a,b}", ["x{a,b}/0.tar"]),
    (["x{a,b}/0.tar", "xa/0.tar"], "x{a,b}/*", ["x{a,b}/0.tar"]),
    (["x{a/0.tar"], "x{a/[0-9].tar", ["x{a/0.tar"]),  # braces that do not match are a name too
    (["xa/v[1]/0.tar", "xa/v1/0.tar"], "x{a,b}/v[1]/*.tar", ["xa/v[1]/0.tar", "xb/v[1]/*.tar"]),
    (["xa/v[1]/0.tar", "xa/v1/0.tar", "xb/v1/1.tar"], "x*/v[1]/*.tar", ["xa/v[1]/0.tar", "xb/v1/1.tar"]),
    (["v[1]/0.tar", "v1/0.tar"], "v*", ["v1/0.tar", "v[1]/0.tar"]),  # each match is a path, not once more a pattern
    (["v[1]/a/0.tar", "v1/a/0.tar"], "v[1]/**/*.tar", ["v[1]/a/0.tar"]),
    (["s/a/0.tar", "s/1.tar"], "s/**", ["s/1.tar", "s/a/0.tar"]),  # folder and shard both match: once
    (["~/0.tar"], "~", ["~/0.tar"]),
    (["a:b/0.tar"], "a:b", ["a:b/0.tar"]),
    (["pipe:x/0.tar"], "pipe:x", ["./pipe:x/0.tar"]),  # no path that is found may read like a command
    (["pipe:x.tar", "y.tar"], "*.tar", ["./pipe:x.tar", "y.tar"]),
    (["a b's #?%20/0.tar"], "a b's #?%20", ["a b's #?%20/0.tar"]),
    (["s/0.tar", "s/notes.txt", "s/old.tar/x"], "s/*", ["s/0.tar"]),
    (["s/0.tar", "s/old.tar/x", "s/1.tar.gz"], "s", ["s/0.tar"]),
    (["s/0.TAR", "s/.hidden.tar"], "s", ["s/0.TAR"]),
    (["s.tar/0.tar"], "s.tar", ["s.tar/0.tar"]),
]


@pytest.mark.parametrize(("files", "pattern", "expected"), AS_WRITTEN, ids=[row[1] for row in AS_WRITTEN])
def test_what_exists_as_written_is_no_pattern(tmp_path, monkeypatch, caplog, files, pattern, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert expand_shards([pattern]) == expected
    assert ("left out" in caplog.text) == ("s/notes.txt" in files)
    assert ("no plain .tar" in caplog.text) == ("s/1.tar.gz" in files)
    if files[0] not in ("*.tar", "~/0.tar") and len(expected) == 1:
        (shard,) = expected
        assert Path(shard).exists()
        assert (shards.file_name(shard), sibling(shard, "sizes.json")) == (
            os.path.basename(shard),
            os.path.join(os.path.dirname(shard), "sizes.json"),
        )


def test_links_to_shards_are_shards_and_one_that_leads_nowhere_is_missed(tmp_path):
    make_shards(tmp_path / "real", [2, 3])
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "0.tar").symlink_to(tmp_path / "real" / "1.tar")
    (folder / "1.tar").symlink_to(tmp_path / "gone.tar")
    (folder / "2.tar").symlink_to("2.tar")
    (folder / "3.tar").symlink_to(tmp_path / "real")
    for pattern in (folder, folder / "[0-2].tar"):
        index = index_shards(expand_shards([str(pattern)]), cache_dir=tmp_path / "cache")
        assert index.sizes == [3, 0, 0]
        assert [record.kind for record in index.skipped] == ["missing shard"] * 2


@pytest.mark.parametrize(
    ("there", "path", "expected"),
    [
        (["t/x[1].tar", "t/x1.tar"], "t/x[1].tar", ["t/x[1].tar"]),
        (["t/x1.tar"], "t/x[1].tar", ["t/x1.tar"]),
        (["t[1]/0.tar", "t1/0.tar"], "t[1]", ["t[1]/0.tar"]),
        (["t[1]/0.tar", "t1/0.tar"], "t[1]/*.tar", ["t[1]/0.tar"]),
        (["t?#/0.tar", "t12/0.tar"], "t?#/*.tar", ["t?#/0.tar"]),
    ],
)
def test_what_exists_as_written_on_the_hub_is_no_pattern(tmp_path, monkeypatch, there, path, expected):
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoFolder

    def tree(self, repo, folder, recursive, **options):
        start = f"{folder}/" if folder else ""
        below = [name.removeprefix(start) for name in there if name.startswith(start)]
        files = [name for name in below if recursive or "/" not in name]
        folders = {name.rpartition("/")[0] for name in below if "/" in name}
        yield from (RepoFile(path=start + name, size=1, oid="0") for name in files)
        yield from (RepoFolder(path=start + name, oid="0") for name in folders)

    monkeypatch.setattr(HfApi, "list_repo_tree", tree)
    prefix = "hf://datasets/org/name/"
    found = expand_shards([prefix + path], cache_dir=tmp_path)
    assert found == [prefix + name for name in expected]
    assert [shards.file_name(url) for url in found] == [name.rpartition("/")[2] for name in expected]
    assert sibling(found[0], "sizes.json") == prefix + expected[0].rpartition("/")[0] + "/sizes.json"


# ----------------------------------------------------------------------------------------------------- indexing shards


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_the_webdataset_library(tmp_path, format):
    path = tmp_path / "odd.tar"
    long = "l" * 90
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add_member(tar, "./folder/0001.JPG", b"one", mtime=0 if format == tarfile.USTAR_FORMAT else 1.5)
        add_member(tar, "./folder/0001.left.cls", b"1")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add_member(tar, "no_extension", b"x")
        add_member(tar, ".hidden.jpg", b"x")
        add_member(tar, "__meta__/notes.txt", b"x")
        add_member(tar, "../../outside.jpg", b"harmless")
        add_member(tar, "/absolute.png", bytes(512))
        add_member(tar, f"{long}/{long}.jpg", b"long name")  # ustar's prefix field
        add_member(tar, f"{long}/{long}.cls", b"0")
        if format != tarfile.USTAR_FORMAT:
            add_member(tar, f"{long * 3}/ümläut.jpg", b"longer")
        add_member(tar, "apart.jpg", b"a")
        add_member(tar, "between.txt", b"")
        add_member(tar, "apart.cls", b"0")
    expected = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in webdataset.tarfile_to_samples()([{"url": str(path)}])
    ]
    index = index_shards([str(path)], cache_dir=tmp_path / "cache")
    reader = ShardReader(index)
    # The library passes over links, and splits a sample that something comes between, without a word.
    assert [(record.kind, record.samples) for record in index.skipped] == [("unread member", 1), ("repeated key", 0)]
    assert index.num_samples == len(expected) > 6
    assert [reader.read(0, sample) for sample in range(len(expected))] == expected


def test_shards_of_the_webdataset_writer(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=7, verbose=0) as writer:
        for key, members in labelled_samples(0, 20):
            writer.write({"__key__": key, **members})
    data = dataset(expand_shards([str(tmp_path / "w-{000..002}.tar")]), tmp_path, "sequential")
    assert data.index.sizes == [7, 7, 6]
    assert [data[0, slot, slot]["key"] for slot in range(20)] == [key for key, _ in labelled_samples(0, 20)]


def test_a_tar_cut_anywhere_keeps_what_is_whole(tmp_path):
    samples = labelled_samples(0, 4)
    whole = Path(write_shard(tmp_path / "whole.tar", samples)).read_bytes()
    content = next(end for end in range(len(whole), 0, -512) if any(whole[end - 512 : end]))
    complete = scan_tar(tmp_path / "whole.tar")
    starts = [complete.members(sample)[extension][0] for sample in range(4) for extension in ("jpg", "cls")]
    before = 0
    for length in sorted([*range(0, content + 512, 97), *starts]):  # also where a payload should begin
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        found = scan_tar(cut)
        assert (found.damage is None) == (length >= content + 512), length
        assert found.keys == [key for key, _ in samples[: len(found)]]
        for sample in range(len(found)):
            for extension, (offset, size) in found.members(sample).items():
                assert whole[:length][offset : offset + size] == samples[sample][1][extension]
            assert set(found.members(sample)) == {"jpg", "cls"}
        assert before <= len(found)
        before = len(found)
    assert before == 4


def test_damage_in_the_middle_is_noticed(tmp_path):
    """``tarfile`` takes a broken header for the end of the archive and says nothing."""
    path = Path(write_shard(tmp_path / "0.tar", labelled_samples(0, 6)))
    data = bytearray(path.read_bytes())
    offset, _ = scan_tar(path).members(3)["jpg"]
    data[offset - 512 + 20] ^= 0xFF  # one byte of the header
    path.write_bytes(data)
    found = scan_tar(path)
    assert len(found) == 3
    assert "no tar header at byte" in found.damage
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 6


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b" + bytes(2000), b"<html>not found</html>" * 100],
    ids=["empty", "compressed", "web page"],
)
def test_a_set_without_a_readable_sample_is_an_error(tmp_path, content):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^--eval_shards: no readable sample in 1 shard, first: .*0\.tar"):
        index_shards([str(path)], cache_dir=tmp_path / "cache", flag="--eval_shards")


def test_of_two_long_names_the_last_counts(tmp_path):
    """Where damage took a member, its long name stays before that of the next one, as ``tarfile`` would call it."""

    def long_name(name):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, len(name)
        return info.tobuf(tarfile.GNU_FORMAT) + name.encode() + bytes(512 - len(name))

    (tmp_path / "0.tar").write_bytes(long_name("a.cls") + long_name("b.json") + files(("x", b"{}")) + EMPTY)
    found = scan_tar(tmp_path / "0.tar")
    assert (found.keys, list(found.members(0))) == (["b"], ["json"])


def test_hostile_headers_end_the_pass(tmp_path):
    def header(kind, size):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    path = tmp_path / "0.tar"
    for block in [
        header(tarfile.GNUTYPE_LONGNAME, 1 << 40),
        header(tarfile.XHDTYPE, 1 << 40),
        header(tarfile.REGTYPE, 1 << 60),
        header(tarfile.GNUTYPE_SPARSE, 10),
        header(tarfile.XHDTYPE, 512) + b"0 path=a\n" + bytes(503),
        header(tarfile.XHDTYPE, 512) + b"99999999999 path=a\n" + bytes(493),
    ]:
        path.write_bytes(block + bytes(300))
        assert scan_tar(path).damage


def special(name, kind, target="", size=0, pax=None):
    """The header of a member that is no plain file, with a pax header before it where there is something for one."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, target, size, pax or {}
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def files(*members):
    """Plain members, without an end: (name, bytes), ..."""
    data = b""
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        data += info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    return data


SAMPLES = labelled_samples(0, 12)
PLAIN = [(f"{key}.{name}", data) for key, members in SAMPLES for name, data in members.items()]
WHOLE = files(*PLAIN)
ENDED = WHOLE + bytes(-(len(WHOLE) + 1024) % 10240 + 1024)
EMPTY, BARE = bytes(10240), WHOLE + bytes(1024)  # an archive of nothing; one that is not filled up
SIXTH, EIGHTH = (len(files(*PLAIN[: 2 * sample])) for sample in (5, 7))
HELD = files(("a.jpg", SAMPLES[0][1]["jpg"]))
SIZE = str(len(SAMPLES[0][1]["jpg"]))
CLS = files(("b.cls", b"0"))
LONG = "l" * 120

# Bytes of a shard, samples to be read of it, records about it (kind, samples lost).
ABSENCES = {
    # libarchive#1778, Light-Untar#29: absence that is damage
    "a hole into an image": (ENDED[:SIXTH] + bytes(3584) + ENDED[SIXTH + 3584 :], 5, [("damaged shard", 7)]),
    "a hole of 4 KiB, up to a label": (ENDED[:SIXTH] + bytes(4096) + ENDED[SIXTH + 4096 :], 11, [("damaged shard", 2)]),
    "a hole of two samples": (ENDED[:SIXTH] + bytes(EIGHTH - SIXTH) + ENDED[EIGHTH:], 10, [("damaged shard", 2)]),
    "a hole at the beginning": (bytes(3584) + ENDED[3584:], 0, [("damaged shard", 12)]),
    "zeros alone": (bytes(len(ENDED)), 0, [("damaged shard", 12)]),
    "nothing": (b"", 0, [("damaged shard", 12)]),
    "an archive of nothing": (EMPTY, 0, [("empty shard", 0)]),
    "no end": (WHOLE, 12, [("damaged shard", 1)]),
    "half an end": (WHOLE + bytes(512), 12, []),
    "bytes after the end": (ENDED + b"\1", 12, [("damaged shard", 1)]),
    "bytes in the filling": (ENDED[:-1] + b"\1", 12, [("damaged shard", 4)]),
    "text after the end": (ENDED + b"<html>" * 2000, 12, [("damaged shard", 5)]),
    # ratarmount#28: cat a.tar b.tar
    "two archives": (ENDED + ENDED, 24, [("joined archives", 0), ("repeated key", 0)]),
    "two that are not filled up": (BARE + BARE, 24, [("joined archives", 0), ("repeated key", 0)]),
    "nothing, then one": (EMPTY + ENDED, 12, [("joined archives", 0)]),
    "one and half of one": (ENDED + ENDED[:SIXTH], 17,
        [("damaged shard", 1), ("joined archives", 0), ("repeated key", 0)]),
    # webdataset#157: links
    "a hard link": (HELD + CLS + special("b.jpg", b"1", "a.jpg") + EMPTY, 2, []),
    "a link to what comes later": (special("s/b.jpg", b"2", "../a.jpg") + HELD + EMPTY, 2, []),
    "links to links": (HELD + special("b.jpg", b"1", "c.jpg") + special("c.jpg", b"2", "./a.jpg") + EMPTY, 3, []),
    "a long link": (files((f"{LONG}.jpg", HELD[512:])) + special("b.jpg", b"1", f"{LONG}.jpg") + EMPTY, 2, []),
    "a long link in pax": (HELD + special("b.jpg", b"1", "x", pax={"linkpath": "a.jpg"}) + EMPTY, 2, []),
    "links to elsewhere": (HELD + special("b.jpg", b"2", "/etc/passwd") + special("c.jpg", b"1", "d.jpg") + EMPTY, 1,
        [("unread member", 2)]),
    "a label that is a link to elsewhere": (HELD + special("a.cls", b"2", "/etc/passwd") + EMPTY, 1,
        [("unread member", 0)]),
    # members that are none
    "a sparse file": (HELD + special("b.jpg", b"S", size=512) + bytes(512) + files(("c.cls", b"0")) + EMPTY, 2,
        [("unread member", 1)]),
    "a sparse file in pax": (HELD + special("GNUSparse.1/b.jpg", b"0", pax={"GNU.sparse.name": "b.jpg"}) + EMPTY, 1,
        [("unread member", 1)]),
    "a device": (HELD + special("b.jpg", b"3") + EMPTY, 1, [("unread member", 1)]),
    "an unknown type": (HELD + special("b.jpg", b"Z", size=3) + bytes(512) + EMPTY, 1, [("unread member", 1)]),
    # webdataset#142: the same name twice
    "a member twice": (HELD + CLS + HELD + HELD + EMPTY, 3, [("repeated member", 1), ("repeated key", 0)]),
    "a sample twice": (HELD + HELD + HELD + EMPTY, 1, [("repeated member", 2)]),
    "capital letters": (HELD + files(("a.JPG", b"x")) + EMPTY, 1, [("repeated member", 1)]),
    "a member twice, then damage": (HELD + CLS + CLS + b"x" * 512, 1, [("damaged shard", 11)]),
    "members apart": (files(*PLAIN[0::2], *PLAIN[1::2]) + EMPTY, 24, [("repeated key", 0)]),
    # numbers and names that stand elsewhere
    "a size in pax": (special("a.jpg", b"0", pax={"size": SIZE}) + HELD[512:] + CLS + EMPTY, 2, []),
    "a name in pax": (special("x", b"0", pax={"path": "a.jpg", "size": SIZE}) + HELD[512:] + EMPTY, 1, []),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSENCES)
def test_absence_is_not_taken_for_completeness(tmp_path, case):
    """Every shard beside a good one, so that the set can be read: what is lost is counted, what is odd is said."""
    content, readable, expected = ABSENCES[case]
    paths = [write_shard(tmp_path / "0.tar", SAMPLES), str(tmp_path / "1.tar")]
    Path(paths[1]).write_bytes(content)
    for _ in range(2):  # the second time from the cache
        index = index_shards(paths, cache_dir=tmp_path / "cache")
        assert index.sizes == [12, readable]
        assert [(record.kind, record.where, record.samples) for record in index.skipped] == [
            (kind, paths[1], samples) for kind, samples in expected
        ]
    reader = ShardReader(index)
    for sample in range(readable):
        key, members = reader.read(1, sample)
        if "jpg" in members and not members["jpg"].startswith(b"x"):
            assert Image.open(io.BytesIO(members["jpg"])).size == (12, 10), key
    counter = SkipCounter(index, 1.0, report=None)
    counter.add(reader.notices)  # the same again, of the shard that was opened
    assert counter.bad_fraction == pytest.approx(
        sum(n for _, n in expected) / (12 + readable + sum(n for _, n in expected))
    )
    assert len(counter.summary().splitlines()) == len(expected)


@pytest.mark.parametrize(("text", "said"), [("3\n", True), ("2", False), ("\ufeff 3\r\n", True), ("many", False)])
def test_shards_that_nshards_counts_and_that_are_not_there_are_said(tmp_path, text, said):
    paths = make_shards(tmp_path / "set", [3, 2])
    (tmp_path / "set/nshards.txt").write_text(text, encoding="utf-8")
    index = index_shards(
        paths[:1], cache_dir=tmp_path / "cache"
    )  # one that was chosen; the other is there all the same
    assert index.sizes == [3]
    where = str(tmp_path / "set/nshards.txt")
    assert index.skipped == [Skipped("missing shard", where, "counts 3 shards, 2 lie there", 0)] * said


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "0.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12345\n")
    assert (
        scan_tar(tmp_path / "0.tar").damage == "a pointer of Git LFS, not the file itself: bring it with `git lfs pull`"
    )


def test_an_index_of_older_rules_is_not_believed(tmp_path):
    (path,) = make_shards(tmp_path, [3])
    status = os.stat(path)
    old = shard_sources.digest(f"3|{path}|{status.st_mtime_ns}|{status.st_size}")
    (tmp_path / "cache/index").mkdir(parents=True)
    fields = {"keys": [], "starts": [0], "extensions": [], "extension_ids": [], "offsets": [], "sizes": []}
    (tmp_path / f"cache/index/{old}.json").write_text(json.dumps({**fields, "damage": None}))
    assert index_shards([path], cache_dir=tmp_path / "cache").sizes == [3]


@pytest.mark.parametrize(
    ("promised", "sizes", "told"),
    [
        # Else its samples would be lost unread.
        ({"0.tar": 0, "1.tar": 6}, [6, 6], {("outdated sizes.json", "0.tar", 0)}),
        ({"0.tar": 4, "1.tar": 6}, [4, 6], {("outdated sizes.json", "0.tar", 2)}),
        ({"0.tar": 8, "1.tar": 6}, [8, 6],
         {("outdated sizes.json", "0.tar#6", 1), ("outdated sizes.json", "0.tar#7", 1)}),
        ({"0.tar": 6, "1.tar": 6, "2.tar": 6}, [6, 6], {("outdated sizes.json", "sizes.json", 0)}),
        ({"0.tar": 6}, [6, 6], set()),
        ({"0.tar": 6, "1.tar": 6}, [6, 6], set()),
    ],
)  # fmt: skip
def test_sizes_json_that_differs_from_the_shards_is_told_and_counted(tmp_path, promised, sizes, told):
    paths = make_shards(tmp_path, [6, 6])
    (tmp_path / "sizes.json").write_text(json.dumps(promised))
    data = dataset(paths, tmp_path, "sequential")
    assert data.index.sizes == sizes
    records = data.index.skipped + [record for slot in range(len(data)) for record in data[0, slot, slot]["skipped"]]
    assert {(record.kind, os.path.basename(record.where), record.samples) for record in records} == told


def test_an_archive_of_nothing_that_sizes_json_knows_of_is_no_news(tmp_path):
    paths = make_shards(tmp_path, [3, 0], sizes_json=True)
    assert index_shards(paths, cache_dir=tmp_path / "cache").skipped == []


def test_sizes_are_counted_once(tmp_path, monkeypatch):
    paths = make_shards(tmp_path / "set", [3, 4])
    passes = []
    monkeypatch.setattr(tar_index, "scan_tar", lambda path: passes.append(path) or scan_tar(path))
    index = index_shards(paths, cache_dir=tmp_path / "cache")
    assert index.sizes == [3, 4]
    assert index_shards(paths, cache_dir=tmp_path / "cache").sizes == [3, 4]
    ShardReader(index).read(1, 3)
    assert passes == paths
    write_shard(Path(paths[1]), labelled_samples(1, 6))  # a changed file is counted again
    assert index_shards(paths, cache_dir=tmp_path / "cache").sizes == [3, 6]
    assert passes == [*paths, paths[1]]
    for stored in (tmp_path / "cache" / "index").iterdir():  # a cache that went bad is made anew
        stored.write_text('{"keys": ')
    assert index_shards(paths, cache_dir=tmp_path / "cache").sizes == [3, 6]
    assert len(passes) == 5


def test_sizes_json_saves_the_pass(tmp_path, monkeypatch):
    paths = make_shards(tmp_path / "set", [3, 4], sizes_json=True)
    monkeypatch.setattr(tar_index, "scan_tar", lambda path: pytest.fail("read the shard"))
    assert index_shards(paths, cache_dir=tmp_path / "cache").sizes == [3, 4]


@pytest.mark.parametrize("text", ["{", "[3]", '{"0.tar": "3"}', '{"0.tar": -3}', '{"0.tar": true}'])
def test_a_useless_sizes_json_is_ignored(tmp_path, text, caplog):
    paths = make_shards(tmp_path, [3])
    (tmp_path / "sizes.json").write_text(text)
    assert index_shards(paths, cache_dir=tmp_path / "cache").sizes == [3]
    assert "sizes.json" in caplog.text


def test_missing_and_damaged_shards_are_recorded_with_an_estimate(tmp_path):
    paths = make_shards(tmp_path / "set", [10, 10, 10, 10])
    paths.append(str(tmp_path / "set" / "4.tar"))
    data = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(data[: len(data) // 2])
    index = index_shards(paths, cache_dir=tmp_path / "cache")
    damaged, missing = index.skipped
    assert index.sizes[0] == index.sizes[2] == 10
    assert 0 < index.sizes[1] < 10
    assert index.sizes[4] == 0
    assert (damaged.kind, damaged.where, damaged.samples) == ("damaged shard", paths[1], 10 - index.sizes[1])
    assert (missing.kind, missing.where, missing.samples) == ("missing shard", paths[4], 10)
    assert "No such file" in missing.detail
    (tmp_path / "set" / "sizes.json").write_text(json.dumps({"4.tar": 123}))
    assert index_shards(paths, cache_dir=tmp_path / "cache").skipped[1].samples == 123


def test_an_unusable_cache_dir_is_an_error(tmp_path):
    paths = make_shards(tmp_path / "set", [1])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache_dir .*/file/cache: cannot be made"):
        index_shards(paths, cache_dir=tmp_path / "file" / "cache")


# ------------------------------------------------------------------------------------------------------ reading samples


@pytest.mark.parametrize("sizes", [[70], [5, 0, 17], [40, 1, 30]], ids=str)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_holds_every_sample_once(tmp_path, sizes, num_workers):
    data = dataset(make_shards(tmp_path / "set", sizes), tmp_path)
    total = sum(sizes)
    batches, skipped = training_batches(
        data, global_batch_size=total, per_device=1, num_workers=num_workers, num_steps=2
    )
    samples = {key: members for shard, size in enumerate(sizes) for key, members in labelled_samples(shard, size)}
    assert skipped == []
    for batch in batches.values():
        assert sorted(key for key, _, _ in batch.values()) == sorted(samples)
        for key, label, pixels in batch.values():
            assert label == int(samples[key]["cls"])
            assert pixels == decode(samples[key]["jpg"], TRANSFORM).numpy().tobytes()
    assert [key for key, *_ in batches[0].values()] != [key for key, *_ in batches[1].values()]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_global_batches_are_the_same_for_any_number_of_processes_and_workers(tmp_path):
    data = dataset(make_shards(tmp_path / "set", [30, 0, 25, 7]), tmp_path, seed=4)
    expected, _ = training_batches(data)  # 6 steps of 12, over the end of an epoch of 62
    assert sorted(expected) == list(range(6))
    assert all(sorted(batch) == list(range(12)) for batch in expected.values())
    for world_size, num_workers, per_device in [(1, 1, 4), (1, 3, 12), (2, 0, 3), (2, 3, 6), (4, 0, 3), (4, 1, 1)]:
        found, _ = training_batches(data, world_size=world_size, num_workers=num_workers, per_device=per_device)
        assert found == expected, (world_size, num_workers)
    other, _ = training_batches(dataset(data.index.urls, tmp_path, seed=5))
    assert other != expected


@pytest.mark.parametrize("first_step", [1, 4, 5])
def test_a_resumed_run_reads_the_same_batches_and_nothing_else(tmp_path, monkeypatch, first_step):
    paths = make_shards(tmp_path / "set", [30, 25, 7])
    expected, _ = training_batches(dataset(paths, tmp_path))
    decoded = []
    monkeypatch.setattr(shards, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    found, _ = training_batches(dataset(paths, tmp_path), first_step=first_step)
    assert found == {step: batch for step, batch in expected.items() if step >= first_step}
    assert len(decoded) == 12 * (6 - first_step)


def test_evaluation_takes_the_first_samples_in_shard_order(tmp_path):
    data = dataset(make_shards(tmp_path / "set", [4, 0, 9]), tmp_path, "sequential")
    keys = [key for shard, size in [(0, 4), (2, 9)] for key, _ in labelled_samples(shard, size)]
    for world_size, num_workers, num_samples in [(1, 0, 6), (2, 2, 13), (4, 0, 9), (3, 0, 1000)]:
        found, counts = {}, set()
        for rank in range(world_size):
            loader = eval_loader(
                data, num_samples=num_samples, batch_size=2, rank=rank, world_size=world_size, num_workers=num_workers
            )
            batches = list(loader)
            assert len(list(loader)) == len(batches)  # a second evaluation
            counts.add(len(batches))
            for batch in batches:
                assert batch["images"].shape[1:] == (3, 8, 8)  # also of an empty batch
                assert batch["images"].dtype == torch.uint8
                assert batch["labels"].dtype == batch["positions"].dtype == torch.int64
                found.update(zip(batch["positions"].tolist(), batch["keys"]))
        assert len(counts) == 1
        assert found == dict(enumerate(keys[:num_samples]))


def test_loaders_leave_the_random_state_alone(tmp_path):
    data = dataset(make_shards(tmp_path / "set", [24]), tmp_path)
    state = torch.get_rng_state()
    training_batches(data, num_workers=1, num_steps=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_are_only_needed_where_they_are_wanted(tmp_path):
    path = write_shard(
        tmp_path / "0.tar", [("a", {"jpg": image_bytes(0)}), ("b", {"jpeg": image_bytes(1), "cls": b"x"})]
    )
    data = dataset([path], tmp_path, "sequential", with_labels=False)
    batch = data.collate_fn([data[0, 0, 0], data[0, 1, 1]])
    assert batch["keys"] == ["a", "b"]
    assert "labels" not in batch
    assert batch["skipped"] == []


def test_readers_give_their_descriptors_back(tmp_path):
    """Every evaluation of a run makes a data set anew."""
    urls = make_shards(tmp_path / "set", [2, 2, 2])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        data = dataset(urls, tmp_path, "sequential")
        assert all(data[0, slot, slot]["image"] is not None for slot in range(6))
    del data
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_data_set_in_use_can_be_sent_to_another_process(tmp_path):
    data = dataset(make_shards(tmp_path / "set", [24]), tmp_path)
    item = data[0, 3, 3]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[0, 3, 3]["image"], item["image"])
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=[[(0, 3, 3)]], num_workers=1, collate_fn=data.collate_fn, multiprocessing_context="spawn"
    )
    assert torch.equal(next(iter(loader))["images"][0], item["image"])


# ----------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "undecodable image": lambda good: {**good, "jpg": good["jpg"][: len(good["jpg"]) // 2]},
    "missing image": lambda good: {"cls": good["cls"]},
    "missing label": lambda good: {"jpg": good["jpg"]},
    "bad label": lambda good: {**good, "cls": str(NUM_CLASSES).encode()},
}
OTHER_BAD_LABELS = [b"-1", b"one", b"", b"1.5", b"\xff"]


def bad_shards(folder, sizes, bad):
    """Shards in which sample ``bad[shard, sample]`` of that kind is bad."""
    paths = []
    for shard, size in enumerate(sizes):
        samples = labelled_samples(shard, size)
        for sample, (key, members) in enumerate(samples):
            if (shard, sample) in bad:
                samples[sample] = (key, BAD[bad[shard, sample]](members))
        paths.append(write_shard(folder / f"{shard}.tar", samples))
    return paths


def test_bad_samples_are_counted_and_replaced_by_the_next_good_one_of_their_run(tmp_path):
    sizes = [150, 170]
    places = [(0, 3), (0, 77), (1, 0), (1, 169)]
    bad = dict(zip(places, BAD))
    data = dataset(bad_shards(tmp_path / "set", sizes, bad), tmp_path)
    order = EpochOrder(sizes, seed=0, epoch=0)
    slots = [order.reference(slot) for slot in range(320)]
    # One more in the run after the first bad one: the slot goes to the one after next.
    position = slots.index((0, 3))
    following = slots[position + 64] if position + 64 < 320 else slots[position % 64]
    bad[following] = "undecodable image"
    data = dataset(bad_shards(tmp_path / "worse", sizes, bad), tmp_path)

    expected = {}
    for slot, reference in enumerate(slots):
        run = slots[slot % 64 :: 64]
        place = run.index(reference)
        shard, sample = next(each for each in run[place:] + run[:place] if each not in bad)
        expected[slot] = f"s{shard:03d}-{sample:05d}"
    for world_size, num_workers in [(1, 0), (2, 1), (4, 0)]:
        batches, skipped = training_batches(
            data, global_batch_size=320, world_size=world_size, num_workers=num_workers, num_steps=1
        )
        assert {position: key for position, (key, *_) in batches[0].items()} == expected
        wheres = {f"{data.index.urls[shard]}#s{shard:03d}-{sample:05d}": kind for (shard, sample), kind in bad.items()}
        assert {record.where: record.kind for record in skipped} == wheres
        counter = SkipCounter(data.index, 0.02)
        counter.add(skipped)
        assert counter.bad_fraction == 5 / 320


def test_a_bad_sample_of_a_tiny_set_is_replaced_from_another_run(tmp_path):
    data = dataset(bad_shards(tmp_path / "set", [3], {(0, 1): "missing label"}), tmp_path)
    batches, skipped = training_batches(data, global_batch_size=3, num_steps=2)
    assert len(skipped) == 2
    assert all("s000-00001" not in {key for key, *_ in batch.values()} for batch in batches.values())


@pytest.mark.parametrize("label", OTHER_BAD_LABELS)
def test_labels_that_are_no_class_are_bad(tmp_path, label):
    path = write_shard(tmp_path / "0.tar", [("a", {"jpg": image_bytes(0), "cls": label}), *labelled_samples(0, 1)])
    data = dataset([path], tmp_path, "sequential", num_classes=None)
    assert [record.kind for record in data[0, 0, 0]["skipped"]] == ["bad label"]
    assert data[0, 1, 1]["skipped"] == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_drops_bad_samples_and_records_them(tmp_path, num_workers):
    bad = {(0, 0): "missing label", (0, 1): "undecodable image", (0, 4): "bad label"}
    data = dataset(bad_shards(tmp_path / "set", [6], bad), tmp_path, "sequential")
    batches = list(eval_loader(data, num_samples=6, batch_size=2, rank=0, world_size=1, num_workers=num_workers))
    assert [batch["positions"].tolist() for batch in batches] == [[], [2, 3], [5]]
    assert batches[0]["images"].shape == (0, 3, 8, 8)
    kinds = [record.kind for batch in batches for record in batch["skipped"]]
    assert kinds == ["missing label", "undecodable image", "bad label"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_stops_with_one_line_where_nothing_is_good(tmp_path, num_workers):
    everything = {(0, sample): "undecodable image" if sample % 2 else "missing label" for sample in range(150)}
    data = dataset(bad_shards(tmp_path / "set", [150], everything), tmp_path)
    message = None
    try:  # pytest.raises would keep the traceback, and with it the worker, alive
        training_batches(data, global_batch_size=2, num_workers=num_workers, num_steps=1)
    except UserError as error:
        assert type(error) is ShardError  # noqa: PT017
        message = str(error)
    assert message.startswith("100 samples in a row cannot be used (")
    assert "undecodable image" in message
    assert "missing label" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("names", "kind", "expected"),
    [
        # webdataset#237, open_clip#480
        (
            ["img_1.0.png", "img_1.cls"],
            "missing image",
            r"the sample has \.0\.png, \.cls \(names are cut at the first dot",
        ),
        (["s.input.jpg", "s.cls"], "missing image", r"the sample has \.input\.jpg, \.cls \(names are cut .* rename it"),
        (["s.jpg", "s.txt"], "missing label", r"no \.cls member; the sample has \.jpg, \.txt$"),
        (["s.jpg", "s.label.cls"], "missing label", r"no \.cls member; the sample has \.jpg, \.label\.cls \(names"),
        (
            ["s.tiff", "s.cls"],
            "missing image",
            r"no \.jpg, \.jpeg, \.png, \.webp member; the sample has \.tiff, \.cls$",
        ),
        (["s.jpg", "s.cls"], "undecodable image", r"cannot identify image file <_io\.BytesIO object>$"),
    ],
)
def test_what_a_sample_lacks_is_said_with_what_it_has(tmp_path, names, kind, expected):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            add_member(tar, name, b"0")
    record = dataset([str(tmp_path / "0.tar")], tmp_path, "sequential")[0, 0, 0]["skipped"][0]
    assert record.kind == kind
    assert re.search(expected, record.detail), record.detail


def test_sizes_json_that_promises_too_much_leaves_bad_samples(tmp_path):
    paths = make_shards(tmp_path / "set", [20, 20])
    (tmp_path / "set" / "sizes.json").write_text('{"0.tar": 23, "1.tar": 20}')
    data = dataset(paths, tmp_path)
    batches, skipped = training_batches(data, global_batch_size=43, num_steps=1)
    assert len(batches[0]) == 43
    assert {(record.kind, record.where) for record in skipped} == {
        ("outdated sizes.json", f"{paths[0]}#{sample}") for sample in (20, 21, 22)
    }
    assert "promises 23 samples, the shard holds 20" in skipped[0].detail


def test_sizes_json_that_promises_too_little_is_said_once(tmp_path):
    paths = make_shards(tmp_path / "set", [20])
    (tmp_path / "set" / "sizes.json").write_text('{"0.tar": 17}')
    data = dataset(paths, tmp_path)
    batches, skipped = training_batches(data, global_batch_size=17, num_steps=2)
    assert len({key for key, *_ in batches[0].values()}) == 17
    (record,) = skipped
    assert (record.kind, record.where, record.samples) == ("outdated sizes.json", paths[0], 3)
    assert "promises 17 samples, the shard holds 20" in record.detail


def test_a_shard_that_vanishes_after_indexing_is_skipped(tmp_path):
    paths = make_shards(tmp_path / "set", [20, 20], sizes_json=True)
    data = dataset(paths, tmp_path)
    os.unlink(paths[1])
    batches, skipped = training_batches(data, global_batch_size=40, num_steps=1)
    assert {key[:4] for key, *_ in batches[0].values()} == {"s000"}
    assert {(record.kind, record.where) for record in skipped} == {
        ("missing shard", f"{paths[1]}#{sample}") for sample in range(20)
    }


# ------------------------------------------------------------------------------------------------------ counting losses


def test_skips_count_once_are_reported_once_per_kind_and_end_the_run(tmp_path):
    index = index_shards(make_shards(tmp_path / "set", [200]), cache_dir=tmp_path / "cache")
    lines = []
    counter = SkipCounter(index, 0.01, report=lines.append)
    assert counter.summary() == ""
    for epoch in range(3):  # the same sample in every epoch
        counter.add([Skipped("undecodable image", "0.tar#a", "broken")])
        counter.seen += 200
        assert counter.bad_fraction == 1 / (200 * (epoch + 1))
        counter.check()
    counter.seen = 200
    counter.add([Skipped("undecodable image", "0.tar#b", "broken"), Skipped("outdated sizes.json", "0.tar", "old", 0)])
    counter.check()  # 2 of 200 is exactly the limit
    counter.add([Skipped("bad label", "0.tar#c", "class 7")])
    assert [line.split(": ")[1] for line in lines] == ["undecodable image", "outdated sizes.json", "bad label"]
    assert counter.summary().splitlines() == [
        "undecodable image: 2 samples, 0.tar#a and 1 more (broken)",
        "outdated sizes.json: noted 1 x, 0.tar (old)",
        "bad label: 1 samples, 0.tar#c (class 7)",
    ]
    with pytest.raises(UserError) as caught:
        counter.check()
    message = str(caught.value)
    assert message.startswith("--max_bad_fraction 0.01: 1.50 % of the samples could not be used: ")
    assert all(where in message for where in ("0.tar#a", "0.tar#b", "0.tar#c"))
    assert "\n" not in message


def test_an_early_loss_does_not_end_a_run(tmp_path):
    index = index_shards(make_shards(tmp_path / "set", [300]), cache_dir=tmp_path / "cache")
    counter = SkipCounter(index, 0.01)
    counter.seen = 8
    counter.add([Skipped("bad label", "0.tar#a", "class 7")])
    assert counter.bad_fraction == 1 / 300
    counter.check()


def test_lost_shards_weigh_against_the_whole_set(tmp_path):
    paths = [*make_shards(tmp_path / "set", [10] * 19), str(tmp_path / "set" / "19.tar")]
    lines = []
    index = index_shards(paths, cache_dir=tmp_path / "cache")
    SkipCounter(index, 0.05, report=lines.append).check()  # 1 of 20
    assert len(lines) == 1
    with pytest.raises(UserError, match=r"5\.00 % of .* 10 samples for missing shard: .*19\.tar"):
        SkipCounter(index, 0.049).check()


def test_counters_of_all_ranks_merge(tmp_path):
    index = index_shards(make_shards(tmp_path / "set", [1000]), cache_dir=tmp_path / "cache")
    lines = []
    ranks = [SkipCounter(index, 0.01, report=lines.append if rank == 0 else None) for rank in range(3)]
    for rank, counter in enumerate(ranks):
        counter.add([Skipped("bad label", "0.tar#same", "x"), Skipped("bad label", f"0.tar#{rank}", "x")])
        counter.seen = 400
    ranks[2].add([Skipped("missing image", "0.tar#i", "x")])
    states = json.loads(json.dumps([counter.state() for counter in ranks]))
    for _ in range(2):  # merging leaves the counters as they are
        merged = ranks[0].merge(states)
        assert merged.seen == 1200
        assert merged.bad_fraction == 5 / 1200
    assert ranks[0].seen == 400
    assert [line.split(": ")[1] for line in lines] == ["bad label", "missing image"]
    assert merged.state()["seen"] == 1200
    resumed = ranks[1].merge([json.loads(json.dumps(merged.state()))])
    assert resumed.summary() == merged.summary()


# -------------------------------------------------------------------------------------------------------- remote shards


def test_shards_from_a_web_server(tmp_path, server):
    local = make_shards(server.folder / "set", [30, 25, 7])
    expected, _ = training_batches(dataset(local, tmp_path))
    server.broken["/set/1.tar"] = 1  # ends in the middle, once
    server.statuses["/set/2.tar"] = [503]
    urls = expand_shards([f"{server.url}/set/{{0..2}}.tar"])
    data = ShardDataset(index_shards(urls, cache_dir=tmp_path / "other"), TRANSFORM, order="shuffled", with_labels=True)
    assert data.index.sizes == [30, 25, 7]
    for world_size, num_workers in [(1, 0), (2, 2)]:
        found, skipped = training_batches(data, world_size=world_size, num_workers=num_workers)
        assert found == expected
        assert skipped == []
    wanted = {"/set/0.tar": 1, "/set/1.tar": 2, "/set/2.tar": 2, "/set/sizes.json": 1}
    assert dict(server.requests) == wanted  # everything else came from the cache
    assert index_shards(urls, cache_dir=tmp_path / "other").sizes == [30, 25, 7]
    assert server.requests["/set/0.tar"] == 1


def test_a_script_that_ends_with_its_loader_waits_for_no_worker(tmp_path):
    """Workers hear no SIGTERM, by which multiprocessing would end them before it waits for them."""
    make_shards(tmp_path, [30])
    program = """
import sys
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, eval_loader, index_shards
data = ShardDataset(index_shards([sys.argv[1]], cache_dir=sys.argv[2]), ImageTransform(8, (8, 8)), order="sequential")
batches = iter(eval_loader(data, num_samples=30, batch_size=5, rank=0, world_size=1, num_workers=2))
print(len(next(batches)["keys"]))
"""
    command = [sys.executable, "-c", program, tmp_path / "0.tar", tmp_path / "cache"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout == "5\n"


def test_a_lock_does_not_live_on_in_a_worker_forked_meanwhile(tmp_path):
    """A prefetch thread may hold one while data workers start: each would then wait for the other without end."""
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    with shard_sources._locked(tmp_path / "lock", wait=True):
        worker.start()
    try:
        with shard_sources._locked(tmp_path / "lock", wait=False) as held:
            assert held
    finally:
        worker.kill()


def test_a_shard_the_server_does_not_have_is_missing(tmp_path, server):
    make_shards(server.folder / "set", [30, 30, 30])
    os.unlink(server.folder / "set" / "1.tar")
    urls = [f"{server.url}/set/{number}.tar" for number in range(3)]
    index = index_shards(urls, cache_dir=tmp_path / "cache")
    assert index.skipped == [Skipped("missing shard", urls[1], "HTTP status 404", 30)]
    assert server.requests["/set/1.tar"] == 1  # no use in asking again


def test_a_remote_shard_that_sizes_json_promises_is_only_fetched_when_needed(tmp_path, server):
    make_shards(server.folder / "set", [30, 30], sizes_json=True)
    os.unlink(server.folder / "set" / "1.tar")
    urls = [f"{server.url}/set/{number}.tar" for number in range(2)]
    data = dataset(urls, tmp_path)
    assert data.index.sizes == [30, 30]
    assert set(server.requests) == {"/set/sizes.json"}
    batches, skipped = training_batches(data, global_batch_size=60, num_steps=1)
    assert len(batches[0]) == 60
    assert {record.kind for record in skipped} == {"missing shard"}
    assert server.requests["/set/1.tar"] <= 2  # once by the reader, once ahead of it


def test_a_server_that_always_breaks_costs_its_shard(tmp_path, server):
    make_shards(server.folder / "set", [5])
    server.broken["/set/0.tar"] = 100
    with pytest.raises(UnavailableShard, match=r"connection broke after \d+ of \d+ bytes, 4 attempts"):
        copy_of(ShardCache(tmp_path / "cache"), f"{server.url}/set/0.tar")
    assert server.requests["/set/0.tar"] == 4
    assert list((tmp_path / "cache" / "shards").iterdir()) == []


def test_no_server_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:9/set/sizes\.json: cannot be reached \(.*refused"):
        index_shards(["http://127.0.0.1:9/set/0.tar"], cache_dir=tmp_path / "cache")


def test_small_texts_are_read_by_path_and_url(tmp_path, server):
    (server.folder / "classnames.txt").write_text("kühn\n", encoding="utf-8")
    (server.folder / "latin.txt").write_bytes("kühn".encode("latin-1"))
    assert read_text(f"{server.url}/classnames.txt", tmp_path / "cache") == "kühn\n"
    assert read_text(str(server.folder / "classnames.txt"), tmp_path / "cache") == "kühn\n"
    assert read_text(f"{server.url}/nothing.txt", tmp_path / "cache") is None
    assert read_text(str(server.folder / "nothing.txt"), tmp_path / "cache") is None
    with pytest.raises(UserError, match="not a UTF-8 text"):
        read_text(str(server.folder / "latin.txt"), tmp_path / "cache")
    kept = [path.name.partition("-")[2] for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(kept) == ["classnames.txt", "nothing.txt.absent"]


def test_tokens_never_show(tmp_path, server, caplog):
    make_shards(server.folder / "set", [5])
    good, absent = (f"{server.url}/set/{number}.tar?token=SECRET" for number in (0, 1))
    index = index_shards([good, absent], cache_dir=tmp_path / "cache")
    counter = SkipCounter(index, 0.0)
    with pytest.raises(UserError) as caught:
        counter.check()
    with pytest.raises(UserError) as piped:
        index_shards(["pipe:curl --oauth2-bearer SECRET http://x; exit 3"], cache_dir=tmp_path / "cache")
    assert "status 3" in str(piped.value)
    with pytest.raises(UserError) as unreachable:
        index_shards(["http://user:SECRET@127.0.0.1:9/0.tar"], cache_dir=tmp_path / "cache")
    written = [str(path) for path in (tmp_path / "cache").rglob("*")]
    shown = [str(error.value) for error in (caught, piped, unreachable)]
    assert not any("SECRET" in text for text in [*written, *shown, caplog.text, counter.summary()])
    assert display_url("https://u:p@h/x.tar?a=1") != display_url("https://u:p@h/x.tar?a=2")
    assert display_url("https://u:p@h/x.tar") == "https://h/x.tar"


def test_pipes_run_only_when_allowed(tmp_path):
    (path,) = make_shards(tmp_path / "set", [6])
    pattern = f"pipe:cat {shlex.quote(path)}"
    with pytest.raises(UserError, match="--allow_pipe_urls"):
        expand_shards([pattern])
    data = dataset(expand_shards([pattern], allow_pipe_urls=True), tmp_path, "sequential")
    assert [data[0, slot, slot]["key"] for slot in range(6)] == [key for key, _ in labelled_samples(0, 6)]


def copy_of(cache, url):
    with cache.local(url) as path:
        return path


def fetch(url, cache_dir, results):
    results.put(copy_of(ShardCache(cache_dir), url))


def test_several_processes_fetch_a_shard_once(tmp_path, server):
    make_shards(server.folder / "set", [5])
    server.delay = 0.3
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (f"{server.url}/set/0.tar", tmp_path / "cache", results)
    processes = [context.Process(target=fetch, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert server.requests["/set/0.tar"] == 1
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == (server.folder / "set" / "0.tar").read_bytes()


def test_the_cache_stays_within_its_limit_and_forgets_the_least_recently_used(tmp_path, server):
    make_shards(server.folder / "set", [5] * 6)
    urls = [f"{server.url}/set/{number}.tar" for number in range(6)]
    size = (server.folder / "set" / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", limit_gb=3.5 * size / 1e9)
    for number, url in enumerate(urls):
        path = copy_of(cache, url)
        os.utime(path, (1000 + number, os.stat(path).st_mtime))
        kept = list(cache.shard_dir.iterdir())
        assert sum(file.stat().st_size for file in kept) <= cache.limit_bytes
        assert Path(path) in kept
    assert {int(file.stat().st_atime) for file in kept} == {1003, 1004, 1005}
    copy_of(ShardCache(cache.cache_dir, 3.5 * size / 1e9), urls[3])  # used again
    copy_of(cache, urls[0])
    assert server.requests["/set/3.tar"] == 1
    copy_of(cache, urls[3])
    assert server.requests["/set/3.tar"] == 1
    copy_of(cache, urls[4])
    assert server.requests["/set/4.tar"] == 2


def test_a_copy_that_is_being_opened_is_not_evicted(tmp_path, server):
    make_shards(server.folder / "set", [5] * 3)
    urls = [f"{server.url}/set/{number}.tar" for number in range(3)]
    cache, other = (ShardCache(tmp_path / "cache", limit_gb=1e-9) for _ in range(2))
    with cache.local(urls[0]) as path:
        assert Path(copy_of(other, urls[1])).exists()  # above the limit, but the only one that could go is this one
        assert Path(path).exists()
        with other.local(urls[0], wait=False) as taken:
            assert not taken
    last = copy_of(other, urls[2])
    assert list(cache.shard_dir.iterdir()) == [Path(last)]


def test_reading_goes_on_when_the_cache_is_too_small(tmp_path, server):
    local = make_shards(server.folder / "set", [10] * 6)
    expected, _ = training_batches(dataset(local, tmp_path))
    size = Path(local[0]).stat().st_size
    index = index_shards(
        [f"{server.url}/set/{number}.tar" for number in range(6)],
        cache_dir=tmp_path / "small",
        cache_limit_gb=1.5 * size / 1e9,
    )
    data = ShardDataset(index, TRANSFORM, order="shuffled", with_labels=True)
    assert training_batches(data, num_workers=1) == (expected, [])


def test_shards_are_fetched_ahead_but_not_far(tmp_path, server, monkeypatch):
    class SmallOrder(EpochOrder):
        """2 runs in blocks of 5: block b takes shards b of the first and 10 + b of the second half of the order."""

        def __init__(self, sizes, seed, epoch):
            super().__init__(sizes, seed, epoch, num_runs=2, block_size=5)

    monkeypatch.setattr(shards, "EpochOrder", SmallOrder)
    make_shards(server.folder / "set", [5] * 20, sizes_json=True)
    data = dataset([f"{server.url}/set/{number}.tar" for number in range(20)], tmp_path)
    order = SmallOrder(data.index.sizes, 0, 0)

    def fetched_after(slot, blocks):
        data[0, slot, 0]
        expected = {f"/set/{shard}.tar" for block in blocks for shard in order.shards_of_block(block)}
        deadline = time.monotonic() + 10
        while not expected <= set(server.requests) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        assert set(server.requests) - {"/set/sizes.json"} == expected
        assert max(server.requests.values()) == 1

    fetched_after(0, [0, 1])
    fetched_after(3, [0, 1])
    fetched_after(10, [0, 1, 2])


HUB_SCRIPT = """
import json, sys
from utils.errors import UserError
from utils.data.images import ImageTransform
from utils.data.sources import expand_shards, read_text
from utils.data.shards import ShardDataset, index_shards
found = {name: expand_shards([f"hf://datasets/org/name/{name}"]) for name in ("test", "test/*.tar", "test/{0..2}.tar")}
index = index_shards(found["test/{0..2}.tar"], cache_dir=sys.argv[1])
data = ShardDataset(index, ImageTransform(8, (8, 8)), order="sequential", with_labels=True)
keys = [data[0, slot, slot]["key"] for slot in range(len(data))]
try:
    expand_shards(["hf://datasets/org/name"])
except UserError as error:
    message = str(error)
text = read_text("hf://datasets/org/name/classnames.txt", sys.argv[1])
print(json.dumps([found, index.sizes, [vars(record) for record in index.skipped], keys, message, text]))
"""


def test_shards_from_the_hub(tmp_path, server):
    """Against a server with the hub's addresses, in a process of its own: the hub's address is read at import."""
    make_shards(server.folder / "test", [4, 3])
    (server.folder / "classnames.txt").write_text("cat\ndog\n")
    files = [
        {"type": "file", "path": f"test/{name}", "size": 1, "oid": "0"} for name in ("1.tar", "0.tar", "sizes.txt")
    ]
    server.replies["/api/datasets/org/name/tree/main/test"] = files
    server.replies["/api/datasets/org/name/tree/main"] = [{"type": "directory", "path": "test", "oid": "0"}]
    environment = {**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": str(ROOT)}
    environment.update(HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", HF_TOKEN="hf_SECRET")
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, str(tmp_path / "cache")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, sizes, skipped, keys, message, text = json.loads(done.stdout)
    urls = [f"hf://datasets/org/name/test/{number}.tar" for number in range(3)]
    assert found == {"test": urls[:2], "test/*.tar": urls[:2], "test/{0..2}.tar": urls}
    assert sizes == [4, 3, 0]
    assert [(record["kind"], record["where"], record["samples"]) for record in skipped] == [
        ("missing shard", urls[2], 4)
    ]
    assert keys == [key for shard, size in [(0, 4), (1, 3)] for key, _ in labelled_samples(shard, size)]
    assert "name its test/ folder" in message
    assert text == "cat\ndog\n"
    assert "SECRET" not in done.stdout + done.stderr


def test_images_of_a_shard_open_as_images(tmp_path):
    """The makers of this file really make what the tests believe."""
    (path,) = make_shards(tmp_path, [2])
    with tarfile.open(path) as tar:
        assert Image.open(io.BytesIO(tar.extractfile("s000-00001.jpg").read())).size == (12, 10)
