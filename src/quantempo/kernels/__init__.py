"""Integer kernels on plain tensors, and their slow exact reference (layer L0)."""

__all__: list[str] = []
