"""Errors a user can act on; everything may import this."""

from __future__ import annotations

__all__ = ["QuantempoError"]


class QuantempoError(ValueError):
    """Report a user's mistake in one sentence: what came, what was expected, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
