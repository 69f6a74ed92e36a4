"""Load LoRA files on packed pipelines: float branches beside the layers, several at once.

    y = layer(x) + up (scale * (down x))

of all adapters of a layer in one product. A branch is a hook, around which engines run a block
layer by layer, unless their kernels add it.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.core.instance import own_forward
from quantempo.engines.fusion import LORA
from quantempo.engines.select import ATTACHING, attach
from quantempo.errors import QuantempoError
from quantempo.models.lora import read_lora
from quantempo.quantized.layers import QConv2d, QLayer, QPatches
from quantempo.registry import check_known

__all__ = ["load_lora", "set_lora", "unload_lora"]

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Down (r, I, ...), up (O, r), scale (r,).
Part = tuple[Tensor, Tensor, Tensor]


class _Branch(nn.Module):
    """The adapters of a layer side by side; users: what engines have made of branches."""

    users: ClassVar[WeakKeyDictionary[nn.Module, WeakSet[Any]]] = WeakKeyDictionary()
    down: Tensor
    up: Tensor
    scale: Tensor

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__()
        self.ranks = {name: len(down) for name, (down, *_) in parts.items()}
        for i, name in enumerate(("down", "up", "scale")):
            values = [part[i] for part in parts.values()]
            self.register_buffer(name, torch.cat([v.to(values[0]) for v in values], i % 2))

    @property
    def parts(self) -> dict[str, Part]:
        """Return views of the adapters by name."""
        sizes = list(self.ranks.values())
        views = self.down.split(sizes), self.up.split(sizes, 1), self.scale.split(sizes)
        return dict(zip(self.ranks, zip(*views, strict=True), strict=True))

    def forward(self, layer: Any, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return y and what the adapters add, in the type of y, unless the kernel has added it."""
        constants = getattr(getattr(layer, "kernel", None), "constants", None)
        if getattr(constants, "adapters", None) is not None:
            return y
        x = given[0]
        down, up, scale = (part.to(x) for part in (self.down, self.up, self.scale))
        if isinstance(layer, _Convolution):
            inner = layer._conv_forward(x, down, None).movedim(1, -1)
        elif isinstance(layer, QConv2d):
            how = (layer.stride, layer.padding, layer.dilation)
            inner = F.conv2d(x, down, None, *how).movedim(1, -1)
        else:
            inner = F.linear(layer.operand(x) if isinstance(layer, QLayer) else x, down)
        more = F.linear(inner * scale, up)
        image = isinstance(layer, (QConv2d, QPatches, *_Convolution))
        return y + (more.movedim(-1, 1) if image else more).to(y.dtype)


@torch.no_grad()
def load_lora(pipe: Any, file: str | Path, scale: float = 1.0, name: str | None = None) -> str:
    """Load a LoRA beside the layers of a packed pipeline; return its name (None: of the file).

    One with the name, layers and ranks of a loaded one takes its place in memory. Any other is
    added, and what was compiled is compiled again. QuantempoError, the pipeline then as it was: a
    file that does not fit, or an engine that cannot run branches.
    """
    name = Path(file).stem if name is None else name
    given, known = dict[Any, Part](), _branches(pipe)
    for (component, layer), pair in read_lora(pipe, file).items():
        dtype = getattr(part := pipe.components[component], "dtype", torch.float32)
        down, up = (value.to(dtype) for value in pair)
        more = 2 ** max(4, math.ceil(math.log2(len(down)))) - len(down)
        down, up = torch.cat([down, down.new_zeros(more, *down.shape[1:])]), F.pad(up, (0, more))
        given[part.get_submodule(layer)] = down, up, down.new_full((len(down),), scale)
    ranks = {layer: len(down) for layer, (down, *_) in given.items()}
    loaded = {k: branch.ranks[name] for k, branch in known.items() if name in branch.ranks}
    if loaded and loaded != ranks:
        text = f"the LoRA '{name}' is loaded with other layers or ranks"
        raise QuantempoError(f"{text}; unload_lora it first, or give this one another name")
    for layer, new in given.items():
        if loaded:
            for value, other in zip(known[layer].parts[name], new, strict=True):
                value.data.copy_(other)
        else:
            _put(layer, {**(known[layer].parts if layer in known else {}), name: new})
    try:
        set_lora(pipe, {name: scale}) if loaded else _renew(pipe)
    except QuantempoError:
        unload_lora(pipe, name)
        raise
    return name


@torch.no_grad()
def set_lora(pipe: Any, scales: Mapping[str, float]) -> None:
    """Change scales of loaded LoRAs by name, in place: nothing is compiled or recorded again."""
    branches = _branches(pipe).values()
    check_known(scales, {name for b in branches for name in b.ranks}, "no LoRA of the name")
    for name, scale in scales.items():
        for branch in branches:
            if name in branch.ranks:
                # Not to be seen as a change of the network.
                branch.parts[name][2].data.fill_(scale)
    for made in {made for branch in branches for made in branch.users.get(branch, ())}:
        made.fill()


@torch.no_grad()
def unload_lora(pipe: Any, name: str | None = None) -> None:
    """Take a LoRA off, None: all of them; without any the pipeline is bit for bit what it was."""
    branches = _branches(pipe)
    known = {name for branch in branches.values() for name in branch.ranks}
    check_known([] if name is None else [name], known, "no LoRA of the name")
    for layer, branch in branches.items():
        _put(layer, {k: v for k, v in branch.parts.items() if name not in (None, k)})
    _renew(pipe)


def _modules(pipe: Any) -> list[nn.Module]:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [module for part in parts for module in part.modules()]


def _branches(pipe: Any) -> dict[nn.Module, _Branch]:
    """Return the branches of a pipeline by layer."""
    found = {module: module._modules.get(LORA) for module in _modules(pipe)}
    return {layer: branch for layer, branch in found.items() if isinstance(branch, _Branch)}


def _put(layer: nn.Module, parts: dict[str, Part]) -> None:
    """Give a layer a branch of these adapters in the place of the one it has."""
    old = layer._modules.pop(LORA, None)
    # A handle of the hook would not be that of a copy.
    for key in [key for key, hook in layer._forward_hooks.items() if hook is old]:
        del layer._forward_hooks[key]
    if parts:
        state = (t for t in (*layer.parameters(), *layer.buffers()) if not t.is_meta)
        # Integers may be set aside.
        held = [t for t in state if t.is_floating_point()]
        layer.add_module(LORA, branch := _Branch(parts).to(held[0].device if held else "cpu"))
        layer.register_forward_hook(branch)


def _renew(pipe: Any) -> None:
    """Attach engines that are attached anew, and have compiled networks compiled again."""
    with ATTACHING:
        for module in _modules(pipe):
            root = own_forward(module)
            if getattr(root, "asked", None) and root.name:
                engine, packed, memory = root.asked
                attach(module, engine, packed, memory=memory)
    # A compiled network does not look at hooks.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
