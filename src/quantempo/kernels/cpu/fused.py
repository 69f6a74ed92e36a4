"""Optional compiled passes over channels-last activations.

    group_norm: clamp(round(silu(GroupNorm(x + shift)) / s) + z, 0, qmax), one pass, not five
    quantize:   codes of x, with nearest upsampling and a border of zero points on the way
    unpack:     weights of 4 bits in groups as bytes, in the order in which oneDNN reads them

`fused.c` is compiled once with the system's C compiler into a cache folder and loaded with
ctypes. Nothing requires it: `load()` says why it is not there and callers use torch instead.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantempo.kernels.cpu.onednn import capabilities

__all__ = ["MAX_CHANNELS", "Library", "Norm", "Part", "fields", "floats", "load", "missing"]

log = logging.getLogger("quantempo")

_SOURCE = Path(__file__).with_name("fused.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-Wno-psabi", "-fopenmp", "-fPIC")
# Per-channel rows of one sample live on the stack of each thread.
MAX_CHANNELS = 16384
# About 10 microseconds of work.
_PARALLEL_FROM = 16384


def fields(text: str, *first: Any) -> list[tuple[str, Any]]:
    """Return the fields of a structure from lines of a type and names, as in `fused.c`."""
    lines = [line.split() for line in text.split(";")]
    each = ((name, getattr(ctypes, f"c_{kind}")) for kind, *names in lines for name in names)
    return [*first, *each]


class _PartStruct(ctypes.Structure):
    _fields_ = fields(
        "void_p x; int64 channels stride; void_p raw; float raw_scale; int32 raw_zero raw_qmax"
    )


class _NormStruct(ctypes.Structure):
    _fields_ = fields(
        "int64 parts n height width groups; int32 bf16 silu; void_p gamma beta shift;"
        "int64 shift_stride; float eps; void_p out codes; float scale; int32 zero qmax",
        ("part", _PartStruct * 2),
    )


class _QuantizeStruct(ctypes.Structure):
    _fields_ = fields(
        "void_p x; int64 n height width channels stride; int32 bf16 repeat;"
        "int64 top bottom left right; float scale; int32 zero qmax; void_p codes scales"
    )


@dataclass(frozen=True)
class Part:
    """One of the tensors that `Library.group_norm` sees as concatenated.

    x: float32 or bfloat16 (B, C, H, W), channels_last or a channel slice of such a tensor; raw:
    (scale, zero_point, qmax) to get the codes of x itself too, or None.
    """

    x: Tensor
    raw: tuple[float, int, int] | None = None


@dataclass(frozen=True)
class Norm:
    """An affine group normalisation: weight and bias float32 (C,), contiguous."""

    groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def __post_init__(self) -> None:
        for name in ("weight", "bias"):
            floats(name, getattr(self, name), (len(self.weight),))


class Library:
    """The compiled kernels, on tensors. All activations are channels_last, (B, C, H, W)."""

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        handle.quantempo_layout.restype = ctypes.c_int
        self.layout = ctypes.sizeof(_NormStruct) * 1000 + ctypes.sizeof(_QuantizeStruct)
        if handle.quantempo_layout() != self.layout:
            raise OSError(f"{path} was compiled from another version of its source")
        self._norm, self._quantize = handle.quantempo_norm, handle.quantempo_quantize
        self._add = handle.quantempo_add
        # On addresses, see `packed` and `product`.
        self.unpack, self.product = handle.quantempo_unpack, handle.quantempo_product
        self.unpack.restype = self.product.restype = None
        self._norm.restype = self._quantize.restype = self._add.restype = None
        pointer: Any = ctypes.c_void_p
        number, size, real = ctypes.c_int, ctypes.c_int64, ctypes.c_float
        self._add.argtypes = [pointer] * 3 + [size] * 4 + [number] * 2
        self._norm.argtypes = [pointer, pointer, size, number]
        self._quantize.argtypes = [pointer, number]
        self.unpack.argtypes = [pointer] * 3 + [size] * 9 + [number]
        self.product.argtypes = [pointer] * 3 + [size] + [pointer] * 6
        self.product.argtypes += [real, number, number]

    def quantize(
        self, x: Tensor, scale: float, zero_point: int, qmax: int = 255,
        border: tuple[int, int, int, int] = (0, 0, 0, 0), repeat: int = 1,
        scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the codes of x, upsampled `repeat` times (nearest), inside a border of z.

        Bit-equal with clamp(round(x / scale) + zero_point, 0, qmax) on finite x.

        x: float32 or bfloat16 (B, C, H, W); channels_last, or a channel slice of such a tensor;
        0 <= zero_point <= qmax <= 255; border: pixels added (top, bottom, left, right); scales:
        float32 (B H), filled with max |x| / (qmax - zero_point) of each row of pixels, its scale.
        """
        batch, channels, height, width = x.shape
        stride = _pixel_stride(x)
        top, bottom, left, right = border
        shape = (batch, channels, top + repeat * height + bottom, left + repeat * width + right)
        codes = _empty(shape, torch.uint8)
        call = _QuantizeStruct(
            x.data_ptr(), batch, height, width, channels, stride, _bf16(x), repeat,
            top, bottom, left, right, scale, zero_point, qmax, codes.data_ptr(),
            None if scales is None else scales.data_ptr(),
        )  # fmt: skip
        self._quantize(ctypes.byref(call), _threads(codes))
        return codes

    def quantize_rows(
        self, x: Tensor, scale: float, zero_point: int, qmax: int = 255,
        scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the codes of x (R, K), rows contiguous, uint8 (R, K); scales: see `quantize`."""
        if x.stride(1) != 1 and x.shape[1] > 1:
            x = x.contiguous()
        # An image one pixel wide.
        image = x.t()[None, :, :, None]
        return self.quantize(image, scale, zero_point, qmax, scales=scales)[0, :, :, 0].t()

    def group_norm(
        self, parts: list[Part], norm: Norm, *, silu: bool, grid: tuple[float, int, int] | None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Normalise torch.cat(parts, 1) + shift, apply SiLU, and quantize.

        parts: one or two tensors of one dtype and size; no copy of their union is made. grid:
        (scale, zero_point, qmax) of the codes; None for floats. shift: float32 (B, C), rows
        contiguous, added to every pixel before the norm; or None.
        Returns uint8 or float32 (B, C, H, W); and the codes of each part whose `raw` asks for them,
        bit-equal with `quantize`. Error: at most 1 from the codes of torch's own float32 passes.
        """
        x = parts[0].x
        batch, _, height, width = x.shape
        channels = sum(part.x.shape[1] for part in parts)
        for part in parts:
            if part.x.dtype != x.dtype or part.x.shape[2:] != x.shape[2:] or len(part.x) != batch:
                raise ValueError(f"got parts {x.dtype} {x.shape}, {part.x.dtype} {part.x.shape}")
        if channels != len(norm.weight) or channels % norm.groups or channels > MAX_CHANNELS:
            raise ValueError(f"got {channels} channels for a norm of {len(norm.weight)}")
        call = _NormStruct(
            parts=len(parts), n=batch, height=height, width=width, groups=norm.groups,
            bf16=_bf16(x), silu=silu, gamma=norm.weight.data_ptr(), beta=norm.bias.data_ptr(),
            eps=norm.eps, scale=1.0,
        )  # fmt: skip
        if shift is not None:
            # A row may be any distance from the next.
            fits = shift.shape == (batch, channels) and shift.is_cpu and shift.stride(1) == 1
            if shift.dtype != torch.float32 or not fits:
                raise ValueError(f"got shift {shift.dtype} {tuple(shift.shape)} on {shift.device}")
            call.shift, call.shift_stride = shift.data_ptr(), shift.stride(0)
        raws: list[Tensor] = []
        for i, part in enumerate(parts):
            struct = call.part[i]
            struct.x, struct.channels = part.x.data_ptr(), part.x.shape[1]
            struct.stride = _pixel_stride(part.x)
            if part.raw is not None:
                raws.append(_empty((batch, part.x.shape[1], height, width), torch.uint8))
                struct.raw = raws[-1].data_ptr()
                struct.raw_scale, struct.raw_zero, struct.raw_qmax = part.raw
        if grid is None:
            out = _empty((batch, channels, height, width), torch.float32)
            call.out = out.data_ptr()
        else:
            out = _empty((batch, channels, height, width), torch.uint8)
            call.codes = out.data_ptr()
            call.scale, call.zero, call.qmax = grid
        threads = _threads(out)
        chunks = 1 if batch % threads == 0 else threads
        scratch = torch.empty(batch * chunks * 2 * channels)
        self._norm(ctypes.byref(call), scratch.data_ptr(), chunks, threads)
        return out, raws

    def add(self, x: Tensor, y: Tensor | None, edge: Tensor | None) -> Tensor:
        """Add y to x in place, and to the pixels on the border of the image a row of `edge`.

        x: float32 or bfloat16 (B, C, H, W), channels_last; returned. y: like x, or None. edge:
        float32 (16, C), or None; row 1 a + 2 b + 4 c + 8 d is for pixels in the first row (a), the
        last row (b), the first column (c), the last column (d).
        """
        batch, channels, height, width = x.shape
        for tensor in (x,) if y is None else (x, y):
            alike = tensor.dtype == x.dtype and tensor.shape == x.shape
            if not alike or _pixel_stride(tensor) != channels:
                raise ValueError(f"got {tensor.dtype} {tensor.shape}, strides {tensor.stride()}")
        edges = floats("edge", edge, (16, channels))
        sizes = batch, height, width, channels, _bf16(x), _threads(x)
        self._add(x.data_ptr(), None if y is None else y.data_ptr(), edges, *sizes)
        return x


def _threads(x: Tensor) -> int:
    """Return torch's number of threads, or 1 if waking others costs more than the work."""
    return torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1


def _empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def floats(name: str, value: Tensor | None, shape: tuple[int, ...]) -> int | None:
    """Return the address of float32 numbers for C; ValueError unless they are there, dense."""
    if value is None:
        return None
    dense = value.is_contiguous() and value.is_cpu
    if value.dtype != torch.float32 or not dense or value.shape != shape:
        text = f"got {name} {value.dtype} {tuple(value.shape)} on {value.device}"
        raise ValueError(f"{text}; expected dense float32 {shape} on the CPU")
    return value.data_ptr()


def _bf16(x: Tensor) -> int:
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu:
        raise TypeError(f"got {x.dtype} on {x.device}; expected float32 or bfloat16 on the CPU")
    return int(x.dtype == torch.bfloat16)


def _pixel_stride(x: Tensor) -> int:
    """Return the elements from one pixel to the next; ValueError if that is not constant."""
    _, _, height, width = x.shape
    stride = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0)
    expected = (height * width * stride, 1, width * stride, stride)
    for size, got, want in zip(x.shape, x.stride(), expected, strict=True):
        if size > 1 and got != want:
            raise ValueError(f"got strides {x.stride()}; expected channels_last")
    return stride


def load() -> Library | None:
    """Return the compiled kernels (compiled at the first call on a machine), or None."""
    found = _load()
    return found if isinstance(found, Library) else None


def missing() -> str | None:
    """Return why there are no compiled kernels, or None."""
    found = _load()
    return found if isinstance(found, str) else None


@functools.cache
def _load() -> Library | str:
    if platform.system() != "Linux":
        return f"they are built on Linux only, this is {platform.system()}"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return "there is no C compiler (gcc or cc) on the path"
    try:
        if not _resolve_openmp():
            return "torch has loaded no GNU-compatible OpenMP runtime to share"
        return _cached(compiler)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["no message"]
        return f"{compiler} failed: {lines[0]}"
    except Exception as error:  # Whatever it was, torch's own operations do the work.
        return f"they could not be built: {error}"


def _resolve_openmp() -> bool:
    """Make the OpenMP runtime that torch loaded visible to the library, and never another one."""
    # Two runtimes would mean two pools of spinning threads on the same cores.
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return True
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}
    for name in sorted(loaded):
        if hasattr(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL), "GOMP_parallel"):
            return True
    return False


def _cached(compiler: str) -> Library:
    """Return the kernels for this source, compiler and CPU, from the cache or compiled into it."""
    version = _run(compiler, "--version")
    cpu = (platform.machine(), sorted(capabilities().items()))
    key = hashlib.sha256(repr((_SOURCE.read_bytes(), _FLAGS, version, cpu)).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache) / "quantempo"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _only_ours(folder):
        raise OSError(f"other users can write to {folder}; set XDG_CACHE_HOME to a private folder")
    path = folder / f"fused_cpu-{key[:16]}.so"
    if path.exists() and _only_ours(path):
        try:
            code = path.read_bytes()
            # What is cut short would end the process when it is loaded.
            if hashlib.sha256(code[:-32]).digest() == code[-32:]:
                return Library(path)
        except (OSError, AttributeError):
            pass
        log.warning("%s is damaged and is built again", path)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "fused_cpu.so"
        # Linked by itself, without -fopenmp: that would load the compiler's own OpenMP runtime.
        _run(compiler, *_FLAGS, "-c", str(_SOURCE), "-o", f"{made}.o")
        _run(compiler, "-shared", f"{made}.o", "-lm", "-o", str(made))
        made.chmod(0o700)
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
            file.flush()
            os.fsync(file.fileno())
        # Loaded under its own name: a damaged library stays loaded under that of the cache.
        library = Library(made)
        os.replace(made, path)
    return library


def _only_ours(path: Path) -> bool:
    found = path.lstat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout
