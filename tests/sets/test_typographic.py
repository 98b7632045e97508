"""Words on images: drawn whole and inside, the same for the same key, drawn uniformly; fonts; the contact sheet."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from examples import typographic_sheet
from tests.shard_maker import make_shards
from utils.errors import UserError
from utils.sets import typographic
from utils.sets.typographic import (
    COLOURS,
    KINDS,
    PLACES,
    Draws,
    WordStyle,
    break_lines,
    find_fonts,
    fold,
    known_fonts,
    merge_names,
    write_word,
    wrong_words,
)

SIDES = [(32, 32), (64, 64), (224, 224), (448, 448), (48, 96), (224, 150)]
NAMES = [
    "cat",
    "fly agaric",
    "Great White Shark",
    "soft-coated wheaten terrier dog",
    "one two three four five",
    "uncharacteristically",
    "jack-in-the-box (Wfgjy) 'Qq'",
]
TOO_LONG = (
    "incomprehensibilities internationalization counterrevolutionaries uncharacteristically electroencephalograms"
)
DEJAVU = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


def plain(value, side):
    return torch.full((3, *side), value, dtype=torch.uint8)


def noise(side, seed=0):
    return torch.randint(0, 256, (3, *side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def changed(image, side, value):
    """Where ``image`` differs from a plain one, (H, W)."""
    return (image != plain(value, side)).any(dim=0)


def extent(mask):
    """First row, last row, first column, last column of a mask (H, W)."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES, ids=lambda side: "x".join(map(str, side)))
def test_a_word_is_visible_and_inside_and_leaves_the_rest_alone(side, kind):
    cases = list(zip(itertools.product(known_fonts(), NAMES), itertools.cycle(PLACES)))
    for (font, name), place in cases[:: 4 if max(side) > 300 else 1]:
        style = WordStyle((font,), kind=kind, place=place)
        before = noise(side)
        image = before.clone()
        on_noise, on_black, on_white = (
            write_word(pixels, name, style, Draws(font, name)) for pixels in (image, plain(0, side), plain(255, side))
        )
        assert torch.equal(image, before)
        assert (on_noise.shape, on_noise.dtype) == (before.shape, torch.uint8)
        # What covers a pixel at all changes black or white.
        word = changed(on_black, side, 0) | changed(on_white, side, 255)
        assert torch.equal(on_noise[:, ~word], before[:, ~word])
        contrast = torch.maximum(on_black.int(), 255 - on_white.int()).amax(dim=0)
        assert (contrast > 100).sum() >= 8, (font, name)
        # Every word is drawn with a clear pixel round its letters: at the image's edge nothing was cut.
        ink = word if kind == "outlined" else (on_white != 255).any(dim=0)
        inner = torch.zeros(side, dtype=torch.bool)
        inner[1:-1, 1:-1] = True
        assert not (ink & ~inner).any(), (font, name)
        top, bottom, _, _ = extent(word)
        if place != "anywhere" and bottom - top < side[0] // 2 - 4:
            assert (bottom < side[0] // 2) if place == "top" else (top >= side[0] // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_drawn_whole(kind):
    """Beside the same word in the middle of a canvas that is far too large."""
    for (font, name), size in zip(itertools.product(known_fonts(), NAMES), itertools.cycle((4, 13, 31, 62))):
        stroke = 2 if kind == "outlined" else 0
        letters, shape = typographic._word(break_lines(name), font, size, stroke)
        canvas = Image.new("L", (letters.shape[1] + 2 * size + 20, letters.shape[0] + 2 * size + 20))
        ImageDraw.Draw(canvas).multiline_text(
            (size + 10, size + 10),
            break_lines(name),
            fill=255,
            stroke_width=stroke,
            font=typographic._font(font, size),
            align="center",
            spacing=max(1, size // 6),
        )
        drawn = extent(torch.from_numpy((letters if kind == "label" else shape) > 0))
        free = extent(torch.from_numpy(np.asarray(canvas) > 0))
        heights, widths = [(box[1] - box[0], box[3] - box[2]) for box in (drawn, free)]
        assert np.abs(np.subtract(heights, widths)).max() <= 1, (font, name, size)
        assert letters.max() > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_of_more_letters_than_columns_is_squeezed_not_cut(kind):
    for font in known_fonts():
        image = write_word(plain(255, (32, 32)), TOO_LONG, WordStyle((font,), kind=kind), Draws(font))
        assert changed(image, (32, 32), 255).sum() > 20
    gap = "M" * 60 + " " * 60 + "M" * 60
    letters, shape = typographic._fitting_word(gap, "DejaVuSansMono", 5, int(kind == "outlined"), 32, 32)
    assert letters.shape == shape.shape
    inked = (letters > 0).any(axis=0).nonzero()[0]
    assert 5 < np.diff(inked).max() < 20  # the gap is there, and the letters after it


def test_letters_scale_with_the_image():
    for kind, size in (("outlined", 40.0), ("label", 60.0)):
        heights = {}
        for side in (64, 448):
            image = write_word(plain(128, (side, side)), "dog", WordStyle(size=(size, size), kind=kind), Draws(0))
            top, bottom, _, _ = extent(changed(image, (side, side), 128))
            heights[side] = bottom - top + 1
        assert heights[448] / heights[64] == pytest.approx(7, rel=0.25)


def test_sizes_fonts_places_and_colours_are_all_used():
    side, style = (224, 224), WordStyle(("DejaVuSans", "Aileron"))
    images = [write_word(plain(128, side), "dog", style, Draws(0, number)) for number in range(200)]
    boxes = [extent(changed(image, side, 128)) for image in images]
    seen = set()
    for image, (top, bottom, left, right) in zip(images, boxes):
        seen |= set(map(tuple, image[:, top:bottom, left:right].flatten(1).T.tolist()))
    assert set(map(tuple, COLOURS.astype(int).tolist())) < seen
    heights = [bottom - top for top, bottom, _, _ in boxes]
    assert min(heights) < 0.6 * max(heights)
    for first, last in ((0, 1), (2, 3)):
        assert min(box[first] for box in boxes) < 10
        assert max(box[last] for box in boxes) > 213


# -------------------------------------------------------------------------------------------------------- reproducible


def test_the_same_key_draws_the_same_and_another_does_not():
    image, style = noise((64, 64)), WordStyle(tuple(known_fonts()))
    drawn = write_word(image, "dog", style, Draws(0, 0, "a"))
    typographic._word.cache_clear()
    assert torch.equal(write_word(image, "dog", style, Draws(0, 0, "a")), drawn)
    for key in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, -1, "a")):
        assert not torch.equal(write_word(image, "dog", style, Draws(*key)), drawn)


def test_draws_never_change():
    """Numbers of an earlier version: a change would draw other words in a run that is resumed."""
    draws = Draws(0, 0, "sample-1")  # 20 numbers are more than one block of the hash
    numbers = [343, 18, 882, 12, 583, 795, 440, 219, 493, 233, 293, 110, 195, 120, 34, 192, 956, 548, 20, 935]
    assert [draws.below(1000) for _ in range(20)] == numbers
    assert draws.between(20.0, 40.0) == 27.94097900390625
    assert Draws(3, -1, "ünïcode/0001").below(10) == 3
    assert wrong_words(2, 10, 3, Draws(7)) == [6, 9, 5]


@pytest.mark.parametrize("limit", [3, 10, 97])
def test_draws_are_uniform_along_one_key_and_over_keys(limit):
    count, draws = 300 * limit, Draws(0)
    for numbers in ([draws.below(limit) for _ in range(count)], [Draws(0, 0, k).below(limit) for k in range(count)]):
        counts = Counter(numbers)
        assert set(counts) == set(range(limit))
        assert chi_square(counts.values(), 300) < limit - 1 + 4 * (2 * (limit - 1)) ** 0.5
    values = [draws.between(-1.0, 3.0) for _ in range(2000)]
    assert -1.0 <= min(values) < -0.98 < 2.98 < max(values) < 3.0


# --------------------------------------------------------------------------------------------------------------- words


def test_wrong_words_are_others_all_different_and_uniform():
    for word, count in itertools.product(range(5), range(5)):
        for number in range(20):
            drawn = wrong_words(word, 5, count, Draws(word, number))
            assert len(set(drawn)) == len(drawn) == count
            assert word not in drawn
            assert set(drawn) <= set(range(5))
    for count in (1, 3):  # every other word, at every place
        draws = [wrong_words(2, 7, count, Draws(number)) for number in range(3000)]
        for column in zip(*draws):
            counts = Counter(column)
            assert set(counts) == {0, 1, 3, 4, 5, 6}
            assert chi_square(counts.values(), 500) < 5 + 4 * 10**0.5


def test_names_that_read_the_same_are_one_word():
    names = ["crane", "Maillot", "drake", "maillot ", "Crane", "great  white\tshark", "Great White Shark"]
    distinct, places = merge_names(names)
    assert distinct == ["crane", "Maillot", "drake", "great  white\tshark"]
    assert places == [0, 1, 2, 1, 0, 3, 3]
    assert all(fold(distinct[place]) == fold(name) for name, place in zip(names, places))
    assert fold("a b") != fold("ab")


def test_where_names_break():
    lines = ["cat", "fly\nagaric", "great\nwhite shark", "one two\nthree four", "one two\nthree four five"]
    assert [break_lines(line.replace("\n", "  ")) for line in lines] == lines


# --------------------------------------------------------------------------------------------------------------- fonts


def test_fonts_by_name_and_by_file(tmp_path):
    names = (*known_fonts(), str(DEJAVU))
    assert find_fonts(names) == names
    assert {"DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "Aileron"} < set(names)
    by_name, by_file = (
        write_word(noise((64, 64)), "dog", WordStyle((font,)), Draws(0)) for font in ("DejaVuSans", DEJAVU)
    )
    assert torch.equal(by_name, by_file)
    no_font = tmp_path / "letters.ttf"
    no_font.write_bytes(b"not a font")
    for name, hint in (
        ("DejavuSan", "did you mean DejaVuSans?"),
        ("Times New Roman", "names: DejaVuSans, "),
        (str(no_font), "neither a font file that opens"),
        (str(tmp_path), "neither a font file that opens"),
        ("", "neither a font file that opens"),
    ):
        with pytest.raises(UserError) as caught:
            find_fonts(["DejaVuSans", name])
        assert str(caught.value).startswith(f"--fonts {name}: ")
        assert hint in str(caught.value)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- sheet


def test_sheet(tmp_path, monkeypatch, capsys):
    make_shards(tmp_path / "set" / "test", [3, 2])
    (tmp_path / "set" / "classnames.txt").write_text("cat\ndog\nfly agaric\ncrane\nCrane\n", encoding="utf-8")

    def sheet(*arguments):
        given = ("--data", tmp_path / "set", "--cache_dir", tmp_path / "cache", *arguments)
        monkeypatch.setattr(sys, "argv", ["typographic_sheet.py", *map(str, given)])
        typographic_sheet.main()

    sheet("--output", tmp_path / "new/sheet.png", "--num_images", 100)
    assert "sheet.png: 5 images" in capsys.readouterr().out
    picture = Image.open(tmp_path / "new/sheet.png")
    assert len(picture.convert("RGB").getcolors(maxcolors=2**20)) > 100
    for arguments, message in (
        (("--output", tmp_path / "sheet.jpg"), r"--output .*sheet.jpg: expected the name of a .png"),
        (("--output", tmp_path / "new/sheet.png/x.png"), r"--output .*: cannot be written"),
        (("--output", tmp_path / "a.png", "--word_size_min", 50), "--word_size_min 50: larger than"),
        (("--output", tmp_path / "a.png", "--fonts", "Cmr10"), "did you mean cmr10?"),
        (("--output", tmp_path / "a.png", "--split", "val"), "--data .*/val: nothing is there"),
    ):
        with pytest.raises(UserError, match=message):
            sheet(*arguments)
