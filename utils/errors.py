"""The errors that a user can mend: one line that says where, what was found, what was expected and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from utils.redaction import printable, without_addresses, without_secrets


class UserError(Exception):
    """A mistake that the user can mend, in one line. What it quotes loses its secrets and control characters here."""

    every_rank = True  # all processes raise it alike: the first one speaks for all

    def __init__(self, text: str) -> None:
        super().__init__(printable(without_secrets(without_addresses(" ".join(text.split())))))


class OwnError(UserError):
    """A mistake that this process may be the only one to meet: it speaks for itself."""

    every_rank = False


@contextlib.contextmanager
def os_errors(cannot: str, todo: str) -> Iterator[None]:
    """An ``OSError`` of the block becomes the line "<cannot> (No space left on device); <todo>"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{cannot} ({error.strerror}); {todo}") from None
