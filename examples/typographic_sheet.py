"""Draws a contact sheet of typographic attacks: images, clean and with a wrong class name written on them.

    python examples/typographic_sheet.py --data data/imagenet-100 --image_size 224 --output sheet.png

The title of a clean image is its class, that of an attacked image "true / written". The words are those that
train_po.py draws in its first epoch with the same seed, word flags and image size, and attacks_per_image 1. Letters
under 7 pixels cannot be read: look at a sheet before a long run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageTransform
from utils.errors import UserError
from utils.evaluation.figures import draw_grid
from utils.sets.labelled import open_set
from utils.sets.pairs import TypographicDataset
from utils.sets.typographic import KINDS, PLACES, word_style

IMAGES_PER_ROW = 4


data_flag, word_flag = partial(flag, group="data"), partial(flag, group="words")


@dataclass
class Settings:
    data: str = required("set directory: classnames.txt and <split>/*.tar", group="data", path=True)
    split: str = data_flag("test", "folder of the shards")
    num_images: int = data_flag(24, "images, drawn from the whole split", minimum=1)
    image_size: int = data_flag(64, "side of the images, in pixels", minimum=8)
    cache_dir: str | None = data_flag(None, "where indexes of shards are kept (default: the system's cache)", path=True)
    fonts: list[str] = word_flag(
        ["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"], "fonts of matplotlib, Aileron, or .ttf files", path=True
    )
    word_size_min: float = word_flag(20.0, "smallest letters, in pixels at an image side of 224", above=0)
    word_size_max: float = word_flag(40.0, "largest letters, in the same unit", above=0)
    word_kind: str = word_flag("outlined", "coloured letters with an outline, or black on a label", choices=KINDS)
    word_place: str = word_flag("anywhere", "which half of the image words are written in", choices=PLACES)
    seed: int = word_flag(0, "of the images and the words", minimum=0)
    output: str = required("the sheet, a .png", group="output", path=True)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    style = word_style(settings)
    output = Path(settings.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"--output {output}: expected the name of a .png file")
    shards = [str(Path(settings.data) / settings.split)]
    labelled = open_set(shards, flag="--data", with_classes=True, cache_dir=settings.cache_dir)
    dataset = TypographicDataset(
        labelled.index,
        ImageTransform(settings.image_size, (settings.image_size, settings.image_size)),
        order="shuffled",
        classnames=labelled.classnames,
        style=style,
        seed=settings.seed,
        flag="--data",
    )
    pictures = []
    for slot in range(min(settings.num_images, len(dataset))):
        sample = dataset[0, slot, slot]
        for record in sample["skipped"]:
            print(f"skipped: {record.kind}: {record.where}: {record.detail}")
        clean, attacked = sample["rows"]
        pictures += [(clean.image, clean.chosen), (attacked.image, f"{attacked.chosen} /\n{attacked.rejected[0]}")]
    step = 2 * IMAGES_PER_ROW
    rows = [("", pictures[start : start + step]) for start in range(0, len(pictures), step)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(
            output, rows, f"{Path(settings.data).resolve().name}, {settings.split}: clean and attacked (true / written)"
        )
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"{output}: {len(pictures) // 2} images")


if __name__ == "__main__":
    run(main)
