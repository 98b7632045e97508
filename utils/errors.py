"""The error that a user can mend: one line that says where, what was found, what was expected and what to do."""

from __future__ import annotations

from utils.redaction import printable, without_addresses, without_secrets


class UserError(Exception):
    """A mistake that the user can mend. The text says what, where, what was expected and what to do, in one line.

    Whatever it quotes loses its secrets and control characters here, so that no message has to think of them.
    ``every_rank``: all processes raise it alike, so that the first one speaks for all.
    """

    every_rank = True

    def __init__(self, text: str) -> None:
        super().__init__(printable(without_secrets(without_addresses(" ".join(text.split())))))
