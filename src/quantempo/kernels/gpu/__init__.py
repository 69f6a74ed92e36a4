"""Triton kernels, imported by the first CUDA call of an operator: Triton may be absent."""

__all__: list[str] = []
