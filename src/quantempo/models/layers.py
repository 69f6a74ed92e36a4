"""Describe a denoiser: its layers and their roles, its blocks, the arguments of its calls.

All name strings of architectures live in `models/`; others see roles, by structure and name.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.registry import check_known

__all__ = [
    "DENOISERS", "EMBEDDINGS", "LAYERS", "ROLES", "Block", "DenoiserInputs", "Site", "bind_inputs",
    "blocks", "check_roles", "clock_time", "denoiser_of", "denoisers_of", "hooked", "input_of",
    "is_unit", "lists_of", "sites", "skip_segments", "timestep_of", "timestep_place",
]  # fmt: skip

LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

ROLES = {
    "input": "first layer, reads x_t itself",
    "output": "last layer, writes the network's output",
    "time": "acts on the time-step (and class) embedding alone",
    "shortcut": "1x1 convolution around a residual block",
    "attention": "projection of an attention block",
    "conv": "other convolution",
    "linear": "other linear layer",
}

# In the order in which one of them is the first.
DENOISERS = ("unet", "transformer", "prior", "decoder", "transformer_2", "prior_prior")
_INPUT = {"conv_in", "pos_embed.proj", "x_embedder", "img_in", "proj_in"}
_OUTPUT = {"conv_out", "proj_out", "proj_out_2", "final_layer.linear"}
_TIME = (
    *("time_embedding", "time_emb_proj", "timestep_embedder", "class_embedding", "class_embedder"),
    *("add_embedding", "adaln", "time_text_embed", "guidance_embedder", "_mod."),
)
_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "query", "key", "value", "proj_attn", "to_qkv"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
# What denoisers call their time; the first of these that `forward` takes.
_TIMES = ("timestep", "timesteps", "timestep_ratio", "sigma", "noise_level", "t", "r")
# In the name of a class: parts that are rounded together.
_UNITS = ("ResnetBlock", "ResBlock", "TransformerBlock")
# Children of a U-Net that images do not pass through.
EMBEDDINGS = (
    *("time_proj", "time_embedding", "class_embedding"),
    *("add_time_proj", "add_embedding", "encoder_hid_proj"),
)


class Site(NamedTuple):
    """One convolution or Linear of the denoiser and what the plan needs to know of it.

    role: a key of ROLES; segments: input channels of each half of a concatenated skip input, or
    () for one tensor; unsupported: why no integer kernel can take it, or None; modulates: whether
    it gives a block, one of many, several vectors (shift, scale, gate), if it reads the time.
    """

    name: str
    layer: nn.Module
    role: str
    segments: tuple[int, ...] = ()
    unsupported: str | None = None
    modulates: bool = False


def check_roles(names: tuple[str, ...]) -> None:
    """Raise QuantempoError when a recipe names a role that does not exist."""
    check_known(names, ROLES, "layers.float_roles has the unknown role")


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Return (component name, module) of the first of `denoisers_of`."""
    return next(iter(denoisers_of(pipe).items()))


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return all networks a pipeline denoises with, the first one first, else QuantempoError."""
    parts = {name: getattr(pipe, name, None) for name in DENOISERS}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found:
        text = f"{type(pipe).__name__} has no denoiser"
        raise QuantempoError(f"{text}; expected a component called one of: {', '.join(DENOISERS)}")
    return found


def sites(denoiser: nn.Module, measured: Mapping[str, str] | None = None) -> list[Site]:
    """Return every convolution and Linear in module order.

    measured: role ("" for none) of each layer that runs, see `calibration.statistics`; None: guess.
    """
    halves = {**dict(skip_segments(denoiser)), **dict(parallel_segments(denoiser))}
    found = []
    for name, layer in denoiser.named_modules():
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            continue
        parent = denoiser.get_submodule(name.rpartition(".")[0])
        end = _end(name, parent) if measured is None else measured.get(name)
        reason = "never runs: no recorded call reaches it" if end is None else _unsupported(layer)
        role, several = end or _kind(name, layer), _modulates(name, layer)
        found.append(Site(name, layer, role, halves.get(name, ()), reason, several))
    return found


def _modulates(name: str, layer: nn.Module) -> bool:
    # No embedding, as each block of DiT has one, and no shift of a residual block (time_emb_proj).
    inside = any(part.isdigit() for part in name.split(".")[:-1]) and "emb" not in name
    return inside and isinstance(layer, nn.Linear) and layer.out_features >= 2 * layer.in_features


def _end(name: str, parent: nn.Module) -> str:
    """Guess from names whether a layer reads x_t or the time, or writes the output."""
    if name in _INPUT:
        return "input"
    if name in _OUTPUT:
        return "output"
    # proj_out_1 of a DiT is the modulation of its last norm: it reads the conditioning only.
    if any(key in name for key in _TIME) or name == "proj_out_1":
        return "time"
    return "time" if "AdaLayerNorm" in type(parent).__name__ else ""


def _kind(name: str, layer: nn.Module) -> str:
    if name.endswith(("conv_shortcut", "nin_shortcut")):
        return "shortcut"
    if name.endswith(_ATTENTION) and isinstance(layer, nn.Linear):
        return "attention"
    return "linear" if isinstance(layer, nn.Linear) else "conv"


def _unsupported(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Conv1d | nn.Conv3d):
        size, padded = layer.kernel_size, any(layer._reversed_padding_repeated_twice)
        gaps = max(size) > 1 and max(layer.dilation) > 1
        if layer.stride != size or layer.groups != 1 or padded or gaps:
            return f"no kernel for a {type(layer).__name__} that is no product over patches"
    elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return f"no kernel for {type(layer).__name__}"
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"padding {layer.padding_mode}/{layer.padding} has no integer kernel"
        if layer.groups != 1 and layer.groups == layer.in_channels:
            return "depthwise convolution: too little work for an integer kernel"
    return None


def skip_segments(denoiser: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the shortcut convolutions of a U-Net that read torch.cat([hidden, skip]).

    The hidden half is as wide as the output of the block before, walking upwards from the middle.
    """
    up_blocks = getattr(denoiser, "up_blocks", None)
    mid = getattr(getattr(denoiser, "mid_block", None), "resnets", None)
    rows = [list(getattr(block, "resnets", ())) for block in up_blocks or ()]
    parts = [*(mid or ()), *(resnet for row in rows for resnet in row)]
    # Blocks of 1-D and video networks have other parts.
    if up_blocks is None or not mid or not all(hasattr(part, "conv2") for part in parts):
        return
    hidden = mid[-1].conv2.out_channels
    for i, row in enumerate(rows):
        for j, resnet in enumerate(row):
            skip = resnet.conv1.in_channels - hidden
            if skip > 0 and getattr(resnet, "conv_shortcut", None) is not None:
                yield f"up_blocks.{i}.resnets.{j}.conv_shortcut", (hidden, skip)
            hidden = resnet.conv2.out_channels


def parallel_segments(denoiser: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the output layers of parallel blocks (Flux, Chroma), which read [attention, MLP].

    The two have ranges of their own: attention averages values, the MLP ends in GELU.
    """
    for name, block in denoiser.named_modules():
        mlp, out = getattr(block, "proj_mlp", None), getattr(block, "proj_out", None)
        if isinstance(mlp, nn.Linear) and isinstance(out, nn.Linear):
            attention = out.in_features - mlp.out_features
            if attention > 0:
                yield f"{name}.proj_out", (attention, mlp.out_features)


class DenoiserInputs(NamedTuple):
    """One call of a denoiser, by argument name.

    sample: (B, ...) x_t as received, or from a list of its rows (`listed`); timestep: (B,), or (B,
    ...) of its tokens, int64, or floating point as received; conditioning: the other arguments,
    defaults not filled in; sample_name: of the first argument ("sample", "hidden_states").
    """

    sample: Tensor
    timestep: Tensor
    conditioning: dict[str, Any]
    sample_name: str
    timestep_name: str
    listed: bool = False


def bind_inputs(denoiser: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> DenoiserInputs:
    """Name the arguments of one call of `denoiser`.

    The time-step, a number or a tensor (), (1,), (B,) or (B, ...), is repeated to (B, ...) with its
    value unchanged: integers become int64, Python floats float32.
    Raises QuantempoError: the denoiser takes no time-step, got none, or got one of another shape.
    """
    # A compiled module hides the signature; an engine may have replaced `forward` on the instance.
    module = getattr(denoiser, "_orig_mod", denoiser)
    signature = inspect.signature(type(module).forward)
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    names = list(signature.parameters)
    given.pop(names[0])
    sample_name = names[1]
    sample = given.pop(sample_name, None)
    time, _ = timestep_place(denoiser)
    listed = _is_list(sample) and len({row.shape for row in sample}) == 1
    sample = torch.stack(sample) if listed else sample
    if not isinstance(sample, Tensor) or given.get(time) is None:
        raise QuantempoError(
            f"{type(module).__name__} was called with ({', '.join(names[1:])}); expected x_t "
            f"first, a tensor or a list of tensors of one shape, and a time ({', '.join(_TIMES)})"
        )
    timestep = _rows(given.pop(time), sample)
    # How the answer is wrapped says nothing about the network's input.
    given.pop("return_dict", None)
    return DenoiserInputs(sample, timestep, given, sample_name, time, listed)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Tensor) for v in value)


def clock_time(denoiser: nn.Module, args: Any, kwargs: Any, place: tuple[str, int]) -> Any:
    """Return the time-step of a call; the one of all rows where their entries in a list differ."""
    t, lists = timestep_of(args, kwargs, place), lists_of(denoiser, args, kwargs)
    if isinstance(t, Tensor) and any(len({row.shape for row in rows}) > 1 for rows in lists):
        # A layer may see one entry after the other: how many of its rows are whose it cannot know.
        if bool((t != t.flatten()[:1]).any()):
            text = "got entries of unequal shapes at unequal time-steps"
            raise QuantempoError(f"{text}; call once for each time-step")
        return t.flatten()[:1]
    return t


def lists_of(denoiser: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> list[list[Tensor]]:
    """Return the arguments but masks that are lists of rows; residuals hold all rows each."""
    plain = (value for name, value in kwargs.items() if "mask" not in name)
    lists = [value for value in (*args, *plain) if _is_list(value)]
    if not lists:
        return []
    name = [*inspect.signature(type(denoiser).forward).parameters][1]
    x = args[0] if args else kwargs.get(name, [])
    held = (len(x),) if isinstance(x, Tensor) else None
    return [v for v in lists if len(v) == len(x) and any(row.shape[:1] != held for row in v)]


def _rows(timestep: Any, sample: Tensor) -> Tensor:
    if isinstance(timestep, float):
        timestep = torch.tensor(timestep, dtype=torch.float32)
    t = torch.as_tensor(timestep, device=sample.device)
    if not t.is_floating_point():
        t = t.to(torch.int64)
    if t.numel() != 1 and t.shape[:1] != sample.shape[:1]:
        text = f"got a time-step of shape {tuple(t.shape)} for x_t of shape {tuple(sample.shape)}"
        raise QuantempoError(f"{text}; expected (), (1,), (B,) or (B, ...)")
    return t if t.numel() > len(sample) else t.reshape(-1).expand(len(sample))


def timestep_place(denoiser: Callable[..., Any]) -> tuple[str, int]:
    """Return name and place of a denoiser's time among its arguments, by default the second."""
    module = getattr(denoiser, "_orig_mod", denoiser)
    forward = getattr(type(module), "forward", None)
    names = [] if forward is None else list(inspect.signature(forward).parameters)[1:]
    return next(((name, names.index(name)) for name in _TIMES if name in names), (_TIMES[0], 1))


def timestep_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: tuple[str, int]) -> Any:
    """Return the time-step of a denoiser call, at its `timestep_place`, else QuantempoError."""
    name, index = place
    if name in kwargs:
        return kwargs[name]
    if len(args) > index:
        return args[index]
    raise QuantempoError(f"the denoiser was called without a time-step; expected `{name}`")


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], hook: Callable[..., Any], *, before: bool = False
) -> Iterator[None]:
    """Call hook(name, module, args, kwargs[, output]) at or `before` each call of the modules."""

    def call(name: str, *seen: Any) -> None:
        hook(name, *seen)

    with ExitStack() as stack:
        for name, module in modules.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(functools.partial(call, name), with_kwargs=True).remove)
        yield


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a Conv or Linear was called with, by place or by name."""
    return args[0] if args else kwargs["input"]


class Block(NamedTuple):
    """One unit; `layers`: full names of the LAYERS in its module, as defined."""

    name: str
    module: nn.Module
    layers: tuple[str, ...]


def blocks(denoiser: nn.Module, whole: Collection[str] = ()) -> list[Block]:
    """Return the units of a float denoiser as defined; in which order they run only a run tells.

    Every one of LAYERS is in exactly one of them; `whole` names further modules that are units.
    """
    found = []
    for name, module in _units(denoiser, "", whole):
        inner = module.named_modules(prefix=name)
        layers = tuple(n for n, layer in inner if isinstance(layer, LAYERS))
        if layers:
            found.append(Block(name, module, layers))
    return found


def _units(module: nn.Module, name: str, whole: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, LAYERS) or (name and (name in whole or is_unit(module))):
        yield name, module
        return
    for child, part in module.named_children():
        yield from _units(part, f"{name}.{child}" if name else child, whole)


def is_unit(module: nn.Module) -> bool:
    """Return whether a module is an attention, residual or transformer block, by its class."""
    kind = type(module).__name__
    return kind.endswith("Attention") or any(part in kind for part in _UNITS)
