"""Typographic attacks: write a word on an image, the same one for the same (seed, epoch, sample key).

Words are written last, on the pixels that the encoder sees, so resizing and cropping never cut them. All randomness
comes from a hash of (seed, epoch, key, number), so nothing depends on the batch, the process or the worker.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
from collections.abc import Sequence
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

REFERENCE_SIZE = 224  # pixels; letter sizes are given for images of this side and scale with the image
AILERON = "Aileron"  # Pillow's built-in scalable font, which has no file
KINDS = ("outlined", "label")
PLACES = ("anywhere", "top", "bottom")
COLOURS = np.array(
    [
        *[(0, 0, 0), (255, 255, 255), (220, 30, 30), (30, 160, 30)],
        *[(30, 60, 220), (240, 220, 40), (40, 200, 210), (210, 50, 200)],
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class WordStyle:
    """How words are written.

    fonts: names or files, see ``find_fonts``. size: smallest and largest font size (em) in pixels on an image of side
    224; a word that does not fit is made smaller. kind: ``outlined``, letters in one of 8 colours with a thin outline
    in another; or ``label``, black on a white sticker. place: ``anywhere``, or the ``top`` or ``bottom`` half.
    """

    fonts: tuple[str, ...] = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
    size: tuple[float, float] = (20.0, 40.0)
    kind: str = "outlined"
    place: str = "anywhere"


class Draws:
    """Random integers that depend only on the parts of a key, the same on every machine and with every version."""

    def __init__(self, *key: object) -> None:
        text = "/".join(map(str, key))
        blocks = (hashlib.blake2b(f"{number}/{text}".encode()).digest() for number in itertools.count())
        self._numbers = itertools.chain.from_iterable(np.frombuffer(block, dtype="<u4").tolist() for block in blocks)

    def below(self, limit: int) -> int:
        """Uniform in 0 ... limit-1, except for a bias of at most limit / 2^32."""
        return next(self._numbers) * limit >> 32

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high) in steps of 1 / 65536 of the range."""
        return low + (high - low) * self.below(65536) / 65536


def merge_names(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct names in order, and the place of every name among them: ImageNet has two cranes."""
    words: dict[str, str] = {}
    for name in names:
        words.setdefault(fold(name), name)
    places = {word: place for place, word in enumerate(words)}
    return list(words.values()), [places[fold(name)] for name in names]


def wrong_words(word: int, num_words: int, count: int, draws: Draws) -> list[int]:
    """Draws ``count`` different words other than ``word``, uniformly; 0 <= count < num_words."""
    others = [(word + offset) % num_words for offset in range(1, num_words)]
    for place in range(count):  # the first ``count`` steps of a Fisher-Yates shuffle
        other = place + draws.below(len(others) - place)
        others[place], others[other] = others[other], others[place]
    return others[:count]


def write_word(pixels: Tensor, word: str, style: WordStyle, draws: Draws) -> Tensor:
    """Writes ``word`` on an image: uint8 (3, H, W) -> a new uint8 (3, H, W). The whole word is always inside."""
    height, width = pixels.shape[1:]
    font = style.fonts[draws.below(len(style.fonts))]
    scale = min(height, width) / REFERENCE_SIZE
    size = max(1, round(scale * draws.between(*style.size)))
    stroke = max(1, round(scale)) if style.kind == "outlined" else 0
    letters, shape = _fitting_word(break_lines(word), font, size, stroke, height, width)
    box_height, box_width = letters.shape
    last = height - box_height  # the last row in which the word may begin; a tall word may cross the middle
    first = min(height // 2, last) if style.place == "bottom" else 0
    if style.place == "top":
        last = max(0, height // 2 - box_height)
    top = first + draws.below(last - first + 1)
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
    """Breaks a name of two or three words after the first word, a longer one after the second."""
    words = name.split()
    first = 1 if len(words) <= 3 else 2
    return "\n".join(filter(None, (" ".join(words[:first]), " ".join(words[first:]))))


def word_style(settings: Any) -> WordStyle:
    """The style given by the flags fonts, word_size_min, word_size_max, word_kind and word_place; or ``UserError``."""
    smallest, largest = settings.word_size_min, settings.word_size_max
    if smallest > largest:
        raise UserError(f"--word_size_min {smallest:g}: larger than --word_size_max {largest:g}; swap them")
    return WordStyle(find_fonts(settings.fonts), (smallest, largest), settings.word_kind, settings.word_place)


def find_fonts(names: Sequence[str]) -> tuple[str, ...]:
    """Checks that each font, a name in ``known_fonts()`` or a .ttf or .otf file, can be opened; else ``UserError``."""
    for name in names:
        try:
            _font(name, 12)
        except OSError:
            match = nearest(name, known_fonts())
            hint = f"did you mean {match}?" if match else f"names: {', '.join(known_fonts())}"
            raise UserError(f"--fonts {name}: neither a font file that opens nor a known font; {hint}") from None
    return tuple(names)


def known_fonts() -> list[str]:
    """The fonts of matplotlib (DejaVu, STIX, Computer Modern) and Pillow, without those for symbols."""
    symbols = re.compile("Siz|Display|cmex|cmmi|cmsy|NonUni|LastResort")
    found = sorted(path.stem for path in _matplotlib_fonts().glob("*.ttf"))
    return [*(name for name in found if not symbols.search(name)), AILERON]


def font_files(names: Sequence[str]) -> list[Path]:
    """The files of the fonts; for Aileron, Pillow's own module."""
    inside = {name: _matplotlib_fonts() / f"{name}.ttf" for name in names} | {AILERON: Path(ImageFont.__file__)}
    return [inside[name] if inside[name].is_file() else Path(name) for name in names]


def _matplotlib_fonts() -> Path:
    spec = importlib.util.find_spec("matplotlib")  # do not import it: every data worker runs this
    return Path(spec.origin if spec and spec.origin else "/nowhere").parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=1024)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == AILERON:
        return ImageFont.load_default(size)
    (file,) = font_files([name])
    if not file.is_file():  # FreeType would search the system for a file of this name
        raise OSError
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def _fitting_word(
    text: str, font: str, size: int, stroke: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The word at ``size``, or at the largest smaller size that fits into (height, width)."""
    while True:
        columns, rows = _layout(text, font, size, stroke)[0]
        if rows <= height and columns <= width:
            return _word(text, font, size, stroke)
        if size == 1:  # more letters than the image has columns: squeeze the word, never cut it
            room = (min(columns, width), min(rows, height))
            parts = [
                Image.fromarray(part).resize(room, Image.Resampling.BOX) for part in _word(text, font, size, stroke)
            ]
            return np.asarray(parts[0]), np.asarray(parts[1])
        size = max(1, min(size - 1, int(size * min(height / rows, width / columns))))


@lru_cache(maxsize=16384)
def _layout(text: str, font: str, size: int, stroke: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """(columns, rows) of the word's box, and the position in it at which Pillow has to start; draws nothing."""
    padding = 0 if stroke else max(1, round(0.2 * size))
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = probe.multiline_textbbox((0, 0), text, stroke_width=stroke, **_options(font, size))
    # Some letters extend beyond their box by a fraction of a pixel, so add one pixel on every side.
    room = (int(np.ceil(right - left)) + 2 * padding + 2, int(np.ceil(bottom - top)) + 2 * padding + 2)
    return room, (1 + padding - left, 1 + padding - top)


# Bytes, not floats: 4096 words at 224 pixels take about 60 MB in every data worker, at 448 four times as much.
@lru_cache(maxsize=4096)
def _word(text: str, font: str, size: int, stroke: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (h, w), uint8, of the letters and of the shape below: the outline, or the sticker if stroke is 0."""
    room, corner = _layout(text, font, size, stroke)
    canvas = Image.new("RGB", room)
    # Draw both at once, letters in red and green, the outline in green. With another stroke width Pillow would move the
    # second line.
    ImageDraw.Draw(canvas).multiline_text(
        corner, text, fill=(255, 255, 0), stroke_width=stroke, stroke_fill=(0, 255, 0), **_options(font, size)
    )
    letters, shape = (np.asarray(canvas.getchannel(channel)) for channel in ("R", "G"))
    return letters, shape if stroke else np.broadcast_to(np.uint8(255), letters.shape)


def _options(font: str, size: int) -> dict[str, Any]:
    return {"font": _font(font, size), "align": "center", "spacing": max(1, size // 6)}
