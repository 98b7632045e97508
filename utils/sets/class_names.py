"""Names of classes: in which form they are written, and when two texts name the same class.

Unicode writes ``é`` as one character (NFC) or as two (NFD, as in file names of macOS); both are the same name.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence


def composed(name: str) -> str:
    """The name in NFC: what is written, compared and looked up."""
    return unicodedata.normalize("NFC", name)


def fold(name: str) -> str:
    """What two names must differ in to be different words.

    Case, runs of spaces, underscores for spaces, invisible characters and the Unicode form do not count.
    """
    visible = "".join(letter for letter in name.replace("_", " ") if unicodedata.category(letter) != "Cf")
    return composed(composed(" ".join(visible.split())).casefold())


def twins(names: Sequence[str]) -> list[list[int]]:
    """The places of names that no text tells apart, a list for each such word: ImageNet has two sunglasses."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(fold(name), []).append(place)
    return [group for group in places.values() if len(group) > 1]


def describe_twins(names: Sequence[str], groups: Sequence[Sequence[int]]) -> str:
    """Some of ``groups``, as "classes 657 'missile' and 744 'missile'"."""
    texts = [" and ".join(f"{place} {names[place]!r}" for place in group[:4]) for group in groups[:3]]
    more = f", and {len(groups) - 3} more" if len(groups) > 3 else ""
    return f"classes {'; '.join(texts)}{more}"


def same_classes(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """The place in ``wanted`` of each of ``names``, None where the two lists are equal.

    ValueError, whose text is the reason, where a name is missing there, or names two classes.
    """
    if list(names) == list(wanted):
        return None
    for name, count in (Counter(names) | Counter(wanted)).items():
        if count > 1:
            raise ValueError(f"{name!r} names two classes")
    places = {name: place for place, name in enumerate(wanted)}
    for name in names:
        if name not in places:
            raise ValueError(f"{name!r} is in one list alone")
    return [places[name] for name in names]
