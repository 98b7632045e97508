"""Reads text files that others wrote, by hand or as JSON: bytes to text, lines and values.

A byte order mark is not part of the text. A line ends only at ``\\n`` or ``\\r\\n``. ``str.splitlines`` also breaks at
U+2028, U+2029, U+0085, vertical tab and form feed, which would shift the labels of all later classes.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

from utils.errors import UserError, os_errors

BYTE_ORDER_MARK = "\ufeff"


def decode_text(data: bytes, where: str) -> str:
    """Decodes UTF-8, with or without a byte order mark. ``UserError`` that names ``where`` for another encoding."""
    for encoding in ("UTF-32-LE", "UTF-32-BE", "UTF-16-LE", "UTF-16-BE"):  # the mark of UTF-32 begins like UTF-16's
        if data.startswith(BYTE_ORDER_MARK.encode(encoding)):
            raise UserError(f"{where}: {encoding[:6]}, expected UTF-8; save it again as UTF-8")
    try:
        text = data.decode("utf-8-sig").lstrip(BYTE_ORDER_MARK)  # some programs write two marks
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at {error.start}"
        raise UserError(f"{where}: not a UTF-8 text ({found}); save it again as UTF-8") from None
    if text.count("\0") > len(text) / 4:  # UTF-16 without a mark, or not a text
        raise UserError(f"{where}: not a UTF-8 text (a zero byte at {text.index(chr(0))}); save it again as UTF-8")
    return text


def text_lines(text: str, where: str = "a text file") -> list[str]:
    """The lines of a text without line ends. A line end at the end of the text does not start another line.

    ``UserError`` for any other carriage return (a file of an old Mac would be one line), and for an invisible byte
    order mark inside the text, as in concatenated files.
    """
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    for number, line in enumerate(lines, 1):
        if "\r" in line:
            raise UserError(
                f"{where}: line {number} holds a carriage return; save it with lines that end in \\n or \\r\\n"
            )
        if BYTE_ORDER_MARK in line:
            raise UserError(f"{where}: line {number} holds a byte order mark (U+FEFF), which nobody sees; take it out")
    return lines


def holds_controls(text: str) -> bool:
    """Whether a line has control characters. Lines are drawn on images, printed in tables and read by a model."""
    return any(unicodedata.category(letter) == "Cc" for letter in text)


def parse_label(data: bytes) -> int:
    """The integer in a ``.cls`` member. ValueError unless it is plain digits; ``int`` would also read 1_0 as ten."""
    text = data.decode("utf-8-sig").strip()
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError("no whole number")
    return int(text)


def read_text_file(path: str | Path, where: str, limit: int = 64 << 20) -> str:
    """Reads a whole local file. ``UserError`` if it is unreadable, larger than ``limit`` bytes or not UTF-8."""
    with os_errors(f"{where}: cannot be read", "check the path and its permissions"), open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{where}: more than {limit >> 20} MiB; give the path of a text file")
    return decode_text(data, where)


def parse_json(text: str | bytes) -> Any:
    """Parses untrusted JSON: finite numbers, integers of at most 18 digits, no repeated name. Raises only ValueError.

    ``json.loads`` is laxer: it accepts NaN, keeps the last of two equal names, raises RecursionError for deep nesting,
    and accepts a byte order mark only in bytes.
    """
    if isinstance(text, str):
        text = text.removeprefix(BYTE_ORDER_MARK)
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite, parse_int=_short)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)[:100]!r} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _short(text: str) -> int:
    if len(text) > 18:
        raise ValueError("a whole number of more than 18 digits")
    return int(text)
