"""Small .tar shards and a web server for the tests."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

NUM_CLASSES = 5


def image_bytes(seed: int, size: tuple[int, int] = (12, 10), format: str = "JPEG", mode: str = "RGB") -> bytes:
    """An encoded picture of (width, height), smooth enough for JPEG, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, format=format)
    return stream.getvalue()


def write_shard(
    path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], format: int = tarfile.USTAR_FORMAT
) -> str:
    """A tar of [(key, {extension: bytes}), ...]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, members in samples:
            for extension, data in members.items():
                add_member(tar, f"{key}.{extension}", data)
    return str(path)


def add_member(tar: tarfile.TarFile, name: str, data: bytes, **attributes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def rewrite(path: Path, data: bytes) -> None:
    """Other bytes of the same size, the date put back."""
    before = path.stat()
    assert before.st_size == len(data)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def relabelled(path: Path, labels: Sequence[int]) -> bytes:
    """The bytes of a shard with other .cls members, one digit each."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        for member, label in zip((member for member in tar if member.name.endswith(".cls")), labels, strict=True):
            data[member.offset_data : member.offset_data + 1] = str(label).encode()
    return bytes(data)


def labelled_samples(
    shard: int, size: int, image_size: tuple[int, int] = (12, 10)
) -> list[tuple[str, dict[str, bytes]]]:
    """Good samples with keys that name shard and sample; every sample has pixels of its own."""
    return [
        (
            f"s{shard:03d}-{sample:05d}",
            {"jpg": image_bytes(1000 * shard + sample, image_size), "cls": str(sample % NUM_CLASSES).encode()},
        )
        for sample in range(size)
    ]


def make_shards(folder: Path, sizes: Sequence[int], *, sizes_json: bool = False) -> list[str]:
    """<folder>/0.tar, 1.tar, ... with ``sizes`` labelled samples each."""
    paths = [write_shard(folder / f"{shard}.tar", labelled_samples(shard, size)) for shard, size in enumerate(sizes)]
    if sizes_json:
        promised = {f"{shard}.tar": size for shard, size in enumerate(sizes)}
        (folder / "sizes.json").write_text(json.dumps(promised), encoding="utf-8")
    return paths


class ShardServer:
    """Serves a folder on the loopback interface and counts the GET requests of every path.

    ``broken[path] = n``: the first n answers end in the middle of the file. ``statuses[path] = [503, ...]``: answers
    with these statuses first. ``replies[path]`` is a JSON answer; folders of the hub's URL scheme are mapped to files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.broken: dict[str, int] = {}
        self.statuses: dict[str, list[int]] = {}
        self.replies: dict[str, object] = {}
        self.delay = 0.0
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ShardServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                with owner._lock:
                    if body:
                        owner.requests[path] += 1
                    status = owner.statuses[path].pop(0) if owner.statuses.get(path) else 200
                    breaks = body and owner.broken.get(path, 0) > 0
                    if breaks:
                        owner.broken[path] -= 1
                plain = re.sub(r"/resolve/[^/]+/", "/", path).replace("/datasets/org/name/", "").lstrip("/")
                file = owner.folder / plain
                if status == 200 and path not in owner.replies and not file.is_file():
                    status = 404
                if status != 200:
                    self.send_response(status)
                    if status == 404:
                        self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = json.dumps(owner.replies[path]).encode() if path in owner.replies else file.read_bytes()
                threading.Event().wait(owner.delay)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Content-Type", "application/json" if path in owner.replies else "application/x-tar")
                self.send_header("ETag", f'"{hash(data) & 0xFFFFFFFF:08x}"')
                self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
                self.end_headers()
                if body:
                    self.wfile.write(data[: len(data) // 2] if breaks else data)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
