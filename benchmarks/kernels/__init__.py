"""Kernels of the GPU against their rivals; `python -m benchmarks.kernels`."""

__all__: list[str] = []
