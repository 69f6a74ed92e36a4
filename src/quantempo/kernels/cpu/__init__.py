"""Integer kernels on CPUs."""

__all__: list[str] = []
