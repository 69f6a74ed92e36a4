"""Core numerics: formats of integers, and tensors that lie in files."""

from quantempo.core import formats, paged
from quantempo.core.formats import *  # noqa: F403
from quantempo.core.paged import *  # noqa: F403

__all__ = formats.__all__ + paged.__all__
