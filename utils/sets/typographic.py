"""Typographic attacks: a word written on an image, the same one for the same (seed, epoch, sample key).

Words are drawn last, on the pixels that the encoder sees, so that resizing and cropping never cut them. Everything random
about an attack comes from one hash of (seed, epoch, key, number): nothing depends on the batch, the process or the
worker. Fonts come with declared dependencies: DejaVu, STIX and Computer Modern with matplotlib, Aileron inside Pillow.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.cli import nearest
from utils.errors import UserError
from utils.sets.labelled import fold

REFERENCE_SIZE = 224  # letter sizes are given for images of this side and scale with the image
AILERON = "Aileron"  # Pillow's own scalable font; it has no file
KINDS = ("outlined", "label")
PLACES = ("anywhere", "top", "bottom")
COLOURS = np.array(
    [(0, 0, 0), (255, 255, 255), (220, 30, 30), (30, 160, 30), (30, 60, 220), (240, 220, 40), (40, 200, 210), (210, 50, 200)],
    dtype=np.float32,
)  # fmt: skip


@dataclass(frozen=True)
class WordStyle:
    """How words are written.

    fonts: names or files, see ``find_fonts``. size: smallest and largest letters (the font's em), in pixels on an image
    of 224; a word that is too wide shrinks until it fits. kind: ``outlined`` letters in one of 8 colours with a thin
    outline in another, or a ``label``, black on a white sticker. place: which half of the image.
    """

    fonts: tuple[str, ...] = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
    size: tuple[float, float] = (20.0, 40.0)
    kind: str = "outlined"
    place: str = "anywhere"


class Draws:
    """Random whole numbers that depend on the parts of a key alone, the same on every machine and in every version."""

    def __init__(self, *key: object) -> None:
        self._key, self._block = "/".join(map(str, key)), 0
        self._numbers: Iterator[int] = iter(())

    def below(self, limit: int) -> int:
        """Uniform in 0 ... limit-1, up to limit / 2^32."""
        number = next(self._numbers, None)
        if number is None:
            digest = hashlib.blake2b(f"{self._block}/{self._key}".encode()).digest()
            self._block += 1
            self._numbers = iter(np.frombuffer(digest, dtype="<u4").tolist())
            number = next(self._numbers)
        return number * limit >> 32

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high) in steps of 1 / 65536 of the range."""
        return low + (high - low) * self.below(65536) / 65536


def merge_names(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Distinct names in order, and for every name the place of its word among them: ImageNet has two cranes."""
    places: dict[str, int] = {}
    distinct: list[str] = []
    for name in names:
        if fold(name) not in places:
            places[fold(name)] = len(distinct)
            distinct.append(name)
    return distinct, [places[fold(name)] for name in names]


def wrong_words(word: int, num_words: int, count: int, draws: Draws) -> list[int]:
    """``count`` different words other than ``word``, uniform: an offset is drawn, never a word again and again.

    ValueError where there are not that many others.
    """
    if not 0 <= count < num_words:
        raise ValueError(f"{count} wrong words of {num_words}")
    others = [(word + offset) % num_words for offset in range(1, num_words)]
    for place in range(count):  # the first ``count`` steps of a Fisher-Yates shuffle
        other = place + draws.below(len(others) - place)
        others[place], others[other] = others[other], others[place]
    return others[:count]


def write_word(pixels: Tensor, word: str, style: WordStyle, draws: Draws) -> Tensor:
    """Writes ``word`` on an image: uint8 (3, H, W) -> a new uint8 (3, H, W). The word is always wholly inside."""
    height, width = pixels.shape[1:]
    font = style.fonts[draws.below(len(style.fonts))]
    scale = min(height, width) / REFERENCE_SIZE
    size = max(1, round(scale * draws.between(*style.size)))
    stroke = max(1, round(scale)) if style.kind == "outlined" else 0
    letters, shape = _fitting_word(break_lines(word), font, size, stroke, style.kind, height, width)
    box_height, box_width = letters.shape
    top = _place(style.place, height, box_height, draws)
    left = draws.below(width - box_width + 1)
    ink, paper = COLOURS[0], COLOURS[1]
    if style.kind == "outlined":
        colour = draws.below(len(COLOURS))
        other = (colour + 1 + draws.below(len(COLOURS) - 1)) % len(COLOURS)
        ink, paper = COLOURS[colour], COLOURS[other]
    image = pixels.clone()
    box = image.numpy()[:, top : top + box_height, left : left + box_width]
    patch = box.astype(np.float32)
    for paint, coverage in ((paper, shape), (ink, letters)):
        patch += (paint[:, None, None] - patch) * (coverage / np.float32(255))
    box[:] = np.rint(patch)
    return image


def break_lines(name: str) -> str:
    """Names of two or three words break after the first, longer ones after the second."""
    words = name.split()
    first = 1 if len(words) <= 3 else 2
    return "\n".join(filter(None, (" ".join(words[:first]), " ".join(words[first:]))))


def word_style(settings: Any) -> WordStyle:
    """The style that the flags fonts, word_size_min, word_size_max, word_kind and word_place ask for; or ``UserError``."""
    smallest, largest = settings.word_size_min, settings.word_size_max
    if smallest > largest:
        raise UserError(f"--word_size_min {smallest:g}: larger than --word_size_max {largest:g}; swap them")
    return WordStyle(find_fonts(settings.fonts), (smallest, largest), settings.word_kind, settings.word_place)


def find_fonts(names: Sequence[str], flag: str = "--fonts") -> tuple[str, ...]:
    """Checks that every font can be opened. A name of ``known_fonts()`` or a .ttf or .otf file; else ``UserError``."""
    known = known_fonts()
    for name in names:
        try:
            _font(name, 12)
        except OSError:
            match = nearest(name, known)
            hint = f", did you mean {match}?" if match else f"; names: {', '.join(known)}"
            raise UserError(
                f"{flag} {name}: neither a font file that opens nor a font that comes with matplotlib or Pillow{hint}"
            ) from None
    return tuple(names)


def known_fonts() -> list[str]:
    """Fonts that need no file of the user's."""
    folder = _matplotlib_fonts()
    found = sorted(path.stem for path in folder.glob("*.ttf")) if folder else []
    symbols = ("Siz", "Display", "cmex", "cmmi", "cmsy", "NonUni", "LastResort")
    return [*(name for name in found if not any(part in name for part in symbols)), AILERON]


def _matplotlib_fonts() -> Path | None:
    spec = importlib.util.find_spec("matplotlib")  # found, not imported: every data worker comes by here
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" if spec and spec.origin else None


def font_files(names: Sequence[str]) -> list[Path]:
    """The files of fonts that ``find_fonts`` has found; Aileron's is Pillow's own module."""
    folder = _matplotlib_fonts()
    inside = {name: folder / f"{name}.ttf" for name in names if folder is not None}
    files = {name: path if path.is_file() else Path(name) for name, path in inside.items()}
    return [Path(ImageFont.__file__) if name == AILERON else files.get(name, Path(name)) for name in names]


@lru_cache(maxsize=1024)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == AILERON:
        return ImageFont.load_default(size)
    folder = _matplotlib_fonts()
    if folder is not None and (folder / f"{name}.ttf").is_file():
        return ImageFont.truetype(folder / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)
    if not Path(name).is_file():  # else FreeType would search the system for a file of this name
        raise OSError
    return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)


def _fitting_word(
    text: str, font: str, size: int, stroke: int, kind: str, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The word at ``size`` or, where that is too large for (height, width), at the largest smaller one that fits."""
    while True:
        columns, rows = _layout(text, font, size, stroke, kind)[0]
        if rows <= height and columns <= width:
            return _word(text, font, size, stroke, kind)
        if size == 1:  # more letters than the image has columns: squeezed, no word is ever cut
            room = (min(columns, width), min(rows, height))
            letters, under = (
                np.asarray(Image.fromarray(part).resize(room, Image.Resampling.BOX))
                for part in _word(text, font, size, stroke, kind)
            )
            return letters, under
        size = max(1, min(size - 1, int(size * min(height / rows, width / columns))))


@lru_cache(maxsize=16384)
def _layout(text: str, font: str, size: int, stroke: int, kind: str) -> tuple[tuple[int, int], tuple[float, float]]:
    """(columns, rows) of the word's box and where in it Pillow has to begin, without drawing."""
    padding = max(1, round(0.2 * size)) if kind == "label" else 0
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    box = probe.multiline_textbbox((0, 0), text, stroke_width=stroke, **_options(font, size))
    left, top, right, bottom = box
    # Some letters cross their box by a fraction of a pixel: one more pixel on every side.
    room = (int(np.ceil(right - left)) + 2 * padding + 2, int(np.ceil(bottom - top)) + 2 * padding + 2)
    return room, (1 + padding - left, 1 + padding - top)


# Bytes, not floats: 4096 words at 224 pixels take some 60 MB of every data worker, at 448 four times that.
@lru_cache(maxsize=4096)
def _word(text: str, font: str, size: int, stroke: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the letters and of what lies under them (outline or sticker), both (h, w) uint8, 255 for all of a pixel."""
    room, corner = _layout(text, font, size, stroke, kind)
    canvas = Image.new("RGB", room)
    # Both in one go, letters in red and green, the outline in green: a stroke of another width would move the second line.
    ImageDraw.Draw(canvas).multiline_text(
        corner, text, fill=(255, 255, 0), stroke_width=stroke, stroke_fill=(0, 255, 0), **_options(font, size)
    )
    letters, shape = (np.asarray(canvas.getchannel(channel)) for channel in ("R", "G"))
    return letters, np.broadcast_to(np.uint8(255), letters.shape) if kind == "label" else shape


def _options(font: str, size: int) -> dict[str, Any]:
    return {"font": _font(font, size), "align": "center", "spacing": max(1, size // 6)}


def _place(place: str, room: int, length: int, draws: Draws) -> int:
    """The first row of a word of ``length`` rows in an image of ``room`` rows; a tall word leaves its half."""
    last = room - length
    low, high = {"anywhere": (0, last), "top": (0, room // 2 - length), "bottom": (min(room // 2, last), last)}[place]
    return low + draws.below(max(0, high - low) + 1)
