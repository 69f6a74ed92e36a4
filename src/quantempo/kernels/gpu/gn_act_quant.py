"""Launch `kernels.ops.gn_act_quant` on a GPU: GroupNorm, SiLU, quantization of channels-last maps.

    v = (x - mean_g) rstd_g gamma + beta      a = v / (1 + exp(-v))      q = clamp(rne(a / s) + z)

How large a part of the map a program takes is decided in `group_norm.plan`. Any GPU has two ways.
`one_launch`: a program owns all pixels of a slab of whole groups; a small slab stays in registers,
a larger one is read again, out of the caches. Where that gives too few programs (few images, large
maps), `channel_moments` writes mean and M2 of every channel and chunk of pixels, `channel_affine`
makes a x + b of them, and `apply` does that; it alone where a map is only quantized. On Hopper a
third, `hopper`. All put partial moments together by Chan's formula, and never subtract E[x]^2.
"""

from functools import cache

import torch
from torch import Tensor

from quantempo.kernels.gpu.dependent_launch import early
from quantempo.kernels.gpu.group_norm import plan as plans
from quantempo.kernels.gpu.group_norm import portable
from quantempo.kernels.gpu.group_norm.plan import Plan, SharedPlan, power_of_two
from quantempo.kernels.ops.gn_act_quant import Normalization

try:
    from quantempo.kernels.gpu.group_norm import hopper as norm_hopper
except ImportError:  # a Triton without Gluon, or with another one: the portable kernels run
    norm_hopper = None  # type: ignore[assignment]

__all__ = ["launch"]


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def launch(call: Normalization, *, plan: Plan | SharedPlan | None = None) -> portable.Results:
    """Return the results of a call, which was checked; ValueError: a map of 2^31 values.

    plan: tiles other than those of the faster kernels, by measured rules.
    Error: with e = 2^-24, a differs from its exact value by about 16 e (|x a_c| + |b_c|) + 8 e |a|
    at most, a_c and b_c the affine map of a channel; a code, by 1, where the quotient is that near
    a tie.
    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, 1979.
    """
    _, _, height, width = call.x.shape
    if call.channels * height * width >= 2**31:
        raise ValueError(
            f"got {call.channels} channels of {height} x {width}; expected < 2^31 values"
        )
    results = call.empty()
    if results[0].numel() or results[1].numel():
        if plan is None:
            groups = call.groups if call.gamma is not None else 0
            plan = _choose(call.images, groups)
        if isinstance(plan, SharedPlan):
            norm_hopper.run(call, results, plan)
        else:
            _run(call, results, plan)
    return results


def _choose(images: tuple[Tensor, ...], groups: int) -> Plan | SharedPlan:
    """Return the tiles of a call, which decide the kernels; groups: 0 without a norm."""
    x, (batch, _, height, width) = images[0], images[0].shape
    size = (batch, height * width, sum(image.shape[1] for image in images), groups)
    able = norm_hopper is not None and groups > 0 and x.element_size() == 2
    # TMA wants rows and bases of whole 16 bytes, and indexes rows with 32 bits.
    able = able and _is_hopper(x.device) and batch * height * width < 2**31
    able = able and not any(i.shape[1] % 8 or i.data_ptr() % 16 for i in images)
    shared = plans.make_shared_plan(*size) if able else None
    return shared or plans.make_plan(*size, x.element_size())


def _run(call: Normalization, results: portable.Results, plan: Plan) -> None:
    """Launch what `plan` says, into `results`."""
    x, skip, silu = call.x, call.skip, call.silu
    batch, _, height, width = x.shape
    channels, pixels = call.channels, height * width
    groups = call.groups if call.gamma is not None else 0
    slabs = -(-channels // plan.width)
    norm, tensors, numbers, form = portable.shared_arguments(call, results, plan.width)
    meta = {
        "WIDTH": plan.width, "BLOCK_P": plan.block_p, "BLOCK_C": plan.block_c,
        "EVEN": pixels % plan.block_p == 0, "FORM": form, "num_warps": plan.warps,
    }  # fmt: skip
    placed = {"EARLY": True, "launch_pdl": True} if early(x.device) else {}
    if plan.one_launch:
        portable.one_launch[(batch * slabs,)](
            x, skip, *norm, tensors, slabs, pixels, *numbers,
            RESIDENT=plan.block_p >= pixels, STAGES=plan.stages, UNROLL=plan.unroll,
            GROUP=channels // groups, GROUPS=power_of_two(plan.width * groups // channels),
            **meta, **placed,
        )  # fmt: skip
        return
    affine = None
    if groups:
        stat_chunks, stat_slabs = -(-pixels // plan.stat_p), -(-channels // plan.stat_c)
        size = (batch, stat_chunks, 2, channels)
        moments = torch.empty(size, dtype=torch.float32, device=x.device)
        source = portable.shared_arguments(call, results, plan.stat_c)[3].SOURCE
        portable.channel_moments[(batch * stat_chunks * stat_slabs,)](
            x, skip, moments, stat_slabs, stat_chunks, pixels, *numbers[:2], BLOCK_P=plan.stat_p,
            BLOCK_C=plan.stat_c, SOURCE=source, num_warps=plan.stat_warps, **placed,
        )  # fmt: skip
        affine = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
        whole = plan.group_c
        parts, block_c = -(-channels // whole), power_of_two(whole)
        block_s = max(1, min(power_of_two(stat_chunks), 2048 // block_c))
        portable.channel_affine[(batch * parts,)](
            moments, *norm, affine, parts, stat_chunks, pixels, channels, WIDTH=whole,
            BLOCK_C=block_c, BLOCK_S=block_s, STAT_P=plan.stat_p, GROUP=channels // groups,
            GROUPS=power_of_two(whole * groups // channels), SILU=silu,
            num_warps=4, **placed,
        )  # fmt: skip
    chunks = -(-pixels // plan.block_p)
    portable.apply[(batch * chunks * slabs,)](
        x, skip, affine, tensors, slabs, chunks, pixels, *numbers, NORM=groups > 0,
        MAIN=results[0].numel() > 0, **meta, **placed,
    )  # fmt: skip
