"""Errors a user can act on, and the log; everything may import this."""

import logging

__all__ = ["MISTAKES", "QuantempoError", "log", "sentence"]

log = logging.getLogger("quantempo")


class QuantempoError(ValueError):
    """Report a user's mistake in one sentence: what came, what was expected, what to do."""


# What a command ends with one sentence for: also names that no file can have, and too much.
MISTAKES = (QuantempoError, OSError, UnicodeError, MemoryError)


def sentence(error: BaseException) -> str:
    """Return one of the mistakes as one line."""
    return " ".join(str(error).split())[:500] or "not enough memory; ask for less"
