"""JSON that comes from outside: everything that is wrong with it is a ValueError."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for finite numbers, whole numbers of at most 18 digits and names that come once. Raises ValueError alone.

    Python's own accepts NaN, which is no JSON, lets the last of two equal names win, ends a deeply nested text with
    RecursionError, and takes a byte order mark in bytes alone.
    """
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite, parse_int=_short)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)[:100]!r} twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number that is too large")
    return number


def _short(text: str) -> int:
    if len(text) > 18:
        raise ValueError("a whole number of more than 18 digits")
    return int(text)
