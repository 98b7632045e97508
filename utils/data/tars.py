"""The index of a .tar: one pass over its headers, cached on disk, so that any sample can be read by offset.

A sample is a sequence of adjacent members whose names agree up to the first dot of the basename, as in the webdataset
library: ``0001.jpg`` and ``0001.cls`` make one sample. Nothing is ever unpacked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.data.sources import digest, remember, remembered

BLOCK = 512  # bytes; a tar consists of blocks of this size
ZEROS = bytes(BLOCK)
RECORD = 20 * BLOCK  # most writers pad a tar to a multiple of this
REGULAR, LINKS = b"0\x007", b"12"
ODD_MEMBERS = {b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}

# A tar that exceeds one of the first three counts as damaged.
MAX_HEADER_BYTES = 1 << 20  # of an extended header, which may also hold extended attributes
MAX_NAME_BYTES = 4096  # Linux' own limit for a path
MAX_MEMBERS = 4_000_000  # ImageNet with its labels has 2.6 million; building their index takes 0.6 GB
MAX_LINKS = 8  # in a chain of links


@dataclass
class TarIndex:
    """The positions of the samples in one tar. Sample i has the members starts[i] ... starts[i + 1] - 1.

    extension_ids index ``extensions``; offsets and sizes of the payloads are in bytes. ``damage`` describes damaged
    places, or is None; ``lost`` estimates from bytes how many samples were there (0: unknown). ``notes`` are (kind,
    detail, samples lost) for undamaged parts that are not read as they stand.
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
    """The tar cannot be read any further; ``place`` is the byte."""

    def __init__(self, text: str, place: int) -> None:
        super().__init__(text)
        self.place = place


def scan_tar(path: str | os.PathLike) -> TarIndex:
    """Indexes a tar in one pass over its headers, without the payloads. OSError if the file cannot be read at all.

    Of a damaged tar the samples before the damage are kept, and those after a hole of zeros that ends at a header.
    Concatenated archives are read as one. A link to a member of the same tar gets the payload of that member; no other
    link is followed. ``notes`` report other links, devices, sparse and unknown members, and repeated names.
    """
    keys: list[str] = []
    starts: list[int] = []
    extension_numbers: dict[str, int] = {}
    extension_ids: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    in_sample: set[int] = set()
    again: list[tuple[int, str]] = []  # number of the sample and name, for each repeated member
    links: dict[int, tuple[str, str, str]] = {}  # index of a member -> key, name, name of the target
    unread: list[tuple[str, str]] = []  # key and description of each member that is not read
    gaps: list[tuple[int, int]] = []
    end: Damage | None = None
    try:
        for name, offset, size, kind, target in _members(path, gaps):
            if name.startswith("__") and re.match(r"__[^/]*__($|/)", name):
                continue  # webdataset's metadata
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
                again.append((len(keys), f"{key}.{extension.lower()}"))
                continue
            if target:
                links[len(offsets)] = key, name, target
            in_sample.add(number)
            extension_ids.append(number)
            offsets.append(offset)
            sizes.append(size)
    except Damage as error:
        end = error
    # Drop the last sample before the damage if its extensions are not those of the sample before: it is incomplete.
    if end and keys and (len(keys) == 1 or in_sample != set(extension_ids[starts[-2] : starts[-1]])):
        again = [(sample, name) for sample, name in again if sample < len(keys)]
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
        times: dict[int, int] = {}  # sample -> how often it is repeated
        for (sample, _), count in Counter(again).items():
            times[sample] = max(count, times.get(sample, 0))
        lost = sum(times.values())
        detail = f"{lost} times a name again, the first is another {again[0][1]}; the first of each is read"
        index.notes.append(("repeated member", detail, lost))
    if repeated := len(index) - len(set(index.keys)):
        key, count = Counter(index.keys).most_common(1)[0]
        detail = (
            f"{repeated} keys again, such as {key}, {count} times apart in the shard, each time as a sample of its own"
        )
        index.notes.append(("repeated key", f"{detail}; members of one sample have to be neighbours", 0))
    return index


def _tell_damage(index: TarIndex, gaps: list[tuple[int, int]], end: Damage | None, path: str | os.PathLike) -> None:
    """Sets ``damage`` and ``lost``, and adds the notes about concatenated archives and empty shards.

    An archive ends with two blocks of zeros, which most writers pad to a full record. Exactly so many zeros inside a
    file are the end of one archive before the next; any other number is a hole.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail_from = file.seek(max(0, size - RECORD - 2 * BLOCK))
        filled_from = tail_from + len(file.read().rstrip(b"\0"))  # zeros at the end are not lost samples
    begin, joined, holes = 0, [], []
    for first, after in gaps:
        filled = (after - begin) % RECORD == 0 and 2 * BLOCK <= after - first < RECORD + 2 * BLOCK
        if after - first == 2 * BLOCK or filled:
            begin = after
            joined.append(after)
        else:
            holes.append((first, after))
    place = end.place if end else filled_from
    if end and joined and joined[-1] == place:  # no archive follows these zeros; ``end`` reports that
        joined.pop()
    if end and holes and holes[-1][1] == place:  # ``end`` reports this hole too: count it with the rest that is lost
        place = holes.pop()[0]
    texts = [f"zeros from byte {first} to {after}, where members should be" for first, after in holes]
    texts += [str(end)] if end else []
    if texts:
        index.damage = "; ".join(texts[:2]) + (f" and {len(texts) - 2} more" if len(texts) > 2 else "")
    if len(index):
        each = (place - sum(after - first for first, after in gaps if after <= place)) / len(index)
        lost = [after - first for first, after in holes] + ([filled_from - place] if end else [])
        index.lost = sum(max(1, round(count / each)) for count in lost)
    elif not index.damage and 0 < size <= RECORD:
        index.notes.append(("empty shard", "an archive without samples, or a file that was overwritten", 0))
    if joined:
        detail = f"{len(joined)} more archives behind the end of the first, at byte {joined[0]}; all are read"
        index.notes.append(("joined archives", detail, 0))


def _follow_links(
    index: TarIndex, links: dict[int, tuple[str, str, str]], path: str | os.PathLike, unread: list[tuple[str, str]]
) -> None:
    """Gives links the payload of their target. Removes dead links, and samples that have no other members."""
    places: dict[str, tuple[int, int]] = {}
    targets: dict[str, str] = {}
    with contextlib.suppress(Damage):  # reported already
        for name, offset, size, kind, target in _members(path, []):
            name = posixpath.normpath(name)
            if target:
                targets[name] = target
            elif not kind:
                places[name] = offset, size
    kept = np.ones(len(index.offsets), dtype=bool)
    for member, (key, name, target) in links.items():
        for _ in range(MAX_LINKS):
            if target not in places:
                target = targets.get(target, target)
        if target in places:
            index.offsets[member], index.sizes[member] = places[target]
        else:
            kept[member] = False
            unread.append((key, f"{name} (a link to {target}, no file in the archive)"))
    counts = np.concatenate([[0], np.cumsum(kept)])[index.starts]
    full = np.diff(counts) > 0
    index.keys = [key for key, whole in zip(index.keys, full) if whole]
    index.starts = np.append(counts[:-1][full], counts[-1])
    for name in ("extension_ids", "offsets", "sizes"):
        setattr(index, name, getattr(index, name)[kept])


def _members(path: str | os.PathLike, gaps: list[tuple[int, int]]) -> Iterator[tuple[str, int, int, str, str]]:
    """Yields (name, offset, size, kind, target) of the members of a tar, without folders. Raises ``Damage``.

    kind: "" for a regular file, else a description. target: the name in the archive that a link points to. ``gaps``
    gets (first byte, byte after) of zeros that are followed by data. Reads ustar, GNU (long names, sparse) and pax
    (path, linkpath, size) in a third of ``tarfile``'s time, and detects damage that ``tarfile`` mistakes for the end.
    """
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        end, offset, members = os.fstat(fd).st_size, 0, 0
        # Fields from extended headers of the next member: the last header of each kind counts, pax wins over GNU.
        pax: dict[bytes, bytes] = {}
        gnu: dict[bytes, bytes] = {}
        while True:
            header = os.pread(fd, BLOCK, offset)
            if len(header) < BLOCK:
                text = f"ends at byte {end} without an end-of-archive mark" if end else "an empty file, of 0 bytes"
                if offset == 0 and header.startswith(b"version https://git-lfs"):
                    text = "a pointer of Git LFS, not the file itself: bring it with `git lfs pull`"
                raise Damage(text, offset)
            if header == ZEROS:
                following = _next_data(fd, offset, end)
                if following is None:
                    if offset == 0 and end > RECORD:
                        raise Damage(f"nothing but zeros, {end} bytes", 0)
                    return
                after = following // BLOCK * BLOCK
                gaps.append((offset, after))
                pax, gnu, offset = {}, {}, after
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
                raise Damage(text, offset)
            kind, payload, more = header[156:157], offset + BLOCK, gnu | pax
            extended = kind in b"gNVxXLK"  # a header that describes the archive or the next member
            if extended and kind in b"xXLK" and size > MAX_HEADER_BYTES:
                raise Damage(f"a name of {size} bytes at byte {offset}", offset)
            if not extended and more.get(b"size", b"").isdigit():
                size = int(more[b"size"][:20])  # 20 digits are more than any file's size
            if kind in b"123456":
                size = 0  # links, devices and folders have no payload, whatever the field says
            if kind == b"S":
                goes_on = header[482]  # whether the map of holes continues in extra blocks
                while goes_on and payload < end:
                    goes_on = os.pread(fd, BLOCK, payload)[504:505] not in (b"", b"\0")
                    payload += BLOCK
            if payload + size > end:
                what = "header" if extended else "member"
                raise Damage(f"ends at byte {end}, inside a {what} that goes on to byte {payload + size}", offset)
            offset = payload + (size + BLOCK - 1) // BLOCK * BLOCK
            if extended:
                if kind in b"xX":
                    pax = _pax_records(os.pread(fd, size, payload))
                elif kind in b"LK":
                    gnu[b"path" if kind == b"L" else b"linkpath"] = _text(os.pread(fd, size, payload))
                continue
            name = more.get(b"path") or _text(header[:100])
            if header[257:263] == b"ustar\0" and header[345] and not more.get(b"path"):
                name = _text(header[345:500]) + b"/" + name
            target = (more.get(b"linkpath") or _text(header[157:257])) if kind in LINKS else b""
            members += 1
            if members > MAX_MEMBERS or max(len(name), len(target)) > MAX_NAME_BYTES:
                most = f"more than {MAX_MEMBERS} members, or a name of more than {MAX_NAME_BYTES} bytes"
                raise Damage(f"{most}, before byte {offset}", payload - BLOCK)
            if any(key.startswith(b"GNU.sparse") for key in more):
                name, kind = more.get(b"GNU.sparse.name") or name, b"S" if kind in REGULAR else kind
            pax, gnu = {}, {}
            shown, link, described = name.decode("utf-8", "backslashreplace"), "", ""
            if kind in LINKS:  # the target of a symbolic link is relative to the folder of the link
                folder = posixpath.dirname(shown) if kind == b"2" else ""
                link = posixpath.normpath(posixpath.join(folder, target.decode("utf-8", "backslashreplace")))
                described = "a link"
            elif kind not in REGULAR:
                described = ODD_MEMBERS.get(kind) or f"of unknown type {kind.decode('latin-1')!r}"
            if kind != b"5":
                yield shown, payload, size, described, link


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _next_data(fd: int, start: int, end: int) -> int | None:
    """The position of the first byte from ``start`` on that is not zero; None if there is none."""
    step = 4096
    while start < end:
        try:
            start = max(start, os.lseek(fd, start, os.SEEK_DATA))  # jump over holes of a sparse file
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
    """Reads a number of a tar header: octal digits, or base 256 for rare large ones."""
    if field[0] & 0x80:
        return tarfile.nti(field)  # type: ignore[attr-defined]
    return int(field.strip(b" \0") or b"0", 8)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Reads the records "<length> <key>=<value>\\n" of a pax header."""
    records, start = {}, 0
    while match := re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, start):
        length = int(match.group(1))
        if start + length <= match.end():
            break
        records[match.group(2)] = data[match.end() : start + length - 1]
        start += length
    return records


def tar_index(path: str, cache_dir: str | os.PathLike, name: str | None = None) -> TarIndex:
    """``scan_tar``, cached as JSON in ``cache_dir``/index by ``name`` (default: the path) and by size and times.

    OSError if the file cannot be read or is not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would hang
        raise OSError(errno.EINVAL, "not a regular file")
    state = [status.st_size, status.st_mtime_ns]
    if name is None:  # an overwritten file may keep size and mtime; not for cached copies: each use changes their ctime
        state += [status.st_ctime_ns, status.st_ino]
    # The first number is the version of the rules above: indexes made by older rules are not used.
    stored = Path(cache_dir) / "index" / f"{digest(f'4|{name or os.path.abspath(path)}|{state}')}.json"
    arrays = {"starts": np.int64, "extension_ids": np.int32, "offsets": np.int64, "sizes": np.int64}
    found = remembered(stored)
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):  # not cached yet, or damaged
        return TarIndex(**found | {field: np.array(found[field], dtype) for field, dtype in arrays.items()})
    index = scan_tar(path)
    remember(stored, vars(index) | {field: getattr(index, field).tolist() for field in arrays})
    return index
