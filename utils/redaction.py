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
_PIPE = re.compile(
    r"(?<![\w/])pipe:(?!\S* \.\.\. \([0-9a-f]{8}\)).*", re.DOTALL
)  # not what ``display_url`` made of one
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]{6,}(?=[>;,)])")
_NO_LETTER = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def url_scheme(url: str) -> str | None:
    """``https``, ``hf``, ``pipe``, ... in small letters; None for a path."""
    if url.startswith("pipe:"):
        return "pipe"
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    return match.group(1).lower() if match else None


def display_url(url: str) -> str:
    """The URL as it may be shown and stored: without user, password, query and fragment, a pipe without arguments.

    Eight hexadecimal digits of a hash tell URLs apart that differ in what is left out. A path stays as it is.
    """
    scheme = url_scheme(url)
    if scheme is None:
        return url
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    if scheme == "pipe":
        program = (url[5:].split() or [""])[0]
        # NAME=value before the program may be a token as well.
        return f"pipe:{program if re.fullmatch(r'[A-Za-z0-9_./-]*', program) else ''} ... ({digest})"
    address, *query = re.split(r"[?#]", re.sub(r"(://)[^/]*@", r"\1", url), maxsplit=1)
    return f"{address} ({digest})" if query and query[0] else address


def without_secrets(text: str) -> str:
    """The text with every URL in it as ``display_url`` shows it, and without tokens of the hub and of the environment.

    A fragment stays: in "https://host/0.tar#key" it is the sample.
    """
    text = _URL.sub(_shown_match, text)
    text = _PIPE.sub(lambda match: display_url(match.group(0)), text)
    text = _HUB_TOKEN.sub("hf_...", text)
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "...")
    return text


def without_addresses(text: str) -> str:
    """The text with <_io.BytesIO object> in place of <_io.BytesIO object at 0x7f...>, which differs from run to run."""
    return _ADDRESS.sub("", text)


def _shown_match(match: re.Match[str]) -> str:
    address, mark, fragment = re.sub(r"(://)[^/]*@", r"\1", match.group(0)).partition("#")
    return display_url(address) + mark + fragment


def shown_setting(value: Any) -> Any:
    """The value of a flag as it may be stored: texts, and texts in a list, without secrets."""
    if isinstance(value, list):
        return [shown_setting(item) for item in value]
    if not isinstance(value, str):
        return value
    # As a whole first: a blank inside a URL is not its end.
    return without_secrets(display_url(value))


def printable(text: str) -> str:
    """The text with escapes (``\\x1b``) in place of control characters, line breaks and halves of surrogate pairs."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def escaped(text: str) -> str:
    """The text for a page, a figure or a table: escapes in place of control characters and halves of surrogate pairs.

    Line breaks and every other letter stay, also joiners, which some scripts need and ``printable`` escapes.
    """
    return _NO_LETTER.sub(lambda match: match.group(0).encode("unicode_escape").decode("ascii"), text)
