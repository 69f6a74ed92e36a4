"""Reshape any tensor so that one row holds what shares one scale."""

from __future__ import annotations

from torch import Tensor

from quantempo.errors import QuantempoError

__all__ = ["from_groups", "to_groups"]


def to_groups(x: Tensor, axis: int | None = None, group_size: int | None = None) -> Tensor:
    """Return x as (P, L): row p holds the L elements that share scale p.

    axis=None: (1, x.numel()), one scale. axis=0 of (O, I, 3, 3): (O, I*9), one a channel.
    With group_size g each row is cut further: (O * I*9/g, g).

    Raises:
        QuantempoError: g does not divide the row.
    """
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    if group_size is None:
        return rows
    if rows.shape[1] % group_size:
        raise QuantempoError(
            f"got group_size={group_size} for rows of {rows.shape[1]} elements; expected a divisor"
        )
    return rows.reshape(-1, group_size)


def from_groups(rows: Tensor, shape: tuple[int, ...], axis: int | None = None) -> Tensor:
    """Undo `to_groups`: return the (P, L) rows in the given shape; bit-exact round trip."""
    if axis is None:
        return rows.reshape(shape)
    axis %= len(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(moved).movedim(0, axis)
