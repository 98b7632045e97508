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
import posixpath
import re
import stat
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.sources import digest
from utils.text_files import parse_json

logger = logging.getLogger(__name__)

BLOCK = 512  # bytes, of which tars are made
RECORD = 20 * BLOCK  # to multiples of which most writers fill them up

# Beyond these a tar counts as damaged.
MAX_HEADER_BYTES = 1 << 20  # of an extended header, which may also hold extended attributes
MAX_NAME_BYTES = 4096  # Linux' own limit for a path
MAX_MEMBERS = 4_000_000  # all of ImageNet with its labels is 2.6 million; their index takes 0.6 GB while it is made
MAX_LINKS = 8  # from one to the next


@dataclass
class TarIndex:
    """Where the samples of one tar lie. Sample i has the members starts[i] ... starts[i + 1] - 1.

    extension_ids index ``extensions``; offsets and sizes are bytes of the payload. ``damage`` says where the tar is not
    whole, or is None; ``lost`` estimates by bytes how many samples lie there (0: that cannot be told). ``notes`` are (kind,
    detail, samples lost) of what is whole and still not read as it stands.
    """

    keys: list[str]
    starts: np.ndarray
    extensions: list[str]
    extension_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str | None = None
    lost: int = 0
    notes: list[tuple[str, str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size)."""
        return {
            self.extensions[self.extension_ids[member]]: (int(self.offsets[member]), int(self.sizes[member]))
            for member in range(self.starts[sample], self.starts[sample + 1])
        }


class Damage(tarfile.ReadError):
    """Where and why a tar cannot be read on."""

    def __init__(self, text: str, place: int, end: int) -> None:
        super().__init__(text)
        self.place, self.end = place, end


def scan_tar(path: str | os.PathLike) -> TarIndex:
    """One pass over the headers of a tar; payloads are skipped.

    A damaged or truncated tar keeps the samples before the damage, and those after a hole of zeros that ends at a header.
    Archives one behind the other are read as one. A link to a member of the same tar is that member; names stay names:
    where else they point to is never looked at. Such links, devices, sparse and unknown members are in ``notes``, as is a
    second member of one name in a sample. OSError where the file cannot be read at all.
    """
    keys: list[str] = []
    starts: list[int] = []
    extension_numbers: dict[str, int] = {}
    extension_ids: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    in_sample: set[int] = set()
    again: dict[int, Counter[int]] = {}  # number of keys so far -> extensions that come once more
    links: dict[int, tuple[str, str, str]] = {}  # place of a member -> key, name, name of the target
    unread: list[tuple[str, str]] = []  # keys and what they would have held
    gaps: list[tuple[int, int]] = []
    end: Damage | None = None
    try:
        for name, offset, size, kind, target in _members(path, gaps):
            if name.startswith("__") and re.match(r"__[^/]*__($|/)", name):
                continue  # webdataset's place for metadata
            folder, slash, basename = name.rpartition("/")
            stem, dot, extension = basename.partition(".")
            if not (stem and dot):
                continue  # no extension, or a hidden file
            key = folder + slash + stem
            if kind and not target:
                unread.append((key, f"{name} ({kind})"))
                continue
            if not keys or key != keys[-1]:
                keys.append(key)
                starts.append(len(offsets))
                in_sample = set()
            number = extension_numbers.setdefault(extension.lower(), len(extension_numbers))
            if number in in_sample:
                again.setdefault(len(keys), Counter())[number] += 1
                continue
            if target:
                links[len(offsets)] = key, name, target
            in_sample.add(number)
            extension_ids.append(number)
            offsets.append(offset)
            sizes.append(size)
    except Damage as error:
        end = error
    if end and keys:
        # The sample that the damage cut through lacks members that its predecessor has.
        last = {extension_ids[member] for member in range(starts[-1], len(offsets))}
        before = {extension_ids[member] for member in range(starts[-2], starts[-1])} if len(keys) > 1 else None
        if last != before:
            again.pop(len(keys), None)
            keys.pop()
            first = starts.pop()
            del extension_ids[first:], offsets[first:], sizes[first:]
            links = {member: link for member, link in links.items() if member < first}
    index = TarIndex(
        keys,
        np.array([*starts, len(offsets)], dtype=np.int64),
        list(extension_numbers),
        np.array(extension_ids, dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
    )
    _tell_damage(index, gaps, end, path)
    if links:
        _follow_links(index, links, path, unread)
    if unread:
        lost = len({key for key, _ in unread} - set(index.keys))
        index.notes.append(("unread member", f"{len(unread)} members, the first is {unread[0][1]}", lost))
    if again:
        lost = sum(max(more.values()) for more in again.values())
        first_key, first_number = keys[min(again) - 1], next(iter(again[min(again)]))
        name = f"{first_key}.{index.extensions[first_number]}"
        index.notes.append(
            (
                "repeated member",
                f"{lost} times a name again, the first is another {name}; the first of each is read",
                lost,
            )
        )
    if (repeated := len(index) - len(set(index.keys))) > 0:
        first_key, count = Counter(index.keys).most_common(1)[0]
        detail = (
            f"{repeated} keys again, such as {first_key}, {count} times apart in the shard, each time as a "
            "sample of its own; members of one sample have to be neighbours"
        )
        index.notes.append(("repeated key", detail, 0))
    return index


def _tell_damage(index: TarIndex, gaps: list[tuple[int, int]], end: Damage | None, path: str | os.PathLike) -> None:
    """Sets ``damage`` and ``lost``, and the notes about further archives and about none.

    Zeros within a file are the end of one archive and the beginning of another where they are as many as one ends in: two
    blocks, by most writers filled up to a record. Others are a hole.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - RECORD - 2 * BLOCK))
        tail = file.read()
        filled_from = size - len(tail) + len(tail.rstrip(b"\0"))  # the end of an archive is no lost sample
    begin, joined, holes = 0, [], []
    for first, after in gaps:
        filled = (after - begin) % RECORD == 0 and 2 * BLOCK <= after - first < RECORD + 2 * BLOCK
        if after - first == 2 * BLOCK or filled:
            begin = after
            joined.append(after)
        else:
            holes.append((first, after))
    place = end.place if end else filled_from
    if end and joined and joined[-1] == place:  # what follows is no archive, which it says itself
        joined.pop()
    if end and holes and holes[-1][1] == place:  # the same of a hole, which is lost with what follows
        place = holes.pop()[0]
    texts = [f"zeros from byte {first} to {after}, where members should be" for first, after in holes]
    if end:
        texts.append(str(end))
    if texts:
        more = f" and {len(texts) - 2} more" if len(texts) > 2 else ""
        index.damage = "; ".join(texts[:2]) + more
    lost = [after - first for first, after in holes] + ([filled_from - place] if end else [])
    if len(index):
        each = (place - sum(after - first for first, after in gaps if after <= place)) / len(index)
        index.lost = sum(max(1, round(count / each)) for count in lost)
    if joined:
        detail = f"{len(joined)} more archives behind the end of the first, at byte {joined[0]}; all are read"
        index.notes.append(("joined archives", detail, 0))
    if not index.damage and not len(index) and 0 < size <= RECORD:
        index.notes.append(("empty shard", "an archive without samples, or a file that was overwritten", 0))


def _follow_links(
    index: TarIndex, links: dict[int, tuple[str, str, str]], path: str | os.PathLike, unread: list[tuple[str, str]]
) -> None:
    """Gives links the payload of the member that they lead to; those that lead to none go, samples of such alone too."""
    places: dict[str, tuple[int, int]] = {}
    targets: dict[str, str] = {}
    with contextlib.suppress(Damage):  # known already
        for name, offset, size, kind, target in _members(path, []):
            name = posixpath.normpath(name)
            if target:
                targets[name] = target
            elif not kind:
                places[name] = offset, size
    dead = []
    for member, (key, name, target) in links.items():
        for _ in range(MAX_LINKS):
            if target in places or target not in targets:
                break
            target = targets[target]
        if target in places:
            index.offsets[member], index.sizes[member] = places[target]
        else:
            dead.append(member)
            unread.append((key, f"{name} (a link to {target}, no file in the archive)"))
    kept = np.ones(len(index.offsets), dtype=bool)
    kept[dead] = False
    counts = np.concatenate([[0], np.cumsum(kept)])[index.starts]
    full = np.diff(counts) > 0
    index.keys = [key for key, whole in zip(index.keys, full) if whole]
    index.starts = np.append(counts[:-1][full], counts[-1])
    index.extension_ids, index.offsets, index.sizes = (
        array[kept] for array in (index.extension_ids, index.offsets, index.sizes)
    )


def _members(path: str | os.PathLike, gaps: list[tuple[int, int]]) -> Iterator[tuple[str, int, int, str, str]]:
    """(name, offset, size, kind, target) of what a tar holds but folders; ``Damage`` where it is damaged.

    kind: "" for a regular file, else what it is; target: of a link, as a name in the archive. ``gaps`` gets the zeros,
    (first byte, byte after), behind which there is something. Reads ustar, GNU (long names, sparse) and pax (path, linkpath,
    size) headers in less than half the time of ``tarfile``, and notices damage that ``tarfile`` takes for the end.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        end, offset, members = os.fstat(fd).st_size, 0, 0
        zeros = bytes(BLOCK)
        pax: dict[bytes, bytes] = {}
        long_name: bytes | None = None
        long_target: bytes | None = None
        while True:
            header = os.pread(fd, BLOCK, offset)
            if len(header) < BLOCK:
                text = f"ends at byte {end} without an end-of-archive mark" if end else "an empty file, of 0 bytes"
                if offset == 0 and header.startswith(b"version https://git-lfs"):
                    text = "a pointer of Git LFS, not the file itself: bring it with `git lfs pull`"
                raise Damage(text, offset, end)
            if header == zeros:
                following = _next_data(fd, offset, end)
                if following is None:
                    if offset == 0 and end > RECORD:
                        raise Damage(f"nothing but zeros, {end} bytes", 0, end)
                    return
                gaps.append((offset, following // BLOCK * BLOCK))
                long_name, long_target, pax, offset = None, None, {}, following // BLOCK * BLOCK
                continue
            try:
                size = _number(header[124:136])
                intact = size >= 0 and _number(header[148:156]) == sum(header) - sum(header[148:156]) + 256
            except (tarfile.HeaderError, ValueError):
                intact = False
            if not intact:
                packed = offset == 0 and header.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"))
                text = "compressed, not a plain tar" if packed else f"no tar header at byte {offset}"
                if gaps and gaps[-1][1] == offset:
                    text += f", after zeros from byte {gaps[-1][0]}: a hole, or bytes behind the end of the archive"
                raise Damage(text, offset, end)
            kind, payload = header[156:157], offset + BLOCK
            if kind in b"xXLK" and size > MAX_HEADER_BYTES:
                raise Damage(f"a name of {size} bytes at byte {offset}", offset, end)
            if kind in b"gKNV" and payload + size > end:
                raise Damage(f"ends at byte {end}, inside a header that goes on to byte {payload + size}", offset, end)
            if kind in b"xX":
                pax = _pax_records(os.pread(fd, size, payload))
            elif kind == b"L":
                long_name = os.pread(fd, size, payload).split(b"\0", 1)[0]
            elif kind == b"K":
                long_target = os.pread(fd, size, payload).split(b"\0", 1)[0]
            elif kind not in b"gNV":  # other notes about the archive or the next member
                if pax and pax.get(b"size", b"").isdigit():
                    size = int(pax[b"size"][:20])  # of 20 digits no file has as many bytes
                name = pax.get(b"path") or long_name or header[:100].split(b"\0", 1)[0]
                if header[257:263] == b"ustar\0" and header[345] and b"path" not in pax and not long_name:
                    name = header[345:500].split(b"\0", 1)[0] + b"/" + name
                target = b""
                if kind in b"12":
                    target = pax.get(b"linkpath") or long_target or header[157:257].split(b"\0", 1)[0]
                if len(name) > MAX_NAME_BYTES or len(target) > MAX_NAME_BYTES:
                    raise Damage(f"a name of {max(len(name), len(target))} bytes at byte {offset}", offset, end)
                members += 1
                if members > MAX_MEMBERS:
                    raise Damage(f"more than {MAX_MEMBERS} members", offset, end)
                if kind in b"123456":
                    size = 0  # links, devices and folders have no payload, whatever the field says
                elif kind == b"S":
                    more = header[482]  # a map that goes on in blocks of its own
                    while more and payload < end:
                        more = os.pread(fd, BLOCK, payload)[504:505] not in (b"", b"\0")
                        payload += BLOCK
                if payload + size > end:
                    raise Damage(
                        f"ends at byte {end}, inside a member that goes on to byte {payload + size}", offset, end
                    )
                if kind in b"0\x007" and not (pax and any(key.startswith(b"GNU.sparse") for key in pax)):
                    yield name.decode("utf-8", "backslashreplace"), payload, size, "", ""
                elif kind != b"5":
                    name = pax.get(b"GNU.sparse.name") or name
                    yield _odd_member(kind, *(text.decode("utf-8", "backslashreplace") for text in (name, target)))
                if pax or long_name or long_target:
                    long_name, long_target, pax = None, None, {}
            offset = payload + (size + BLOCK - 1) // BLOCK * BLOCK
    finally:
        os.close(fd)


def _odd_member(kind: bytes, name: str, target: str) -> tuple[str, int, int, str, str]:
    """What ``_members`` yields for anything but a regular file."""
    if kind in b"12":  # a symbolic link starts from the folder that it is in
        target = posixpath.normpath(target if kind == b"1" else posixpath.join(posixpath.dirname(name), target))
        return name, 0, 0, "a link", target
    what = {b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}.get(kind)
    if kind in b"0\x007":
        what = "a sparse file"
    return name, 0, 0, what or f"of unknown type {kind.decode('latin-1')!r}", ""


def _next_data(fd: int, start: int, end: int) -> int | None:
    """The place of the first byte from ``start`` on that is not zero; None where there is none."""
    step = 4096
    while start < end:
        try:
            start = max(start, os.lseek(fd, start, os.SEEK_DATA))  # over what takes no room on the disk
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
        data = os.pread(fd, step, start)
        rest = data.lstrip(b"\0")
        if rest:
            return start + len(data) - len(rest)
        if not data:
            return None
        start, step = start + len(data), min(2 * step, 1 << 20)
    return None


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
    """``scan_tar``, kept as JSON in ``cache_dir``/index by ``name`` (default: the path), and the file's mtime and size.

    OSError where it cannot be read, or is no file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a regular file")
    state = [status.st_size, status.st_mtime_ns]
    if (
        name is None
    ):  # a file that was written over may keep its size and date; ctime of a copy in the cache is its last use
        state += [status.st_ctime_ns, status.st_ino]
    # The first number stands for the rules above: what older ones have kept is not theirs.
    key = digest(f"4|{name or os.path.abspath(path)}|{state}")
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
