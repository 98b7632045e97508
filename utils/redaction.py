"""What may be shown and stored: texts without tokens, and without characters that steer a terminal."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

# Their values are taken out wherever they turn up, in an error text of a library for example.
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
SHORTEST_SECRET = 8  # characters; a shorter value would take common words out of a text

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_USER = re.compile(r"(?<=://)[^/]*@")
_PIPE = re.compile(r"(?<![\w/])pipe:(?!\S* \.\.\. \([0-9a-f]{8}\)).*", re.DOTALL)  # not as ``display_url`` shows it
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]{6,}(?=[>;,)])")
_NO_LETTER = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def url_scheme(url: str) -> str | None:
    """``https``, ``hf``, ``pipe``, ... in small letters; None for a path."""
    match = re.match(r"pipe(?=:)|[A-Za-z][A-Za-z0-9+.-]*(?=://)", url)
    return match[0].lower() if match else None


def display_url(url: str) -> str:
    """The URL without user, password, query and fragment, a pipe without arguments. A path stays as it is.

    Eight hexadecimal digits of a hash tell URLs apart that differ in what is left out.
    """
    scheme = url_scheme(url)
    if scheme is None:
        return url
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    if scheme == "pipe":
        program = (url[5:].split() or [""])[0]
        # NAME=value before the program may be a token as well.
        return f"pipe:{program if re.fullmatch(r'[A-Za-z0-9_./-]*', program) else ''} ... ({digest})"
    address, *query = re.split(r"[?#]", _USER.sub("", url), maxsplit=1)
    return f"{address} ({digest})" if query and query[0] else address


def without_secrets(text: str) -> str:
    """The text with its URLs as ``display_url`` shows them, without tokens of the hub and of the environment.

    A fragment stays: in "https://host/0.tar#key" it is the sample.
    """
    text = _PIPE.sub(lambda match: display_url(match[0]), _URL.sub(_shown_match, text))
    text = _HUB_TOKEN.sub("hf_...", text)
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "...")
    return text


def _shown_match(match: re.Match[str]) -> str:
    address, mark, fragment = _USER.sub("", match[0]).partition("#")
    return display_url(address) + mark + fragment


def shown_setting(value: Any) -> Any:
    """The value of a flag as it may be stored: texts, and texts in a list, without secrets."""
    if isinstance(value, list):
        return [shown_setting(item) for item in value]
    # As a whole first: a blank inside a URL is not its end.
    return without_secrets(display_url(value)) if isinstance(value, str) else value


def without_addresses(text: str) -> str:
    """<_io.BytesIO object> in place of <_io.BytesIO object at 0x7f...>, which differs from run to run."""
    return _ADDRESS.sub("", text)


def printable(text: str) -> str:
    """The text with escapes (``\\x1b``) in place of control characters, line breaks and halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def escaped(text: str) -> str:
    """The text for a page, a figure or a table: as ``printable``, but line breaks and letters of every script stay."""
    return _NO_LETTER.sub(lambda match: _escape(match[0]), text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
