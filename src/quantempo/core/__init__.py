"""Core numerics: formats of integers."""

from quantempo.core import formats
from quantempo.core.formats import *  # noqa: F403

__all__ = formats.__all__
