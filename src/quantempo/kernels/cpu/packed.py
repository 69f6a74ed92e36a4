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

__all__ = ["Packed"]

_ALIGNED = 64
_buffers = threading.local()


class Packed:
    """Input channels first .. first + inputs of a weight in groups, stored as by `GroupFormat`.

    dense: return these as int8, in the shape that oneDNN is given.
    """

    def __init__(
        self,
        stored: Tensor,
        groups: Tensor,
        group: int,
        first: int,
        inputs: int,
        dense: Callable[[], Tensor],
    ) -> None:
        self.dense = dense
        self._given = (stored.contiguous(), groups.contiguous(), group, first, inputs)

    def again(self, made: Tensor) -> Callable[[], Tensor] | None:
        """Return what makes oneDNN's tensor `made` of this weight again; None: it cannot be."""
        library, wrap = fused.load(), _wrapper()
        if library is None or wrap is None:
            return None
        size, address = torch.ops.mkldnn._nbytes(made), torch.ops.mkldnn.data_ptr(made)
        wanted = _bytes_at(address, size)
        (out, taps, _), inputs = self._given[0].shape, self._given[-1]
        for block, unit in itertools.product((64, 48, 32, 16), (4, 16, 32, 64)):
            depth = -(-inputs // unit) * unit
            length = -(-out // block) * block * taps * depth
            if length > size:
                continue
            to = _buffer(size)
            library.unpack(*self._given, block, depth, to)
            if torch.equal(_bytes_at(to, length), wanted[:length]):
                description = torch.ops.mkldnn._get_mkldnn_serialized_md(made)
                rest, shape = wanted[length:].clone(), tuple(made.shape)
                break
        else:
            return None

        def again() -> Tensor:
            to = _buffer(size)
            library.unpack(*self._given, block, depth, to)
            _bytes_at(to + length, len(rest)).copy_(rest)
            return wrap(to, shape, description)

        return again


def _buffer(size: int) -> int:
    """Return the address of this thread's buffer, of so many bytes at least."""
    known: Tensor | None = getattr(_buffers, "bytes", None)
    if known is None or len(known) < size + _ALIGNED:
        known = _buffers.bytes = torch.empty(size + _ALIGNED, dtype=torch.uint8)
    return -(-known.data_ptr() // _ALIGNED) * _ALIGNED


def _bytes_at(address: int, size: int) -> Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


@functools.cache
def _wrapper() -> Callable[[int, tuple[int, ...], Tensor], Tensor] | None:
    """Return a function that makes an int8 tensor of oneDNN around memory, by torch's C interface.

    None where this torch has none.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        make, known = library.aoti_torch_create_tensor_from_blob_v2, (
            library.aoti_torch_dtype_int8(),
            library.aoti_torch_device_type_cpu(),
            library.aoti_torch_layout__mkldnn(),
        )  # fmt: skip
        steal: Any = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr  # type: ignore[attr-defined]
    except (OSError, AttributeError):
        return None
    dtype, device, layout = known
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    make.argtypes = [
        pointer, size, pointer, pointer, size, number, number, number, pointer, number, pointer,
        size,
    ]  # fmt: skip
    capsule: Any = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [pointer, ctypes.c_char_p, pointer]

    def wrap(address: int, shape: tuple[int, ...], description: Tensor) -> Tensor:
        sizes, handle = (size * len(shape))(*shape), pointer()
        failed = make(
            address, len(shape), sizes, sizes, 0, dtype, device, 0, ctypes.byref(handle), layout,
            description.data_ptr(), len(description),
        )  # fmt: skip
        if failed:
            raise RuntimeError("torch refused a weight of oneDNN")
        tensor: Tensor = steal(capsule(handle, None, None))
        return tensor

    return wrap
