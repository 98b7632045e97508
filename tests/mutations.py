"""Damage for the fuzz test: bytes, tar headers, images and JSON changed at random, the same way for the same seed."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

NUMBERS = (-1, 0, 1, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 10**18, 10**40)
PIECES = (
    *(b"\0", b"\n", b"\r", b"\x1b]0;title\x07\x1b[2J", b"\xff\xfe", b"../../", b"/etc/passwd", b"-" * 300, b"9" * 5000),
    *(
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-1",
        b"null",
        b"true",
        b'"\\ud800"',
        b"[" * 3000,
        b'{"a":' * 2000,
        b"\xf0\x9f\x98\x80",
    ),
    *(
        b": ",
        b"&a [*a, *a]",
        b"*a",
        b"!!python/object/apply:os.system [echo]",
        b"2024-99-99",
        b"0x" + b"f" * 4500,
        b"<<: *a",
    ),
    *(
        "\u202e".encode(),
        "\u0661".encode(),
        b"{c}",
        b"pipe:echo",
        b"https://user:password@host/a?token=b",
        b"$\\frac{",
        b"%s%n",
    ),
)
JSON_VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e308,
        10**30,
        "",
        "text",
        "\ud800",
        "\x1b[2J\n",
        "n" * 20_000,
        [],
        {},
        [[[]]],
        [None],
    ),
    *({"a": []}, ["text"] * 20_000, ["a", "a"], [1, 2, 3], {"attribute": "woman"}),
)
# Fields of a tar header: offset and length.
FIELDS = {
    **{
        "name": (0, 100),
        "mode": (100, 8),
        "size": (124, 12),
        "mtime": (136, 12),
        "checksum": (148, 8),
        "kind": (156, 1),
    },
    **{"linkname": (157, 100), "magic": (257, 8), "prefix": (345, 155)},
}
KINDS = b"0\x001234567gxXLKSNVDM\xff"


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, pieces, cuts, copies."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(data) + 1)
        other = min(len(data), place + draw.choice((1, 2, 16, 100, 512, 4000)))
        change = draw.randrange(8)
        if change == 0 and data:
            for _ in range(draw.choice((1, 1, 8, 64))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif change == 1:
            data[place:place] = draw.choice(PIECES)
        elif change == 2:
            piece = draw.choice(PIECES)
            data[place : place + len(piece)] = piece
        elif change == 3:
            del data[place:]
        elif change == 4:
            del data[place:other]
        elif change == 5:
            data[place:place] = data[draw.randrange(len(data) + 1) :][: other - place]
        elif change == 6:
            data[place : place + 4] = struct.pack(draw.choice((">I", "<I")), draw.choice(NUMBERS) % 2**32)
        else:
            data[place:other] = draw.randbytes(other - place)
    return bytes(data)


def mutate_tar(data: bytes, draw: random.Random) -> bytes:
    """Headers with other fields, mostly under a right checksum; blocks swapped or cut; or ``mutate_bytes``."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    headers = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    change = draw.randrange(5)
    if change == 0 or not headers:
        return mutate_bytes(data, draw)
    if change == 1:
        first, second = draw.choice(headers), draw.randrange(len(blocks))
        blocks[first], blocks[second] = blocks[second], blocks[first]
        return b"".join(blocks)[: draw.choice((None, draw.randrange(len(data))))]
    for _ in range(draw.choice((1, 1, 3))):
        block = blocks[draw.choice(headers)]
        field = draw.choice(("name", "size", "size", "kind", "kind", *FIELDS))
        start, length = FIELDS[field]
        if field == "kind":
            block[start] = draw.choice(KINDS)
        elif field == "size" and draw.random() < 0.7:
            number = draw.choice(NUMBERS)
            octal = b"%0*o\0" % (length - 1, abs(number))
            base_256 = (b"\xff" if number < 0 else b"\x80") + (number % 2**80).to_bytes(length - 1, "big")
            block[start : start + length] = octal if draw.random() < 0.5 and len(octal) == length else base_256
        else:
            filling = draw.choice(
                (draw.choice(PIECES), draw.randbytes(length), mutate_bytes(block[start:][:length], draw))
            )
            block[start : start + length] = filling[:length].ljust(length, b"\0")
        if draw.random() < 0.8:
            seal(block)
    return b"".join(blocks)


def seal(header: bytearray) -> None:
    """Writes the right checksum into a tar header."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def mutate_image(data: bytes, draw: random.Random) -> bytes:
    """``mutate_bytes``, for a PNG often with right chunk checksums, so that it is read beyond them."""
    if data[:4] == b"\x89PNG" and draw.random() < 0.6:
        chunks = list(png_chunks(data))
        kind, body = chunks[number := draw.randrange(len(chunks))]
        if kind == b"IHDR" and draw.random() < 0.6:
            sides = [draw.choice(NUMBERS) % 2**32 for _ in range(2)]
            body = struct.pack(">II", *sides) + body[8:]
        elif draw.random() < 0.3:
            kind = draw.choice(
                (b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"PLTE", b"tRNS", b"eXIf")
            )
            bomb = b"a\0\0" + zlib.compress(bytes(draw.choice((10, 10**6, 10**7))))
            body = draw.choice((bomb, body, draw.randbytes(30)))
        else:
            body = mutate_bytes(body, draw)
        chunks[number] = (kind, body)
        return png(chunks)
    return mutate_bytes(data, draw)


def png_chunks(data: bytes):
    place = 8
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += length + 12


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of [(kind, body), ...]."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """A value exchanged, dropped, or put under another name; or ``mutate_bytes``."""
    if draw.random() < 0.3:
        return mutate_bytes(data, draw)
    tree = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        places = list(_places(tree))
        if not places:
            return json.dumps(draw.choice(JSON_VALUES)).encode()
        holder, key = draw.choice(places)
        if draw.random() < 0.2:
            del holder[key]
        elif draw.random() < 0.1:
            other, other_key = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        else:
            holder[key] = json.loads(json.dumps(draw.choice(JSON_VALUES)))
    return json.dumps(tree).encode() if draw.random() < 0.95 else json.dumps(draw.choice(JSON_VALUES)).encode()


def _places(tree: Any):
    """(holder, key or index) of every value in a tree of dicts and lists."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items[:50]:
        yield tree, key
        yield from _places(value)


def mutate_lines(data: bytes, draw: random.Random, mutate: Callable[[bytes, random.Random], bytes]) -> bytes:
    """One line of a text changed by ``mutate``."""
    lines = data.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    lines[number] = mutate(lines[number].rstrip(b"\n"), draw) + b"\n"
    return b"".join(lines)
