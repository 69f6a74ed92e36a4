"""Write the packed networks of a pipeline as graphs, ONNX or OpenVINO IR, for other programs.

One call of the pipeline says what its networks are called with: the shapes of a graph are those.
"""

import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from quantempo.core.paged import is_paged
from quantempo.engines.base import too_many_terms
from quantempo.engines.openvino.engine import Layout
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoisers_of, hooked, timestep_place
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline.samples import as_traced, open_model
from quantempo.quantized import CLOCK_NAME, find_clock, quantized_layers
from quantempo.run_folder import RunFolder, atomic_path

__all__ = ["write"]

_NEEDS = {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino",)}
# What a protobuf file holds.
_MOST = 2**31 - 1


def write(
    packed: Path, out: Path, *, format: str, batch_size: int = 1, force: bool = False,
    call: dict[str, Any] | None = None, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write OUT/NETWORK.onnx (or .xml with .bin), and NETWORK.json that says what it takes.

    batch_size: images in a call; call: arguments of the pipeline's. Returns what was written.
    Raises QuantempoError: the extra is missing, OUT exists, or a network no graph can hold.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDS[format]):
        text = f"got format '{format}' without the packages that write it"
        raise QuantempoError(f"{text}; pip install 'quantempo[{format}]'")
    if RunFolder(out).foreign() and not force:
        raise QuantempoError(f"{out} is not empty; choose another folder, or --force to replace it")
    pipe = open_model(packed, engine="simulated")
    networks = {n: part for n, part in denoisers_of(pipe).items() if find_clock(part) is not None}
    for name, part in networks.items():
        _check(name, part)
    calls: dict[str, tuple[Any, Any]] = {}
    with hooked(networks, lambda n, _, *given: calls.setdefault(n, given), before=True):
        run_pipeline(
            pipe, range(batch_size), steps=1, batch_size=batch_size, **as_traced(pipe, call or {})
        )
    if idle := sorted(networks.keys() - calls):
        text = f"one step of {type(pipe).__name__} does not call {', '.join(idle)}"
        raise QuantempoError(f"{text}, so that its inputs are unknown; run its packed folder")
    made: dict[str, Any] = {}
    with atomic_path(out) as folder:
        folder.mkdir()
        for name, (args, kwargs) in calls.items():
            made[name] = _write(networks[name], args, kwargs, folder / name, format)
            (folder / f"{name}.json").write_text(json.dumps(made[name], indent=1) + "\n")
    return {"folder": str(out), **{name: _summary(facts) for name, facts in made.items()}}


def _check(name: str, denoiser: nn.Module) -> None:
    """Refuse a network that a graph cannot hold."""
    size = sum(t.numel() * t.itemsize for t in (*denoiser.parameters(), *denoiser.buffers()))
    if is_paged(denoiser) or size > _MOST:
        text = f"'{name}' takes {size / 1e9:.1f} GB, and a graph holds at most {_MOST / 1e9:.1f}"
        raise QuantempoError(f"{text}; run its packed folder")
    for layer_name, layer in quantized_layers(denoiser):
        reason = too_many_terms(layer)
        if getattr(layer, "groups", 1) > 1 and len(layer.segments) > 1:
            reason = "groups and a split input"
        if reason is not None:
            raise QuantempoError(f"a graph cannot hold {name}.{layer_name}: {reason}")


def _write(denoiser: nn.Module, args: Any, kwargs: Any, to: Path, format: str) -> dict[str, Any]:
    run, given = _graph_of(denoiser, args, kwargs)
    with torch.no_grad():
        results = run(denoiser, *given.values())
    outputs = {f"output{i or ''}": value for i, value in enumerate(results)}
    try:
        _save(denoiser, run, given, [*outputs], to, format)
    except OSError:
        raise
    except Exception as error:
        text = f"{format} cannot hold {type(denoiser).__name__} as it is called"
        line = str(error).strip().split("\n")[0][:200]
        raise QuantempoError(f"{text}: {line}; run its packed folder") from error
    integer = {name for name, _ in quantized_layers(denoiser)}
    floats = {
        name: layer.weight.numel() * layer.weight.itemsize
        for name, layer in denoiser.named_modules()
        if name not in integer and getattr(getattr(layer, "weight", None), "ndim", 0) > 1
    }

    def described(values: dict[str, Tensor]) -> dict[str, Any]:
        return {
            name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            for name, value in values.items()
        }

    return {
        "inputs": described(given), "outputs": described(outputs),
        "integer_layers": sorted(integer), "float_layers_bytes": floats,
    }  # fmt: skip


def _save(
    denoiser: nn.Module, run: Any, given: Any, outputs: list[str], to: Path, format: str
) -> None:
    if format == "onnx":
        from quantempo.export.onnx_graph import onnx_program

        names = {"input_names": list(given), "output_names": outputs}
        onnx_program(denoiser, run, [*given.values()], **names).save(to.with_suffix(".onnx"))
    else:
        import openvino as ov

        from quantempo.engines.openvino.rewrite import timed_graph

        graph = timed_graph(denoiser, run, given, outputs)
        ov.save_model(graph, to.with_suffix(".xml"), compress_to_fp16=False)


def _summary(facts: dict[str, Any]) -> dict[str, Any]:
    floats = facts["float_layers_bytes"]
    return {
        "inputs": ", ".join(f"{n} {v['dtype']} {v['shape']}" for n, v in facts["inputs"].items()),
        "integer_layers": len(facts["integer_layers"]), "float_layers": len(floats),
        "float_bytes": sum(floats.values()),
    }  # fmt: skip


def _graph_of(
    denoiser: nn.Module, args: Any, kwargs: Any
) -> tuple[Callable[..., list[Tensor]], dict[str, Tensor]]:
    """Return run(network, *tensors), which sets the clock from t, and the tensors by name."""
    arguments = dict(
        inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
    )
    arguments.pop(next(iter(arguments)))
    time = timestep_place(denoiser)[0]
    arguments[time] = torch.as_tensor(arguments[time])
    if arguments[time].ndim > 1:
        text = f"{type(denoiser).__name__} was called with a time-step for every token"
        raise QuantempoError(f"{text}; a graph takes one for each image")
    layout, tensors = Layout.of(arguments)
    tensors = [t.detach().float() if t.is_floating_point() else t for t in tensors]
    paths = tree_flatten_with_path(arguments)[0]
    names = [".".join(_part(k) for k in path) for path, leaf in paths if isinstance(leaf, Tensor)]

    def run(network: Any, *given: Tensor) -> list[Tensor]:
        bound = layout.fill(given)
        clock = network.get_submodule(CLOCK_NAME)
        index = clock.times.index(bound[time]).reshape(-1)
        clock.call.bucket = clock.bucket_of.index_select(0, index).squeeze()
        output = type(network).forward(network, **bound)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    return run, dict(zip(names, tensors, strict=True))


def _part(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))
