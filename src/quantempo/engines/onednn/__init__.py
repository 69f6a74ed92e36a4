"""The CPU engine: oneDNN products and fused blocks."""

__all__: list[str] = []
