"""--prefetch: downloads everything that a run needs into the caches, for compute nodes without internet.

The run finds its files by the same functions. With HF_HUB_OFFLINE=1, --prefetch only checks that they are there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from utils.cli import launched_rank
from utils.data.digests import side_by_side, threads
from utils.data.sources import (
    ShardCache,
    UnavailableShard,
    default_cache_dir,
    display_url,
    expand_shards,
    is_remote,
    remote_size,
)
from utils.data.tars import tar_index
from utils.errors import UserError, os_errors
from utils.models.hub import find_config, find_model
from utils.models.published import CLIP_TOKENIZER, MODEL_TYPES, ModelName
from utils.processes.progress import RunProgress
from utils.sets.labelled import find_classes, open_set
from utils.training.settings import RunSettings

DOWNLOADS = 4  # shards downloaded at a time
QUESTIONS = 8  # requests for sizes at a time
MOST_LOST = 8  # failed shards before giving up: the server is down
SECONDS_BETWEEN_LINES = 30.0  # between progress lines in a log file

Models = Sequence[tuple[str, ModelName, Sequence[str]]]  # flag, name, supported types


def prefetch_training(
    settings: RunSettings, sets: Sequence[dict[str, Any]], supported: Sequence[str] = MODEL_TYPES
) -> None:
    """Downloads models, listings, texts and shards of a training run, and prints where they are. Raises ``UserError``.

    ``sets``: the arguments of ``open_set``; ``supported``: model types. Mistakes are reported before any large
    download. Under a launcher only the first process works; the others return.
    """
    if launched_rank() > 0:
        return
    sets = [options for options in sets if options["patterns"]]
    named = [(flag, name, supported) for flag, name in settings.models if name is not None]
    for flag, name, kinds in named:
        find_config(name, flag, kinds)
    urls: list[str] = []
    for options in sets:
        where = {name: options[name] for name in ("flag", "allow_pipe_urls", "cache_dir")}
        found = expand_shards(options["patterns"], **where)
        if options["with_classes"]:
            find_classes(found, options["classnames"], options["flag"], settings.cache_dir)
        urls += found
    folder = Path(settings.cache_dir or default_cache_dir())
    cache = ShardCache(folder, settings.cache_limit_gb)
    remote = [url for url in dict.fromkeys(urls) if is_remote(url)]
    lacking = shards_to_fetch(remote, cache) if remote else {}
    lines = prefetch_models(named)
    fetch_shards(lacking, cache)
    gone = {url: "others took its room" for url in remote if not cache.copy_of(url).exists()}
    _refuse_lost(gone, len(remote), "raise --cache_limit_gb, or name fewer shards")
    for options in sets:
        index = open_set(**options).index
        lines.append(f"{options['flag']}: {index.num_samples} samples in {len(index.urls)} shards")
    if remote:
        size = _kept_bytes(remote, cache) / 1e9
        lines.append(f"{len(remote)} shards from URLs, {size:.3g} GB, in {folder.resolve()}")
    say_where(lines, folder)


def prefetch_models(models: Models) -> list[str]:
    """Downloads the files of every model on the hub. Returns a line for each model that says where it is."""
    lines = []
    for flag, name, supported in models:
        if not Path(name.path).exists():
            print(f"{name}: looking for its files", flush=True)
        here = find_model(name, flag, supported)
        named = name.path, name.base_model, name.processor, None
        brought = here.path, here.base_model, here.processor, here.tokenizer
        for part, folder in zip(named, brought):
            if folder is not None and folder != part:
                size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
                lines.append(f"{part or CLIP_TOKENIZER}, {size / 1e9:.3g} GB, in {folder}")
    return list(dict.fromkeys(lines))


def shards_to_fetch(remote: Sequence[str], cache: ShardCache) -> dict[str, int | None]:
    """The shards that the cache lacks, with their bytes if the server states them.

    Raises UserError if a shard does not exist, or if ``cache_limit_gb`` or the disk is too small for all shards.
    """
    where = f"--cache_dir {cache.cache_dir}"
    with os_errors(f"{where}: cannot be made", "name a folder that can be written"):
        cache.cache_dir.mkdir(parents=True, exist_ok=True)
    present = [url for url in remote if cache.copy_of(url).exists()]
    for url in present:
        with cache.local(url):  # marks the copy as used, so that others are evicted first
            pass
    lacking = [url for url in remote if url not in set(present)]
    absent: dict[str, str] = {}

    def ask(url: str) -> int | None:
        try:
            return remote_size(url)
        except UnavailableShard as error:
            absent[url] = str(error)
            return None

    sizes = dict(zip(lacking, side_by_side(ask, lacking, title="asking for sizes", count=QUESTIONS)))
    _refuse_lost(absent, len(remote), "correct the pattern")
    new, free = sum(size or 0 for size in sizes.values()), shutil.disk_usage(cache.cache_dir).free
    total, limit = _kept_bytes(present, cache) + new, cache.limit_bytes
    if limit is not None and total > limit:
        taken = f"the {len(remote)} shards of this run take {total / 1e9:.3g} GB"
        advice = "without internet all have to be there: raise it, or name fewer shards"
        raise UserError(f"--cache_limit_gb {limit / 1e9:g}: {taken}; {advice}")
    if new > free:
        taken = f"{new / 1e9:.3g} GB of shards are still to come, {free / 1e9:.3g} GB are free"
        raise UserError(f"{where}: {taken}; make room, name a folder on another disk, or name fewer shards")
    return sizes


def fetch_shards(lacking: dict[str, int | None], cache: ShardCache) -> None:
    """Downloads shards in parallel and indexes them. Raises UserError if some failed; the downloaded ones stay."""

    def fetch(url: str) -> int:
        with cache.local(url) as path:
            tar_index(path, cache.cache_dir, url)
            return os.stat(path).st_size

    lost: dict[str, str] = {}
    fetched, reported = 0, time.monotonic()
    total = sum(size or 0 for size in lacking.values())
    with RunProgress("fetching shards", len(lacking)) as progress, threads(DOWNLOADS) as pool:
        running = {pool.submit(fetch, url): url for url in lacking}
        for number, future in enumerate(as_completed(running), start=1):
            try:
                fetched += future.result()
            except UnavailableShard as error:
                lost[running[future]] = str(error)
                if len(lost) == MOST_LOST:
                    break
            report = number == len(lacking) or time.monotonic() > reported + SECONDS_BETWEEN_LINES
            reported = time.monotonic() if report else reported
            progress.update(number, {"GB": fetched / 1e9, "of": total / 1e9}, report=report)
    _refuse_lost(lost, len(lacking), "start it again: what is there stays")


def _kept_bytes(urls: Sequence[str], cache: ShardCache) -> int:
    return sum(cache.copy_of(url).stat().st_size for url in urls)


def _refuse_lost(lost: dict[str, str], total: int, what_to_do: str) -> None:
    if lost:
        url, reason = next(iter(lost.items()))
        first = f"the first is {display_url(url)} ({reason})"
        raise UserError(f"--prefetch: {len(lost)} of {total} shards cannot be had, {first}; {what_to_do}")


def say_where(lines: Sequence[str], cache_dir: str | Path | None) -> None:
    """Prints what was downloaded and how a run without internet finds it. ``cache_dir`` is None if not set."""
    from huggingface_hub import constants

    print(f"prefetched: {'; '.join(lines) or 'nothing, all is local'}")
    where = "" if cache_dir is None else f"with --cache_dir {Path(cache_dir).resolve()}, and "
    hub = f"HF_HUB_CACHE={Path(constants.HF_HUB_CACHE).resolve()}"
    same = f"the same command without --prefetch, {where}with HF_HUB_OFFLINE=1 {hub} in the environment"
    print(f"on nodes without internet: {same}")
