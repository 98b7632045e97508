"""Where shards are: expands paths, globs, folders and URLs to single shards, and keeps local copies of remote ones.

Small texts and listings of the hub are fetched anew each time; the last copy is used when there is no network.
Nothing that is logged or kept on disk holds a token: ``utils.redaction.display_url`` removes it from a URL.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import glob
import hashlib
import http.client
import json
import logging
import os
import re
import select
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand

from utils.data.folders import entries_of, kind_of
from utils.errors import UserError
from utils.redaction import display_url, url_scheme, without_addresses, without_secrets
from utils.text_files import decode_text, parse_json
from utils.whole_files import whole_file

logger = logging.getLogger(__name__)

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
QUICK_TIMEOUT = 10.0  # the same, for a text that has a copy in the cache
DOWNLOAD_RETRIES = 3
PIPE_TIMEOUT = 600.0  # seconds without a byte from a command
LONGEST_LOCK = 3600.0  # seconds that another process may take to fetch the same shard
RETRY_DELAY = 1.0  # seconds before the first retry, doubled for each further one
MAX_TEXT_BYTES = 64 << 20  # of sizes.json and similar files; a million shards take half of it
BRING_IT = "bring everything before, by the same command with --prefetch true where there is internet"


class ShardError(UserError):
    """Reading cannot go on. A DataLoader rebuilds a worker's error from its traceback; only its last line is kept."""

    every_rank = False  # other ranks may go on reading, so every rank that raises it prints it

    def __init__(self, text: str) -> None:
        super().__init__(text.rsplit("ShardError: ", 1)[-1].strip())


class UnavailableShard(Exception):
    """A shard cannot be fetched; the text says why."""


class _Absent(UnavailableShard):
    """The server answered that there is no such file: do not retry."""


class _Refused(_Absent):
    """The server refuses access. Some servers do so for missing files, and a proxy may do so for everything."""


def default_cache_dir() -> Path:
    """The cache folder: clip_shards in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_shards"


def expand_shards(
    patterns: Sequence[str],
    *,
    flag: str = "--train_shards",
    allow_pipe_urls: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> list[str]:
    """Paths and URLs of single shards, in the order given; duplicates stay. UserError if a pattern matches nothing.

    A pattern is a path, a glob, a folder (its *.tar in numeric order), an http(s):// URL or
    ``hf://datasets/<org>/<name>[@revision]/<path>`` (also a glob or a folder). Braces are expanded first. A listing of
    the hub is kept in ``cache_dir``. Single missing shards of a pattern are found later, by ``index_shards``.
    """
    urls: list[str] = []
    for pattern in patterns:
        where = f"{flag} {display_url(pattern)}"
        scheme = None if os.path.lexists(pattern) else url_scheme(pattern)
        if scheme is None:
            urls += _expand_local(pattern, flag)
            continue
        if scheme not in ("hf", "http", "https", "pipe"):
            raise UserError(f"{where}: {scheme}:// is not supported; expected a path, http(s):// or hf://")
        if scheme == "pipe" and not allow_pipe_urls:
            raise UserError(f"{where}: runs a shell command; give a path or URL, or --allow_pipe_urls")
        for url in _expand_braces(pattern, where):
            if scheme.startswith("http") and "*" in _address(url)[0]:
                raise UserError(f"{where}: a web server cannot be listed; write x-{{000..010}}.tar")
            urls += _expand_hub(url, flag, Path(cache_dir or default_cache_dir())) if scheme == "hf" else [url]
    for url in urls:
        if file_name(url).lower().endswith(COMPRESSED):
            raise UserError(f"{flag} {display_url(url)}: compressed; expected a plain .tar, please unpack it once")
    if not urls:
        raise UserError(f"{flag}: no shards given; expected paths, globs, directories or URLs of .tar files")
    return urls


def known_path(name: str) -> str:
    """The path as written if its first folder or the file exists, else with ``~`` expanded."""
    return name if _written_part(name, os.path.lexists) else os.path.expanduser(name)


def _expand_local(pattern: str, flag: str) -> list[str]:
    """The shards of a local pattern. The leading part that exists as written is a name, only the rest is a pattern.

    If a folder ``v[1]`` exists, ``v[1]`` means this folder, even beside a ``v1``. A brace alternative that matches
    nothing is kept as written, so that it counts as missing; UserError if no alternative matches.
    """
    where = f"{flag} {pattern}"
    pattern = known_path(pattern)
    known = _written_part(pattern, os.path.lexists)
    # Each brace alternative may begin with ~.
    paths = [_as_path(known_path(known + rest)) for rest in _expand_braces(pattern[len(known) :], where)]
    found = [sorted(map(_as_path, _matches(path)), key=_natural) for path in paths]
    if not any(found):
        parent = next(folder for folder in Path(paths[0]).absolute().parents if folder.is_dir())
        tars = sum(map(_is_tar, os.listdir(parent))) if os.access(parent, os.R_OK) else 0
        count = f"none of the {len(paths)} files exists" if len(paths) > 1 else "nothing is there"
        raise UserError(
            f"{where}: {count}; expected .tar shards; the nearest existing folder is {parent} ({tars} .tar files); "
            "correct the path"
        )
    urls: list[str] = []
    for path, matches in zip(paths, found):
        chosen = [match for match in matches if len(matches) > 1 and _is_shard_or_folder(match, flag)] or matches
        if others := [match for match in matches if match not in set(chosen)]:
            odd = f"{len(others)} that are no shards and no folders of shards, the first is {others[0]}"
            logger.warning("%s: also matches %s; left out", where, odd)
        shards: dict[str, None] = {}  # ``**`` matches a folder and the shards in it
        for match in chosen or [path]:
            names = _tars_in_folder(match, _names_in(match, flag), flag) if os.path.isdir(match) else None
            shards |= dict.fromkeys([match] if names is None else [os.path.join(match, name) for name in names])
        urls += shards
    return urls


def _expand_braces(text: str, where: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(text))
    except ValueError:
        raise UserError(f"{where}: braces do not match; expected e.g. x-{{000..010}}.tar") from None


def _written_part(path: str, exists: Callable[[str], bool]) -> str:
    """The longest leading part of ``path`` that exists as written and ends at a folder's boundary."""
    ends = [len(path), *(slash.start() for slash in reversed(list(re.finditer("/", path))))]
    return next((path[:end] for end in ends if end and exists(path[:end])), "")


def _matches(path: str) -> list[str]:
    """The matches of a glob, folder by folder; a folder that exists as written is not treated as a pattern."""
    known = _written_part(path, os.path.lexists)
    rest = path[len(known) :]
    if not rest.strip("/"):
        return [path] if os.path.lexists(path) else []
    if "**" in rest:
        return glob.glob(glob.escape(known) + rest, recursive=True)
    step = re.findall(r"/*[^/]+", rest)[0]  # the next folder or file
    found = glob.glob(glob.escape(known) + step) if glob.has_magic(step) else []
    return [match for folder in found for match in _matches(folder + rest[len(step) :])]


def _as_path(path: str) -> str:
    """Puts ./ before a path that looks like a URL, such as that of a file called pipe:x."""
    return path if url_scheme(path) is None else os.path.join(os.curdir, path)


def _is_shard_or_folder(path: str, flag: str) -> bool:
    """Whether a match is a .tar or a folder of .tar files. A compressed .tar counts here and is refused later."""
    if os.path.isdir(path):
        return any(map(_is_tar, _names_in(path, flag)))
    return path.lower().endswith((".tar", *COMPRESSED))


def _names_in(folder: str, flag: str) -> list[str]:
    """The names of the entries of a local folder; the names of folders end in /."""
    return [entry.name + "/" * (kind_of(entry) == "folder") for entry in entries_of(folder, f"{flag} {folder}")]


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not name.startswith(".")


def has_shards(folder: Path) -> bool:
    """Whether a folder holds .tar files. A folder named *.tar does not count: a class may have such a name."""
    return any(not path.is_dir() for path in folder.glob("*.tar"))


def _tars_in_folder(folder: str, names: Sequence[str], flag: str) -> list[str]:
    """The .tar files among ``names`` in numeric order; UserError if there are none. Names of folders end in /.

    The error or a warning names entries that only look like shards: compressed files and folders.
    """
    where = f"{flag} {display_url(folder)}"
    tars = sorted(filter(_is_tar, names), key=_natural)
    others = sorted(name for name in names if re.fullmatch(r"[^.].*\.(tar/|tar\.\w+|tgz)", name.lower()))
    if not tars:
        hint = f"there is {others[0]}: unpack or name it" if others else "correct the path"
        if splits := [split for split in ("train/", "test/") if split in names]:
            hint = f"name its {' or '.join(splits)} folder"
        raise UserError(f"{where}: a folder without .tar files; expected .tar shards; {hint}")
    if others:
        odd = f"{len(others)} that are no plain .tar files are not read, the first is {others[0]}"
        logger.warning("%s: %s; unpack them once, or take them out", where, odd)
    return tars


def _natural(name: str) -> list[Any]:
    """Sort key for numeric order: shard 10 comes after shard 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name) if part]


def is_remote(url: str) -> bool:
    return url_scheme(url) is not None


def file_name(url: str) -> str:
    return "pipe.tar" if url_scheme(url) == "pipe" else _address(url)[0].rpartition("/")[2]


def sibling(url: str, name: str) -> str | None:
    """The path or URL of the file ``name`` in the folder of ``url``; None for a pipe."""
    if url_scheme(url) == "pipe":
        return None
    address, query = _address(url)
    return os.path.join(os.path.dirname(address), name) + query


def _address(url: str) -> tuple[str, str]:
    """Splits an http(s) URL before its query or fragment. In other URLs and paths ? and # belong to names."""
    address = re.split(r"[?#]", url, maxsplit=1)[0] if url_scheme(url) in ("http", "https") else url
    return address, url[len(address) :]


# -------------------------------------------------------------------------------------------------------------- the hub


def _expand_hub(url: str, flag: str, cache_dir: Path) -> list[str]:
    """One hf:// URL without braces -> shard URLs. A folder or glob is listed on the hub, or else from the cache."""
    repo, revision, path = _parse_hub(url, flag)
    if path.endswith(".tar") and not glob.has_magic(path):
        return [url]
    where, kept = f"{flag} {display_url(url)}", cache_dir / "listings" / f"{digest(url)}.json"
    try:
        shards = _list_hub(url, repo, revision, path, flag)
    except UserError:
        raise
    except Exception as error:  # the hub's own errors, httpx's, OSError
        reason = "HF_HUB_OFFLINE is set" if hub_offline() else f"the hub does not list it ({one_line(error)})"
        known = None if hub_answered(error) else remembered(kept).get("shards")
        if known is None:
            raise UserError(f"{where}: {reason}; check the name, the network and the login, or {BRING_IT}") from None
        logger.warning("%s: %s; its %d shards are those listed %s", where, reason, len(known), _day_of(kept))
        return known
    remember(kept, {"pattern": url, "shards": shards})
    return shards


def _list_hub(url: str, repo: str, revision: str | None, path: str, flag: str) -> list[str]:
    """The shards of a folder or glob that the hub has now. UserError if there are none; the hub's errors pass through.

    As with local paths, a name that exists as written is not treated as a pattern.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def entries(folder: str, deep: bool) -> dict[str, bool]:
        """Path -> whether it is a file."""
        tree = HfApi().list_repo_tree(repo, folder or None, recursive=deep, revision=revision, repo_type="dataset")
        return {entry.path: isinstance(entry, RepoFile) for entry in tree}

    prefix = url[: len(url) - len(path)].rstrip("/") + "/"
    path = path.strip("/")
    if glob.has_magic(path):
        folder = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        listed = entries(folder, deep="/" in path[len(folder) :].lstrip("/"))
        if listed.get(path):
            return [prefix + path]
        # A listing may omit folders that occur in the paths of its files.
        there = {name[: end.start()] for name in listed for end in re.finditer("/", name)} | {*listed}
        known = _written_part(path, there.__contains__)
        if known != path:
            pattern = glob.escape(known) + path[len(known) :]
            matches = [name for name, is_file in listed.items() if is_file and fnmatch.fnmatchcase(name, pattern)]
            if not matches:
                raise UserError(f"{flag} {display_url(url)}: matches no file on the hub; expected .tar shards")
            return [prefix + match for match in sorted(matches, key=_natural)]
    names = [name.rpartition("/")[2] + "/" * (not is_file) for name, is_file in entries(path, deep=False).items()]
    return [prefix + (f"{path}/{name}" if path else name) for name in _tars_in_folder(url, names, flag)]


def hub_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, which forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_answered(error: BaseException) -> bool:
    """Whether the hub itself refused (not found, no access); False if it cannot be reached or is too busy."""
    from huggingface_hub.errors import HfHubHTTPError

    status = getattr(getattr(error, "response", None), "status_code", 500)
    return isinstance(error, HfHubHTTPError) and not _may_help_to_ask_again(status)


def _may_help_to_ask_again(status: int) -> bool:
    return status in (408, 425, 429) or status >= 500


def _parse_hub(url: str, flag: str = "") -> tuple[str, str | None, str]:
    """hf://datasets/<org>/<name>[@revision]/<path> -> (repository, revision, path)."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", url)
    if not match:
        expected = "hf://datasets/<org>/<name>[@revision]/<path>/x-{000..010}.tar"
        raise UserError(f"{flag} {url}: not understood; expected {expected}")
    revision = urllib.parse.unquote(match[2]) if match[2] else None
    return match[1], revision, match[3] or ""


def hub_set(
    name: str, split: str, cache_dir: str | None = None, flag: str = "--data", local_files_only: bool = False
) -> Path:
    """Downloads the texts and one split of a set on the hub, e.g. clip-benchmark/wds_cifar10; returns the folder.

    The repository of ``<org>/<a>/<b>`` is ``<org>/<a>-<b>``, as CLIP_benchmark names its sets. The files go to the
    hub's own cache, or to ``cache_dir``/hub. ``local_files_only``: another process has downloaded them already.
    """
    from huggingface_hub import errors, snapshot_download

    where = f"{flag} {name}"
    org, _, rest = name.strip("/").partition("/")
    repo = f"{org}/{rest.replace('/', '-')}"
    if name.startswith("/") or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        nothing = "no such directory, and no name on the hub"
        raise UserError(f"{where}: {nothing}; expected a local data set or <org>/<name>")
    options: dict[str, Any] = {
        "repo_type": "dataset",
        "allow_patterns": ["*.txt", f"{glob.escape(split)}/*"],
        "cache_dir": None if cache_dir is None else Path(cache_dir) / "hub",
        "local_files_only": local_files_only,
    }
    try:
        folder = Path(snapshot_download(repo, **options))
    except Exception as error:  # the hub's own errors, those of httpx or requests, OSError
        cause = error.__cause__ or error
        offline = any(isinstance(each, errors.OfflineModeIsEnabled) for each in (error, cause))
        unreachable = isinstance(error, errors.LocalEntryNotFoundError)  # its cause says why
        why = "HF_HUB_OFFLINE is set" if offline else one_line(cause if unreachable else error)
        local = f"data/{repo.partition('/')[2]}"
        download = f"download it once with `hf download {repo} --repo-type dataset --local-dir {local}`"
        login = "log in with `hf auth login`"
        hints = {
            errors.GatedRepoError: f"accept its terms on its page and {login}",
            errors.RepositoryNotFoundError: f"correct the path or the name, or {login} if it is private",
            Exception: f"{download} where there is internet and give that folder, or {BRING_IT}",
        }
        hint = next(text for kind, text in hints.items() if isinstance(error, kind))
        nothing = f"no such directory, and neither the cache nor the hub gives out the {split}/ of {repo}"
        raise UserError(f"{where}: {nothing} ({why}); {hint}") from None
    if not has_shards(folder / split):
        # The other splits have folders too: the text patterns bring their nshards.txt, as in all CLIP_benchmark sets.
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != split)
        found = ", ".join(splits) or "no folder"
        raise UserError(
            f"{where}: no split {split!r} with .tar files in {repo} on the hub; found {found}; name one with --split"
        )
    return folder


def one_line(error: BaseException) -> str:
    """Type and text of an error on one line, without secrets, at most 300 characters."""
    return " ".join(f"{type(error).__name__} {without_secrets(without_addresses(str(error)))}".split())[:300]


# --------------------------------------------------------------------------------------------------------- local copies


class ShardCache:
    """Local copies of remote shards, at most ``limit_gb`` (in 10^9 bytes); the least recently used are evicted first.

    A copy is written completely or not at all. With a lock per shard, any number of processes may ask for a shard, and
    one fetches it. The lock also protects the copy until it is open; after that an evicted copy stays readable through
    the descriptor. The limit should hold the shards of two shuffle blocks, up to 4 * 64, or they are fetched again.
    """

    def __init__(self, cache_dir: str | os.PathLike, limit_gb: float | None = None) -> None:
        self.cache_dir = Path(cache_dir)
        self.limit_bytes = None if limit_gb is None else int(limit_gb * 1e9)
        self.shard_dir, self.lock_dir = self.cache_dir / "shards", self.cache_dir / "locks"
        self._touched: dict[str, float] = {}

    @contextlib.contextmanager
    def local(self, url: str, wait: bool = True) -> Iterator[str]:
        """Gives a local path of the shard, fetched if needed and not evicted in the block. Raises UnavailableShard.

        ``wait`` False: if another process is fetching or opening the shard, gives an empty path at once.
        """
        if not is_remote(url):
            yield url
            return
        target = self.copy_of(url)
        with _locked(self._lock_of(target), wait) as held:
            if held and not target.exists():
                # A fixed name, so that the file left by a killed process is overwritten later.
                with whole_file(target, target.with_name(target.name + ".part")) as part:
                    _download(url, part)
                    with open(part, "rb") as stream:
                        os.fsync(stream.fileno())
                self._evict()
            if held:
                self.touch(str(target))
            yield str(target) if held else ""

    def copy_of(self, url: str) -> Path:
        """The path of the copy of a remote shard, which need not exist."""
        return self.shard_dir / f"{digest(url)}-{file_name(url)}"

    def touch(self, path: str) -> None:
        """Marks the copy as in use by its access time, at most once a minute. mtime stays: the index depends on it."""
        now = time.time()
        if now - self._touched.get(path, 0.0) > 60:
            self._touched[path] = now
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, ns=(int(now * 1e9), os.stat(path).st_mtime_ns))

    def _evict(self) -> None:
        """Deletes the least recently used copies until the limit holds, except those that are locked."""
        if self.limit_bytes is None:
            return
        with _locked(self.lock_dir / "evict.lock", wait=True):
            copies = []
            for copy in self.shard_dir.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if copy.suffix != ".part":
                        status = copy.stat()
                        copies.append((status.st_atime, status.st_size, copy))
            total = sum(size for _, size, _ in copies)
            for _, size, copy in sorted(copies):
                if total <= self.limit_bytes:
                    break
                with _locked(self._lock_of(copy), wait=False) as held:
                    if held:
                        copy.unlink(missing_ok=True)
                        total -= size

    def _lock_of(self, copy: Path) -> Path:
        return self.lock_dir / f"{copy.name.partition('-')[0]}.lock"


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock between processes and threads. If it is taken and ``wait`` is False, yields False at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        end, pause = time.monotonic() + LONGEST_LOCK, 0.01
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not wait:
                yield False
                return
            if time.monotonic() > end:
                raise UnavailableShard(f"another process holds {path} for {LONGEST_LOCK:.0f} s; end it")
            time.sleep(pause)
            pause = min(1.0, 2 * pause)
        try:
            yield True
        finally:
            # Closing the file is not enough: a data worker forked in the block has a copy of it, which keeps the lock.
            fcntl.flock(stream, fcntl.LOCK_UN)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def remember(path: Path, found: dict[str, Any]) -> None:
    """Caches a result as JSON. If the cache is full or read-only, nothing is kept and the next process recomputes."""
    with contextlib.suppress(OSError), whole_file(path) as aside:
        aside.write_text(json.dumps(found), encoding="utf-8")


def remembered(path: Path) -> dict[str, Any]:
    """The cached result; empty if there is none or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _download(
    url: str,
    target: Path,
    *,
    limit: int | None = None,
    timeout: float = DOWNLOAD_TIMEOUT,
    retries: int = DOWNLOAD_RETRIES,
) -> None:
    """Downloads ``url`` to ``target`` and retries after network errors. UnavailableShard if it cannot be fetched.

    For a web server only: ``limit``, the largest number of bytes; ``timeout``, seconds without a byte.
    """
    from_web = partial(_download_http, limit=limit, timeout=timeout)
    fetch = {"pipe": _download_pipe, "hf": _download_hub}.get(url_scheme(url) or "", from_web)
    for attempt in range(retries + 1):
        try:
            return fetch(url, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                hint = "make room or name another folder"
                raise ShardError(f"--cache_dir: cannot be written ({error.strerror}); {hint}") from None
            if attempt == retries:
                tried = f"{one_line(error)}, {attempt + 1} attempt{'s' if attempt else ''}"
                unreachable = isinstance(error, (urllib.error.URLError, TimeoutError, ConnectionError))
                raise UnavailableShard(f"{tried}; without internet {BRING_IT}" if unreachable else tried) from None
            time.sleep(RETRY_DELAY * 2**attempt)


# The next three raise _Absent if there is no such file, and OSError if a retry may help.


def _download_http(url: str, target: Path, limit: int | None, timeout: float) -> None:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(target, "wb") as stream:
            expected = response.headers.get("Content-Length")
            while chunk := response.read(1 << 20):
                stream.write(chunk)
                if limit is not None and stream.tell() > limit:
                    raise UnavailableShard(f"more than {limit} bytes")
            if expected is not None and expected.isdecimal() and stream.tell() != int(expected):
                raise OSError(f"connection broke after {stream.tell()} of {expected} bytes")
    except urllib.error.HTTPError as error:
        kind = OSError if _may_help_to_ask_again(error.code) else _Absent if error.code in (404, 410) else _Refused
        raise kind(f"HTTP status {error.code}") from None
    except (http.client.InvalidURL, ValueError):
        # Do not repeat the error's text: it quotes parts of the address, such as the password in http://user:password@host.
        raise _Absent("not an address of a file; expected http(s)://host/path, without user and password") from None
    except http.client.HTTPException as error:
        raise OSError(one_line(error)) from None


def _download_hub(url: str, target: Path) -> None:
    from huggingface_hub import errors, hf_hub_download
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})

    if hub_offline():
        raise UnavailableShard(f"HF_HUB_OFFLINE is set and the cache lacks it; {BRING_IT}")
    repo, revision, path = _parse_hub(url)
    fetch = partial(hf_hub_download, repo_type="dataset", revision=revision, tqdm_class=Silent)
    with tempfile.TemporaryDirectory(dir=target.parent, suffix=".part") as folder:
        try:
            os.replace(fetch(repo, path, local_dir=folder), target)
        except errors.LocalEntryNotFoundError as error:  # no connection; a subclass of EntryNotFoundError
            raise OSError(one_line(error)) from None
        except errors.EntryNotFoundError as error:
            raise _Absent(one_line(error)) from None
        except errors.HfHubHTTPError as error:  # without a login, a private one is "not found"
            raise (_Refused if hub_answered(error) else OSError)(one_line(error)) from None


def _download_pipe(url: str, target: Path) -> None:
    command = url.partition(":")[2]
    with (
        subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0) as process,
        open(target, "wb") as stream,
    ):
        assert process.stdout is not None
        output = process.stdout.fileno()
        try:
            while select.select([output], [], [], PIPE_TIMEOUT)[0]:
                if not (chunk := os.read(output, 1 << 20)):
                    break
                stream.write(chunk)
            else:
                raise UnavailableShard(f"no byte of the command for {PIPE_TIMEOUT:.0f} s")
        except BaseException:
            process.kill()
            raise
    # Report only the status, not the command, which may hold tokens.
    if process.returncode:
        raise OSError(f"the command ended with status {process.returncode}")


def remote_size(url: str) -> int | None:
    """The size in bytes that the server states for a remote file, or None. UnavailableShard if it is not there."""
    try:
        if url_scheme(url) == "pipe":
            return None
        if url_scheme(url) == "hf":
            from huggingface_hub import get_hf_file_metadata, hf_hub_url

            repo, revision, path = _parse_hub(url)
            return get_hf_file_metadata(hf_hub_url(repo, path, repo_type="dataset", revision=revision)).size
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            return int(length) if length else None
    except Exception as error:  # the hub's own errors, httpx's, OSError
        if isinstance(error, urllib.error.HTTPError) and error.code in (404, 410):
            raise UnavailableShard(f"HTTP status {error.code}") from None
        if hub_answered(error):
            raise UnavailableShard(one_line(error)) from None
        return None  # a server may refuse to say


# ---------------------------------------------------------------------------------------------------------- small texts


def read_text(location: str, cache_dir: str | os.PathLike | None = None) -> str | None:
    """Reads a small UTF-8 text file by path or URL (sizes.json, classnames.txt); None if there is no such file.

    A text behind a URL is fetched anew every time. ``cache_dir`` keeps a copy, or the answer that there is no such
    file, for use when the server cannot be reached. A pipe is refused: no command is run for a text.
    """
    shown = display_url(location)
    remote = is_remote(location) and not os.path.lexists(location)
    if remote and url_scheme(location) == "pipe":
        raise UserError(f"{shown}: runs a shell command; give a path or URL")
    try:
        path = _text_copy(location, Path(cache_dir or default_cache_dir())) if remote else Path(known_path(location))
        if path is None:
            return None
        with open(path, "rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnavailableShard as error:
        hint = "" if BRING_IT in str(error) else f", or {BRING_IT}"
        raise UserError(f"{shown}: cannot be reached ({error}); check address and network{hint}") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); check its permissions") from None
    if len(data) > MAX_TEXT_BYTES:
        raise UserError(f"{shown}: more than {MAX_TEXT_BYTES >> 20} MiB; expected a short text")
    return decode_text(data, shown)


def _text_copy(url: str, cache_dir: Path) -> Path | None:
    """The path of a copy of a remote text, fetched now if the server answers; None if there is no such text."""
    copy = cache_dir / "texts" / f"{digest(url)}-{file_name(url)}"
    absent = copy.with_name(copy.name + ".absent")
    known = copy.exists() or absent.exists()
    # A node without internet should not wait long for a text that it has.
    patience: dict[str, Any] = {"timeout": QUICK_TIMEOUT, "retries": 0} if known else {}
    try:
        with whole_file(copy) as aside:
            _download(url, aside, limit=MAX_TEXT_BYTES, **patience)
        absent.unlink(missing_ok=True)
    except UnavailableShard as error:
        if isinstance(error, _Absent) and not (isinstance(error, _Refused) and copy.exists()):
            absent.touch()
            copy.unlink(missing_ok=True)
            return None
        if not known:
            raise
        found, what = (copy, "the copy") if copy.exists() else (absent, "as absent, as it was")
        logger.warning("%s: cannot be reached (%s); taken %s of %s", display_url(url), error, what, _day_of(found))
    return copy if copy.exists() else None


def _day_of(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
