"""GroupNorm, SiLU and quantization of channels-last maps (Triton kernels).

    v = (x - mean_g) rstd_g gamma + beta      a = v / (1 + exp(-v))      q = clamp(rne(a / s) + z)

Here lives the function that launches the kernels of `norm_kernels`; how large a part of the map a
program takes is decided in `norm_plan`. What the op means on a CPU, and its schema, are elsewhere
(`quantempo.kernels.ops`).

Two ways. `one_launch`: a program owns all pixels of a slab of whole groups; a small slab stays in
registers, a larger one is read again, out of the caches, to be normalized. Where that gives too
few programs (few images, large maps), `channel_moments` writes mean and M2 of every channel and
chunk of pixels, `channel_affine` makes a x + b of them, and `apply` does that. All ways put
partial moments together by Chan's formula, and never subtract E[x]^2. A map that is only quantized
is `apply` alone.

A third, `norm_cooperative`: few large maps of 16-bit values that the registers of the GPU hold all
at once are read once, in one launch. On Hopper a fourth, `norm_hopper`: the slab of a program
stays in shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from quantempo.kernels.gpu.contraction.tiles import multiprocessors
from quantempo.kernels.gpu.dependent_launch import early
from quantempo.kernels.gpu.group_norm import cooperative as norm_cooperative
from quantempo.kernels.gpu.group_norm.arguments import last_row, source, switches
from quantempo.kernels.gpu.group_norm.plan import (
    FEW_IMAGES,
    LARGE_MAP,
    CooperativePlan,
    Plan,
    SharedPlan,
    make_cooperative_plan,
    make_plan,
    make_shared_plan,
    power_of_two,
)
from quantempo.kernels.gpu.group_norm.portable import (
    apply,
    channel_affine,
    channel_moments,
    one_launch,
)

try:
    from quantempo.kernels.gpu.group_norm import hopper as norm_hopper
except ImportError:  # a Triton without Gluon, or with another one: the portable kernels run
    norm_hopper = None  # type: ignore[assignment]

__all__ = ["PATHS", "launch"]

# "hopper": `norm_hopper.normalize_slab`; "cooperative": `norm_cooperative.normalize_held`;
# "triton": the kernels of `norm_kernels`; the last two on any GPU.
PATHS = ("hopper", "cooperative", "triton")
# Multiprocessors, where there is no GPU to ask.
_PROCESSORS = 132


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _last(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def launch(
    x: Tensor,
    skip: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    zero_point: int,
    qmax: int,
    bucket: Tensor,
    raw_scales: Tensor | None,
    raw_zero_points: Sequence[int],
    raw_qmax: int,
    *,
    plan: Plan | SharedPlan | CooperativePlan | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize, activate and quantize torch.cat([x, skip], 1); quantize x and skip as they are.

    Args:
        x: (N, C1, H, W) float16, bfloat16 or float32, channels_last.
        skip: (N, C2, H, W) of the same, or None.
        gamma, beta: (C1 + C2,) float32; None: no norm, and groups and eps mean nothing.
        groups: a divisor of C1 + C2.
        eps: added to the biased variance.
        silu: whether a = v / (1 + exp(-v)) follows.
        scale: (G,) float32; None: the first result is a itself, in x.dtype.
        zero_point, qmax: z and the largest code, unsigned; stored q - 128.
        bucket: int64 () or (B,) on the device; image n uses entry n // (N / B), entry 0 if G = 1.
        raw_scales: (S, G) float32: also return codes of x (row 0) and skip (row S - 1).
        raw_zero_points, raw_qmax: of those.
        plan: tiles other than those of `norm_plan`; which kind it is decides the path.
        path: one of PATHS; None: the faster one, by measured rules.

    Returns:
        (codes (N, C1 + C2, H, W), raw_x (N, C1, H, W), raw_skip (N, C2, H, W)), channels_last;
        a result not asked for has shape (0,).

    Raises:
        ValueError: a map of 2^31 values, or what a path asked for cannot take.
            The rest was checked by `ops_checks.check_norm`.
        RuntimeError: the first call on a device is being recorded (see `launch.reserve`).

    Error: with e = 2^-24, a differs from its exact value by at most about
    16 e (|x a_c| + |b_c|) + 8 e |a|, a_c and b_c the affine map of a channel; a code differs from
    the exact one, by 1, only where the exact quotient is that near a tie.
    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Updating formulae and a pairwise algorithm for
    computing sample variances, 1979.
    """
    scales = (scale, raw_scales)
    batch, c1, height, width = x.shape
    channels = c1 if skip is None else c1 + skip.shape[1]
    if channels * height * width >= 2**31:
        raise ValueError(f"got {channels} channels of {height} x {width}; expected < 2^31 values")
    codes = x.new_empty(0, dtype=x.dtype if scale is None else torch.int8)
    raw_x, raw_skip = (x.new_empty(0, dtype=torch.int8) for _ in range(2))
    main = gamma is not None or silu or scale is not None
    if main:
        dtype = x.dtype if scale is None else torch.int8
        codes = _last((batch, channels, height, width), dtype, x.device)
    if raw_scales is not None:
        raw_x = _last(x.shape, torch.int8, x.device)
        if skip is not None:
            raw_skip = _last(skip.shape, torch.int8, x.device)
    results = (codes, raw_x, raw_skip)
    if x.numel() and (main or raw_scales is not None):
        norm_groups = groups if gamma is not None else 0
        if plan is None:
            plan = _choose(x, skip, norm_groups, path)
        quantization = (zero_point, qmax, *(raw_zero_points or (0,)), raw_qmax)
        norm = (gamma, beta, eps)
        arguments = (x, skip, norm, norm_groups, silu, scales, quantization, bucket, results)
        if isinstance(plan, SharedPlan):
            norm_hopper.run(*arguments, plan)
        elif isinstance(plan, CooperativePlan):
            norm_cooperative.run(*arguments, plan)
        else:
            _run(*arguments, plan)
    return results


def _choose(
    x: Tensor, skip: Tensor | None, groups: int, path: str | None
) -> Plan | SharedPlan | CooperativePlan:
    """Return the tiles of a call: of which kind decides the path."""
    if path not in (None, *PATHS):
        raise ValueError(f"got path={path!r}; expected one of {PATHS}, or None for the faster")
    batch, _, height, width = x.shape
    images = [x] if skip is None else [x, skip]
    channels = sum(image.shape[1] for image in images)
    pixels = height * width
    portable = make_plan(batch, pixels, channels, groups, x.element_size())
    large = x.element_size() * batch * pixels * channels >= LARGE_MAP
    # Measured there alone, on channels that load in whole vectors.
    pays = batch <= FEW_IMAGES and (large or not portable.one_launch) and _is_hopper(x.device)
    pays = pays and not any(i.shape[1] % 8 for i in images)
    if path == "cooperative" or (path is None and pays):
        held = None
        if groups and x.element_size() == 2:
            processors = multiprocessors(x.device) if x.device.type == "cuda" else _PROCESSORS
            held = make_cooperative_plan(batch, pixels, channels, groups, processors)
        # Slabs of odd groups, or of no whole vectors, spill.
        smooth = held is not None and held.width % 8 == 0 and channels // groups % 2 == 0
        if held is not None and (path is not None or smooth):
            return held
        if path == "cooperative":
            raise ValueError(
                f"got path='cooperative', {batch} images of {channels} channels in {groups} "
                f"groups, {pixels} pixels, {x.dtype}; expected a norm, 16-bit floats, and a map "
                "that the registers of the GPU hold: path='triton'"
            )
    if path == "hopper" or (path is None and groups and _is_hopper(x.device)):
        # The copy engine wants rows and bases of whole 16 bytes, and indexes rows with 32 bits.
        able = norm_hopper is not None and groups > 0 and x.element_size() == 2
        able = able and (x.device.type != "cuda" or _is_hopper(x.device))
        able = able and batch * pixels < 2**31
        able = able and not any(i.shape[1] % 8 or i.data_ptr() % 16 for i in images)
        plan = None
        if able:
            plan = make_shared_plan(batch, pixels, channels, groups, path == "hopper")
        if plan is not None:
            return plan
        if path == "hopper":
            raise ValueError(
                f"got path='hopper', {channels} channels in {groups} groups, {pixels} pixels, "
                f"{x.dtype}; expected a norm, 16-bit floats, channels of x and of skip multiples "
                "of 8, and a slab of whole groups that fits into shared memory: path='triton'"
            )
    return portable


def _run(
    x: Tensor, skip: Tensor | None, norm: tuple[Tensor | None, Tensor | None, float], groups: int,
    silu: bool, scales: tuple[Tensor | None, Tensor | None], quantization: tuple[int, ...],
    bucket: Tensor, results: tuple[Tensor, Tensor, Tensor], plan: Plan,
) -> None:  # fmt: skip
    """Launch what `plan` says, into `results`."""
    batch, c1, height, width = x.shape
    c2 = 0 if skip is None else skip.shape[1]
    channels, pixels = c1 + c2, height * width
    zero_point, qmax, *points, raw_qmax = quantization

    slabs = -(-channels // plan.width)
    tensors = (*scales, last_row(scales[1], skip), bucket, *results)
    numbers = (
        pixels, c1, c2, batch // bucket.numel(), zero_point, qmax, points[0], points[-1], raw_qmax,
    )  # fmt: skip
    meta = {
        "WIDTH": plan.width, "BLOCK_P": plan.block_p, "BLOCK_C": plan.block_c,
        "EVEN": pixels % plan.block_p == 0,
        "SOURCE": source(c1, skip, plan.width), "MAIN": results[0].numel() > 0,
        "num_warps": plan.warps, **switches(silu, scales),
    }  # fmt: skip
    placed = {"EARLY": True, "launch_pdl": True} if early(x.device) else {}
    if plan.one_launch:
        one_launch[(batch * slabs,)](
            x, skip, *norm, *tensors, slabs, *numbers,
            HELD=plan.block_p >= pixels, STAGES=plan.stages, UNROLL=plan.unroll,
            GROUP=channels // groups, GROUPS=power_of_two(plan.width * groups // channels),
            **meta, **placed,
        )  # fmt: skip
        return
    affine = None
    if groups:
        stat_chunks, stat_slabs = -(-pixels // plan.stat_p), -(-channels // plan.stat_c)
        size = (batch, stat_chunks, 2, channels)
        moments = torch.empty(size, dtype=torch.float32, device=x.device)
        channel_moments[(batch * stat_chunks * stat_slabs,)](
            x, skip, moments, stat_slabs, stat_chunks, pixels, c1, c2, BLOCK_P=plan.stat_p,
            BLOCK_C=plan.stat_c, SOURCE=source(c1, skip, plan.stat_c), num_warps=plan.stat_warps,
            **placed,
        )  # fmt: skip
        affine = torch.empty((batch, 2, channels), dtype=torch.float32, device=x.device)
        whole = plan.group_c
        parts, block_c = -(-channels // whole), power_of_two(whole)
        block_s = max(1, min(power_of_two(stat_chunks), 2048 // block_c))
        channel_affine[(batch * parts,)](
            moments, *norm, affine, parts, stat_chunks, pixels, channels, WIDTH=whole,
            BLOCK_C=block_c, BLOCK_S=block_s, STAT_P=plan.stat_p, GROUP=channels // groups,
            GROUPS=power_of_two(whole * groups // channels), SILU=silu,
            num_warps=4, **placed,
        )  # fmt: skip
    chunks = -(-pixels // plan.block_p)
    apply[(batch * chunks * slabs,)](
        x, skip, affine, *tensors, slabs, chunks, *numbers, NORM=groups > 0, **meta, **placed
    )
