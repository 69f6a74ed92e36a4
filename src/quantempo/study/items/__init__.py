"""The studies themselves, one file a table or figure of the paper; importing registers them."""

# In the order of the paper, which is that of the page.
from quantempo.study.items import operations  # isort: skip
from quantempo.study.items import inputs  # isort: skip
from quantempo.study.items import activations  # isort: skip
from quantempo.study.items import single_step  # isort: skip
from quantempo.study.items import laws  # isort: skip
from quantempo.study.items import metrics  # isort: skip
from quantempo.study.items import samplers  # isort: skip
from quantempo.study.items import legacy  # isort: skip

__all__ = [
    "activations",
    "inputs",
    "laws",
    "legacy",
    "metrics",
    "operations",
    "samplers",
    "single_step",
]
