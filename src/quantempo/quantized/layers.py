"""Quantized layers: plain modules that hold integers and scales in buffers.

    y = s_a * s_w[o] * (sum_k q_a q_w - z * sum_k q_w) + bias[o]
    q_a = clamp(round(x / s_a) + z, 0, 2^act_bits - 1)

s_a belongs to a time bucket, or to each token: max |x| / (2^(act_bits - 1) - 1), z in the middle.

They replace Conv2d and Linear in place under the same name. What executes them is a plain callable
`kernel` that a backend attaches; saving and loading never depend on it. Source: PTQ4DM section
3.1 with quantizers moved to layer inputs, where integer kernels need them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantempo.core import Grid, GroupFormat, activation_format, token_scale, weight_format
from quantempo.core.instance import FixedTypes, keep
from quantempo.core.paged import Paged, loaded, small
from quantempo.errors import QuantempoError
from quantempo.quantized.clock import StepClock, token_rows

__all__ = ["Float16Linear", "QConv2d", "QLayer", "QLinear", "QPatches", "StoredLinear"]

Kernel = Callable[[Tensor], Tensor]


def _float32(run: Kernel, x: Tensor) -> Tensor:
    """Return run(x) without autocast, which would round on the way."""
    if not torch.is_autocast_enabled(x.device.type):
        return run(x)
    with torch.autocast(x.device.type, enabled=False):
        return run(x)


class QLayer(FixedTypes):
    """Hold what `QConv2d` and `QLinear` share.

    Buffers: weight_int as `core.formats` stores it, int8 (O, ...) or packed; weight_group uint8,
    see `GroupFormat`, or None; weight_scale float32 (O,); bias float32 (O,) or None; act_scale
    float32 (S, G), a row for each input segment, a column for each time bucket; act_zero_point
    int32 (S,). `weight_codes` is the weight as int8 (O, ...), unpacked anew at each access.

    segments: input channels of each segment, which sum to C_in; buckets: G, 0 for a scale for every
    token (`dynamic`); device: of the (uninitialised) buffers.
    """

    weight_int: Tensor
    weight_group: Tensor | None
    weight_scale: Tensor
    bias: Tensor | None
    act_scale: Tensor
    act_zero_point: Tensor
    clock: StepClock
    # Attributes of the float layer that the constructor takes besides.
    copied: tuple[str, ...] = ()

    def __init__(
        self, weight_shape: tuple[int, ...], bias: bool, clock: StepClock,
        segments: tuple[int, ...], buckets: int, *, weight_bits: int = 8, act_bits: int = 8,
        group: int = 0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__()
        out, parts = weight_shape[0], len(segments)
        self.weight_shape = weight_shape
        self.weight_format = codes = weight_format(weight_bits, group)
        self.act_format = activation_format(act_bits)

        def buffer(name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
            empty = None if shape is None else torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, empty)

        buffer("weight_int", codes.stored_shape(weight_shape), codes.storage)
        buffer("weight_group", codes.group_shape(weight_shape), torch.uint8)
        buffer("weight_scale", (out,), torch.float32)
        buffer("bias", (out,) if bias else None, torch.float32)
        buffer("act_scale", (parts, buckets), torch.float32)
        buffer("act_zero_point", (parts,), torch.int32)
        self.segments = tuple(segments)
        # Not registered as a child: the clock belongs to the denoiser, once.
        keep(self, "clock", clock)
        keep(self, "kernel", None)
        # What an engine has unpacked for itself; whether it packed the weight its own way.
        self._unpacked: Tensor | None = None
        self.aside = False
        # Whether an engine is to hold a weight in groups as bytes.
        self.unpack = False

    @classmethod
    def like(
        cls, layer: Any, clock: StepClock, segments: tuple[int, ...], buckets: int, **bits: int
    ) -> Self:
        """Return an empty quantized copy of a float layer, on its device; no segments: one."""
        how = {name: getattr(layer, name) for name in cls.copied}
        shape, width = tuple(layer.weight.shape), layer.weight.shape[1] * how.get("groups", 1)
        how |= {**bits, "device": layer.weight.device}
        return cls(shape, layer.bias is not None, clock, segments or (width,), buckets, **how)

    @property
    def weight_codes(self) -> Tensor:
        """Return the integer weight, int8 (O, ...); of a packed one a new tensor at each access."""
        stored, known = self.weight_int, self._unpacked
        if not self.weight_format.packed:
            return loaded(stored).to(self.weight_scale.device)
        if known is not None and known.device == stored.device:
            return known
        codes, group = self.stored.values()
        return self.weight_format.decode(codes, self.weight_shape, group)

    @property
    def stored(self) -> dict[str, Any]:
        """Return `weight_int` and `weight_group` by name, where the scales are."""
        device, group = self.weight_scale.device, self.weight_group
        group = None if group is None else group.to(device)
        return {"weight_int": loaded(self.weight_int).to(device), "weight_group": group}

    @property
    def _in_checkpoint(self) -> bool:
        """Whether the integers lie in the checkpoint, to be read by each engine once."""
        return isinstance(self.weight_int, Paged) and self.weight_int.place.stamp is not None

    def leave(self, lies: Paged) -> None:
        """Leave the integers where they lie, in the checkpoint, if they are many."""
        self.weight_int = self.weight_int if small(lies) else lies

    def hold(self) -> None:
        """Read integers that lie in the checkpoint: they are to change, to move or to be saved."""
        if self._in_checkpoint:
            self.weight_int = loaded(self.weight_int)

    def set_aside(self) -> None:
        """Move the integers of groups to the host's memory: an engine has its own."""
        assert self.weight_group is not None
        self.weight_int, self.weight_group = self.weight_int.cpu(), self.weight_group.cpu()
        self.aside = True

    def _apply(self, fn: Kernel, recurse: bool = True) -> Self:
        """Leave what is set aside where it is, on the host, unless that is where the scales go."""
        away = self.aside or self._in_checkpoint
        device = fn(self.weight_scale).device if away else torch.device("cpu")
        if device.type != "cpu":
            self.hold()
        stays = self.aside and (
            device == self.weight_scale.device or device.type not in ("cpu", "meta")
        )
        aside = (self.weight_int, self.weight_group) if stays else ()
        return super()._apply(lambda x: x if any(x is y for y in aside) else fn(x), recurse)

    @property
    def grid(self) -> Grid:
        """Return the codes that each weight may take."""
        return self.weight_format.grid(self.weight_shape, self.stored["weight_group"])

    def set_codes(self, codes: Tensor) -> None:
        """Store the integer weight (O, ...), of any device; QuantempoError: outside its format.

        Where it has groups, `weight_group` says which codes there are: fill it first.
        """
        self.hold()
        codes = codes.to(self.weight_int.device).reshape(self.weight_shape)
        self.weight_int.copy_(self.weight_format.encode(codes, self.weight_group))
        self._unpacked = None

    def regroup(self, group: int) -> None:
        """Store a weight of up to 4 bits in groups, all of scale 1: no code is another one."""
        codes, spec = self.weight_codes, weight_format(self.weight_bits, group)
        shape: Any = spec.group_shape(self.weight_shape)
        self.weight_group = codes.new_full(shape, 2 ** (spec.bits - 1), dtype=torch.uint8)
        self.weight_int, self.weight_format = spec.encode(codes, self.weight_group), spec

    def relayout(self, codes: Tensor) -> None:
        """Keep the integer weight as this int8 tensor: equal values, another memory layout."""
        if self.weight_format.packed:
            self._unpacked = codes
        else:
            self.weight_int = codes

    def release(self) -> None:
        """Hold nothing of an engine's: a weight laid out for one is contiguous again."""
        if not self._in_checkpoint:
            codes, self.weight_group = self.stored.values()
            self.weight_int = codes.clone(memory_format=torch.contiguous_format)
        self._unpacked, self.aside = None, False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._in_checkpoint and not keep_vars:
            destination[f"{prefix}weight_int"] = loaded(self.weight_int)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.hold()
        super()._load_from_state_dict(*args, **kwargs)
        self._unpacked = None

    @property
    def weight_bits(self) -> int:
        """Bits of the weight."""
        return self.weight_format.bits

    @property
    def act_bits(self) -> int:
        """Bits of the input."""
        return self.act_format.bits

    @property
    def act_qmax(self) -> int:
        """Largest code of an activation."""
        return self.act_format.qmax

    @property
    def weight(self) -> Tensor:
        """Return the dequantized weight, float32 (made anew at each access)."""
        codes = self.weight_codes
        return codes.float() * self.weight_scale.reshape(-1, *[1] * (codes.ndim - 1))

    @property
    def dynamic(self) -> bool:
        """Whether the scale of an input is that of each token, measured as it comes."""
        return self.act_scale.shape[1] == 0

    def scale_now(self, segment: int, x: Tensor) -> Tensor:
        """Return the scale of a segment x: () or (B, 1, ...) by time bucket, (..., 1) by token."""
        if self.dynamic:
            return token_scale(x, self.act_format)
        return self.clock.rows(self.act_scale[segment], x)

    def forward(self, input: Tensor) -> Tensor:
        """Run the attached kernel; raises QuantempoError when no backend was attached."""
        if self.kernel is None:
            raise QuantempoError("a quantized layer ran before an engine was attached; attach one")
        if self.clock.by_token:
            rows, bucket = token_rows(self.clock.now, input)
            with self.clock.at(bucket):
                y = self.forward(rows)
            return y if rows is input else y.unflatten(0, input.shape[:2])
        return _float32(partial(self.run, self.kernel), input)

    def operand(self, x: Tensor) -> Tensor:
        """Return what kernels read of an input."""
        return x

    def run(self, kernel: Kernel, x: Tensor) -> Tensor:
        """Return the output for an input of the float layer's shape, by a kernel."""
        return kernel(x)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what an engine made: a copy gets its own."""
        return {**self.__dict__, "kernel": None, "_unpacked": None, "aside": False}

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        how = "".join(f"{name}={getattr(self, name)}, " for name in self.copied)
        scales = "dynamic" if self.dynamic else f"buckets={self.act_scale.shape[1]}"
        group = f"g{codes.group}" if isinstance(codes := self.weight_format, GroupFormat) else ""
        grids = f"W{self.weight_bits}{group}A{self.act_bits}, {scales}"
        return f"{tuple(self.weight_shape)}, segments={self.segments}, {how}{grids}"

    kernel: Kernel | None


class QConv2d(QLayer):
    """Quantized 2-D convolution with zero padding; weight_int (O, C_in/groups, kh, kw)."""

    copied = ("stride", "padding", "dilation", "groups")

    def __init__(
        self, weight_shape: tuple[int, ...], *args: Any, stride: tuple[int, int],
        padding: tuple[int, int], dilation: tuple[int, int], groups: int, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight_shape, *args, **kwargs)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.out_channels, self.in_channels = weight_shape[0], weight_shape[1] * groups
        self.kernel_size = tuple(weight_shape[2:])

    @property
    def padding_mode(self) -> str:
        """Zeros: the only padding that integer kernels have."""
        return "zeros"

    @padding_mode.setter
    def padding_mode(self, mode: str) -> None:
        if mode != "zeros":
            text = f"got padding_mode '{mode}' for an integer convolution, which pads zeros"
            raise QuantempoError(f"{text}; set it on the float model and quantize that")


class QLinear(QLayer):
    """Quantized linear layer; weight_int (O, C_in), input (..., C_in)."""

    def __init__(self, weight_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        super().__init__(weight_shape, *args, **kwargs)
        self.out_features, self.in_features = weight_shape


class QPatches(QLinear):
    """Quantized convolution over 1 to 3 dimensions whose stride is its kernel: one product.

    The input is cut into patches of `kernel_size`, (B, C, ...) -> (B, ..., K), what is left over at
    the ends dropped; weight_int (O, K), K = C * prod(kernel_size).
    """

    copied = ("kernel_size",)

    def __init__(
        self, weight_shape: tuple[int, ...], bias: bool, clock: StepClock,
        segments: tuple[int, ...], *args: Any, kernel_size: tuple[int, ...], **kwargs: Any,
    ) -> None:  # fmt: skip
        width = math.prod(weight_shape[1:])
        super().__init__((weight_shape[0], width), bias, clock, (width,), *args, **kwargs)
        self.kernel_size = kernel_size

    def operand(self, x: Tensor) -> Tensor:
        """Return the patches, (B, ..., K)."""
        for dim, size in enumerate(self.kernel_size, 2):
            x = x.unfold(dim, size, size)
        return x.movedim(1, len(self.kernel_size) + 1).flatten(len(self.kernel_size) + 1)

    def run(self, kernel: Kernel, x: Tensor) -> Tensor:
        """Return (B, O, ...) for (B, C, ...), by a kernel on patches."""
        return kernel(self.operand(x)).movedim(-1, 1)


class StoredLinear(FixedTypes):
    """An empty copy of a float linear layer, on its device, until it is filled."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        bias = None if layer.bias is None else torch.empty_like(layer.bias, dtype=torch.float32)
        self.register_buffer("bias", bias)

    def fill(self, layer: nn.Linear, *codes: Tensor) -> Self:
        """Round the weight of a float layer, or hold its codes, scale and groups; copy its bias."""
        self._round(layer.weight.detach(), *codes)
        if layer.bias is not None:
            self.bias = layer.bias.detach().float()
        return self

    def _round(self, weight: Tensor, *codes: Tensor) -> None:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b, computed in float32, in the type of nn.Linear; x (..., in_features)."""
        y, kind = _float32(self._run, input), input.device.type
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y

    def _run(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return nn.functional.linear(x.float(), weight.float(), self.bias).to(x.dtype)


class Float16Linear(StoredLinear, nn.Linear):
    """Linear layer computed in float32 whose weight is stored in float16, in files.

    Of the time embedding, on t alone: a network loaded in another dtype computes t as exactly. The
    weight is a parameter, for who asks `next(part.parameters()).dtype`; `state_dict` has it in
    float16 where that loses nothing.
    Error: |W - W_hat| <= 2^-11 |W| for |W| >= 2^-14, else 2^-25.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight = torch.empty_like(layer.weight, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def _round(self, weight: Tensor, *_: Tensor) -> None:
        half = loaded(weight).float().half()
        self.weight = nn.Parameter(half.float(), requires_grad=False)
        if not bool(self.weight.isfinite().all()):
            text = "a weight of the time embedding is beyond 65504, the largest float16"
            raise QuantempoError(f"{text}; keep the layer in float32 (layers.exclude)")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        half = self.weight.half()
        # Weights of 12 bits, from checkpoints of format 2, may need all of float32.
        if half.is_meta or torch.equal(half.float(), self.weight.float()):
            destination[f"{prefix}weight"] = half

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].float()
            # An engine may hold it in float16.
            self.weight.data = self.weight.data.float()
        super()._load_from_state_dict(state_dict, prefix, *args)
