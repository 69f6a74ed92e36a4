"""GroupNorm, activation and quantization in one operator on GPUs."""

__all__: list[str] = []
