"""Makes texts safe to show and store: without tokens, and without characters that control a terminal."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

# The values of these variables are removed wherever they occur, for example in a library's error text.
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
SHORTEST_SECRET = 8  # characters; removing a shorter value could remove common words

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_USER = re.compile(r"(?<=://)[^/]*@")
_PIPE = re.compile(r"(?<![\w/])pipe:(?!\S* \.\.\. \([0-9a-f]{8}\)).*", re.DOTALL)  # but not one from ``display_url``
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]{6,}(?=[>;,)])")
_NO_LETTER = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def url_scheme(url: str) -> str | None:
    """``https``, ``hf``, ``pipe``, ... in lower case; None for a path."""
    match = re.match(r"pipe(?=:)|[A-Za-z][A-Za-z0-9+.-]*(?=://)", url)
    return match[0].lower() if match else None


def display_url(url: str) -> str:
    """A URL without user, password, query and fragment; a pipe without arguments; a path unchanged.

    If URLs differ only in the removed parts, eight hexadecimal digits of a hash tell them apart.
    """
    scheme = url_scheme(url)
    if scheme is None:
        return url
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    if scheme == "pipe":
        program = (url[5:].split() or [""])[0]
        # The command may begin with NAME=value, and this value may be a token as well.
        return f"pipe:{program if re.fullmatch(r'[A-Za-z0-9_./-]*', program) else ''} ... ({digest})"
    address, *query = re.split(r"[?#]", _USER.sub("", url), maxsplit=1)
    return f"{address} ({digest})" if query and query[0] else address


def without_secrets(text: str) -> str:
    """The text without tokens of the hub and of the environment, and with every URL as ``display_url`` shows it.

    A URL keeps its fragment: in "https://host/0.tar#key" it names the sample.
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
    """The value of a flag without secrets, so that it may be stored. Texts inside a list are cleaned too."""
    if isinstance(value, list):
        return [shown_setting(item) for item in value]
    # First ``display_url`` on the whole value: ``without_secrets`` would end a URL at a blank inside it.
    return without_secrets(display_url(value)) if isinstance(value, str) else value


def without_addresses(text: str) -> str:
    """Turns <_io.BytesIO object at 0x7f...>, which differs from run to run, into <_io.BytesIO object>."""
    return _ADDRESS.sub("", text)


def printable(text: str) -> str:
    """Replaces control characters, line breaks and halves of surrogate pairs by escapes such as ``\\x1b``."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def escaped(text: str) -> str:
    """As ``printable``, for a page, a figure or a table: line breaks and letters of every script stay."""
    return _NO_LETTER.sub(lambda match: _escape(match[0]), text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
