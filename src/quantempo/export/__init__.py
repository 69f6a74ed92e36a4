"""Packed networks in the formats of other programs, with the same integers and scales."""

__all__: list[str] = []
