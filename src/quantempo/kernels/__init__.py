"""Integer kernels on plain tensors, and their slow exact reference."""

__all__: list[str] = []
