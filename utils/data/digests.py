"""Digests of file contents. A stored result keeps one, so that it is recomputed when its data has changed.

Names, sizes and dates are not enough: labels corrected inside a tar leave its size, and a copy may keep its date. So
the digest is over the bytes. It is cached by path, size, mtime, ctime and inode. Nobody can set ctime back, so a file
is read once after every change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from utils.data.shards import ShardIndex
from utils.data.sources import ShardCache, UnavailableShard, default_cache_dir, digest, remember, remembered
from utils.processes.distributed import gather_objects
from utils.processes.progress import RunProgress

KIND = "sha256"  # 1.8 GB/s per thread on a processor with SHA instructions; blake2b 1.3 GB/s
SETTLED = 2.0  # seconds; sooner after a change, the file system's clock may be too coarse to show another one
THREADS = 4

T = TypeVar("T")
R = TypeVar("R")


def files_digest(paths: Sequence[str | os.PathLike], cache_dir: str | os.PathLike | None = None) -> str:
    """A digest of the bytes of these files in this order, cached in ``cache_dir``/digests. Raises OSError."""
    real = [os.path.realpath(path) for path in paths]
    kept = Path(cache_dir or default_cache_dir()) / "digests" / f"{digest(json.dumps(real))}.json"
    state, changed = files_state(real)
    found = remembered(kept)
    if found.get("state") == state and isinstance(found.get("digest"), str):
        return found["digest"]
    started, whole = time.time(), hashlib.new(KIND)
    for path in real:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, KIND).digest())
    if changed < started - SETTLED and files_state(real)[0] == state:
        remember(kept, {"state": state, "digest": whole.hexdigest()})
    return whole.hexdigest()


def files_state(paths: Sequence[str | os.PathLike]) -> tuple[str, float]:
    """A digest of the files' size, mtime, ctime and inode, and the time of the latest change, without reading them."""
    found = [os.stat(path) for path in paths]
    state = [(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino) for status in found]
    return digest(json.dumps(state)), max((status.st_ctime for status in found), default=0.0)


def text_digest(lines: Sequence[str]) -> str:
    """A short digest of texts without line breaks."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def shards_digest(accelerator: Accelerator, index: ShardIndex, num_samples: int | None = None) -> str:
    """A digest of the bytes and the sample counts of the shards that hold the first ``num_samples`` samples.

    Call it on all processes: each reads its part, all get the result. For a remote shard the cached copy is read.
    """
    used, samples = 0, 0
    while used < len(index.urls) and (num_samples is None or samples < num_samples):
        samples += index.sizes[used]
        used += 1
    cache = ShardCache(index.cache_dir, index.cache_limit_gb)

    def one(place: int) -> str:
        try:
            with cache.local(index.urls[place]) as path:
                return files_digest([path], index.cache_dir)
        except (OSError, UnavailableShard):
            return "unavailable"

    own = range(accelerator.process_index, used, accelerator.num_processes)
    found = dict(zip(own, side_by_side(one, own, enabled=accelerator.is_main_process)))
    for others in gather_objects(accelerator, found):
        found |= others
    return text_digest([f"{found[place]} {index.sizes[place]}" for place in range(used)])


def side_by_side(
    read: Callable[[T], R],
    things: Sequence[T],
    *,
    title: str = "has the data changed? read",
    count: int = THREADS,
    enabled: bool = True,
) -> list[R]:
    """Calls ``read`` on each thing in ``count`` threads, and shows progress if that takes seconds."""
    found = []
    with RunProgress(title, len(things), enabled=enabled, transient=True) as progress, threads(count) as pool:
        for result in pool.map(read, things):
            found.append(result)
            progress.update(len(found))
    return found


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that are not waited for at the end of the block, so that an error or Ctrl-C ends at once."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
