"""When two texts name the same class."""

import unicodedata

import pytest

from utils.sets.class_names import describe_twins, fold, same_classes, twins
from utils.sets.labelled import imagenet_prompts

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


def test_imagenets_own_twins():
    names = imagenet_prompts()[0]
    assert describe_twins(names, twins(names)) == (
        "classes 657 'missile' and 744 'missile'; 836 'sunglasses' and 837 'sunglasses'"
    )


def test_classes_of_another_list_are_found_by_name():
    assert same_classes(["a", "b", "a"], ["a", "b", "a"]) is None
    assert same_classes(["b", "c"], ["a", "b", "c"]) == [1, 2]
    for names, expected in ((["a", "x"], "'x' is in one list alone"), (["b", "a", "a"], "'a' names two classes")):
        with pytest.raises(ValueError, match=expected):
            same_classes(names, ["a", "b"])
