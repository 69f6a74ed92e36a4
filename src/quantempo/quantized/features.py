"""What a quantized denoiser asks of an engine beside plain integer layers."""

from __future__ import annotations

from torch import nn

from quantempo.quantized.attention import INT8_ATTENTION, int8_attention_blocks
from quantempo.quantized.delta import DELTA, delta_layers

__all__ = ["features_of"]


def features_of(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the names of what an engine must be able to run, () for a plain denoiser."""
    found = {DELTA: any(True for _ in delta_layers(denoiser))}
    found[INT8_ATTENTION] = bool(int8_attention_blocks(denoiser))
    return tuple(name for name, present in found.items() if present)
