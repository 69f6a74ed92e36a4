"""Triton kernels of the GPU path, one op a module, each with a `launch`.

Nothing here is imported by `quantempo.kernels` itself: Triton may be absent.
"""

__all__: list[str] = []
