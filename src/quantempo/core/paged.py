"""Tensors that lie in safetensors files: read at each use, kept nowhere.

What networks larger than the memory are made of while they are quantized.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.core.instance import put_buffer
from quantempo.errors import QuantempoError

__all__ = [
    "Paged", "held", "is_paged", "laid_out", "loaded", "page_out", "paged_tensors",
    "save_tensors", "small", "spilled",
]  # fmt: skip

_aten = torch.ops.aten
# In the order in which safetensors lays them out.
_DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Elements up to which a tensor is not worth a read at each use.
_SMALL = 2**16


class _Place(NamedTuple):
    file: Path
    start: int
    dtype: torch.dtype
    # Size and time of a file that nobody may change.
    stamp: tuple[int, int] | None = None


class Paged(Tensor):
    """A tensor of a file; every operation on it reads the file, none but `put` writes to it.

    Its dtype is that of computation, the file may hold another one. Shape, dtype, device and
    `detach` read nothing, and it stays paged on another device.
    """

    place: _Place
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, place: _Place, shape: Any, dtype: torch.dtype, device: Any = "cpu") -> "Paged":
        """Return the tensor at a place."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device(device))
        made.place = place
        return made

    def like(self, dtype: torch.dtype | None = None, device: Any = None) -> "Paged":
        """Return the same tensor, of another dtype or device."""
        return Paged(self.place, self.shape, dtype or self.dtype, device or self.device)

    def load(self) -> Tensor:
        """Return the values; QuantempoError: the file was cut or is gone."""
        file, start, dtype, stamp = self.place
        # On its way to a GPU while the next one is read.
        gpu, done = self.device.type == "cuda", 0
        found = torch.empty(tuple(self.shape), dtype=dtype, pin_memory=gpu)
        with suppress(OSError), file.open("rb", buffering=0) as stream:
            stream.seek(start)
            # Beyond 2 GB a call reads a part.
            while stamp in (None, _stamp(file)) and (
                count := stream.readinto(_bytes(found)[done:])
            ):  # type: ignore[attr-defined]
                done += count
        if done != found.nbytes:
            raise QuantempoError(f"cannot read {file} any more, was it changed? Restore it")
        return found.to(self.device, non_blocking=gpu).to(self.dtype)

    def put(self, value: Tensor) -> None:
        """Write what this is the place of, of the type in the file."""
        with self.place.file.open("r+b") as stream:
            stream.seek(self.place.start)
            stream.write(_bytes(loaded(value).detach().cpu().contiguous()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled with its values."""
        return self.load().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Self:
        """Be shared by copies: nothing writes to it."""
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on the values."""
        first, kwargs = args[0] if args else None, kwargs or {}
        if isinstance(first, Paged):
            if func in (_aten.detach.default, _aten.alias.default):
                return first.like()
            if func is _aten._to_copy.default and kwargs.get("dtype") in (None, first.dtype):
                return first.like(device=kwargs.get("device"))
        for given, known in zip(args, func._schema.arguments, strict=False):
            written = known.alias_info is not None and known.alias_info.is_write
            if written and isinstance(given, Paged):
                raise QuantempoError(f"{func} writes to {given.place.file}; load the network whole")
        args, kwargs = pytree.tree_map_only(Paged, Paged.load, (args, kwargs))
        return func(*args, **kwargs)


def small(tensor: Tensor) -> bool:
    """Return whether a tensor is better kept in memory."""
    return tensor.numel() < _SMALL


def is_paged(module: nn.Module) -> bool:
    """Return whether any parameter of a module lies in a file."""
    return any(isinstance(parameter, Paged) for parameter in module.parameters())


def loaded(tensor: Tensor) -> Tensor:
    """Return a tensor in memory: itself, or the values of a paged one."""
    return tensor.load() if isinstance(tensor, Paged) else tensor


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def paged_tensors(file: Path, fixed: bool = False) -> dict[str, Paged]:
    """Return the tensors of a safetensors file, its header read; fixed: it must stay as it is."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    found, stamp = dict[str, Paged](), _stamp(file) if fixed else None
    for name, entry in header.items():
        dtype = _DTYPES[entry["dtype"]]
        place = _Place(file, 8 + size + entry["data_offsets"][0], dtype, stamp)
        found[name] = Paged(place, entry["shape"], dtype)
    return found


def laid_out(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Paged]:
    """Write the header that `save_file` of safetensors does, and return where the tensors go.

    What lies there already stays.
    """
    order, header, end = [*_NAMES], dict[str, Any](), 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    for name in names:
        value, start = tensors[name], end
        end += value.numel() * value.dtype.itemsize
        shape = {"dtype": _NAMES[value.dtype], "shape": list(value.shape)}
        header[name] = shape | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.touch()
    with file.open("r+b") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(stream.tell() + end)
    return paged_tensors(file)


def save_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the bytes that `save_file` of safetensors does, with one tensor in memory at a time."""
    for name, place in laid_out(file, tensors, metadata).items():
        place.put(tensors[name])


def spilled(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Write tensors to a file and return them paged; QuantempoError: the disk is full."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, tensors)
    except OSError as error:
        reason = error.strerror or error
        raise QuantempoError(f"cannot write {file}: {reason}; free some space, rerun") from error
    found = paged_tensors(file)
    return {name: found[name].like(device=value.device) for name, value in tensors.items()}


def page_out(module: nn.Module, file: Path) -> None:
    """Write the large tensors that a module itself holds to a file, and put paged ones there."""
    every = {k: v for k, v in {**module._parameters, **module._buffers}.items() if v is not None}
    mine = {k: v for k, v in every.items() if not (small(v) or isinstance(v, Paged))}
    for name, value in spilled(mine, file).items():
        put_buffer(module, name, value)


@contextmanager
def held(module: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Keep the paged tensors of a module in memory; write: and then what became of them on disk."""
    with ExitStack() as stack:
        files = dict[nn.Module, Path]()
        for part in module.modules():
            for name, value in {**part._parameters, **part._buffers}.items():
                if isinstance(value, Paged):
                    files[part] = value.place.file
                    stack.callback(put_buffer, part, name, value)
                    put_buffer(part, name, value.load())
        yield
        for part, file in files.items() if write else ():
            page_out(part, file)
        if write:
            stack.pop_all()
