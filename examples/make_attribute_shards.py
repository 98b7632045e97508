"""Makes shards of scikit-learn's handwritten digits on a red or blue background, independent of the class.

    python examples/make_attribute_shards.py --output_dir data/attribute-digits --image_size 64

SYNTHETIC. The set replaces photographs of people for work on a concept such as gender, which is measured, flipped or
neutralised. The class (zero ... nine) stands for an occupation, the background (red or blue) for the concept. The
digits are real handwriting (see make_digit_shards.py). The colours are invented: light ink on a red or blue whose hue,
saturation and brightness differ from image to image. In every class and split half of the images are red and half are
blue, give or take one; the shapes do not show which. The split is stratified: 1,077 training, 270 validation and 450
test images, the same in all three sets below. They share one folder:

    {train,val,test}/           the labelled set: <key>.png, <key>.cls (the digit), <key>.json {"attribute": "red"}
    pairs/{train,val,test}/     preference data, two consecutive samples of every image:
        digit-0012-pair         {"chosen": "a photo of the blue digit seven.",
                                 "rejected": ["a photo of the red digit seven."], "reg": false}
                                for a red seven: preference training should flip the concept, so the chosen text names
                                the attribute that the image does not have
        digit-0012-neutral      {"reg": true, "candidates": [ten texts], "chosen": "a photo of the digit seven."}
                                for the regulariser, which should preserve the class
    captions/{train,test}/      labelled with 30 classes, "red digit zero" ... "blue digit zero" ... "digit zero" ...,
                                for examples/pretrain_small_clip.py, to train a small CLIP on class and attribute

Each labelled set has classnames.txt and templates that give the same texts as ``pairs``; captions/words.txt has the
words that teach the small CLIP to read.

The bias is deliberate. In captions/train every image appears once with its coloured class. A red image always appears
a second time, with the neutral class; a blue image does so only with probability 1 - caption_bias. So the neutral
caption is mostly seen with red, and a CLIP trained on it puts "a photo of the digit seven." nearer to the red sevens,
as CLIPs trained on the web put "a photo of a doctor" nearer to men. This bias can then be measured and removed. With
--caption_bias 0 there is none. captions/test holds every image once, with its coloured class. The neutral class fits
too, so accuracy over the 30 classes stays far below 1 even for a good model.

The same flags and package versions write the same bytes.
"""

from __future__ import annotations

import colorsys
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.make_digit_shards import CLASSNAMES, check_output_dir, draw_digit, png_bytes, write_lines, write_shards
from utils.cli import flag, parse_settings, required, run

ATTRIBUTES = ["red", "blue"]
HUES = {"red": 0, "blue": 225}  # degrees; after the jitter they differ by at least 105
HUE_JITTER = 15
CAPTION_TEMPLATES = ["a photo of the {c}.", "a picture of the {c}.", "the {c}."]
TEMPLATES = [template.replace("{c}", "digit {c}") for template in CAPTION_TEMPLATES]
VAL_SHARE, TEST_SHARE = 0.15, 0.25


@dataclass
class Settings:
    output_dir: str = required("where the three sets go", group="output", path=True)
    image_size: int = flag(64, "side of the images, in pixels", group="images", minimum=8)
    caption_bias: float = flag(
        0.8,
        "share of the blue images that lack a neutral caption in captions/train; every red one has it",
        group="images",
        minimum=0,
        maximum=1,
    )
    samples_per_shard: int = flag(180, "samples per .tar", group="output", minimum=1)
    seed: int = flag(0, "of the split, the order, the attributes, the colours and the bias", group="images", minimum=0)
    overwrite: bool = flag(False, "write into a non-empty output_dir", group="output")


@dataclass
class Digit:
    """One encoded image with its class and attribute."""

    index: int
    png: bytes
    label: int  # 0 ... 9
    attribute: str

    @property
    def key(self) -> str:
        return f"digit-{self.index:04d}"


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    check_output_dir(output_dir, settings.overwrite)

    source = load_digits()
    splits = split_digits(source.target, settings.seed)
    attributes = assign_attributes(splits, source.target)
    for split, chosen in splits.items():
        digits = [draw(source, int(index), attributes[index], settings) for index in chosen]
        sets = {output_dir / split: labelled_samples(digits), output_dir / "pairs" / split: pair_samples(digits)}
        if split == "train":
            sets[output_dir / "captions" / split] = caption_samples(digits, settings.caption_bias, settings.seed)
        if split == "test":
            sets[output_dir / "captions" / split] = coloured_samples(digits)
        for folder, samples in sets.items():
            write_shards(folder, samples, settings.samples_per_shard)
    for folder, classnames, templates in (
        (output_dir, CLASSNAMES, TEMPLATES),
        (output_dir / "captions", caption_classnames(), CAPTION_TEMPLATES),
    ):
        write_lines(folder / "classnames.txt", classnames)
        write_lines(folder / "zeroshot_classification_templates.txt", templates)
    # Printed words for pretrain_small_clip.py --with_words --words: they name the digit, not the background.
    coloured = len(ATTRIBUTES) * len(CLASSNAMES)
    write_lines(output_dir / "captions" / "words.txt", [""] * coloured + CLASSNAMES)


def split_digits(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """``labels`` (n,) -> the shuffled indices of train, val and test, stratified by class."""
    indices = np.arange(len(labels))
    rest, test = train_test_split(indices, test_size=TEST_SHARE, stratify=labels, random_state=seed)
    train, val = train_test_split(
        rest, test_size=VAL_SHARE / (1 - TEST_SHARE), stratify=labels[rest], random_state=seed
    )
    return {"train": train, "val": val, "test": test}


def assign_attributes(splits: dict[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Assigns an attribute to each image with ``labels`` (n,) -> (n,) strings, alternating within every class.

    The order in ``splits`` is random, so the attributes are too. In each class their counts differ by at most one,
    overall and per split. Every second class starts with the other attribute, so that the totals are balanced.
    """
    attributes = np.empty(len(labels), dtype=object)
    in_order = np.concatenate(list(splits.values()))
    for label in range(len(CLASSNAMES)):
        of_class = in_order[labels[in_order] == label]
        attributes[of_class] = [ATTRIBUTES[(label + place) % 2] for place in range(len(of_class))]
    return attributes


def draw(source: object, index: int, attribute: str, settings: Settings) -> Digit:
    """Draws the digit ``index`` in light ink on a background of the colour ``attribute``."""
    random = np.random.default_rng([settings.seed, index])
    hue = (HUES[attribute] + random.uniform(-HUE_JITTER, HUE_JITTER)) / 360
    saturation, brightness = random.uniform(0.7, 0.95), random.uniform(0.45, 0.8)
    background = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, brightness))
    image = draw_digit(source.images[index], settings.image_size, background, random.uniform(205, 255, 3))
    return Digit(index, png_bytes(image), int(source.target[index]), attribute)


def labelled_samples(digits: list[Digit]) -> Iterator[dict]:
    for digit in digits:
        yield {
            "__key__": digit.key,
            "png": digit.png,
            "cls": str(digit.label).encode(),
            "json": json.dumps({"attribute": digit.attribute}).encode(),
        }


def pair_samples(digits: list[Digit]) -> Iterator[dict]:
    """For every image a preference for the text with the other attribute, and a regulariser over the neutral texts."""
    candidates = [caption(name) for name in neutral_names()]
    for digit in digits:
        name = CLASSNAMES[digit.label]
        (other,) = set(ATTRIBUTES) - {digit.attribute}
        pair = {
            "chosen": caption(coloured_name(other, name)),
            "rejected": [caption(coloured_name(digit.attribute, name))],
            "reg": False,
        }
        neutral = {"reg": True, "candidates": candidates, "chosen": candidates[digit.label]}
        for kind, content in (("pair", pair), ("neutral", neutral)):
            yield {"__key__": f"{digit.key}-{kind}", "png": digit.png, "json": json.dumps(content).encode()}


def caption_samples(digits: list[Digit], caption_bias: float, seed: int) -> Iterator[dict]:
    """Every image with its coloured class; again with the neutral class if it is red, or by chance if it is blue."""
    for digit, coloured in zip(digits, coloured_samples(digits)):
        yield coloured
        # Draw per image, so that a smaller bias keeps all neutral captions of a larger one.
        chance = np.random.default_rng([seed, digit.index, 1]).random()
        if digit.attribute == "red" or chance >= caption_bias:
            label = len(ATTRIBUTES) * len(CLASSNAMES) + digit.label
            yield {"__key__": f"{digit.key}-neutral", "png": digit.png, "cls": str(label).encode()}


def coloured_samples(digits: list[Digit]) -> Iterator[dict]:
    for digit in digits:
        label = ATTRIBUTES.index(digit.attribute) * len(CLASSNAMES) + digit.label
        yield {"__key__": f"{digit.key}-{digit.attribute}", "png": digit.png, "cls": str(label).encode()}


def caption_classnames() -> list[str]:
    """The names of the 30 classes of ``captions``: ten red, ten blue, ten neutral."""
    coloured = [coloured_name(attribute, name) for attribute in ATTRIBUTES for name in CLASSNAMES]
    return [*coloured, *neutral_names()]


def coloured_name(attribute: str, name: str) -> str:
    return f"{attribute} digit {name}"


def neutral_names() -> list[str]:
    return [f"digit {name}" for name in CLASSNAMES]


def caption(name: str) -> str:
    """``name`` in the first template, which ``pairs`` uses."""
    return CAPTION_TEMPLATES[0].replace("{c}", name)


if __name__ == "__main__":
    run(main)
