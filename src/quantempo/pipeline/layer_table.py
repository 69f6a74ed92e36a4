"""The layer table: what every Conv2d and Linear became, and why."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from quantempo.calibration.dataset import CalibrationData
from quantempo.engines.fusion import report
from quantempo.engines.layerwise import execution
from quantempo.engines.select import ENGINES, attach
from quantempo.engines.simulated import once
from quantempo.errors import QuantempoError
from quantempo.evaluation.fidelity import sqnr_db
from quantempo.models.layers import LAYERS, Site, denoisers_of, hooked, input_of, sites
from quantempo.models.load import check_device, load_pipeline
from quantempo.models.macs import ATTENTION_MATMULS, count_macs
from quantempo.quantized import LayerPlan, QLayer, find_clock, quantized_layers
from quantempo.quantized.attention import marked_attention

__all__ = [
    "describe", "int8_share", "layer_rows", "layer_sqnr", "mean_weight_bits", "measured_rows",
    "weight_rows",
]  # fmt: skip


def measured_rows(
    denoiser: nn.Module, packed: nn.Module, plans: list[LayerPlan], data: CalibrationData
) -> list[dict[str, Any]]:
    """Return `layer_rows` with work and errors measured on a few rows of the calibration set."""
    if not len(data):
        return layer_rows(sites(denoiser), plans, denoiser, {}, {})
    batch = data.rows(data.spread(16))

    def forward() -> Tensor:
        return data.replay(denoiser, batch)

    macs = count_macs(denoiser, forward, len(batch.x_t))
    sqnr = layer_sqnr(denoiser, packed, batch.t, forward)
    return layer_rows(sites(denoiser), plans, packed, macs, sqnr)


def layer_rows(
    found: list[Site], plans: list[LayerPlan], denoiser: nn.Module, macs: Mapping[str, int],
    sqnr_db: Mapping[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row for each site, in the order of `plans`, and one for the attention matmuls.

    denoiser: the packed one; macs: per sample, see `count_macs`.
    """
    rows = []
    for site, plan in zip(found, plans, strict=True):
        layer = denoiser.get_submodule(site.name)
        row = _row(site.name, type(site.layer).__name__, plan.role, macs.get(site.name, 0))
        row |= {
            "weight_shape": list(site.layer.weight.shape),
            "bits_weight": {"float16": 16, "weight_only": plan.weight_bits}.get(plan.kind, 32),
            "reason": plan.reason,
            "sqnr_db": sqnr_db.get(site.name),
        }
        if plan.group:
            row["group"] = plan.group
        if isinstance(layer, QLayer):
            row |= {
                "bits_weight": layer.weight_bits,
                "group": plan.group,
                "bits_activation": layer.act_bits,
                "segments": list(layer.segments),
                "buckets": layer.act_scale.shape[1],
                "zero_point": layer.act_zero_point.tolist(),
            }
            if not layer.dynamic:
                least, most = layer.act_scale.aminmax()
                row |= {"scale_min": float(least), "scale_max": float(most)}
        rows.append(row)
    row = _row(ATTENTION_MATMULS, "matmul", "attention", macs.get(ATTENTION_MATMULS, 0))
    row["reason"] = _attention_reason(denoiser)
    return [*rows, row]


def _attention_reason(denoiser: nn.Module) -> str:
    """Return why attention is in float, or of how many modules it is in 8 bits on a GPU."""
    if not (found := marked_attention(denoiser)):
        return "product of two activations: softmax and its neighbours stay in float"
    eight = [known.error for known in found.values() if known.chosen]
    left = [f"; not {name}: {v.error:.2%}" for name, v in found.items() if not v.chosen]
    tokens = min(known.tokens for known in found.values()) or "unknown"
    said = f"{len(eight)} of {len(found)} in 8 bits where engine triton can, error"
    return f"{said} up to {max(eight, default=0):.2%} (tokens: {tokens}){''.join(left)}"


def _row(name: str, kind: str, role: str, macs: int) -> dict[str, Any]:
    """Return the row of something that stays in float."""
    empty = ("bits_weight", "buckets", "scale_min", "scale_max", "zero_point", "reason", "sqnr_db")
    row: dict[str, Any] = {"name": name, "kind": kind, "role": role, "macs": macs}
    row |= {"weight_shape": [], "segments": [], "bits_activation": 32}
    return row | dict.fromkeys(empty)


def int8_share(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of MACs in integers: of Conv2d and Linear, and with attention matmuls."""

    def share(rows: list[dict[str, Any]]) -> float:
        integer = sum(row["macs"] for row in rows if row["bits_activation"] <= 8)
        return integer / max(1, sum(row["macs"] for row in rows))

    layers = [row for row in rows if row["kind"] != "matmul"]
    return {"int8_mac_share": share(layers), "int8_mac_share_with_attention": share(rows)}


def mean_weight_bits(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean bits a weight of the integer layers, groups included; None without layers."""
    layers = [row for row in rows if row["kind"] != "matmul" and row["bits_activation"] <= 8]
    sizes = [math.prod(row["weight_shape"]) for row in layers]
    each = (r["bits_weight"] + (8 / r["group"] if r.get("group") else 0) for r in layers)
    bits = sum(bits * size for bits, size in zip(each, sizes, strict=True))
    return bits / sum(sizes) if layers else None


@torch.no_grad()
def layer_sqnr(
    float_denoiser: nn.Module, packed: nn.Module, timestep: Tensor, call: Callable[[], Any]
) -> dict[str, float]:
    """Return the SQNR of each integer layer of `packed`, simulated, on inputs of a float `call`."""
    clock = find_clock(packed)
    assert clock is not None
    # Both on one device; the packed model may have been built on another.
    packed.to(next(float_denoiser.parameters()).device)
    clock.set(timestep)
    result: dict[str, float] = {}

    layers = dict(quantized_layers(packed))

    def compare(name: str, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        kernel = partial(once, layers[name], True)
        found = sqnr_db(output, layers[name].run(kernel, input_of(args, kwargs)))
        # A layer that is zero has none, and JSON no infinity.
        if math.isfinite(found):
            result[name] = found

    with hooked({name: float_denoiser.get_submodule(name) for name in layers}, compare):
        call()
    return result


def weight_rows(component: str, part: nn.Module) -> list[dict[str, Any]]:
    """Return a row for each layer of a component whose weights alone are int8."""
    rows, found = [], {"bits_weight": 8, "reason": "weight alone is int8, input is float"}
    for name, layer in part.named_modules():
        if isinstance(layer, LAYERS):
            kind = type(layer).__name__.removeprefix("Parametrized")
            row = _row(f"{component}.{name}", kind, "linear", 0) | found
            rows.append(row | {"weight_shape": [*layer.weight.shape], "backend": "float"})
    return rows


def describe(
    packed: str | Path, device: str | None = None
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, str]]:
    """Return the layer table of a packed folder, with what runs each layer; unfused blocks; notes.

    The default engine of the device (None: a GPU if there is one) is attached, so "backend" is what
    runs there: "onednn, fused", "onednn", "simulated", "float". Unfused: name of a block -> why.
    Notes: what --memory does there; where a LoRA is slower.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    pipe = load_pipeline(packed)
    found = denoisers_of(pipe).items()
    parts = [(name, part.to(device)) for name, part in found if find_clock(part) is not None]
    if not parts:
        raise QuantempoError(f"'{packed}' is a float model; expected a packed one (RUN/packed)")
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    for number, (name, part) in enumerate(parts):
        start = f"{name}." if number else ""
        more, unfused = _described(part)
        rows += [row | {"name": start + row["name"]} for row in more]
        reasons |= {start + block: reason for block, reason in unfused.items()}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and any(map(is_parametrized, part.modules())):
            rows += weight_rows(name, part)
    gpu = torch.device(device).type == "cuda"
    notes = {"--memory": "blocks beyond it are copied in by each call" if gpu else "for a GPU only"}
    return rows, reasons, notes


def _described(denoiser: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    config = denoiser.hf_quantizer.quantization_config
    settings = {k: v for k, v in denoiser.config.items() if k != "quantization_config"}
    with torch.device("meta"):
        floating = type(denoiser).from_config(settings)
    rows = layer_rows(sites(floating), config.plans(floating), denoiser, {}, {})
    engine, runs = attach(denoiser), execution(denoiser)
    for row in rows:
        known = runs.get(row["name"], "float")
        # An engine that compiles the whole network has no kernels of layers.
        row["backend"] = known = engine if known == "none" else known
        if row.get("group") and row["bits_activation"] <= 8:
            holds = ENGINES.get(known.partition(",")[0]).holds
            row["backend"] += f", {holds(denoiser.get_submodule(row['name']))}"
    return rows, {row.name: row.reason for row in report(denoiser) if row.reason is not None}
