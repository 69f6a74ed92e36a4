"""Core numerics: formats of integers, tensors that lie in files, and work of many processes."""

from quantempo.core import formats, paged, progress, ranks
from quantempo.core.formats import *  # noqa: F403
from quantempo.core.paged import *  # noqa: F403
from quantempo.core.progress import *  # noqa: F403
from quantempo.core.ranks import *  # noqa: F403

__all__ = formats.__all__ + paged.__all__ + progress.__all__ + ranks.__all__
