"""Where the samples of a .tar lie: one pass over its headers, kept on disk, so that any sample is read by offset.

A sample is the run of neighbouring members whose names agree up to the first dot of the basename, as in the webdataset
library; ``0001.jpg`` and ``0001.cls`` make one sample. Nothing is ever unpacked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import stat
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.shard_sources import digest
from utils.strict_json import parse_json

logger = logging.getLogger(__name__)

# Beyond these a tar counts as damaged.
MAX_HEADER_BYTES = 1 << 20  # of an extended header, which may also hold extended attributes
MAX_NAME_BYTES = 4096  # Linux' own limit for a path
MAX_MEMBERS = 4_000_000  # all of ImageNet with its labels is 2.6 million; their index takes 0.6 GB while it is made


@dataclass
class TarIndex:
    """Where the samples of one tar lie. Sample i has the members starts[i] ... starts[i + 1] - 1.

    extension_ids index ``extensions``; offsets and sizes are bytes of the payload. ``damage`` says where reading had to
    end, or is None.
    """

    keys: list[str]
    starts: np.ndarray
    extensions: list[str]
    extension_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size)."""
        return {
            self.extensions[self.extension_ids[member]]: (int(self.offsets[member]), int(self.sizes[member]))
            for member in range(self.starts[sample], self.starts[sample + 1])
        }


def scan_tar(path: str | os.PathLike) -> TarIndex:
    """One pass over the headers of a tar; payloads are skipped.

    A damaged or truncated tar keeps the samples before the damage. OSError where the file cannot be read at all. Links
    and devices are passed over, names stay names: where they point to is never looked at.
    """
    keys: list[str] = []
    starts: list[int] = []
    extension_numbers: dict[str, int] = {}
    extension_ids: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    in_sample: set[int] = set()
    damage = None
    try:
        for name, offset, size in _regular_members(path):
            if name.startswith("__") and re.match(r"__[^/]*__($|/)", name):
                continue  # webdataset's place for metadata
            folder, slash, basename = name.rpartition("/")
            stem, dot, extension = basename.partition(".")
            if not (stem and dot):
                continue  # no extension, or a hidden file
            key = folder + slash + stem
            if not keys or key != keys[-1]:
                keys.append(key)
                starts.append(len(offsets))
                in_sample = set()
            number = extension_numbers.setdefault(extension.lower(), len(extension_numbers))
            if number not in in_sample:  # a second member of the same name adds nothing
                in_sample.add(number)
                extension_ids.append(number)
                offsets.append(offset)
                sizes.append(size)
    except tarfile.TarError as error:
        damage = str(error)
    if damage and keys:
        # The sample that the damage cut through lacks members that its predecessor has.
        last = {extension_ids[member] for member in range(starts[-1], len(offsets))}
        before = {extension_ids[member] for member in range(starts[-2], starts[-1])} if len(keys) > 1 else None
        if last != before:
            keys.pop()
            end = starts.pop()
            del extension_ids[end:], offsets[end:], sizes[end:]
    return TarIndex(
        keys,
        np.array([*starts, len(offsets)], dtype=np.int64),
        list(extension_numbers),
        np.array(extension_ids, dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        damage,
    )


def _regular_members(path: str | os.PathLike) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files in a tar; tarfile.ReadError where the archive is damaged.

    Reads ustar, GNU (long names) and pax (path, size) headers in less than half the time of ``tarfile``, and notices
    damage within the archive that ``tarfile`` takes for its end.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        end, offset, members = os.fstat(fd).st_size, 0, 0
        long_name, pax, zeros = None, {}, bytes(512)
        while True:
            header = os.pread(fd, 512, offset)
            if len(header) < 512:
                raise tarfile.ReadError(f"ends at byte {end} without an end-of-archive mark")
            if header == zeros:
                return
            try:
                size = _number(header[124:136])
                intact = size >= 0 and _number(header[148:156]) == sum(header) - sum(header[148:156]) + 256
            except (tarfile.HeaderError, ValueError):
                intact = False
            if not intact:
                packed = offset == 0 and header.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"))
                raise tarfile.ReadError("compressed, not a plain tar" if packed else f"no tar header at byte {offset}")
            kind, payload = header[156:157], offset + 512
            if kind in b"xXL" and size > MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"a name of {size} bytes at byte {offset}")
            if kind in b"gKNV" and payload + size > end:
                raise tarfile.ReadError(f"ends at byte {end}, inside a header that goes on to byte {payload + size}")
            if kind in b"xX":
                pax = _pax_records(os.pread(fd, size, payload))
            elif kind == b"L":
                long_name = os.pread(fd, size, payload).split(b"\0", 1)[0]
            elif kind == b"S":
                raise tarfile.ReadError(f"a sparse member at byte {offset}, which is not supported")
            elif kind not in b"gKNV":  # other notes about the archive or the next member
                if pax.get(b"size", b"").isdigit():
                    size = int(pax[b"size"][:20])  # of 20 digits no file has as many bytes
                name = pax.get(b"path") or long_name or header[:100].split(b"\0", 1)[0]
                if header[257:263] == b"ustar\0" and header[345] and b"path" not in pax and not long_name:
                    name = header[345:500].split(b"\0", 1)[0] + b"/" + name
                if len(name) > MAX_NAME_BYTES:
                    raise tarfile.ReadError(f"a name of {len(name)} bytes at byte {offset}")
                members += 1
                if members > MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")
                if kind in b"123456":
                    size = 0  # links, devices and folders have no payload, whatever the field says
                elif payload + size > end:
                    raise tarfile.ReadError(
                        f"ends at byte {end}, inside a member that goes on to byte {payload + size}"
                    )
                elif kind in b"0\x007" and not any(key.startswith(b"GNU.sparse") for key in pax):
                    yield name.decode("utf-8", "backslashreplace"), payload, size
                if pax or long_name:
                    long_name, pax = None, {}
            offset = payload + (size + 511) // 512 * 512
    finally:
        os.close(fd)


def _number(field: bytes) -> int:
    """A number of a tar header: octal digits, or in the rare large ones base 256."""
    if field[0] & 0x80:
        return tarfile.nti(field)  # type: ignore[attr-defined]
    return int(field.strip(b" \0") or b"0", 8)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records "<length> <key>=<value>\\n" of a pax header."""
    records, start = {}, 0
    while match := re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, start):
        length = int(match.group(1))
        if start + length <= match.end():
            break
        records[match.group(2)] = data[match.end() : start + length - 1]
        start += length
    return records


def tar_index(path: str, cache_dir: str | os.PathLike, name: str | None = None) -> TarIndex:
    """``scan_tar``, kept as JSON in ``cache_dir``/index by ``name`` (default: path and mtime) and the file's size.

    OSError where it cannot be read, or is no file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a regular file")
    key = digest(f"3|{name or f'{os.path.abspath(path)}|{status.st_mtime_ns}'}|{status.st_size}")
    stored = Path(cache_dir) / "index" / f"{key}.json"
    arrays = {"starts": np.int64, "extension_ids": np.int32, "offsets": np.int64, "sizes": np.int64}
    try:
        found = parse_json(stored.read_text(encoding="utf-8"))
        values: dict[str, Any] = {
            key: np.array(value, arrays[key]) if key in arrays else value for key, value in found.items()
        }
        return TarIndex(**values)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        pass  # not there yet, or unreadable: one pass restores it
    index = scan_tar(path)
    fields = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(index).items()}
    with contextlib.suppress(OSError):  # a full or read-only cache costs the next process a pass, no more
        stored.parent.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_name(f"{stored.name}.{os.getpid()}.{threading.get_ident()}.part")
        temporary.write_text(json.dumps(fields), encoding="utf-8")
        os.replace(temporary, stored)
    return index
