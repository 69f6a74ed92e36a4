"""What each layer costs at each number of bits, and bits chosen by it."""

from quantempo.mixed_precision.choose import choose_bits, limit_loss, recall
from quantempo.mixed_precision.losses import ARTEFACT, OPTIONS, last_latent, measure, table_rows

__all__ = [
    "ARTEFACT", "OPTIONS", "choose_bits", "last_latent", "limit_loss", "measure", "recall",
    "table_rows",
]  # fmt: skip
