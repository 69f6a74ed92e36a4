"""What is timed: bfloat16 in its best forms, other quantizers, and the packed network.

A candidate turns a workload into a forward of the same signature. All run the same network on the
same inputs; each owns its copy of the weights, so that its memory can be told from the others'.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from quantempo.bench.graph import Forward, capture
from quantempo.engines.cuda.graphs import graphed
from quantempo.engines.select import ENGINES, attach
from quantempo.errors import QuantempoError
from quantempo.models.layers import sites
from quantempo.models.presets import fuse_projections
from quantempo.registry import nearest

__all__ = ["CANDIDATES", "Candidate", "Subject", "select"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# What others set for diffusion networks besides the mode (1x1 convolutions as matrix products).
_FLAGS = {"conv_1x1_as_mm": True, "coordinate_descent_check_all_directions": True}
# What compiled code is recorded with by the compiler itself.
_TREES = {"triton.cudagraphs": True}


@dataclass(frozen=True)
class Subject:
    """One network with the arguments of a call, on one device.

    floating: float32; packed: quantized, float layers in `dtype`; engine: that runs it; inputs:
    args and kwargs of a call in `dtype`.
    """

    floating: nn.Module
    packed: nn.Module | None
    inputs: Inputs
    engine: str = "triton"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Candidate:
    """One way to run the network.

    kind: "bf16" (a baseline), "peer" (another quantizer) or "ours"; build: makes the forward, not
    yet compiled or recorded; record: then turns it into a CUDA graph, or None; missing: says why it
    cannot run here, or None.
    """

    name: str
    about: str
    build: Callable[[Subject], Forward]
    record: Callable[[Forward, Subject], Forward] | None = None
    missing: Callable[[Subject], str | None] = field(default=lambda subject: None)

    @property
    def kind(self) -> str:
        """The part of the name before the slash; other quantizers are "peer"."""
        kind = self.name.partition("/")[0]
        return kind if kind in ("bf16", "ours") else "peer"


def select(patterns: Iterable[str] = ()) -> list[Candidate]:
    """Return the candidates whose names match a shell pattern, in their order; all for none.

    Raises:
        QuantempoError: a pattern that matches none.
    """
    patterns = list(patterns)
    names = [candidate.name for candidate in CANDIDATES]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise QuantempoError(
                f"no candidate matches '{pattern}'{nearest(pattern, names)} "
                f"(known: {', '.join(names)})"
            )
    return [
        candidate
        for candidate in CANDIDATES
        if not patterns or any(fnmatchcase(candidate.name, pattern) for pattern in patterns)
    ]


def _floating(subject: Subject, channels_last: bool = True) -> nn.Module:
    # diffusers' own `to` warns about what a full cast may do to training.
    net = nn.Module.to(copy.deepcopy(subject.floating), subject.dtype).eval()
    return net.to(memory_format=torch.channels_last) if channels_last else net


def _compiled(net: nn.Module, fullgraph: bool = False, **options: Any) -> Forward:
    forward = torch.compile(net, fullgraph=fullgraph, dynamic=False, options=options or None)
    if not options.get("triton.cudagraphs"):
        return forward

    def step(*args: Any, **kwargs: Any) -> Any:
        # Its own graphs may overwrite the output of the call before.
        torch.compiler.cudagraph_mark_step_begin()
        return forward(*args, **kwargs)

    return step


def _mode(name: str) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    return dict(list_mode_options(name))


def _record(forward: Forward, subject: Subject) -> Forward:
    return capture(forward, *subject.inputs)


def _graphed(forward: Forward, subject: Subject) -> Forward:
    recorder = graphed(forward)
    recorder(*subject.inputs[0], **subject.inputs[1])
    # What it cannot capture it runs eagerly with a warning: here that is another candidate.
    if not any(recorder._recordings.values()):
        raise QuantempoError("it could not be captured")
    return recorder


def _with_flags(subject: Subject) -> Forward:
    net = _floating(subject)
    fuse_projections(net)
    return _compiled(net, **{**_mode("max-autotune"), **_FLAGS})


def _torchao(config: str, **settings: Any) -> Callable[[Subject], Forward]:
    """Return a builder with a torchao configuration on the layers that ours would take, compiled.

    Linear layers alone: torchao has no integer convolution. Layers of the time embedding see one
    row an image, which integer products refuse.
    """

    def build(subject: Subject) -> Forward:
        library = importlib.import_module("torchao.quantization")
        net = _floating(subject)
        found = (site for site in sites(net) if isinstance(site.layer, nn.Linear))
        names = {site.name for site in found if site.role not in ("time", "input", "output")}
        chosen = {key: getattr(library, value)() for key, value in settings.items()}
        library.quantize_(net, getattr(library, config)(**chosen), lambda _, name: name in names)
        return _compiled(net)

    return build


def _no_torchao(subject: Subject) -> str | None:
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install torchao)"
    return None


def _packed(subject: Subject) -> nn.Module:
    net = copy.deepcopy(subject.packed)
    assert net is not None
    attach(net, subject.engine)
    return net.eval()


def _not_ours(subject: Subject) -> str | None:
    if subject.packed is None:
        return "there is no quantized network"
    if subject.engine not in ENGINES.names():
        return f"there is no engine '{subject.engine}' (known: {', '.join(ENGINES.names())})"
    return ENGINES.get(subject.engine).missing()


def _ours(name: str, about: str, record: Any = None, **options: Any) -> Candidate:
    compiled = options.pop("compiled", False)

    def build(subject: Subject) -> Forward:
        net = _packed(subject)
        return _compiled(net, fullgraph=True, **options) if compiled else net

    return Candidate(f"ours/{name}", about, build, record, _not_ours)


CANDIDATES: tuple[Candidate, ...] = (
    Candidate("bf16/eager", "as loaded", lambda s: _floating(s, channels_last=False)),
    Candidate("bf16/channels_last", "eager, channels last", _floating),
    Candidate("bf16/compile", "torch.compile", lambda s: _compiled(_floating(s))),
    Candidate(
        "bf16/compile+graph",
        "torch.compile in one CUDA graph",
        lambda s: _compiled(_floating(s)),
        _record,
    ),
    Candidate(
        "bf16/max-autotune",
        "torch.compile, mode max-autotune with its own CUDA graphs",
        lambda s: _compiled(_floating(s), **_mode("max-autotune")),
    ),
    Candidate(
        "bf16/max-autotune+flags",
        "the same with 1x1 convolutions as products and, where diffusers offers it, fused QKV",
        _with_flags,
    ),
    Candidate(
        "torchao/int8",
        "int8 dynamic on Linear, compiled, in one CUDA graph",
        _torchao("Int8DynamicActivationInt8WeightConfig"),
        _record,
        _no_torchao,
    ),
    Candidate(
        "torchao/fp8",
        "fp8 dynamic by row on Linear, compiled, in one CUDA graph",
        _torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow"),
        _record,
        _no_torchao,
    ),
    _ours("eager", "the engine, kernel by kernel"),
    _ours("graph", "the engine in one CUDA graph", _record),
    _ours("graphed", "the engine in one CUDA graph, as users get it", _graphed),
    _ours("compile+graph", "engine and torch.compile in one CUDA graph", _record, compiled=True),
    _ours(
        "max-autotune+graph",
        "engine and torch.compile, mode max-autotune-no-cudagraphs, in one CUDA graph",
        _record,
        compiled=True,
        max_autotune=True,
        coordinate_descent_tuning=True,
    ),
    _ours(
        "reduce-overhead",
        "engine and torch.compile, mode reduce-overhead with its own CUDA graphs",
        compiled=True,
        **_TREES,
    ),
)
