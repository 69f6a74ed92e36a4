"""Scale search: metrics, whole-set histograms, scales of activations and weights."""

from quantempo.scales.activation import (
    ActivationScale,
    Candidates,
    CostTable,
    bucket_gain,
    cost_table,
    search_activation,
)
from quantempo.scales.groups import GroupScales, search_groups
from quantempo.scales.histogram import Histogram, MinMax, TokenError, bin_centers
from quantempo.scales.metrics import MEAN_METRICS, METRICS, Metric, make_metric
from quantempo.scales.search import (
    LayerScales,
    bucket_of_bin,
    search_scales,
    search_weight,
    search_weights,
    segment_costs,
    segment_time,
)

__all__ = [
    "MEAN_METRICS", "METRICS", "ActivationScale", "Candidates", "CostTable", "GroupScales",
    "Histogram", "LayerScales", "Metric", "MinMax", "TokenError", "bin_centers", "bucket_gain",
    "bucket_of_bin", "cost_table", "make_metric", "search_activation", "search_groups",
    "search_scales", "search_weight", "search_weights", "segment_costs", "segment_time",
]  # fmt: skip
