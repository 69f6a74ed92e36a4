"""What every kernel of the norm is told of a call in the same way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["last_row", "source", "switches"]


def source(c1: int, skip: Tensor | None, part: int) -> int:
    """Return where `part` channels in a row lie: 0 in x, 1 in x or skip, 2 also in both."""
    return 0 if skip is None else 2 if c1 % part else 1


def last_row(raw_scales: Tensor | None, skip: Tensor | None) -> Tensor | None:
    """Return the scales of the raw codes of skip."""
    return raw_scales[-1] if raw_scales is not None and skip is not None else raw_scales


def switches(silu: bool, scales: tuple[Tensor | None, Tensor | None]) -> dict[str, Any]:
    """Return the constants of a kernel that do not depend on tiles; arguments as those of a run."""
    scale, raw_scales = scales
    return {
        "SILU": silu, "QUANTIZE": scale is not None, "RAW": raw_scales is not None,
        "MANY": scale is not None and scale.shape[0] > 1,
        "RAW_MANY": raw_scales is not None and raw_scales.shape[1] > 1,
    }  # fmt: skip
