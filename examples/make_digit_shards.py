"""Makes shards of scikit-learn's handwritten digits: real images for the demo and the tests, without a download.

    python examples/make_digit_shards.py --output_dir data/digits --image_size 32

The 1,797 digits are real handwriting, but tiny: 8 x 8 pixels with 17 grey levels (Alpaydin and Kaynak, UCI "Optical
Recognition of Handwritten Digits", 1998; they ship with scikit-learn). They are enlarged smoothly. Every image gets its
own dark background colour and its own light ink colour, because in grey digits all three channels would be equal. The
colours are invented and independent of the class; the shapes do not change. The split is stratified: 1,437 training
and 360 test images. The same flags and package versions write the same bytes.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError

CLASSNAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = [
    "a photo of the number {c}.",
    "the digit {c}.",
    "a handwritten {c}.",
    "a drawing of the digit {c}.",
    "the number {c} in coloured ink.",
]
TEST_SHARE = 0.2


@dataclass
class Settings:
    output_dir: str = required("where the set goes: train/*.tar, test/*.tar, classnames.txt", group="output", path=True)
    image_size: int = flag(32, "side of the images, in pixels", group="images", minimum=8)
    colour: bool = flag(True, "random background and ink; false for white on black", group="images")
    samples_per_shard: int = flag(180, "samples per .tar", group="output", minimum=1)
    seed: int = flag(0, "of the split, the order and the colours", group="images", minimum=0)
    overwrite: bool = flag(False, "write into a non-empty output_dir", group="output")


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    check_output_dir(output_dir, settings.overwrite)

    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, test = train_test_split(
        indices, test_size=TEST_SHARE, stratify=digits.target, random_state=settings.seed, shuffle=True
    )
    for split, chosen in (("train", train), ("test", test)):
        write_shards(output_dir / split, draw_samples(chosen, digits, settings), settings.samples_per_shard)
    write_lines(output_dir / "classnames.txt", CLASSNAMES)
    write_lines(output_dir / "zeroshot_classification_templates.txt", TEMPLATES)


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Raises ``UserError`` if ``output_dir`` is a file, or if it is not empty and ``overwrite`` is not set."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; give a directory")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise UserError(f"--output_dir {output_dir}: not empty; give another directory, or add --overwrite")


def write_shards(folder: Path, samples: Iterable[dict], samples_per_shard: int) -> dict[str, int]:
    """Writes ``samples``, dicts of __key__ and {extension: bytes}, to 000000.tar, ... and sizes.json in ``folder``.

    Deletes the .tar files of an earlier run. Returns the contents of sizes.json: the number of samples of each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for outdated in folder.glob("*.tar"):
        outdated.unlink()
    sizes: dict[str, int] = {}
    samples = iter(samples)
    for first in samples:
        name = f"{len(sizes):06d}.tar"
        sizes[name] = 0
        # Fixed time and owner, so that the bytes depend only on the samples.
        with (
            (folder / name).open("wb") as file,
            webdataset.TarWriter(file, mtime=0, user="root", group="root") as shard,
        ):
            for sample in itertools.chain([first], itertools.islice(samples, samples_per_shard - 1)):
                shard.write(sample)
                sizes[name] += 1
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {sum(sizes.values())} samples in {len(sizes)} shards")
    return sizes


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_samples(chosen: np.ndarray, digits: object, settings: Settings) -> Iterator[dict]:
    """The digits with the indices ``chosen`` as samples with an image and its class."""
    for index in map(int, chosen):
        image = draw_digit(digits.images[index], settings.image_size, *draw_colours(index, settings))
        yield {
            "__key__": f"digit-{index:04d}",
            "png": png_bytes(image),
            "cls": str(digits.target[index]).encode(),
        }


def draw_colours(index: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The background and ink colours of the digit ``index``, (3,) each, 0 ... 255."""
    if not settings.colour:
        return np.zeros(3), np.full(3, 255.0)
    random = np.random.default_rng([settings.seed, index])
    return random.uniform(0, 110, 3), random.uniform(145, 255, 3)


def draw_digit(ink: np.ndarray, size: int, background: np.ndarray, foreground: np.ndarray) -> Image.Image:
    """``ink`` (8, 8), 0 ... 16 -> an RGB image of side ``size`` that mixes the two colours, (3,) each, by the ink."""
    grey = Image.fromarray(np.round(ink * (255 / 16)).astype(np.uint8))
    share = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)[..., None] / 255
    return Image.fromarray(np.round(background + share * (foreground - background)).astype(np.uint8))


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    run(main)
