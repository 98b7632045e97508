"""Text files that people write: one way from bytes to text and to lines, the same for every such file.

Class names, templates, words, lists of classes, recipes and JSON come from editors of every kind. A byte order mark is not
part of the text. A line ends at ``\\n`` or ``\\r\\n`` and nowhere else: ``str.splitlines`` also breaks at U+2028, U+2029,
U+0085, vertical tab and form feed, which shifts the labels of all classes below.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from pathlib import Path

from utils.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
# UTF-32's mark begins with UTF-16's.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 bytes, with or without a byte order mark, as text. UserError that names ``where`` for any other encoding."""
    for mark, encoding in _OTHER_MARKS:
        if data.startswith(mark):
            raise UserError(f"{where}: {encoding}, expected UTF-8; save it again as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not a UTF-8 text (byte {data[error.start]:#04x} at {error.start}); save it again as UTF-8"
        ) from None
    text = text.lstrip(BYTE_ORDER_MARK)  # some programs write one more
    if text.count("\0") > len(text) / 4:  # UTF-16 without a mark, or no text
        raise UserError(f"{where}: not a UTF-8 text (a zero byte at {text.index(chr(0))}); save it again as UTF-8")
    return text


def text_lines(text: str, where: str = "a text file") -> list[str]:
    """The lines of a text without their ends. An end after the last line begins no further one.

    UserError that names ``where`` for carriage returns that end no line, as of an old Mac, whose file would be one line, and
    for a byte order mark inside, as of files put together: it would be a letter that nobody sees.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, 1):
        if "\r" in line:
            raise UserError(
                f"{where}: line {number} holds a carriage return; save it with lines that end in \\n or \\r\\n"
            )
        if BYTE_ORDER_MARK in line:
            raise UserError(f"{where}: line {number} holds a byte order mark (U+FEFF), which nobody sees; take it out")
    return lines


def holds_controls(text: str) -> bool:
    """Whether a line holds control characters: it is drawn into images, printed in tables and read by a model."""
    return any(unicodedata.category(letter) == "Cc" for letter in text)


def parse_label(data: bytes) -> int:
    """The whole number of a ``.cls`` member, with or without a byte order mark and spaces around it. Else ValueError.

    Plain digits alone: ``int`` also takes 1_0 for ten, and digits of other scripts.
    """
    text = data.decode("utf-8-sig").strip()
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError("no whole number")
    return int(text)


def read_text_file(path: str | Path, where: str) -> str:
    """A local text file whole. UserError that names ``where`` if it cannot be read or is not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); check the path and its permissions") from None
    return decode_text(data, where)
