"""Scale search: metrics, whole-set histograms, scales of activations and weights."""

from quantempo.scales import activation, groups, histogram, metrics, search
from quantempo.scales.activation import *  # noqa: F403
from quantempo.scales.groups import *  # noqa: F403
from quantempo.scales.histogram import *  # noqa: F403
from quantempo.scales.metrics import *  # noqa: F403
from quantempo.scales.search import *  # noqa: F403

__all__ = [
    *activation.__all__, *groups.__all__, *histogram.__all__, *metrics.__all__, *search.__all__,
]  # fmt: skip
