"""The cost of writing a word for a data worker: images per second with and without it, measured in turns.

    python benchmarks/word_drawing.py --data data/imagenet-100

Without: read, decode and resize (ShardDataset). With: the same plus one word (TypographicDataset, attacks_per_image 1).
Both read the same samples in the same process, a few at a time, with new words in every round, as in training. Seconds
are CPU time of this process, so other load on the machine and waiting for a disk do not count.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset
from utils.errors import UserError
from utils.processes.progress import wide_console
from utils.sets.labelled import LabelledSet, open_set
from utils.sets.pairs import TypographicDataset
from utils.sets.typographic import KINDS, WordStyle

WARM_UP = 2  # rounds that are not counted: they load the files into memory and the first words into the cache


@dataclass
class Settings:
    data: str = required("set directory: classnames.txt and <split>/*.tar", group="data", path=True)
    split: str = flag("test", "folder of the shards", group="data")
    cache_dir: str | None = flag(
        None, "where indexes of shards are kept (default: the system's cache)", group="data", path=True
    )
    image_size: list[int] = flag([64, 224], "sides of the images, in pixels", group="measure", minimum=8)
    word_kind: list[str] = flag(["outlined", "label"], "kinds of words", group="measure", choices=KINDS)
    num_images: int = flag(100, "images per round", group="measure", minimum=1)
    rounds: int = flag(10, "rounds; the table shows the medians", group="measure", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    torch.set_num_threads(1)
    shards = [str(Path(settings.data) / settings.split)]
    labelled = open_set(shards, flag="--data", with_classes=True, cache_dir=settings.cache_dir)
    if settings.num_images > labelled.index.num_samples:
        raise UserError(f"--num_images {settings.num_images}: the split holds {labelled.index.num_samples}; lower it")
    name = (
        f"{Path(settings.data).resolve().name}: {len(labelled.classnames)} classes, median of {settings.rounds} rounds"
    )
    table = Table(title=name)
    for heading in ("side", "words", "images/s without", "with", "ms per image without", "with", "the word's share"):
        table.add_column(heading, justify="right")
    for side in settings.image_size:
        for kind in settings.word_kind:
            without, with_word = measure(labelled, side, kind, settings)
            rates = (f"{1 / without:.0f}", f"{1 / with_word:.0f}", f"{1e3 * without:.2f}", f"{1e3 * with_word:.2f}")
            table.add_row(str(side), kind, *rates, f"{1 - without / with_word:.0%}")
    wide_console().print(table)


def measure(labelled: LabelledSet, side: int, kind: str, settings: Settings) -> tuple[float, float]:
    """Seconds per image without and with a word."""
    transform = ImageTransform(side, (side, side))
    names, style = labelled.classnames, WordStyle(kind=kind)
    plain = ShardDataset(labelled.index, transform, order="shuffled", with_labels=True, num_classes=len(names))
    words = TypographicDataset(labelled.index, transform, order="shuffled", classnames=names, style=style)
    rounds: dict[ShardDataset, list[float]] = {plain: [], words: []}
    for number in range(WARM_UP + settings.rounds):
        spent = dict.fromkeys(rounds, 0.0)
        for start in range(0, settings.num_images, 10):
            # Alternate the order: the first one reads the file from disk for both.
            for dataset in (plain, words) if (number + start // 10) % 2 else (words, plain):
                clock = time.process_time()
                for slot in range(start, min(start + 10, settings.num_images)):
                    dataset[number, slot, slot]
                spent[dataset] += time.process_time() - clock
        if number >= WARM_UP:
            for dataset, seconds in spent.items():
                rounds[dataset].append(seconds / settings.num_images)
    return statistics.median(rounds[plain]), statistics.median(rounds[words])


if __name__ == "__main__":
    run(main)
