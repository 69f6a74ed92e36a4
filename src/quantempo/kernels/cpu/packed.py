"""Weights of 4 bits for oneDNN: unpacked at every call, into one buffer a thread.

oneDNN's own tensor of a weight is made once, looked at and thrown away: what it holds has to be
[O / block][P][depth / 4][block][4], maybe with sums behind, for a block of 16 to 64 channels (CPUs
with VNNI). Then a call writes the same bytes anew and gives oneDNN a tensor around them.
"""

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantempo.kernels.cpu import fused

__all__ = ["Packed", "missing"]

_ALIGNED = 64
_buffers = threading.local()
_mkldnn = torch.ops.mkldnn


class Packed:
    """Input channels first .. first + inputs of a weight in groups; dense: return them as int8."""

    def __init__(
        self, stored: Tensor, groups: Tensor, group: int, first: int, inputs: int,
        dense: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        self.dense, self.inputs = dense, inputs
        self._held = stored.contiguous(), groups.contiguous()
        self._numbers = (*stored.shape, groups.shape[2], group, first, inputs)

    def write(self, block: int, depth: int, to: int) -> None:
        """Write int8 (O / block, P, depth / 4, block, 4); block <= 64; depth = 4 i >= `inputs`."""
        library, held = fused.load(), [tensor.data_ptr() for tensor in self._held]
        assert library is not None
        library.unpack(*held, to, *self._numbers, block, depth, torch.get_num_threads())

    def again(self, made: Tensor) -> Callable[[], Tensor] | None:
        """Return what makes oneDNN's tensor `made` of this weight again; None: it cannot be."""
        wrap = _wrapper()
        if fused.load() is None or wrap is None:
            return None
        size, (out, taps, *_) = _mkldnn._nbytes(made), self._numbers
        wanted, to = _bytes(_mkldnn.data_ptr(made), size), _buffer(size)
        for block, unit in itertools.product((64, 48, 32, 16), (4, 16, 32, 64)):
            depth = -(-self.inputs // unit) * unit
            length = -(-out // block) * block * taps * depth
            if length <= size:
                self.write(block, depth, to)
                if torch.equal(_bytes(to, length), wanted[:length]):
                    break
        else:
            return None
        description, rest = _mkldnn._get_mkldnn_serialized_md(made), wanted[length:].clone()
        shape = tuple(made.shape)
        # By the buffer of a thread.
        view = functools.lru_cache(8)(lambda to: wrap(to, shape, description))

        def again() -> Tensor:
            to = _buffer(size)
            self.write(block, depth, to)
            ctypes.memmove(to + length, rest.data_ptr(), len(rest))
            return view(to)

        return again


def missing() -> str | None:
    """Return why weights cannot stay packed here (one clause), or None; a small one is tried."""
    if (reason := fused.missing()) is not None:
        return reason
    stored = torch.arange(64 * 8, dtype=torch.uint8).reshape(64, 1, 8)
    codes = torch.stack((stored & 15, stored >> 4), -1).reshape(64, 16).to(torch.int8) - 8
    groups = torch.full((64, 1, 1), 8, dtype=torch.uint8)
    made = torch.ops.onednn.qlinear_prepack(codes, None)
    known = Packed(stored, groups, 16, 0, 16, lambda: codes).again(made)
    return "the order of oneDNN's weights on this CPU is not known" if known is None else None


def _buffer(size: int) -> int:
    """Return the address of this thread's buffer, of so many bytes at least."""
    known: Tensor | None = getattr(_buffers, "bytes", None)
    if known is None or len(known) < size + _ALIGNED:
        known = _buffers.bytes = torch.empty(size + _ALIGNED, dtype=torch.uint8)
    return -(-known.data_ptr() // _ALIGNED) * _ALIGNED


def _bytes(address: int, size: int) -> Tensor:
    """Return the memory at an address as uint8 (size,)."""
    held = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(held, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


@functools.cache
def _wrapper() -> Callable[[int, tuple[int, ...], Tensor], Tensor] | None:
    """Return what makes an int8 tensor of oneDNN around memory, if torch's C interface can."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        make = library.aoti_torch_create_tensor_from_blob_v2
        kind = library.aoti_torch_dtype_int8(), library.aoti_torch_device_type_cpu(), 0
        layout = library.aoti_torch_layout__mkldnn()
        take: Any = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs  # type: ignore[attr-defined]
    except (OSError, AttributeError):
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    make.argtypes = (pointer, size, pointer, pointer, size, number, number, number)
    make.argtypes += (pointer, number, pointer, size)
    capsule: Any = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [pointer, ctypes.c_char_p, pointer]

    def wrap(address: int, shape: tuple[int, ...], description: Tensor) -> Tensor:
        sizes, handle = (size * len(shape))(*shape), pointer()
        about = layout, description.data_ptr(), len(description)
        if make(address, len(shape), sizes, sizes, 0, *kind, ctypes.byref(handle), *about):
            raise RuntimeError("torch refused a weight of oneDNN")
        tensor: Tensor = take([capsule(handle, None, None)])[0]
        return tensor

    return wrap
