"""Triton kernels of the GPU path; `launch` of `contraction.launch` and `gn_act_quant` runs them.

Nothing here is imported by `quantempo.kernels` itself: Triton may be absent.
"""

__all__: list[str] = []
