"""Quantize what a layer's input changed since the step before.

Each layer keeps a_hat, its input as the integers tell it, and o_hat = W a_hat:

    first step:  q = clamp(round(x / s_a), -z, 2^8 - 1 - z)      a_hat = s_a q
    later:       q = clamp(round((x - a_hat) / s_d), -n, n)      a_hat += s_d q
    always:      o_hat += s s_w[o] sum_k q q_w                   y = o_hat + bias[o]

with a_hat = o_hat = 0 before a first step, n = 2^(b-1) - 1 and s_d = rate[bucket(t)] * gap, gap the
training time-steps since the call before. What rounding and clipping leave out stays in x - a_hat
and is met by the next step, so errors do not build up. The grid of changes is signed and narrow:
they have no preferred sign, and a clipped one should not get one. What runs it is in
`backends.delta`; rates are measured in `calibrate.deltas`.

Error: |x - a_hat| <= s_d / 2 where nothing is clipped, whatever the number of steps.

Source: after MoDiff (modulated diffusion, 2025); rates per unit of time instead of per step and
a time key instead of a counter are ours, so that another step count works.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantempo.core import QuantSpec
from quantempo.errors import QuantempoError
from quantempo.quantized.layers import QLayer
from quantempo.quantized.swap import LayerPlan, find_clock, quantized_layers

__all__ = [
    "DELTA",
    "DeltaRow",
    "delta_layers",
    "delta_spec",
    "fill_deltas",
    "install_deltas",
    "limit_deltas",
    "plan_memory",
    "reset_deltas",
]

log = logging.getLogger("quantempo")

# How an engine says that it can.
DELTA = "delta quantization"

# a_hat and o_hat are float32: in half precision every step would leave a rounding of its own in
# one and another in the other, and o_hat would no longer be W a_hat.
STATE_BYTES = 4


@dataclass(frozen=True)
class DeltaRow:
    """Say whether one layer keeps state, and what it would cost.

    macs: of one image; bytes: of a_hat and o_hat, an image; delta: whether it does.
    """

    name: str
    macs: int
    bytes: int
    delta: bool


def delta_spec(bits: int) -> QuantSpec:
    """Return the grid of changes: signed, symmetric, narrow."""
    return QuantSpec(bits=bits, signed=True, symmetric=True, narrow=True)


def plan_memory(
    sizes: Mapping[str, tuple[int, int]], macs: Mapping[str, int], megabytes: float
) -> list[DeltaRow]:
    """Choose the layers that run as deltas: the most work first, while the state fits.

    A layer that does not fit is passed over; smaller ones after it may still fit.

    Args:
        sizes: name -> (input, output) elements of one image.
        macs: name -> multiply-accumulates of one image.
        megabytes: 10^6 bytes of state an image, 0 for no limit.

    Returns:
        One row for each layer, the most work first.
    """
    left = megabytes * 1e6 if megabytes else float("inf")
    rows = []
    for name in sorted(sizes, key=lambda name: (-macs[name], name)):
        size = STATE_BYTES * sum(sizes[name])
        rows.append(DeltaRow(name, macs[name], size, size <= left))
        left -= size if size <= left else 0
    return rows


def limit_deltas(plans: list[LayerPlan], rows: list[DeltaRow]) -> list[LayerPlan]:
    """Return the plans with deltas only where the memory plan has them; log what it costs."""
    chosen = {row.name: row for row in rows if row.delta}
    new = [p if p.name in chosen else replace(p, delta_bits=0) for p in plans]
    state = sum(chosen[p.name].bytes for p in new if p.delta_bits)
    others = sum(p.kind == "int8" and not p.delta_bits for p in new)
    log.info(
        "delta: %d layers keep %.2f MB of state an image; %d others take 8-bit inputs",
        sum(p.delta_bits > 0 for p in new), state / 1e6, others,
    )  # fmt: skip
    return new


def install_deltas(
    denoiser: nn.Module, bits: Mapping[str, int], buckets: int, refresh: int = 0
) -> None:
    """Give layers of a quantized denoiser an empty table of rates, and let its clock follow.

    Works on the meta device too (loading). Attach an engine afterwards.

    Args:
        denoiser: quantized in place.
        bits: name -> bits of the changes, 2 to 8; nothing is done if there are none.
        buckets: columns of the tables, 1 or the number of time buckets.
        refresh: a full 8-bit step every so many, 0 for the first alone.

    Raises:
        QuantempoError: not quantized, a name that is no integer layer, bits out of range, or a
            layer whose whole inputs have fewer than 8 bits.
    """
    if not bits:
        return
    clock, layers = find_clock(denoiser), dict(quantized_layers(denoiser))
    if clock is None:
        raise QuantempoError("deltas need a quantized denoiser; pack it first")
    for name, count in bits.items():
        layer = layers.get(name)
        if layer is None:
            raise QuantempoError(f"'{name}' is no integer layer of this model; it cannot be delta")
        if not 2 <= count <= 8 or layer.act_bits != 8:
            raise QuantempoError(
                f"got {count}-bit deltas on {layer.act_bits}-bit inputs of '{name}'; expected 2 to "
                "8 bits on 8: the first step of a trajectory is a whole 8-bit one"
            )
        layer.delta_bits = count
        shape, device = (len(layer.segments), buckets), layer.act_scale.device
        layer.delta_rate = torch.empty(shape, dtype=torch.float32, device=device)
    clock.watch(refresh)


@torch.no_grad()
def fill_deltas(denoiser: nn.Module, rates: Mapping[str, Tensor]) -> None:
    """Copy the rates (S, G) float32 > 0 of every delta layer; raises if one is missing or bad."""
    for name, layer in delta_layers(denoiser):
        rate, table = rates.get(name), layer.delta_rate
        assert table is not None
        if rate is None or rate.shape != table.shape or not bool((rate > 0).all()):
            found = None if rate is None else tuple(rate.shape)
            raise QuantempoError(
                f"got rates {found} for the deltas of '{name}'; expected {tuple(table.shape)} "
                "numbers above 0: search them again"
            )
        table.copy_(rate)


def delta_layers(denoiser: nn.Module) -> Iterator[tuple[str, QLayer]]:
    """Yield (name, layer) of the layers that quantize changes."""
    for name, layer in quantized_layers(denoiser):
        if layer.delta_rate is not None:
            yield name, layer


def reset_deltas(denoiser: nn.Module) -> None:
    """Let the next call start a trajectory, for callers that broke one off.

    Not needed between whole ones: time then goes back up, which starts one as well. So does
    another batch size or image size.
    """
    clock = find_clock(denoiser)
    if clock is not None:
        clock.reset()
