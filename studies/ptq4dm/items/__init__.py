"""The studies themselves, one file a table or figure of the paper; importing registers them."""

# In the order of the paper, which is that of the page.
from studies.ptq4dm.items import operations  # isort: skip
from studies.ptq4dm.items import inputs  # isort: skip
from studies.ptq4dm.items import activations  # isort: skip
from studies.ptq4dm.items import single_step  # isort: skip
from studies.ptq4dm.items import laws  # isort: skip
from studies.ptq4dm.items import metrics  # isort: skip
from studies.ptq4dm.items import samplers  # isort: skip
from studies.ptq4dm.items import legacy  # isort: skip
from studies.ptq4dm.items import ours  # isort: skip

__all__ = [
    "activations",
    "inputs",
    "laws",
    "legacy",
    "metrics",
    "operations",
    "ours",
    "samplers",
    "single_step",
]
