"""Round column by column and let later columns make up for the error of earlier ones.

    minimise ||(W - s q) X||^2 over integers q, greedily, given H = X X^T

Layers behind quantized ones receive X instead of the float network's X_f. With `rounding.correct`
c > 0 (asymmetric calibration) W is first replaced by what makes up for it, l the damping:

    W' = W + c W (X_f - X) X^T (H + l I)^-1,   for c = 1
    argmin over W' of ||W X_f - W' X||^2 + l ||W' - W||^2

Source: Frantar et al. 2022, "GPTQ", algorithm 1, with columns in the order of descending diag(H);
Li et al. 2025, "GPTAQ", and Zhang et al. 2025, "Qronos", for targets of the float network's inputs.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.calibration.dataset import CalibrationData
from quantempo.core import Format, Grid, GroupFormat, Paged, loaded, ranks
from quantempo.errors import QuantempoError, log
from quantempo.models.layers import input_of
from quantempo.quantized import LayerPlan, QConv2d, QLayer
from quantempo.recipe import RoundingSettings
from quantempo.rounding import base
from quantempo.run_folder import Kept
from quantempo.scales import search_groups

__all__ = ["Inverse", "gptq", "input_moments", "moments", "round_alone"]

# Factors on the damping that are tried in float64, one after the other.
_HARDER = (1.0, 10.0, 100.0)
# Bytes of unfolded patches at a time.
_PATCH_BYTES = 2**28


class Inverse(NamedTuple):
    """The inverse U^T U of a damped hessian: U `upper` (K, K) float32, its rows in `order` (K,)."""

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: float = 0.01) -> "Inverse":
        """Factor (H + damping mean(diag H) I)^-1; H (K, K), semi-definite, is not changed."""
        if not bool(hessian.isfinite().all()):
            raise QuantempoError("got a hessian that is not finite; check checkpoint and trace")
        order = hessian.diagonal().argsort(descending=True, stable=True)
        return cls(order, _inverse_factor(hessian[order][:, order].float(), damping))

    def diagonal(self) -> Tensor:
        """Return the diagonal, (K,), > 0."""
        return self.upper.square().sum(0)[self.order.argsort()]

    def corrected(self, weight: Tensor, cross: Tensor, share: float = 1.0) -> Tensor:
        """Return W' as the module says, (O, K) float32; cross: (X_f - X) X^T, scaled as H."""
        rows = (weight.float() @ cross)[:, self.order]
        return weight + share * (rows @ self.upper.t() @ self.upper)[:, self.order.argsort()]


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor | Inverse, scale: Tensor, spec: Format | Grid,
    damping: float = 0.01, block: int = 128,
) -> Tensor:  # fmt: skip
    """Return codes (O, K) int8 in [qmin, qmax] that minimise tr((W - s q) H (W - s q)^T), greedily.

    With U the upper Cholesky factor of (H + damping mean(diag H) I)^-1 and columns j in order: q_j
    = clamp(round(w_j / s)), then w_k -= (w_j - s q_j) U_jk / U_jj for all later k. A diagonal H
    gives the nearest codes exactly. Float32; float64 where H is near singular.

    weight, scale: (O, K) floating and (O,) float32, > 0; hessian: (K, K) = X X^T up to a factor, or
    what `Inverse` made of it; block: columns updated together; changes the order of sums only.
    Raises QuantempoError: H is not finite or not positive semi-definite.
    """
    width = weight.shape[1]
    order, factor = hessian if isinstance(hessian, Inverse) else Inverse.of(hessian, damping)
    # Columns as rows: each step reads and writes whole contiguous rows.
    rest = weight.float()[:, order].t().contiguous()
    step, grid = scale.float(), Grid.of(spec)[:, order]
    codes, columns = torch.empty_like(rest), _columns(rest.device.type)
    for first in range(0, width, block):
        last = min(first + block, width)
        here, part = factor[first:last, first:last], grid[:, first:last]
        errors = torch.empty_like(rest[first:last])
        every = (rest[first:last], codes[first:last], errors, here, step)
        columns(*every, (part.step, part.low, part.high))
        rest[last:] -= factor[first:last, last:].t() @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().to(torch.int8).contiguous()


@functools.cache
def _columns(device: str) -> Callable[..., None]:
    """Return what rounds a block of columns on a type of device, see `kernels.gpu.gptq`."""
    if device == "cuda":
        try:
            return importlib.import_module("quantempo.kernels.gpu.gptq").launch  # type: ignore[no-any-return]
        except ImportError as error:
            log.warning("gptq: column by column, many times slower: no kernel here (%s)", error)
    return _one_by_one


def _one_by_one(
    rest: Tensor, codes: Tensor, errors: Tensor, factor: Tensor, scale: Tensor, grid: Any
) -> None:
    every = Grid(*grid)
    for j, column in enumerate(rest):
        codes[j] = code = every[:, j].round(column / scale)
        errors[j] = (column - code * scale) / factor[j, j]
        rest[j + 1 :] -= torch.outer(factor[j, j + 1 :], errors[j])


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped hessian (changed), float32."""
    diagonal = hessian.diagonal()
    # A column that no input ever reaches: any value does, and its row holds zeros alone.
    diagonal[diagonal <= 0] = 1.0 if not bool((diagonal > 0).any()) else float(diagonal.mean())
    mean = float(diagonal.mean())
    before = diagonal.clone()
    diagonal.add_(damping * mean)
    factor = _factor(hessian)
    if factor is not None:
        return factor
    diagonal.copy_(before)
    for harder in _HARDER:
        damped = hessian.double()
        damped.diagonal().add_(harder * damping * mean)
        factor = _factor(damped)
        if factor is not None:
            log.warning(
                "gptq: a hessian of %d columns is near singular; float64 with damping %g instead "
                "of float32 with %g", len(hessian), harder * damping, damping,
            )  # fmt: skip
            return factor.float()
    raise QuantempoError(
        f"no Cholesky factor of a hessian of {len(hessian)} columns even with damping "
        f"{_HARDER[-1] * damping}; take more samples of the trace, or rounding 'nearest'"
    )


def _factor(damped: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        return None
    lower = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(lower, upper=True)
    return None if bool(failed) or not bool(upper.isfinite().all()) else upper


def moments(layer: QLayer, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Return X X^T of an input, (groups, K, K) float32, K in the order of weight.flatten(1).

    x: (B, C, H, W), or (..., C) for a linear layer; already on the layer's grid; other: Y of the
    same shape, for Y X^T instead.
    Memory: patches of a convolution are made for a few images at a time, 256 MB of each.
    """
    y = x if other is None else other
    if not isinstance(layer, QConv2d):
        return (y.reshape(-1, y.shape[-1]).t() @ x.reshape(-1, x.shape[-1]))[None]
    width = math.prod(layer.weight_shape[1:])
    total = x.new_zeros(layer.groups, width, width)
    positions = 1
    for i in (0, 1):
        span = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        positions *= (x.shape[2 + i] + 2 * layer.padding[i] - span) // layer.stride[i] + 1
    rows = max(1, _PATCH_BYTES // (4 * layer.groups * width * positions))

    def patches(part: Tensor) -> Tensor:
        found = F.unfold(part, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        # (b, groups K, L) -> (groups, K, b L)
        return found.unflatten(1, (layer.groups, width)).permute(1, 2, 0, 3).flatten(2)

    for part, beside in zip(x.split(rows), y.split(rows), strict=True):
        right = patches(part)
        left = right if other is None else patches(beside)
        total.baddbmm_(left, right.transpose(1, 2))
    return total


@torch.no_grad()
def input_moments(
    block: base.BlockRun, names: Sequence[str], *, cross: bool = False
) -> list[tuple[list[str], Tensor, Tensor | None]]:
    """Return X X^T of the quantized inputs X of layers and, if `cross`, (X_f - X) X^T, or None.

    (groups, K, K) each, means over all recorded rows, a batch at a time; layers that multiply the
    same X are named together. The block runs with its integers as they are now, up to the last of
    the layers; X_f is what a layer of the float network gets.
    """
    found, count = [(list(names), list[Tensor]())], 0
    exact = block.layer_inputs(names, exact=True) if cross else repeat({})
    for xs, wanted in zip(block.layer_inputs(names), exact, strict=False):
        before, found = found, []
        for together, totals in before:
            parts = _alike(block, together, xs, wanted)
            for same, layer, (x, *others) in parts:
                # Those that differ from here on have had the same sums.
                own = totals if same is parts[-1][0] else [t.clone() for t in totals]
                kinds = (None, *others)
                if own:
                    pairs = zip(own, kinds, strict=True)
                    own = [t.add_(moments(layer, x, other)) for t, other in pairs]
                found.append((same, own or [moments(layer, x, other) for other in kinds]))
        count += len(next(iter(xs.values())))
    # Means, so that the numbers do not grow with the set.
    every = ((same, *(t.div_(count) for t in totals)) for same, totals in found)
    return [(same, hessian, rest[0] if rest else None) for same, hessian, *rest in every]


def _alike(
    block: base.BlockRun, names: Sequence[str], xs: Mapping[str, Tensor], exact: Mapping[str, Any]
) -> list[tuple[list[str], QLayer, list[Tensor]]]:
    """Return X, and X_f - X if known, of layers, with the names of all that multiply the same."""
    found: list[tuple[list[str], QLayer, list[Tensor]]] = []
    for name in names:
        layer, wanted = block.copies[name], exact.get(name)
        seen = [base.dequantized_input(layer, layer.operand(xs[name]))]
        if wanted is not None:
            seen.append(layer.operand(wanted).float() - seen[0])
        for same, other, values in found:
            if _window(layer) == _window(other) and all(map(torch.equal, seen, values)):
                same.append(name)
                break
        else:
            found.append(([name], layer, seen))
    return found


def _window(layer: QLayer) -> tuple[Any, ...]:
    """Return all of a layer on which `moments` depends."""
    fields = ("kernel_size", "stride", "padding", "dilation", "groups")
    return (layer.weight_shape[1:], *(getattr(layer, field, None) for field in fields))


def _gptq_codes(unit: base.Unit) -> dict[str, Tensor]:
    """Round the layers of a block step by step, each on the inputs it will really get.

    Those come from the block whose earlier steps are rounded already; its layers hold the codes
    afterwards. Each layer of a step is of one rank. Scales of weights in groups are searched again
    for what is rounded here, the error of column j counting 1 / (H^-1)_jj; others stay, so that a
    correction may lead beyond the codes: counted, and logged.
    Memory: 5 K^2 float32 while H is factored, K = weight[0].numel(); 4 without `correct`; 2 or 1
    for each other input of the step.
    """
    codes, cut, groups, share = {}, 0, unit.groups or {}, unit.settings.correct
    for step in unit.block.steps:
        mine = ranks.mine(step, [unit.weights[name][0].numel() for name in step])
        found = dict[str, Any]()
        # Layers of equal inputs share what is factored; a rank may have none of a step.
        together = input_moments(unit.block, mine, cross=share > 0) if mine else []
        for names, hessian, cross in together:
            inverses = [Inverse.of(h) for h in hessian]
            for n in names:
                found[n] = _round_layer(unit, n, inverses, cross), unit.scales[n], groups.get(n)
        for name, ((value, more), scale, group) in ranks.merged(found).items():
            unit.scales[name].copy_(scale)
            if group is not None:
                groups[name].copy_(group)
            codes[name] = value.to(unit.weights[name].device)
            unit.block.assign(name, codes[name])
            cut += more
    if cut:
        most, name = sum(weight.numel() for weight in unit.weights.values()), unit.block.name
        log.info("%s: `correct` leads %d of %d weights beyond their codes", name, cut, most)
    return codes


def _round_layer(
    unit: base.Unit, name: str, inverses: Sequence[Inverse], cross: Tensor | None
) -> tuple[Tensor, int]:
    """Return the codes of a layer, groups of a convolution apart, and how many more are cut off."""
    weight, layer, share = unit.weights[name], unit.block.copies[name], unit.settings.correct
    rows, cut = len(weight) // len(inverses), 0
    parts = list(weight.detach().float().flatten(1).split(rows))
    if cross is not None:
        both = zip(inverses, parts, cross, strict=True)
        parts = [inverse.corrected(part, c, share) for inverse, part, c in both]
    spec, scale = unit.specs[name], unit.scales[name]
    if isinstance(spec, GroupFormat) and unit.groups is not None:
        counts = torch.cat([(1 / v.diagonal()).expand(rows, -1) for v in inverses])
        shaped = (t.reshape(weight.shape) for t in (torch.cat(parts), counts))
        found = search_groups(next(shaped), spec, next(shaped))
        scale.copy_(found.scale)
        unit.groups[name].copy_(found.groups)
    elif cross is not None:
        ratios = (w / scale[:, None] for w in (torch.cat(parts), weight.flatten(1)))
        far, near = ((spec.grid(()).round(r) - r).abs() > 0.5 for r in ratios)
        cut = int((far & ~near).sum())
    grid, starts = unit.grid(name), range(0, len(weight), rows)
    every = zip(parts, inverses, scale.split(rows), starts, strict=True)
    done = [gptq(part, inverse, some, grid[i : i + rows]) for part, inverse, some, i in every]
    return torch.cat(done).reshape(layer.weight_shape), cut


@torch.no_grad()
def round_alone(
    denoiser: nn.Module, data: CalibrationData, plans: Sequence[LayerPlan],
    settings: RoundingSettings, kept: Kept | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return NAME int8 (O, K), NAME.weight_scale and NAME.weight_group of layers of float inputs.

    H = X X^T of their inputs in the float network, of `settings.samples` rows from all over the
    set: layers of equal ones share it. kept: see `round_denoiser`.
    """
    kept = Kept(kept.folder, f"{kept.key} {settings}") if kept else Kept()
    some = {f"{p.name}.safetensors": p for p in plans if p.kind == "weight_only" and p.group}
    done = ranks.told([file for file in some if kept.read(file)[0]])
    every: dict[str, Any] = {p.name: denoiser.get_submodule(p.name) for p in some.values()}
    layers = {p.name: every[p.name] for file, p in some.items() if file not in done}
    # By the first of the layers of equal inputs, where later calls end.
    found = dict[str, tuple[Tensor, list[str], Tensor]]()

    def see(name: str, args: Any, kwargs: Any) -> None:
        x = input_of(args, kwargs).float().flatten(0, -2)
        if name not in found:
            same = (names for y, names, _ in found.values() if torch.equal(x, y))
            if (names := next(same, None)) is not None:
                names.append(name)
                return
            found[name] = x, [name], x.new_zeros(x.shape[1], x.shape[1])
        found[name][2].addmm_(x.t(), x)

    index = torch.linspace(0, len(data) - 1, min(settings.samples, len(data))).long()
    for rows in data.calls(index, settings.batch) if layers else []:
        again = {name for _, names, _ in found.values() for name in names[1:]}
        waiting = {name: layer for name, layer in layers.items() if name not in again}
        with suppress(base.UnreachedError):
            base.run_until(waiting, partial(data.replay, denoiser, data.rows(rows)), see)
    shared: list[Any] = [(names, hessian) for _, names, hessian in found.values()]
    if idle := sorted(layers.keys() - {name for names, _ in shared for name in names}):
        log.warning("never run by the trace, rounded to nearest: %s", ", ".join(idle))
        shared.append((idle, None))
    result = dict[str, Tensor]()
    # The first rank is as fast alone.
    for names, hessian in [] if ranks.rank() else shared:
        inverse = None if hessian is None else Inverse.of(hessian)
        for file, p in some.items():
            if p.name in names:
                made = _alone(p, loaded(layers[p.name].weight.detach()).float(), inverse)
                kept.write(file, True, made)
                result |= {} if kept.folder else made
    result = ranks.told(result)
    for file, p in some.items() if kept.folder else ():
        paged = isinstance(every[p.name].weight, Paged)
        result |= kept.folder.read_safetensors(file, paged=paged)  # type: ignore[union-attr]
    return result


def _alone(plan: LayerPlan, weight: Tensor, inverse: Inverse | None) -> dict[str, Tensor]:
    """Return the tensors of one layer, to nearest where nothing is known of its inputs."""
    spec = GroupFormat(plan.weight_bits, group=plan.group)
    scale, groups = search_groups(weight, spec, inverse and 1 / inverse.diagonal())
    grid = spec.grid(weight.shape, groups)
    codes = gptq(weight, inverse, scale, grid) if inverse else base.nearest(weight, scale, grid)
    found = {"": codes, ".weight_scale": scale, ".weight_group": groups}
    return {f"{plan.name}{part}": value.cpu() for part, value in found.items()}


base.ROUNDINGS.register("gptq")(base.Rounding("hessian", _gptq_codes))
