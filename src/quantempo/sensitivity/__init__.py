"""What each layer costs at each number of bits, and bits chosen by it (layer L5)."""

from quantempo.sensitivity.choose import choose_bits, recall
from quantempo.sensitivity.losses import ARTEFACT, OPTIONS, measure, table_rows
from quantempo.sensitivity.rollout import last_latent

__all__ = ["ARTEFACT", "OPTIONS", "choose_bits", "last_latent", "measure", "recall", "table_rows"]
