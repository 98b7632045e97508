"""Text files that people write: one way from bytes to text and to lines, the same for every such file.

Class names, templates, words, lists of classes, recipes and JSON come from editors of every kind. A byte order mark is not
part of the text. A line ends at ``\\n`` or ``\\r\\n`` and nowhere else: ``str.splitlines`` also breaks at U+2028, U+2029,
U+0085, vertical tab and form feed, which shifts the labels of all classes below.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from utils.errors import UserError

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
            f"{where}: not UTF-8 text (byte {data[error.start]:#04x} at {error.start}); save it again as UTF-8"
        ) from None
    if "\0" in text:  # UTF-16 without a mark, or no text
        raise UserError(f"{where}: not UTF-8 text (a zero byte at {text.index(chr(0))}); save it again as UTF-8")
    return text


def text_lines(text: str) -> list[str]:
    """The lines of a text without their ends. An end after the last line begins no further one."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_text_file(path: str | Path, where: str) -> str:
    """A local text file whole. UserError that names ``where`` if it cannot be read or is not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); check the path and its permissions") from None
    return decode_text(data, where)
