"""Digests of files: they follow the bytes, whatever size and date say, and cost one pass for every change."""

import os
import shutil
import time

import pytest
from accelerate import Accelerator

from tests.shard_maker import labelled_samples, write_shard
from utils.data import digests
from utils.data.digests import files_digest, shards_digest
from utils.data.shards import index_shards


def overwrite(path, data):
    """Other bytes of the same size under the same date, in the same inode."""
    before = path.stat()
    assert before.st_size == len(data)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path, data):
    """Other bytes of the same size and date, moved into place."""
    before = path.stat()
    path.with_name("aside").write_bytes(data)
    os.utime(path.with_name("aside"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("aside").rename(path)


@pytest.mark.parametrize("change", [overwrite, replace])
@pytest.mark.parametrize("settled", [0.0, 2.0])
def test_a_digest_follows_the_bytes_whatever_size_and_date_say(tmp_path, monkeypatch, change, settled):
    """img2dataset#174: reuse by name, size or date serves what is gone."""
    monkeypatch.setattr(digests, "SETTLED", settled)
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    time.sleep(0.01)  # the kernel's clock ticks every few milliseconds
    first = files_digest([path], tmp_path / "cache")
    time.sleep(0.01)
    change(path, b"new")
    assert files_digest([path], tmp_path / "cache") != first
    change(path, b"old")
    assert files_digest([path], tmp_path / "cache") == first


def test_a_file_is_read_once_for_every_change(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 0.0)
    read = []
    real = digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda file, kind: read.append(file.name) or real(file, kind))
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"a")
    other.write_bytes(b"b")
    time.sleep(0.01)
    assert files_digest([path], tmp_path / "cache") == files_digest([path], tmp_path / "cache")
    os.symlink(path, tmp_path / "link")
    files_digest([tmp_path / "link"], tmp_path / "cache")
    assert len(read) == 1
    both = files_digest([path, other], tmp_path / "cache")
    assert both == files_digest([path, other], tmp_path / "cache") != files_digest([other, path], tmp_path / "cache")
    assert len(read) == 5
    for kept in (tmp_path / "cache/digests").iterdir():
        kept.write_text("[]")
    assert files_digest([path, other], tmp_path / "cache") == both
    (tmp_path / "full").write_text("a cache that cannot be written")
    assert files_digest([path, other], tmp_path / "full") == both


def test_what_has_just_changed_is_read_again(tmp_path):
    """A clock of coarse ticks does not show a second change within one."""
    (tmp_path / "a").write_bytes(b"old")
    files_digest([tmp_path / "a"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_shards_are_known_by_the_bytes_of_those_that_are_read(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / "set" / f"{shard}.tar", labelled_samples(shard, 4))
    urls = [str(tmp_path / "set" / f"{shard}.tar") for shard in range(3)]
    accelerator, cache = Accelerator(cpu=True), tmp_path / "cache"

    def digest(num_samples=None, urls=urls):
        return shards_digest(accelerator, index_shards(urls, cache_dir=cache), num_samples)

    whole, first = digest(), digest(8)
    assert len({whole, first, digest(4)}) == 3
    assert digest(5) == first  # of the second shard as much is taken as there is
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert digest(urls=[url.replace("/set/", "/copy/") for url in urls]) == whole
    assert digest(urls=urls[::-1]) != whole
    write_shard(tmp_path / "set" / "2.tar", labelled_samples(9, 4))
    assert digest(8) == first
    assert digest() != whole
    os.unlink(urls[2])
    assert digest(8) == first
    assert digest() != whole
