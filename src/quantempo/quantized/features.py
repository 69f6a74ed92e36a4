"""What a quantized denoiser asks of an engine beside plain integer layers."""

from __future__ import annotations

from torch import nn

from quantempo.quantized.attention import INT8_ATTENTION, int8_attention_blocks

__all__ = ["features_of"]


def features_of(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the names of what an engine must be able to run, () for a plain denoiser."""
    return (INT8_ATTENTION,) if int8_attention_blocks(denoiser) else ()
