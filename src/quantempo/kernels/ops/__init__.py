"""What quantized U-Nets and transformers need on a GPU: one schema for CUDA, CPU and tracing.

    gn_act_quant          codes of silu(GroupNorm(cat(x, skip))), in one pass instead of five
    norm_modulate_quant   codes of LayerNorm(x) (1 + scale) + shift, static or a token at a time
    join_heads            queries and keys normalised and rotated, text and image one sequence
    qconv2d               integer convolution with its whole epilogue
    qgemm                 the same for the rows of a linear layer
    attention8            attention with int8 codes of queries and keys (Hopper)
    weight_only_linear    a few float rows times int8 codes: all modulations of a network

Images are logically (N, C, H, W) in channels_last memory. CODES: an unsigned code q in [0, qmax]
with zero point z is stored as int8 q' = q - 128; z is given unsigned. BUCKET: int64 () or (B,),
read on the device; image (or row) n uses entry bucket[n // (N / B)] of every (G,) table, and entry
0 if G = 1. Values are never read on the host, so one CUDA graph, and one trace of torch.compile,
serves every time-step.

CUDA runs the Triton kernels of `kernels.gpu`, a CPU the float64 definition beside each operator.
All raise ValueError on other shapes, types or strides than they say; none has gradients.
"""

from quantempo.kernels.ops.attention import attention8
from quantempo.kernels.ops.gn_act_quant import gn_act_quant
from quantempo.kernels.ops.join_heads import join_heads
from quantempo.kernels.ops.norm_modulate_quant import norm_modulate_quant
from quantempo.kernels.ops.operator import reserve
from quantempo.kernels.ops.qconv2d import qconv2d
from quantempo.kernels.ops.qgemm import qgemm
from quantempo.kernels.ops.weight_only_linear import weight_only_linear

__all__ = [
    "attention8", "gn_act_quant", "join_heads", "norm_modulate_quant", "qconv2d", "qgemm",
    "reserve", "weight_only_linear",
]  # fmt: skip
