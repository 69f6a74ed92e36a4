"""What quantempo does not ship: variants of a recipe, quantized in memory and simulated.

    stored      GPTQ goes over the columns as stored
    smooth=A    inputs of a layer over s, weights times s = max |x|^A / max |w|^(1 - A) by channel
    rotate=N    both times blocks of a Hadamard matrix, of at most N channels
    lowrank=R   a float branch L R of rank R beside each layer: least |(W - Q - L R) X|, damped
    int8=R      the bytes of these branches spent on layers of 8 bits, most error a byte first

Sources: Xiao et al. 2023, "SmoothQuant"; Ashkboos et al. 2024, "QuaRot"; Zhang et al. 2024, "QERA".
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo import quantized as package
from quantempo.calibration.dataset import CalibrationData
from quantempo.engines.base import BACKENDS, channel_dim
from quantempo.models.layers import hooked, input_of
from quantempo.pipeline import quantize as core
from quantempo.quantized import QConv2d, QLayer, QLinear, quantized_layers
from quantempo.recipe import Recipe
from quantempo.rounding import base

__all__ = ["quantized"]

# The module, not the function of its name.
GPTQ: Any = sys.modules["quantempo.rounding.gptq"]
# Dampings of branches, in means of diag(H); the one of least error of the network is taken.
DAMPINGS = (0.0, 0.1, 1.0, 10.0)


def _times(x: Tensor, axis: int, by: Tensor, power: int = 1) -> Tensor:
    """Return x T^power along an axis; by: diagonal (C,) of T, or its blocks (b, b), T T = 1."""
    y = x.movedim(axis, -1)
    if by.ndim == 1:
        return (y * by**power).movedim(-1, axis)
    return (y.unflatten(-1, (-1, len(by))) @ by).flatten(-2).movedim(-1, axis)


def _let(layer: Any, axis: int, by: Tensor) -> None:
    """Let a layer be called with x T."""
    layer.transform = axis, by
    layer.register_forward_pre_hook(lambda _, args: (_times(args[0], axis, by), *args[1:]))


@contextmanager
def _kept() -> Iterator[None]:
    """Let quantized layers have the transforms of float ones for a while."""
    swap_layers, run_until = package.swap_layers, base.run_until

    def swap(denoiser: nn.Module, plans: Any, *rest: Any) -> None:
        old = {p.name: denoiser.get_submodule(p.name) for p in plans if p.kind != "float"}
        swap_layers(denoiser, plans, *rest)
        for name, layer in old.items():
            if hasattr(layer, "transform"):
                _let(denoiser.get_submodule(name), *layer.transform)  # type: ignore[misc]

    def run(modules: Any, call: Any, see: Callable[..., None]) -> None:
        def seen(name: str, args: Any, kwargs: Any) -> None:
            # A block that is one layer will be called with what is recorded.
            if hasattr(modules[name], "transform") and see.__qualname__.startswith("record"):
                axis, by = modules[name].transform
                args = (_times(args[0], axis, by, -1), *args[1:])
            see(name, args, kwargs)

        run_until(modules, call, seen)

    with patch.object(package, "swap_layers", swap), patch.object(base, "run_until", run):
        yield


def _hadamard(width: int, most: int) -> Tensor:
    """Return the largest matrix of a power of 4 up to `most` that divides a width."""
    made, by = torch.ones(1, 1), torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    while len(made) * 4 <= most and width % (len(made) * 4) == 0:
        made = torch.kron(made, by) / 2
    return made


def _transformed(
    denoiser: nn.Module, recipe: Recipe, data: CalibrationData, how: str, value: float
) -> tuple[nn.Module, Recipe]:
    """Return the same float network with transformed layers, and a recipe of the same floats."""
    plans = core.plan(denoiser, recipe, data)
    scales = core.search(denoiser, core.calibrate(denoiser, data, plans, recipe), plans, recipe)
    scales = core.keep_costly(denoiser, data, plans, scales, recipe)
    costly = [key.removesuffix(".costly") for key in scales if key.endswith(".costly")]
    net: Any = copy.deepcopy(denoiser)
    layers = {p.name: net.get_submodule(p.name) for p in plans if p.kind == "int8"}
    layers = {n: o for n, o in layers.items() if n not in costly and getattr(o, "groups", 1) == 1}
    axes = {n: -1 if isinstance(o, nn.Linear) else 1 for n, o in layers.items()}
    tops: dict[str, Tensor] = {}

    def see(name: str, _: Any, *call: Any) -> None:
        top = input_of(*call).abs().movedim(axes[name], -1).flatten(0, -2).amax(0)
        tops[name] = torch.maximum(tops.get(name, top), top)

    with hooked(layers, see, before=True), torch.no_grad():
        for rows in data.calls(torch.arange(len(data)), 32):
            data.replay(net, data.rows(rows))
    segments = {plan.name: plan.segments for plan in plans}
    for name, layer in layers.items():
        weight, top = layer.weight.data, tops[name].clamp_min(1e-5)
        if how == "smooth":
            most = weight.abs().transpose(0, 1).flatten(1).amax(1).clamp_min(1e-5)
            by = most ** (1 - value) / top**value
        else:
            by = _hadamard(math.gcd(*segments[name] or (len(top),)), int(value)).to(top)
        weight.copy_(_times(weight, 1, by, -1))
        _let(layer, axes[name], by)
    return net, recipe.override("layers", exclude=[*recipe.layers.exclude, *costly], float_macs=0.0)


def _stored(cls: Any, hessian: Tensor, damping: float = 0.01) -> Any:
    """Return what `Inverse.of` does, with the columns as they are."""
    order = torch.arange(len(hessian), device=hessian.device)
    return cls(order, GPTQ._inverse_factor(hessian.float().clone(), damping))


class _Branches:
    """The branches of all layers; found: the error E = W - Q that GPTQ leaves, and H = X X^T."""

    def __init__(self, rank: int) -> None:
        self.rank, self.found = rank, dict[str, tuple[Tensor, Tensor]]()

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Find them while layers are rounded; later layers see them."""
        plain, assign, parts = GPTQ.gptq, base.BlockRun.assign, []

        def gptq(weight: Tensor, inverse: Any, scale: Tensor, grid: Any) -> Tensor:
            codes, back = plain(weight, inverse, scale, grid), inverse.order.argsort()
            hessian = torch.cholesky_inverse(inverse.upper.t())[back][:, back]
            parts.append((weight - scale[:, None] * codes, hessian))
            return codes

        def assigned(block: Any, name: str, codes: Tensor) -> None:
            assign(block, name, codes)
            # None: assigned before. Several: groups of a convolution.
            if len(parts) == 1 and type(block.copies[name]) in (QConv2d, QLinear):
                self.found[name] = parts[0]
                self.add(name, block.copies[name], 0.0)
            parts.clear()

        with patch.object(GPTQ, "gptq", gptq), patch.object(base.BlockRun, "assign", assigned):
            yield

    def add(self, name: str, layer: QLayer, damping: float) -> Any:
        """Add the branch of a layer: L what E (H + l I) E^T has most of, R = L^T E."""
        error, hessian = self.found[name]
        weighted = error @ hessian + damping * hessian.diagonal().mean() * error
        left = torch.linalg.eigh((weighted @ error.t()).double())[1][:, -self.rank :].float()
        left, right = (part.bfloat16().float() for part in (left, left.t() @ error))
        weight = (left @ right).reshape(layer.weight_shape)

        def hook(layer: Any, args: Any, y: Tensor) -> Tensor:
            if channel_dim(layer) == -1:
                return y + F.linear(args[0], weight)
            how = layer.stride, layer.padding, layer.dilation, layer.groups
            return y + F.conv2d(args[0], weight, None, *how)

        return layer.register_forward_hook(hook)

    @torch.no_grad()
    def install(self, net: nn.Module, copied: nn.Module, data: CalibrationData) -> dict[str, float]:
        """Add all branches to a network; return its error by damping, 1 without branches."""
        batch, layers = data.rows(data.spread(16)), dict(quantized_layers(copied))
        exact, errors = data.replay(net, batch), {}

        def error() -> Tensor:
            return (data.replay(copied, batch) - exact).square().flatten(1).mean(1)

        plain = error()
        for damping in DAMPINGS:
            handles = [self.add(name, layers[name], damping) for name in self.found]
            errors[damping] = float((error() / plain).mean())
            for handle in handles:
                handle.remove()
        for name in self.found:
            self.add(name, layers[name], min(errors, key=errors.__getitem__))
        return {f"{damping:g}": value for damping, value in errors.items()}


def _extra(layer: QLayer, rank: int) -> int:
    """Return the bytes of a branch in 16 bits."""
    out, width = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
    return 2 * min(rank, out) * (out + width)


def _with_int8(net: nn.Module, recipe: Recipe, data: CalibrationData, rank: int) -> Recipe:
    nearest = core.quantize(net, data, recipe.override("rounding", name="nearest"))
    copied = nearest.install(net, copy=True)
    layers = dict(quantized_layers(copied))
    shares = core.error_shares(net, copied, data, list(layers))
    sizes = {name: math.prod(layer.weight_shape) for name, layer in layers.items()}
    left, bits = float(sum(_extra(layer, rank) for layer in layers.values())), {}
    for name in sorted(sizes, key=lambda n: -shares[n][0] / sizes[n]):
        more = (0.5 - 1 / recipe.weights.group) * sizes[name]
        if more <= left:
            left, bits[name] = left - more, "w8a8"
    return recipe.override("layers", bits=recipe.layers.bits | bits)


def quantized(
    net: nn.Module, recipe: Recipe, data: CalibrationData, variant: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network quantized by a variant of a recipe, and what its row says of it."""
    (how, _, text), start, row = variant.partition("="), time.perf_counter(), {}
    branches = _Branches(int(text)) if how == "lowrank" else None
    with ExitStack() as stack:
        if branches is not None:
            stack.enter_context(branches.rounding())
        elif how == "stored":
            stack.enter_context(patch.object(GPTQ.Inverse, "of", classmethod(_stored)))
        elif how == "int8":
            recipe = _with_int8(net, recipe, data, int(text))
        else:
            net, recipe = _transformed(net, recipe, data, how, float(text))
            stack.enter_context(_kept())
        made = core.quantize(net, data, recipe)
        copied = made.install(net, copy=True).to(next(net.parameters()).device)
    layers = dict(quantized_layers(copied))
    held = 0
    for layer in layers.values():
        layer.kernel = BACKENDS.get("simulated").lower(layer)
        held += sum(part.nbytes for part in layer.stored.values() if part is not None)
    if branches is not None:
        row["errors"] = branches.install(net, copied, data)
        held += sum(_extra(layers[name], branches.rank) for name in branches.found)
    floats = [plan for plan in made.plans if plan.kind == "float"]
    row["float_layers"] = [{"name": plan.name, "reason": plan.reason} for plan in floats]
    row["weight_bits_mean"] = 8 * held / sum(math.prod(o.weight_shape) for o in layers.values())
    row["seconds"] = {"variant": round(time.perf_counter() - start, 3)}
    return copied.eval(), row
