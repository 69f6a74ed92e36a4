"""Write and read ComfyUI's quantized checkpoints; `docs/formats/comfy.md` has every tensor.

    y = (x_int8 x_scale[token]) (weight[o] weight_scale[o])^T + bias        int8_tensorwise

Layers that the format cannot say are written in 16 bits, those it says otherwise than we do are
rounded anew when read; each is listed with its reason. A rotation multiplies 256 neighbouring
inputs by H_256 = h x h x h x h / 16 (Kronecker products), its own inverse; h is 4 x 4, of ones with
-1 on the anti-diagonal.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quantempo.checkpoint.diffusers_plugin import mark_quantized, quantize_without_data
from quantempo.core.paged import loaded, paged_tensors, save_tensors
from quantempo.errors import QuantempoError, log
from quantempo.export.names import groups, joined, parted
from quantempo.models.layers import denoisers_of
from quantempo.models.load import load_pipeline
from quantempo.quantized import (
    CLOCK_NAME,
    QLayer,
    QLinear,
    WeightOnlyLinear,
    find_clock,
    row_codes,
)
from quantempo.run_folder import RunFolder, atomic_path, reading

__all__ = ["hadamard", "read", "write"]

_ROTATED = 256
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# Format -> tensors of a layer besides `weight`, by name.
_PARTS = {
    "int8_tensorwise": {"weight_scale"},
    "float8_e4m3fn": {"weight_scale"},
    "asym_w4a8_int8": {"weight_codebook", "weight_s_rel", "weight_s_channel"},
}


def hadamard(x: Tensor) -> Tensor:
    """Return x with each 256 neighbours of the last dimension, a multiple, times H_256 (module)."""
    h = torch.ones(4, 4, dtype=x.dtype, device=x.device) - 2 * torch.eye(4).flip(0).to(x)
    whole = torch.kron(torch.kron(h, h), torch.kron(h, h)) / 16
    return (x.unflatten(-1, (-1, _ROTATED)) @ whole).flatten(-2)


@torch.no_grad()
def write(
    packed: Path, out: Path, *, rotate: bool = False, force: bool = False, **_: Any
) -> dict[str, Any]:  # fmt: skip
    """Write the denoiser of a packed folder as OUT, one safetensors file.

    Names are the original ones where we know them (FLUX), else those of diffusers. rotate: round
    weights of a multiple of 256 inputs anew, rotated; weights that are not int8 are bfloat16.
    Returns counts, and `not_said`: layer -> reason, bytes in 16 bits.
    Raises QuantempoError: OUT exists, or a pipeline without one packed network.
    """
    if out.exists() and (out.is_dir() or not force):
        raise QuantempoError(f"{out} exists; name another file, or --force to replace it")
    networks = [n for n in denoisers_of(load_pipeline(packed)).values() if find_clock(n)]
    if len(networks) != 1:
        raise QuantempoError(f"{packed} has {len(networks)} packed networks; a file holds one")
    layers = {
        n: m for n, m in networks[0].named_modules() if isinstance(m, QLayer | WeightOnlyLinear)
    }
    known, reasons = groups(networks[0]), {n: _unsaid(layer) for n, layer in layers.items()}
    for theirs, ours in known.items():
        if any(reasons.get(name, "float") for name in ours):
            for name in ours:
                if reasons.get(name) == "":
                    reasons[name] = f"a part of {theirs} there, with others that are not int8"
    tensors, marks, left = dict[str, Tensor](), dict[str, Any](), dict[str, Any]()
    for key, value in networks[0].state_dict().items():
        if key.rpartition(".")[0] not in layers and not key.startswith(CLOCK_NAME):
            tensors[key] = value
    for name, layer in layers.items():
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
        codes, scale = loaded(layer.weight_codes), layer.weight_scale
        shape = (len(codes), -1, *getattr(layer, "kernel_size", ()))
        weight = (codes.flatten(1) * scale[:, None]).reshape(shape)
        if reason := reasons[name]:
            tensors[f"{name}.weight"] = weight.bfloat16()
            left[name] = {"reason": reason, "bytes": tensors[f"{name}.weight"].nbytes}
            continue
        marks[name] = {"format": "int8_tensorwise"}
        if rotate and codes.shape[1] % _ROTATED == 0:
            codes, scale = row_codes(hadamard(weight))
            marks[name] |= {"convrot": True, "convrot_groupsize": _ROTATED}
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale[:, None]}
        mark = bytearray(json.dumps(marks[name]).encode())
        tensors[f"{name}.comfy_quant"] = torch.frombuffer(mark, dtype=torch.uint8)
    first = {ours[0]: theirs for theirs, ours in known.items()}
    parts = {name for ours in known.values() for name in ours[1:]}
    there = {first.get(n, n): mark for n, mark in marks.items() if n not in parts}
    whole, tensors = json.dumps({"format_version": "1.0", "layers": there}), joined(tensors, known)
    with atomic_path(out) as file:
        save_tensors(file, tensors, {"format": "pt", "_quantization_metadata": whole})
    _tell("in 16 bits", left)
    rotated = sum("convrot" in mark for mark in marks.values())
    about = {"file": str(out), "bytes": out.stat().st_size, "int8": len(marks)}
    return about | {"rotated": rotated, "in_16_bits": len(left), "not_said": left}


def _unsaid(layer: Any) -> str:
    """Return why a layer is no `int8_tensorwise`, "" if it is."""
    if isinstance(layer, WeightOnlyLinear):
        return "its inputs are float; the format multiplies int8 of each token"
    if type(layer) is not QLinear:
        return "a convolution; the format has linear layers alone"
    if len(layer.segments) > 1:
        return "its inputs have two grids; the format has one for each token"
    if layer.act_scale.shape[1]:
        return "scales of its inputs are fixed, by time; the format measures those of each token"
    bits = layer.act_format.bits
    return "" if bits == 8 else f"its inputs have {bits} bits; the format has 8"


def _tell(what: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    for reason, count in Counter(row["reason"] for row in rows.values()).items():
        size = sum(row.get("bytes", 0) for row in rows.values() if row["reason"] == reason)
        log.warning("%d layers %s (%.1f MB): %s", count, what, size / 1e6, reason)


@torch.no_grad()
def read(
    file: Path, model: str, out: Path, *, force: bool = False, **loading: Any
) -> dict[str, Any]:
    """Write OUT, a packed diffusers folder, of a file's denoiser and the rest of a float pipeline.

    int8 layers keep their integers. fp8, 4-bit and rotated ones are dequantized and rounded to the
    nearest int8 again: our layers have neither their numbers nor the rotation of inputs.
    loading: of `load_pipeline`. Returns counts, and `rounded`: layer -> reason and SQNR.
    Raises QuantempoError: a damaged file, an unknown format, layers or shapes of another network.
    """
    if RunFolder(out).foreign() and not force:
        raise QuantempoError(f"{out} is not empty; choose another folder, or --force to replace it")
    tensors, marks = _parse(file)
    pipe = load_pipeline(model, **loading)
    network, *others = denoisers_of(pipe).values()
    if others:
        raise QuantempoError(f"{model} has {1 + len(others)} denoisers; a file is of one")
    tensors, marks = parted(tensors, marks, groups(network), network)
    codes, left = dict[str, tuple[Tensor, Tensor]](), dict[str, Any]()
    for name, mark in marks.items():
        parts = {key: tensors.pop(f"{name}.{key}") for key in {"weight", *_PARTS[mark["format"]]}}
        _check_parts(f"{file}: {name}", parts, mark)
        if mark["format"] == "int8_tensorwise" and not mark.get("convrot"):
            whole, scale = loaded(parts["weight"]), loaded(parts["weight_scale"]).float()
            codes[name] = whole, scale.flatten().expand(len(whole)).contiguous()
            tensors[f"{name}.weight"] = whole * codes[name][1][:, None]
        else:
            tensors[f"{name}.weight"] = weight = _weight(parts, mark)
            codes[name] = row_codes(weight)
            error = (weight - codes[name][0] * codes[name][1][:, None]).square().sum()
            sqnr = 10 * float((weight.square().sum() / error.clamp_min(1e-30)).log10())
            why = mark["format"] + ", rotated" * bool(mark.get("convrot"))
            left[name] = {"reason": f"{why}, rounded to int8 again", "sqnr_db": round(sqnr, 1)}
    _fill(network, tensors, file)
    mark_quantized(network, quantize_without_data(network, "w8a8", codes))
    with atomic_path(out) as folder:
        pipe.save_pretrained(folder)
    _tell("differ from the file's", left)
    return {"folder": str(out), "int8": len(codes), "rounded_again": len(left), "rounded": left}


def _parse(file: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors of a file, without prefixes, and the mark of each quantized layer."""
    if not file.is_file():
        raise QuantempoError(f"{file} is no file; expected a safetensors checkpoint")
    with reading(file):
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("_quantization_metadata", "{}"))
        found: dict[str, Tensor] = {}
        for key, value in paged_tensors(file).items():
            found[key.removeprefix(_prefix(key))] = value
        named = about.get("layers", {}).items()
        marks = {key.removeprefix(_prefix(key)): mark for key, mark in named}
        for key in [key for key in found if key.endswith(".comfy_quant")]:
            mark = bytes(loaded(found.pop(key)).tolist()).rstrip(b"\0 ")
            marks[key.removesuffix(".comfy_quant")] = json.loads(mark)
        for name, mark in marks.items():
            mark.update(mark.pop("params", {}))
            known, size = _PARTS.get(mark["format"]), mark.get("convrot_groupsize", _ROTATED)
            if known is None or size != _ROTATED or mark.get("group_size", 16) != 16:
                text = f"expected {', '.join(_PARTS)}, in groups of {_ROTATED} and 16"
                raise QuantempoError(f"{file}: got {json.dumps(mark)} for {name}; {text}")
            if missing := {f"{name}.{part}" for part in {"weight", *known}} - found.keys():
                raise QuantempoError(f"{file} has no {', '.join(sorted(missing))}; fetch it again")
            found.pop(f"{name}.input_scale", None)
    if not marks:
        raise QuantempoError(f"{file} has no quantized layer (`comfy_quant`); use it as it is")
    return found, marks


def _prefix(key: str) -> str:
    return next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")


def _check_parts(what: str, parts: Mapping[str, Tensor], mark: Mapping[str, Any]) -> None:
    """Raise QuantempoError for tensors of a layer that do not fit each other."""
    outs, width = parts["weight"].shape if parts["weight"].ndim == 2 else (0, 0)
    four = mark["format"] == "asym_w4a8_int8"
    width *= 1 + four
    sizes = {
        "weight_scale": (1, outs), "weight_s_channel": (outs,), "weight_codebook": (16,),
        "weight_s_rel": (outs * width // 16,),
    }  # fmt: skip
    odd = [key for key, part in parts.items() if key in sizes and part.numel() not in sizes[key]]
    if (four or mark.get("convrot")) and width % _ROTATED:
        odd.append("weight")
    scales = [
        loaded(v).float() for key, v in parts.items() if key in ("weight_scale", "weight_s_channel")
    ]
    if not outs or odd or not all(bool((v.isfinite() & (v > 0)).all()) for v in scales):
        shapes = ", ".join(f"{key} {tuple(part.shape)}" for key, part in sorted(parts.items()))
        text = f"got {shapes} of {mark['format']}, which do not fit or have scales that are not > 0"
        raise QuantempoError(f"{what}: {text}; fetch it again")
    if (
        parts["weight"].dtype == torch.int8
        and not four
        and int(loaded(parts["weight"]).min()) < -127
    ):
        raise QuantempoError(f"{what}: a code of -128; our integers reach from -127 to 127")


def _weight(parts: Mapping[str, Tensor], mark: Mapping[str, Any]) -> Tensor:
    """Return the float32 weight that a quantized layer stands for."""
    part = {key: loaded(value) for key, value in parts.items()}
    if mark["format"] == "asym_w4a8_int8":
        byte = part["weight"].view(torch.uint8)
        q = torch.stack([byte & 15, byte >> 4], -1).flatten(1).long()
        fine = part["weight_s_rel"].view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
        # Integers by definition, as `int8_tensorwise` has them.
        w8 = (part["weight_codebook"].float()[q] * fine).round().clamp(-127, 127)
        return hadamard(w8 * part["weight_s_channel"].float()[:, None])
    weight = part["weight"].float() * part["weight_scale"].float().reshape(-1, 1)
    return hadamard(weight) if mark.get("convrot") else weight


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Put the values of a file into a float network; QuantempoError unless they are its own."""
    state = network.state_dict()
    odd = sorted(state.keys() ^ tensors.keys()) or sorted(
        key for key, value in state.items() if value.shape != tensors[key].shape
    )
    if odd:
        text = f"{len(odd)} tensors of {file} and {type(network).__name__} differ, '{odd[0]}' first"
        raise QuantempoError(f"{text}; give the model it was made of, named as diffusers")
    for key, value in state.items():
        value.copy_(loaded(tensors[key]))
