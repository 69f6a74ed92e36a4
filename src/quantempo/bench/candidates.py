"""The forms in which a network is timed: float, other quantizers, and ours on every engine.

A candidate turns a subject into a forward of the same signature. All run the same network on the
same inputs; each owns its copy of the weights, so that its memory can be told from the others'.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.engines.cuda.graphs import capture, graphed
from quantempo.engines.select import ENGINES, attach, attached
from quantempo.errors import QuantempoError
from quantempo.models.layers import sites
from quantempo.registry import nearest

__all__ = ["CANDIDATES", "Candidate", "Forward", "Subject", "cast_inputs", "record", "select"]

Forward = Callable[..., Any]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What others set for diffusion networks besides the mode (1x1 convolutions as matrix products).
_FLAGS = {"conv_1x1_as_mm": True, "coordinate_descent_check_all_directions": True}
_TREES: dict[str, Any] = {"triton.cudagraphs": True}
_WARM = 3


@dataclass(frozen=True)
class Subject:
    """One network with the arguments of a call, on one device.

    floating: float32; packed: quantized, float layers in `dtype`; inputs: keyword arguments of a
    call, float32; engine: that runs `packed` where the candidate names none; memory: of a GPU, for
    those that are streamed.
    """

    floating: nn.Module
    packed: nn.Module | None
    inputs: dict[str, Any]
    engine: str = "triton"
    dtype: torch.dtype = torch.bfloat16
    memory: int | str | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to run the network.

    name: KIND/FORM, the kind "fp32" or "bf16" (baselines), "ours", or another quantizer's name;
    build: makes the forward; graph: turns it into a CUDA graph, or None; missing: says why it
    cannot run here, or None; devices: types it is for; engine: of ours, None for the subject's;
    compiled: by torch.compile.
    """

    name: str
    build: Callable[[Subject], Forward]
    graph: Callable[[Forward, dict[str, Any]], Forward] | None = None
    missing: Callable[[Subject], str | None] = lambda subject: None
    devices: tuple[str, ...] = ("cuda",)
    engine: str | None = None
    compiled: bool = False

    @property
    def kind(self) -> str:
        """Return "fp32", "bf16" or "ours", and "peer" for other quantizers."""
        kind = self.name.partition("/")[0]
        return kind if kind in (*_DTYPES, "ours") else "peer"

    def inputs(self, subject: Subject) -> dict[str, Any]:
        """Return the subject's inputs in the dtype that this candidate computes in."""
        own = subject.dtype if self.kind == "ours" else _DTYPES.get(self.kind, torch.bfloat16)
        return cast_inputs(subject.inputs, own)


def select(patterns: Iterable[str] = (), device: str = "cuda") -> list[Candidate]:
    """Return a device's candidates that match a shell pattern, all for none; refuse others."""
    patterns = list(patterns)
    here = [candidate for candidate in CANDIDATES if device in candidate.devices]
    names = [candidate.name for candidate in here]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            text = f"no candidate on {device} matches '{pattern}'{nearest(pattern, names)}"
            raise QuantempoError(f"{text} (expected one of: {', '.join(names)})")
    return [c for c in here if not patterns or any(fnmatchcase(c.name, p) for p in patterns)]


def cast_inputs(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments in another float dtype; times (one axis or none) and integers stay."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value

    return pytree.tree_map_only(Tensor, cast, inputs)


def record(forward: Forward, inputs: dict[str, Any]) -> Forward:
    """Return a forward that replays a recorded CUDA graph, its output overwritten each time."""
    leaves, shape = pytree.tree_flatten(inputs)
    kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    fixed = pytree.tree_unflatten(kept, shape)
    graph, output = capture(lambda: forward(**fixed), _WARM)

    def replay(**inputs: Any) -> Any:
        given, given_shape = pytree.tree_flatten(inputs)
        if given_shape != shape:
            raise ValueError(f"got arguments {given_shape}; the graph was recorded with {shape}")
        for mine, new in zip(kept, given, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        graph.replay()
        return output

    # The graph reads the network's weights where they are, and does not keep them alive itself.
    replay.recorded = forward  # type: ignore[attr-defined]
    return replay


def _graphed(forward: Forward, inputs: dict[str, Any]) -> Forward:
    recorder = graphed(forward)
    recorder(**inputs)
    # What it cannot capture it runs eagerly with a warning: here that is another candidate.
    if not any(recorder._recordings.values()):
        raise QuantempoError("it could not be captured")
    return recorder


def _floating(subject: Subject, kind: str = "bf16", last: bool = True) -> nn.Module:
    # diffusers' own `to` warns about what a full cast may do to training.
    net = nn.Module.to(copy.deepcopy(subject.floating), _DTYPES[kind]).eval()
    # There is none of films.
    last = last and all(weight.ndim < 5 for weight in net.parameters())
    return net.to(memory_format=torch.channels_last) if last else net


def _compiled(net: nn.Module, fullgraph: bool = False, **options: Any) -> Forward:
    forward = torch.compile(net, fullgraph=fullgraph, dynamic=False, options=options or None)
    if not options.get("triton.cudagraphs"):
        return forward

    @functools.wraps(forward, updated=())
    def step(**inputs: Any) -> Any:
        # Its own graphs may overwrite the output of the call before.
        torch.compiler.cudagraph_mark_step_begin()
        return forward(**inputs)

    return step


def _frozen(subject: Subject, kind: str) -> Forward:
    """Return a compiled forward whose weights are constants, laid out by the compiler."""
    import torch._inductor.config as inductor

    forward = _compiled(_floating(subject, kind, last=False))
    # An option of torch.compile() with this name does nothing in torch 2.13; the global does,
    # while the first call compiles.
    with inductor.patch(freezing=True):
        forward(**cast_inputs(subject.inputs, _DTYPES[kind]))
    return forward


def _compile(subject: Subject) -> Forward:
    on_cpu = next(subject.floating.parameters()).device.type == "cpu"
    return _frozen(subject, "bf16") if on_cpu else _compiled(_floating(subject))


def _autotuned(subject: Subject, flags: bool = False) -> Forward:
    from torch._inductor import list_mode_options

    net, mode = _floating(subject), list_mode_options("max-autotune")
    if flags:
        getattr(net, "fuse_qkv_projections", lambda: None)()
    return _compiled(net, **mode, **(_FLAGS if flags else {}))


def _blocks(net: nn.Module) -> nn.Module:
    """Compile the blocks of a transformer; all of one class run what was compiled for the first."""
    for module in net.modules():
        if type(module).__name__.endswith("TransformerBlock"):
            module.compile(fullgraph=True, dynamic=False)
    return net


class _Dynamic(nn.Module):
    """A linear layer in 8 bits as torch has it: a scale for every token, one for every channel."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.top = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        self.bias, weight = layer.bias, layer.weight.detach().float()
        self.scale = nn.Buffer(weight.abs().amax(1) / self.top)
        self.weight = nn.Buffer(self._codes(weight, self.scale[:, None], dtype))

    def _codes(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.float() / scale
        return (x.round() if dtype == torch.int8 else x).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = x.flatten(0, -2), self.weight.t()
        scale = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / self.top
        codes = self._codes(rows, scale, self.weight.dtype)
        if self.weight.dtype == torch.int8:
            y = torch._int_mm(codes, weight) * scale * self.scale
            y = y if self.bias is None else y + self.bias
        else:
            scales = scale, self.scale[None]
            y = torch._scaled_mm(codes, weight, *scales, self.bias, None, x.dtype, True)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def _dynamic(form: str, dtype: torch.dtype) -> Candidate:
    """Return the linear layers that ours would take in torch's own 8-bit products, compiled."""

    def build(subject: Subject) -> Forward:
        net = _floating(subject)
        for site in list(sites(net)):
            if isinstance(site.layer, nn.Linear) and site.role not in ("time", "input", "output"):
                net.set_submodule(site.name, _Dynamic(site.layer, dtype))
        return _blocks(net) if "Transformer" in type(net).__name__ else _compiled(net)

    return Candidate(f"torch/{form}", build, record, compiled=True)


def _ours(
    form: str, graph: Any = None, engine: str | None = None, compiled: bool = False,
    devices: tuple[str, ...] = ("cuda",), **options: Any,
) -> Candidate:  # fmt: skip
    def build(subject: Subject) -> Forward:
        net: Any = copy.deepcopy(subject.packed)
        memory = subject.memory if form.startswith("streamed") else None
        name = attach(net, engine or subject.engine, memory=memory)
        net.eval()
        # The first call is compared with the exact integers; another engine may take over.
        net(**cast_inputs(subject.inputs, subject.dtype))
        if (found := attached(net)) != name:
            raise QuantempoError(f"it is far from the exact integers: {found} took over")
        return _compiled(net, fullgraph=True, **options) if compiled else net

    def missing(subject: Subject) -> str | None:
        if subject.packed is None:
            return "there is no quantized network"
        return ENGINES.get(engine or subject.engine).missing()

    return Candidate(f"ours/{form}", build, graph, missing, devices, engine, compiled)


_CPU, _BOTH = ("cpu",), ("cpu", "cuda")

CANDIDATES: tuple[Candidate, ...] = (
    Candidate("fp32/eager", lambda s: _floating(s, "fp32", last=False), devices=_CPU),
    Candidate("fp32/channels_last", lambda s: _floating(s, "fp32"), devices=_CPU),
    Candidate("fp32/compile", lambda s: _frozen(s, "fp32"), devices=_CPU, compiled=True),
    Candidate("bf16/eager", lambda s: _floating(s, last=False), devices=_BOTH),
    Candidate("bf16/channels_last", _floating, devices=_BOTH),
    Candidate("bf16/compile", _compile, devices=_BOTH, compiled=True),
    Candidate("bf16/compile+graph", _compile, record, compiled=True),
    Candidate(
        "bf16/blocks+graph", lambda s: _blocks(_floating(s)), record,
        lambda s: None if "Transformer" in type(s.floating).__name__ else "it is no transformer",
        compiled=True,
    ),
    Candidate("bf16/max-autotune", _autotuned, compiled=True),
    Candidate("bf16/max-autotune+flags", lambda s: _autotuned(s, flags=True), compiled=True),
    # In 8 bits on Linear, activations quantized as they come.
    _dynamic("int8", torch.int8),
    _dynamic("fp8", torch.float8_e4m3fn),
    *(
        _ours(name, engine=name, devices=_CPU)
        for name in ENGINES.names()
        if {"cpu", "any"} & set(ENGINES.get(name).devices)
    ),
    _ours("eager"),
    _ours("graph", record),
    _ours("streamed"),
    _ours("streamed+graph", record),
    _ours("graphed", _graphed),
    _ours("compile+graph", record, compiled=True),
    _ours(
        "max-autotune+graph", record, compiled=True,
        max_autotune=True, coordinate_descent_tuning=True,
    ),
    _ours("reduce-overhead", compiled=True, **_TREES),
)  # fmt: skip
