"""Layers that quantize what their input changed since the step before.

One product a call: a first step is a change from zero on the layer's 8-bit grid, so nothing is
computed twice and nothing depends on a value the host would have to wait for. The integer sums are
those of the backend; the formulas are in `quantizers.delta`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantempo.engines.base import Kernel, channel_dim
from quantempo.engines.cuda.layer import TritonKernel
from quantempo.engines.cuda.operands import last
from quantempo.engines.simulated import SimulatedKernel
from quantempo.errors import QuantempoError
from quantempo.kernels.cpu import onednn
from quantempo.quantized import QConv2d, QLayer
from quantempo.quantized.clock import writable

__all__ = ["DeltaKernel", "lower_delta"]

# The zero point of a signed change in unsigned codes.
_MIDDLE = 128


def lower_delta(layer: QLayer, backend: str) -> Kernel:
    """Return the kernel of a layer with `delta_rate`, its sums done by a named backend.

    Raises:
        QuantempoError: a layer without rates, or a backend that has no such kernel.
    """
    if layer.delta_rate is None:
        raise QuantempoError("this layer has no rates of change; install_deltas first")
    if backend == "onednn":
        return DeltaKernel(layer, _OneDNNSums(layer), "onednn delta")
    if backend == "triton":
        return DeltaKernel(layer, _TritonSums(layer), "triton delta")
    if backend == "simulated":
        return DeltaKernel(layer, _SimulatedSums(layer), "simulated delta")
    raise QuantempoError(
        f"backend '{backend}' cannot run deltas; expected one of: onednn, simulated, triton"
    )


class DeltaKernel:
    """Run a layer on changes, keeping a_hat and o_hat between calls.

    The state is the kernel's: it is not saved with the weights and ends with the engine. It is
    begun anew when the clock says so, and for this layer alone when its input has another shape or
    device than before. Without gradients.

    Args:
        layer: with `delta_rate` and a clock that watches.
        sums: called with (segment, integers q as float32, starts) for sum_k q q_w in float32.
        name: what `execution` shows.

    Attributes:
        input, output: float32 a_hat and o_hat, None before the first call.
    """

    def __init__(self, layer: QLayer, sums: Any, name: str) -> None:
        self.layer, self.sums, self.backend = layer, sums, name
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Read the layer's integers; done by the first call, except inside a compiled network."""
        self.sums.prepare(device)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the dtype of x."""
        layer, axis = self.layer, channel_dim(self.layer)
        clock, rates = layer.clock, layer.delta_rate
        assert rates is not None
        if clock.refresh is None:
            raise QuantempoError("the clock does not follow trajectories; install_deltas first")
        value, known, fresh = x.float(), self.input, clock.fresh
        if known is None or not _alike(known, value):
            # In the layout of x; this layer starts anew, whatever the others do.
            self.input = known = torch.zeros_like(value)
            self.output, fresh = None, torch.ones((), dtype=torch.bool, device=x.device)
        known.masked_fill_(fresh, 0.0)
        rows = (-1, 1, 1) if isinstance(layer, QConv2d) else (-1,)
        largest = 2 ** (layer.delta_bits - 1) - 1
        total: Tensor | None = None
        parts = zip(
            value.split(layer.segments, axis), known.split(layer.segments, axis), strict=True
        )
        for i, (segment, before) in enumerate(parts):
            zero = layer.act_zero_point[i].float()
            step = clock.rows(rates[i], x) * clock.gap
            scale = torch.where(fresh, layer.scale_now(i, x), step)
            low = torch.where(fresh, -zero, -float(largest))
            high = torch.where(fresh, layer.act_qmax - zero, float(largest))
            codes = ((segment - before) / scale).round_().maximum(low).minimum(high)
            before.add_(codes * scale)
            term = self.sums(i, codes, fresh) * (scale * layer.weight_scale.reshape(rows))
            total = term if total is None else total + term
        assert total is not None
        if self.output is None:
            self.output = torch.zeros_like(total)
        # In place, for what a recorded graph of the network will read at its next run.
        self.output.masked_fill_(fresh, 0.0).add_(total)
        bias = layer.bias
        y = self.output.clone() if bias is None else self.output + bias.reshape(rows)
        return y.to(x.dtype)


def _alike(known: Tensor, value: Tensor) -> bool:
    """Return whether state may be written in place for this input."""
    return known.shape == value.shape and known.device == value.device and writable(known)


class _SimulatedSums:
    """Exact sums in float arithmetic, on any device."""

    def __init__(self, layer: QLayer) -> None:
        self.kernel = SimulatedKernel(layer)
        self.prepare = self.kernel.prepare

    def __call__(self, segment: int, codes: Tensor, starts: Tensor) -> Tensor:
        return self.kernel.sums(segment, codes)


class _TritonSums:
    """Int8 kernels of a GPU; whether a step is a first one stays on the device."""

    def __init__(self, layer: QLayer) -> None:
        self.kernel = TritonKernel(layer)
        self.prepare = self.kernel.prepare

    def __call__(self, segment: int, codes: Tensor, starts: Tensor) -> Tensor:
        operands = self.kernel.here(codes.device)
        # Stored codes are q - 128: a change has its zero point in the middle, where that is 0.
        zero = operands.grids[segment].zero_point - _MIDDLE
        stored = (codes + torch.where(starts, zero, 0)).to(torch.int8)
        table = torch.where(starts, operands.tables[segment], 0)
        if isinstance(self.kernel.layer, QConv2d):
            how = operands.shape
            return operands.conv(last(stored), torch.int32, segment, table, **how).float()
        rows = stored.reshape(-1, stored.shape[-1]).contiguous()
        sums = operands.gemm(rows, torch.int32, segment, table)
        return sums.reshape(*codes.shape[:-1], -1).float()


class _OneDNNSums:
    """Int8 kernels of oneDNN; the scales stay out of them, they change with every gap."""

    def __init__(self, layer: QLayer) -> None:
        self.layer = layer
        self.parts: list[Any] = []

    def __call__(self, segment: int, codes: Tensor, starts: Tensor) -> Tensor:
        if not self.parts:
            self.prepare(codes.device)
        # On the CPU there is nothing to wait for.
        zero = int(self.layer.act_zero_point[segment]) if bool(starts) else _MIDDLE
        unsigned = codes.add_(zero).to(torch.uint8)
        if isinstance(self.layer, QConv2d):
            return self.parts[segment](unsigned, 1.0, zero, None)
        flat = unsigned.reshape(-1, unsigned.shape[-1]).contiguous()
        return self.parts[segment](flat, 1.0, zero, None).reshape(*codes.shape[:-1], -1)

    def prepare(self, device: torch.device) -> None:
        layer, self.parts = self.layer, []
        width = layer.segments if len(layer.segments) > 1 else (layer.weight_codes.shape[1],)
        one = torch.ones_like(layer.weight_scale)
        for weight in layer.weight_codes.split(width, 1):
            if isinstance(layer, QConv2d):
                how = (layer.stride, layer.padding, layer.dilation, layer.groups)
                self.parts.append(onednn.Int8Conv2d(weight.contiguous(), one, *how))
            else:
                self.parts.append(onednn.Int8Linear(weight.contiguous(), one))
