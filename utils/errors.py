"""Errors that a user can fix: one line that says where, what was found, what was expected and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from utils.redaction import printable, without_addresses, without_secrets


class UserError(Exception):
    """A mistake that the user can fix, in one line. Secrets and control characters are removed from the text here."""

    every_rank = True  # all processes raise the same error, so only the first one prints it

    def __init__(self, text: str) -> None:
        super().__init__(printable(without_secrets(without_addresses(" ".join(text.split())))))


class OwnError(UserError):
    """A mistake that perhaps only this process has met, so every process that raises it prints it."""

    every_rank = False


@contextlib.contextmanager
def os_errors(cannot: str, todo: str) -> Iterator[None]:
    """Turns an ``OSError`` in the block into a ``UserError``: "<cannot> (No space left on device); <todo>"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{cannot} ({error.strerror}); {todo}") from None
