"""Folders of pictures: finds pictures and subfolders, and keeps a record of everything that is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from utils.errors import os_errors

# Suffixes of Pillow's formats. The true format of a file is read from its first bytes.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"),
    *(".dib", ".tif", ".tiff", ".avif"),
}
# Folders that operating systems add: thumbnails, deleted files, files recovered after a crash.
SYSTEM_FOLDERS = {
    *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "__macosx", "__pycache__", "$recycle.bin", "recycler"),
    *("lost+found", "system volume information", "found.000"),
}

READ_ALREADY = "links to folders that are read already"
LeftOut = dict[str, list[str]]  # kind of entry -> paths


def is_system(name: str) -> bool:
    """Whether a folder of this name is hidden or made by an operating system."""
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS


def is_picture(name: str) -> bool:
    """Whether a file of this name is a picture, judged by its suffix; hidden files are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def kind_of(entry: os.DirEntry) -> str:
    """ "folder", "file", "broken link" or "other", with links followed. Reading "other", such as a pipe, may hang."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"
    except OSError:  # a link to itself, or into a folder that may not be entered
        return "broken link"


def entries_of(folder: str | Path, where: str = "") -> list[os.DirEntry]:
    """The entries of a folder, sorted by name. UserError about ``where`` (default: the folder) if it is unreadable."""
    with os_errors(f"{where or folder}: cannot be read", "check its permissions"), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def subfolders(folder: Path, left_out: LeftOut | None = None, root: Path | None = None) -> list[str]:
    """The sorted names of the folders in ``folder``, without system folders; empty if ``folder`` is not a folder.

    Everything else in it is added to ``left_out``, as paths relative to ``root``.
    """
    if not folder.is_dir():
        return []
    found, around = [], _around(folder)
    left_out = {} if left_out is None else left_out
    for entry in entries_of(folder):
        if kind_of(entry) != "folder" or is_system(entry.name):
            leave(left_out, entry, root or folder)
        elif entry.is_symlink() and _identity(entry) in around:
            leave(left_out, entry, root or folder, READ_ALREADY)
        else:
            found.append(entry.name)
    return found


def pictures(folder: Path, left_out: LeftOut, root: Path) -> list[os.DirEntry]:
    """The pictures in a folder, sorted by name. The rest goes to ``left_out``, as paths relative to ``root``."""
    found = []
    for entry in entries_of(folder):
        # The kind matters as well as the suffix: reading a pipe would never end.
        if kind_of(entry) == "file" and is_picture(entry.name):
            found.append(entry)
        else:
            leave(left_out, entry, root)
    return found


def leave(left_out: LeftOut, entry: os.DirEntry, root: Path, kind: str | None = None) -> None:
    """Adds an entry to ``left_out`` under its kind."""
    found, suffix = kind_of(entry), os.path.splitext(entry.name)[1].lower()
    own = {
        "folder": "hidden folders, or a system's own" if is_system(entry.name) else "folders",
        "file": "hidden files"
        if entry.name.startswith(".")
        else f"{suffix} files"
        if suffix
        else "files without a suffix",
        "broken link": "broken links",
        "other": "pipes, sockets or devices",
    }
    path = os.path.relpath(entry.path, root) + "/" * (found == "folder")
    left_out.setdefault(kind or own[found], []).append(path)


def describe(left_out: LeftOut) -> str:
    """ "7 .heic files (a/1.HEIC, a/2.HEIC, a/3.HEIC, ...), 1 broken links (b/4.jpg)"; "" if nothing is left out."""
    parts = []
    for kind, paths in sorted(left_out.items(), key=lambda item: (-len(item[1]), item[0])):
        more = ", ..." if len(paths) > 3 else ""
        parts.append(f"{len(paths):,} {kind} ({', '.join(sorted(paths)[:3])}{more})")
    return ", ".join(parts)


def walk(folder: Path, left_out: LeftOut, root: Path) -> Iterator[tuple[Path, list[os.DirEntry]]]:
    """Yields ``folder`` and all folders below it, each with its files and broken links; the rest goes to ``left_out``.

    Links are followed. No folder is visited twice, and no parent of ``folder`` is visited, so circular links end.
    """
    seen = _around(folder)
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        files, inner = [], []
        for entry in entries_of(place):
            kind = kind_of(entry)
            if kind in ("file", "broken link") and not entry.name.startswith("."):
                files.append(entry)
            elif kind != "folder" or is_system(entry.name):
                leave(left_out, entry, root)
            elif (identity := _identity(entry)) in seen:
                leave(left_out, entry, root, READ_ALREADY)
            else:
                seen.add(identity)
                inner.append(Path(entry.path))
        waiting += reversed(inner)
        yield place, files


def _around(folder: Path) -> set[tuple[int, int]]:
    """The identities of the folder and all its parents: a link to one of them is circular."""
    return {_identity(place) for place in (folder, *folder.absolute().parents, *folder.resolve().parents)}


def _identity(place: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(place)
    return status.st_dev, status.st_ino
