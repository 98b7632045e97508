"""When two texts name the same class; which attributes are one group."""

import json
import unicodedata

import pytest

from tests.shard_maker import image_bytes, write_shard
from utils.data.images import ImageTransform
from utils.data.shards import eval_loader, index_shards
from utils.sets.labelled import AttributeDataset, fold, imagenet_prompts, same_classes, twins, warn_of_twins

NFC, NFD = (unicodedata.normalize(form, "Café Noir") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (NFC, NFD, True),
        (NFD.upper(), NFC, True),
        ("hot_dog", "hot dog", True),
        (" hot \u00a0dog", "Hot_Dog", True),
        ("hot\u200b dog\ufeff", "hot dog", True),
        ("straße", "STRASSE", True),
        ("hot dog", "hotdog", False),
        ("m²", "m2", False),
        ("cafe noir", NFC, False),
    ],
)
def test_what_tells_two_names_apart(one, other, same):
    """Of CuPL#2 and dmvr#6."""
    assert (fold(one) == fold(other)) == same
    assert twins(["x", one, other]) == ([[1, 2]] if same else [])


def test_imagenets_own_twins(caplog):
    warn_of_twins(imagenet_prompts()[0], "--data set")
    assert "classes 657 'missile' and 744 'missile'; 836 'sunglasses' and 837 'sunglasses' have one name" in caplog.text
    warn_of_twins(["cat"] * 5 + [f"{number // 2}" for number in range(8)], "--data set")
    assert "0 'cat' and 1 'cat' and 2 'cat' and 3 'cat'; 5 '0' and 6 '0'; 7 '1' and 8 '1', and 2 more" in caplog.text


def test_classes_of_another_list_are_found_by_name():
    assert same_classes(["a", "b", "a"], ["a", "b", "a"]) is None
    assert same_classes(["b", "c"], ["a", "b", "c"]) == [1, 2]
    for names, expected in ((["a", "x"], "'x' is in one list alone"), (["b", "a", "a"], "'a' names two classes")):
        with pytest.raises(ValueError, match=expected):
            same_classes(names, ["a", "b"])


def test_two_ways_to_write_a_word_are_one_group(tmp_path):
    forms = [unicodedata.normalize(form, "mère") for form in ("NFC", "NFD")]
    texts = [*forms, f" {forms[1]} ", "  ", "a" * 201, 3]
    samples = [
        (str(n), {"jpg": image_bytes(n), "cls": b"0", "json": json.dumps({"attribute": text}).encode()})
        for n, text in enumerate(texts)
    ]
    shard = write_shard(tmp_path / "0.tar", samples)
    data = AttributeDataset(index_shards([shard], cache_dir=tmp_path), ImageTransform(8, (8, 8)), num_classes=1)
    items = [data[0, slot, slot] for slot in range(6)]
    assert [item.get("attribute") for item in items] == [forms[0]] * 3 + [None] * 3
    for item, found in zip(items[3:], ("'  '", f"'{'a' * 99}", "3")):
        assert item["skipped"][0].detail.startswith(f"attribute {found} cannot name a group; expected")
    (batch,) = eval_loader(data, num_samples=6, batch_size=6, rank=0, world_size=1, num_workers=0)
    assert (batch["attributes"], batch["labels"].tolist()) == ([forms[0]] * 3, [0] * 3)
