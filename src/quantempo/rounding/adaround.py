"""Learn for every weight whether to round up or down, a block at a time.

    w_hat = s clamp(floor + h(v), qmin, qmax),   penalty sum (1 - |2 h - 1|^beta)

Source: Nagel et al. 2020 (AdaRound, eq. 21-24) on the blocks of Li et al. 2021 (BRECQ).
"""

import torch
from torch import Tensor

from quantempo.rounding.base import ROUNDINGS, Rounding, Unit, check_start
from quantempo.rounding.learn import errors, learn
from quantempo.rounding.soft import SoftKernel

__all__ = ["START_KEPT"]

# What is noted of a block whose start was better.
START_KEPT = "the start was better and is kept"

# Share of the iterations before the penalty sets in; its exponent falls from the first to the
# second afterwards, as in the papers.
WARM_UP = 0.2
BETA = (20.0, 2.0)
# Of the penalty, a mean over weights, beside a loss of 1.8 at the start. Below 100 a few percent
# of h are undecided at the end, and rounding them costs more than all that was learned (measured
# on a small block: 16 leaves 15 % undecided, 500 none, with errors 0.55 and 0.48 of the start's).
WEIGHT = 300.0
# A v has about 3 to go and moves by at most the rate in an iteration. The papers' 1e-3 is for
# 20,000 iterations; fewer need larger steps to get anywhere.
TRAVEL, LEAST_RATE, MOST_RATE = 30.0, 1e-3, 0.1
# From the nearest codes h starts where the soft weight is the float one. From others it starts
# near the codes: at the float weight what they know would be lost (measured on the first block of
# the bundled model, 4 bits, 100 iterations: error 2.5e-3 from a gptq start of 2.3e-5).
SPREAD = {"nearest": 1.0}
SPREAD_ELSE = 0.2


def _adaround_codes(unit: Unit) -> dict[str, Tensor]:
    """Learn better codes than another rounding's; keep those of the smaller error, over all rows.

    The block's layers hold them afterwards.
    """
    settings, block = unit.settings, unit.block
    check_start(settings)
    start = ROUNDINGS.get(settings.start).codes(unit)
    for name, value in start.items():
        block.assign(name, value)
    if settings.iterations == 0:
        return start
    powers = block.powers()
    before = block.loss(powers)
    codes = _learn_codes(unit, start, powers)
    for name, value in codes.items():
        block.assign(name, value)
    after = block.loss(powers)
    better = after < before
    moved = sum(int((codes[name] != start[name]).sum()) for name in codes)
    share = moved / max(1, sum(value.numel() for value in codes.values()))
    kept = f"{100 * share:.1f} % of the codes moved" if better else START_KEPT
    unit.notes.append(f"adaround {before:.3e} -> {after:.3e}, {kept}")
    if not better:
        for name, value in start.items():
            block.assign(name, value)
    return codes if better else start


def _learn_codes(unit: Unit, start: dict[str, Tensor], powers: list[Tensor]) -> dict[str, Tensor]:
    """Return the learned codes; the block's layers are left with the soft kernels."""
    settings, block = unit.settings, unit.block
    # Of the integers: soft codes start near the float weights, with hardly an error.
    at_start = errors(block, powers)
    spread = SPREAD.get(settings.start, SPREAD_ELSE)
    kernels = {
        name: SoftKernel(block.copies[name], weight, start[name], unit.grid(name), spread)
        for name, weight in unit.weights.items()
    }
    for name, kernel in kernels.items():
        block.copies[name].kernel = kernel
    count = sum(kernel.v.numel() for kernel in kernels.values())
    warm = int(WARM_UP * settings.iterations)

    def penalty(iteration: int) -> Tensor:
        if iteration < warm:
            return torch.zeros((), device=block.device)
        done = (iteration - warm) / max(1, settings.iterations - warm)
        beta = BETA[0] + (BETA[1] - BETA[0]) * done
        sums = [(1 - (2 * kernel.h() - 1).abs().pow(beta)).sum() for kernel in kernels.values()]
        return WEIGHT * torch.stack(sums).sum() / count

    rate = min(MOST_RATE, max(LEAST_RATE, TRAVEL / settings.iterations))
    parameters = [kernel.v for kernel in kernels.values()]
    learn(block, parameters, settings, powers=powers, start=at_start, rate=rate, penalty=penalty)
    return {name: kernel.codes() for name, kernel in kernels.items()}


ROUNDINGS.register("adaround")(Rounding("block", _adaround_codes))
