"""examples/make_attribute_shards.py: the sets it writes, read back from the tars."""

from __future__ import annotations

import filecmp
import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from examples import make_attribute_shards
from tests.conftest import run_script
from utils.errors import UserError

CLASSNAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {"train": 1077, "val": 270, "test": 450}
SMALL = ("--image_size", 16, "--samples_per_shard", 500)


def call(script: ModuleType, *arguments: str | Path) -> None:
    """The script's main() in this process, as if called with ``arguments``: the imports are paid for once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()


def read_split(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> {extension: bytes} of all samples in ``folder``, in their order."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def colour(png: bytes) -> str:
    """Red or blue, by the larger channel at the corners, where there is hardly any ink."""
    pixels = np.asarray(Image.open(io.BytesIO(png)), dtype=float)
    red, _, blue = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    assert abs(red - blue) > 20
    return "red" if red > blue else "blue"


def same_files(one: Path, two: Path) -> bool:
    files = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    again = sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    return files == again and filecmp.cmpfiles(one, two, files, shallow=False)[0] == files


@pytest.fixture(scope="module")
def attributes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "attributes"
    run_script("examples/make_attribute_shards.py", "--output_dir", folder, *SMALL)
    return folder


@pytest.fixture(scope="module")
def labelled(attributes: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Split -> samples of the labelled set."""
    return {split: read_split(attributes / split) for split in SIZES}


def attribute_of(sample: dict[str, bytes]) -> str:
    return json.loads(sample["json"])["attribute"]


def test_layout_and_counts(attributes: Path) -> None:
    folders = SIZES | {f"pairs/{split}": 2 * count for split, count in SIZES.items()}
    folders |= {"captions/test": SIZES["test"], "captions/train": len(read_split(attributes / "captions/train"))}
    assert {str(tar.parent.relative_to(attributes)) for tar in attributes.rglob("*.tar")} == set(folders)
    for folder, count in folders.items():
        sizes = json.loads((attributes / folder / "sizes.json").read_text())
        assert sorted(sizes) == sorted(path.name for path in (attributes / folder).glob("*.tar"))
        assert max(sizes.values()) <= 500
        assert sum(sizes.values()) == count == len(read_split(attributes / folder))
    assert (attributes / "classnames.txt").read_text().splitlines() == CLASSNAMES


def test_same_flags_give_the_same_bytes(attributes: Path, tmp_path: Path) -> None:
    """The first was made in another process."""
    call(make_attribute_shards, "--output_dir", tmp_path / "again", *SMALL)
    assert same_files(attributes, tmp_path / "again")


def test_every_digit_is_in_one_split(labelled: dict) -> None:
    assert {split: len(samples) for split, samples in labelled.items()} == SIZES
    assert len(set().union(*labelled.values())) == sum(SIZES.values())


def test_attribute_is_balanced_in_every_class_and_split(labelled: dict) -> None:
    for samples in labelled.values():
        counts = Counter((sample["cls"], attribute_of(sample)) for sample in samples.values())
        for label in range(10):
            red, blue = (counts[str(label).encode(), attribute] for attribute in ("red", "blue"))
            assert red + blue > 20
            assert abs(red - blue) <= 1


def test_attribute_is_the_colour_of_the_ground(labelled: dict) -> None:
    samples = [sample for samples in labelled.values() for sample in samples.values()]
    assert all(colour(sample["png"]) == attribute_of(sample) for sample in samples)
    grounds = {Image.open(io.BytesIO(sample["png"])).getpixel((0, 0)) for sample in samples}
    assert len(grounds) > 1000  # not one constant red and one constant blue


def test_pairs_choose_the_other_attribute_and_keep_the_class(attributes: Path, labelled: dict) -> None:
    neutral = [f"a photo of the digit {name}." for name in CLASSNAMES]
    for split, images in labelled.items():
        pairs = read_split(attributes / "pairs" / split)
        assert list(pairs) == [f"{key}-{kind}" for key in images for kind in ("pair", "neutral")]
        for key, image in images.items():
            attribute, label = attribute_of(image), int(image["cls"])
            other = {"red": "blue", "blue": "red"}[attribute]
            assert pairs[f"{key}-pair"]["png"] == pairs[f"{key}-neutral"]["png"] == image["png"]
            assert json.loads(pairs[f"{key}-pair"]["json"]) == {
                "chosen": f"a photo of the {other} digit {CLASSNAMES[label]}.",
                "rejected": [f"a photo of the {attribute} digit {CLASSNAMES[label]}."],
                "reg": False,
            }
            assert json.loads(pairs[f"{key}-neutral"]["json"]) == {
                "reg": True,
                "candidates": neutral,
                "chosen": neutral[label],
            }


def prompts(folder: Path) -> list[list[str]]:
    """The texts of every class, one per template."""
    names = (folder / "classnames.txt").read_text().splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    return [[template.replace("{c}", name) for template in templates] for name in names]


def test_captions_are_the_texts_of_the_pairs(attributes: Path) -> None:
    captions = prompts(attributes / "captions")
    assert len(captions) == 30
    assert captions[20:] == prompts(attributes)
    texts = set()
    for sample in read_split(attributes / "pairs/train").values():
        content = json.loads(sample["json"])
        texts |= {content["chosen"], *content.get("rejected", []), *content.get("candidates", [])}
    assert texts == {of_class[0] for of_class in captions}


def test_captions_name_colour_and_class(attributes: Path, labelled: dict) -> None:
    for split in ("train", "test"):
        samples = read_split(attributes / "captions" / split)
        for key, image in labelled[split].items():
            attribute, label = attribute_of(image), int(image["cls"])
            coloured = samples.pop(f"{key}-{attribute}")
            assert int(coloured["cls"]) == 10 * ["red", "blue"].index(attribute) + label
            assert coloured["png"] == image["png"]
            if (neutral := samples.pop(f"{key}-neutral", None)) is not None:
                assert split == "train"
                assert int(neutral["cls"]) == 20 + label
                assert neutral["png"] == image["png"]
        assert not samples


@pytest.mark.parametrize(("bias", "share"), [(0.8, 0.2), (0, 1), (1, 0)])
def test_neutral_captions_lean_towards_red(attributes: Path, tmp_path: Path, bias: float, share: float) -> None:
    if bias != 0.8:
        arguments = ("--output_dir", tmp_path / "set", "--caption_bias", bias, "--image_size", 8)
        call(make_attribute_shards, *arguments)
        attributes = tmp_path / "set"
    samples = read_split(attributes / "captions/train")
    counts = Counter(colour(sample["png"]) for key, sample in samples.items() if key.endswith("neutral"))
    coloured = Counter(key.split("-")[-1] for key in samples)
    assert counts["red"] == coloured["red"]
    # Three standard deviations of the draws.
    assert counts["blue"] / coloured["blue"] == pytest.approx(share, abs=3 * (share * (1 - share) / 538) ** 0.5)


@pytest.mark.parametrize("name", ["used", "file"])
def test_attribute_shards_leave_a_used_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=re.escape(f"--output_dir {tmp_path / name}: ")):
        call(make_attribute_shards, "--output_dir", tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "notes.txt", "used"]
