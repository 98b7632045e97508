r"""Copies the samples of some classes of a labelled set into a set of their own, with the labels renumbered.

    python examples/select_classes.py --data data/imagenet --classes "tabby cat" "golden retriever" \
      --output_dir data/cats-and-dogs

--data is a set directory: classnames.txt (line number = class) and a folder of .tar shards per split. The new set has
the chosen names in the order given, so that the first becomes class 0. All members of a sample are copied as they are,
byte for byte, but for the .cls; the order of the samples stays; zeroshot_classification_templates.txt comes along.
Nothing is left out in silence: the copy stops at a sample that cannot be read or has no valid label.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.make_digit_shards import check_output_dir, write_lines, write_shards
from utils.cli import UserError, flag, nearest, parse_settings, required, run
from utils.progress import RunProgress
from utils.shard_sources import expand_shards
from utils.shards import ShardIndex, ShardReader, index_shards
from utils.skipped import BadSample, Skipped
from utils.zeroshot import read_classnames

DEFAULT_SPLITS = ["train", "test"]
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


@dataclass
class Settings:
    data: str = required("set directory: classnames.txt and <split>/*.tar", group="data")
    classes: list[str] = required(
        "names of the classes to copy, in the order of the new labels", group="data", many=True
    )
    splits: list[str] | None = flag(
        None, "folders of shards to copy; default train and test, as far as they exist", group="data"
    )
    cache_dir: str | None = flag(None, "where indexes of shards are kept; default the user's cache", group="data")
    output_dir: str = required("where the new set goes", group="output")
    samples_per_shard: int = flag(1000, "samples per .tar", group="output", minimum=1)
    overwrite: bool = flag(False, "write into a non-empty output_dir", group="output")


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    data, output_dir = Path(settings.data), Path(settings.output_dir)
    if not data.is_dir():
        raise UserError(f"--data {data}: no such directory; expected a set with classnames.txt and <split>/*.tar")
    classnames = read_classnames(data / "classnames.txt")
    new_labels = renumber(settings.classes, classnames, data)
    splits = find_splits(data, settings.splits)
    check_output_dir(output_dir, settings.overwrite)
    check_apart(data, output_dir, splits)

    indexes = {}
    for split in splits:
        urls = expand_shards([str(data / split)], flag="--data")
        with RunProgress(f"counting {split}", len(urls), transient=True) as progress:
            indexes[split] = index_shards(
                urls, cache_dir=settings.cache_dir, progress=lambda done, _: progress.update(done), flag="--data"
            )
        stop_at_loss(indexes[split].skipped)
    for split, index in indexes.items():
        with RunProgress(f"reading {split}", index.num_samples) as progress:
            samples = select_samples(index, new_labels, len(classnames), progress)
            sizes = write_shards(output_dir / split, samples, settings.samples_per_shard)
        if not sizes:
            raise UserError(f"--classes: none of the {index.num_samples} samples in {data / split} is of these classes")
    write_lines(output_dir / "classnames.txt", settings.classes)
    if (data / TEMPLATES_FILE).is_file():
        shutil.copyfile(data / TEMPLATES_FILE, output_dir / TEMPLATES_FILE)


def renumber(classes: list[str], classnames: list[str], data: Path) -> dict[int, int]:
    """Label in the set -> label among ``classes``. UserError for a name that is unknown, ambiguous or given twice."""
    new_labels: dict[int, int] = {}
    for name in classes:
        if name not in classnames:
            match = nearest(name, classnames)
            hint = f"did you mean {match!r}?" if match else f"the {len(classnames)} names are in its classnames.txt"
            raise UserError(f"--classes {name!r}: no such class in {data}; {hint}")
        if classnames.count(name) > 1:
            raise UserError(f"--classes {name!r}: several lines of {data / 'classnames.txt'}; make the names differ")
        if classnames.index(name) in new_labels:
            raise UserError(f"--classes {name!r}: given twice; every class has one label")
        new_labels[classnames.index(name)] = len(new_labels)
    return new_labels


def find_splits(data: Path, asked: list[str] | None) -> list[str]:
    """The folders of ``data`` to copy: those asked for, else those of the usual ones that exist."""
    present = sorted(folder.name for folder in data.iterdir() if any(folder.glob("*.tar")))
    for split in asked or []:
        if split not in present:
            raise UserError(
                f"--splits {split}: no .tar files in {data / split}; there is {', '.join(present) or 'none'}"
            )
    splits = list(dict.fromkeys(asked)) if asked else [split for split in DEFAULT_SPLITS if split in present]
    if not splits:
        there = f"name others with --splits: {', '.join(present)}" if present else "expected <split>/*.tar"
        raise UserError(f"--data {data}: no shards in {' or '.join(DEFAULT_SPLITS)}; {there}")
    return splits


def check_apart(data: Path, output_dir: Path, splits: list[str]) -> None:
    """UserError where writing would harm: the source itself, or a set of which another split would stay behind."""
    for split in splits:
        if (output_dir / split).resolve() == (data / split).resolve():
            raise UserError(f"--output_dir {output_dir}: is where the samples come from; give another directory")
    if output_dir.is_dir():
        # Its labels are those of another selection: beside the new classnames.txt they would be wrong.
        stale = sorted(tar.parent.name for tar in output_dir.glob("*/*.tar") if tar.parent.name not in splits)
        if stale:
            raise UserError(
                f"--output_dir {output_dir}: its {stale[0]}/ would keep the labels of an earlier set; add it to --splits "
                "or give another directory"
            )


def select_samples(
    index: ShardIndex, new_labels: dict[int, int], num_classes: int, progress: RunProgress
) -> Iterator[dict]:
    """The samples whose label is in ``new_labels``, in the order of the shards, with their new labels.

    UserError at a sample that is lost or whose label is none of 0 ... num_classes - 1.
    """
    reader = ShardReader(index)
    done, last_key = 0, None
    try:
        for shard, size in enumerate(index.sizes):
            for sample in range(size):
                # The label first: most of a large set is passed over, and of that no image is read.
                label = read_label(reader, shard, sample, num_classes)
                if label in new_labels:
                    key, members = reader.read(shard, sample)
                    if key == last_key:
                        # Keys may begin anew in every shard; as neighbours in one, two samples would become one.
                        key = f"{key}-{shard}"
                    last_key = key
                    yield {"__key__": key, **members, "cls": str(new_labels[label]).encode()}
                done += 1
                progress.update(done)
            stop_at_loss(reader.notices)
    except BadSample as bad:
        stop_at_loss([bad.skipped])
    finally:
        reader.close()


def read_label(reader: ShardReader, shard: int, sample: int, num_classes: int) -> int:
    """The .cls of a sample; BadSample where it is lost, UserError where it is no class."""
    key, members = reader.read(shard, sample, ["cls"])
    text = members.get("cls", b"").decode("ascii", "replace").strip()
    if not (text.isdecimal() and len(text) <= 9) or int(text) >= num_classes:
        raise UserError(
            f"--data {reader.index.urls[shard]}#{key}: .cls is {text[:40]!r}; expected 0 ... {num_classes - 1}, a line "
            "of classnames.txt"
        )
    return int(text)


def stop_at_loss(skipped: list[Skipped]) -> None:
    """UserError that names the first of ``skipped``, if there is one."""
    if skipped:
        raise UserError(f"--data {skipped[0].where}: {skipped[0].kind}: {skipped[0].detail}; mend it and start again")


if __name__ == "__main__":
    run(main)
