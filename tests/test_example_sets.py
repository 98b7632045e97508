"""examples/make_attribute_shards.py and classes of a set by examples/make_shards.py: the sets they write, read back from the tars."""

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

from examples import make_attribute_shards, make_shards
from tests.conftest import run_script
from tests.shard_maker import write_shard
from utils.cli import UserError

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


def test_selected_classes_keep_their_bytes_and_get_new_labels(attributes: Path, labelled: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--data", attributes, "--classes", "seven", "two", "--cache_dir", tmp_path / "cache")
    call(make_shards, *arguments, "--output_dir", out, "--samples_per_shard", 100)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["classnames.txt", "zeroshot_classification_templates.txt", "train", "test"]
    )
    assert (out / "classnames.txt").read_text() == "seven\ntwo\n"
    templates = "zeroshot_classification_templates.txt"
    assert (out / templates).read_bytes() == (attributes / templates).read_bytes()
    for split in ("train", "test"):
        chosen = {key: sample for key, sample in labelled[split].items() if sample["cls"] in (b"7", b"2")}
        expected = {key: {**sample, "cls": {b"7": b"0", b"2": b"1"}[sample["cls"]]} for key, sample in chosen.items()}
        found = read_split(out / split)
        assert found == expected
        assert list(found) == list(expected)
        sizes = json.loads((out / split / "sizes.json").read_text())
        assert sum(sizes.values()) == len(expected)
        assert set(list(sizes.values())[:-1]) <= {100}


def test_selecting_again_gives_the_same_bytes(attributes: Path, tmp_path: Path) -> None:
    arguments = ("--data", attributes, "--classes", "zero", "--splits", "val", "--cache_dir", tmp_path / "cache")
    call(make_shards, *arguments, "--output_dir", tmp_path / "one")
    call(make_shards, *arguments, "--output_dir", tmp_path / "two")
    assert [path.name for path in (tmp_path / "one").glob("*/")] == ["val"]
    assert same_files(tmp_path / "one", tmp_path / "two")
    call(make_shards, *arguments, "--output_dir", tmp_path / "two", "--overwrite")
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_keys_that_meet_at_the_end_of_a_shard_stay_two_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "set/train/0.tar", [("001", {"cls": b"0"}), ("000", {"cls": b"1"})])
    write_shard(tmp_path / "set/train/1.tar", [("000", {"cls": b"0"})])
    (tmp_path / "set/classnames.txt").write_text("a\nb\n")
    arguments = ("--data", tmp_path / "set", "--classes", "b", "a", "--cache_dir", tmp_path / "cache")
    call(make_shards, *arguments, "--output_dir", tmp_path / "out")
    found = read_split(tmp_path / "out/train")
    assert [sample["cls"] for sample in found.values()] == [b"1", b"0", b"1"]


@pytest.mark.parametrize("name", ["used", "file"])
def test_attribute_shards_leave_a_used_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=re.escape(f"--output_dir {tmp_path / name}: ")):
        call(make_attribute_shards, "--output_dir", tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "notes.txt", "used"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "sevn"], "--classes 'sevn': no such class in set; did you mean 'seven'?"),
        (["--classes", "xylophone"], "the 10 names are in its classnames.txt"),
        (["--classes", "one", "one"], "--classes 'one': given twice"),
        (["--data", "twins", "--classes", "crane"], "several lines of twins/classnames.txt"),
        (["--splits", "valid"], "--splits valid: no .tar files in set/valid; there is test, train, val"),
        (["--data", "nowhere"], "--data nowhere: no such directory"),
        (["--data", "bare"], "bare/classnames.txt: no such file"),
        (["--data", "twins"], "--data twins: no shards in train or test; expected <split>/*.tar"),
        (["--output_dir", "used"], "--overwrite"),
        (["--output_dir", "set", "--overwrite"], "is where the samples come from"),
        (["--output_dir", "used", "--overwrite", "--splits", "train"], "its test/ would keep the labels"),
        (["--data", "unlabelled"], "--data unlabelled/train/0.tar#0: .cls is ''; expected 0 ... 1"),
        (["--data", "beyond"], "--data beyond/train/0.tar#0: .cls is '2'; expected 0 ... 1"),
        (["--data", "broken"], "--data broken/train/0.tar: damaged shard"),
        (["--data", "short"], "sizes.json promises 2 samples, the shard holds 1"),
        (["--data", "long"], "outdated sizes.json"),
        (["--data", "others"], "none of the 1 samples in others/train is of these classes"),
        (["--class", "one"], "did you mean --classes"),
    ],
)
def test_mistakes_of_a_selection_are_named_in_one_line(
    attributes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").symlink_to(attributes)
    Path("bare").mkdir()
    Path("used/test").mkdir(parents=True)
    write_shard(Path("used/test/0.tar"), [("0", {"png": b"mine", "cls": b"0"})])
    Path("twins").mkdir()
    Path("twins/classnames.txt").write_text("crane\none\ncrane\n")
    for name, keys, members in (
        ("unlabelled", "0", {"png": b""}),
        ("beyond", "0", {"png": b"", "cls": b"2"}),
        ("broken", "012", {"png": b"", "cls": b"1"}),
        ("short", "0", {"png": b"", "cls": b"1"}),
        ("long", "01", {"png": b"", "cls": b"1"}),
        ("others", "0", {"png": b"", "cls": b"0"}),
    ):
        write_shard(Path(name, "train/0.tar"), [(key, members) for key in keys])
        Path(name, "classnames.txt").write_text("zero\none\n")
    for name, promised in (("short", 2), ("long", 1)):
        Path(name, "train/sizes.json").write_text(json.dumps({"0.tar": promised}))
    broken = Path("broken/train/0.tar")
    broken.write_bytes(broken.read_bytes()[: 2 * 1536] + b"x" * 600)
    defaults = {"--data": ["set"], "--classes": ["one"], "--output_dir": ["out"], "--cache_dir": ["cache"]}
    given = [word for name, words in defaults.items() if name not in arguments for word in (name, *words)]
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        call(make_shards, *given, *arguments)
    assert "\n" not in str(error.value)
    assert not Path("out/classnames.txt").exists()
    assert read_split(Path("used/test")) == {"0": {"png": b"mine", "cls": b"0"}}
    assert (attributes / "test/000000.tar").is_file()


def test_a_mistake_ends_the_script_with_status_2(attributes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--data", attributes, "--classes", "sevn", "--output_dir", out)
    output = run_script("examples/make_shards.py", *arguments, status=2)
    assert len(output.splitlines()) == 1
    assert "did you mean 'seven'?" in output
    assert not out.exists()
