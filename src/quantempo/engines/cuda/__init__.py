"""The GPU engine: Triton kernels, fused blocks, CUDA graphs."""

__all__: list[str] = []
