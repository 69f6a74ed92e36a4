"""Test Triton kernels without a GPU: run them interpreted, and compile them for a chip not here.

module = harness.interpreted("gn_act_quant")        # a private copy, kernels run on numpy
module.launch(...)                                  # CPU tensors in, CPU tensors out

from quantempo.kernels.gpu import gn_act_quant
with harness.recorded(gn_act_quant) as launches:    # nothing runs; meta tensors will do
    gn_act_quant.launch(...)
binary = harness.compiled(launches[0], arch=90)     # what launch() would have compiled
assert binary.spills == 0 and binary.count("LDG.E.128") > 0
"""

import functools
import importlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

PACKAGE = "quantempo.kernels.gpu"
TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# --- interpreted ---------------------------------------------------------------------------------


def convert_float(
    data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object
) -> np.ndarray:
    """Convert the bits of `data` between float types, ties to even.

    Stands in for the interpreter's own conversion (Triton 3.6), which rounds halves up and loses
    the carry into the exponent: float32 1.999 became bfloat16 1.0.
    """
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    contiguous = np.ascontiguousarray(data)
    unsigned = contiguous.view(bits[contiguous.dtype.itemsize])
    values = torch.from_numpy(unsigned.copy()).view(TORCH_DTYPE[source.name])
    result = values.to(TORCH_DTYPE[target.name])
    width = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[result.element_size()]
    return result.view(width).numpy().reshape(data.shape)


@functools.cache
def interpreted_standard_library() -> tuple[tuple[ModuleType, str, InterpretedFunction], ...]:
    """Return (module, name, interpreted copied) of tl.sum, tl.max, ...: compiled at import time."""
    copies: dict[JITFunction, InterpretedFunction] = {}
    found = []
    for module in (tl, tl.standard):
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                copied = copies.setdefault(value, InterpretedFunction(value.fn))
                found.append((module, name, copied))
    return tuple(found)


# What the interpreter patches while it runs a kernel. It leaves some of that behind (Triton 3.6:
# the patches made for a function that a kernel calls), which would break every later compilation.
PATCHED = (tl, tl.core, tl.math, tl.standard, tl.dtype, tl.tensor, tl.core.tensor_descriptor_base)


def restore(before: list[dict[str, Any]]) -> None:
    """Give the members of PATCHED the values they had."""
    for owner, members in zip(PATCHED, before, strict=True):
        for name, value in list(vars(owner).items()):
            if name not in members:
                # Functions of tl.standard, once rewritten, need the names added beside them.
                if owner is not tl.standard:
                    delattr(owner, name)
            elif value is not members[name]:
                setattr(owner, name, members[name])


@contextmanager
def interpreting() -> Iterator[None]:
    """Make Triton interpret what is defined or launched inside the block."""
    copies = interpreted_standard_library()
    interpret, convert = triton.knobs.runtime.interpret, interpreter._convert_float
    before = [dict(vars(owner)) for owner in PATCHED]
    try:
        triton.knobs.runtime.interpret = True
        interpreter._convert_float = convert_float
        for module, name, copied in copies:
            setattr(module, name, copied)
        # exp2 of a large exponent is inf on the chip, without a warning.
        with np.errstate(over="ignore"):
            yield
    finally:
        triton.knobs.runtime.interpret = interpret
        interpreter._convert_float = convert
        restore(before)


def interpreted_run(function: InterpretedFunction) -> Callable[..., Any]:
    """Return `function.run` inside `interpreting()`."""
    run = function.run

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with interpreting():
            return run(*args, **kwargs)

    return wrapped


@functools.cache
def interpreted(name: str) -> ModuleType:
    """Return a private copy of `quantempo.kernels.gpu.NAME` whose kernels run on numpy.

    The modules of the package that it imports are private, interpreted copies too; the compiled
    ones in `sys.modules` stay as they were.
    """
    parent = importlib.import_module(PACKAGE.rpartition(".")[0])
    child = PACKAGE.rpartition(".")[2]
    attribute = getattr(parent, child, None)
    ours = [key for key in sys.modules if key == PACKAGE or key.startswith(PACKAGE + ".")]
    kept = {key: sys.modules.pop(key) for key in ours}
    try:
        with interpreting():
            module = importlib.import_module(f"{PACKAGE}.{name}")
        copies = [value for key, value in sys.modules.items() if key.startswith(PACKAGE + ".")]
    finally:
        for key in [key for key in sys.modules if key == PACKAGE or key.startswith(PACKAGE + ".")]:
            del sys.modules[key]
        sys.modules.update(kept)
        if attribute is None:
            vars(parent).pop(child, None)
        else:
            setattr(parent, child, attribute)
    functions = {
        id(value): value
        for copy in copies
        for value in vars(copy).values()
        if isinstance(value, InterpretedFunction)
    }
    for function in functions.values():
        function.run = interpreted_run(function)  # type: ignore[method-assign]
    return module


# --- compiled ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](*args, **kwargs)` that was asked for and did not run."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of every kernel that `modules` name, instead of running them."""
    launches: list[Launch] = []

    def recorder(kernel: JITFunction) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            assert not callable(grid), "give the grid as a tuple"
            launches.append(Launch(kernel, tuple(grid), args, kwargs))

        return run

    values = [value for module in modules for value in vars(module).values()]
    kernels = {id(value): value for value in values if isinstance(value, JITFunction)}
    try:
        for kernel in kernels.values():
            kernel.run = recorder(kernel)  # type: ignore[method-assign]
        yield launches
    finally:
        for kernel in kernels.values():
            del kernel.run


@dataclass(frozen=True)
class Binary:
    """What the assembler made of a launch."""

    registers: int  # per thread
    stack: int  # bytes a thread keeps in local memory
    spills: int  # local loads and stores in the machine code
    shared: int  # bytes of shared memory a program, as Triton asks for it
    sass: str  # the machine code, one instruction a line
    ptx: str  # before the assembler
    messages: str = ""  # of the assembler, if asked to speak

    def count(self, pattern: str) -> int:
        """Return the number of instructions whose text contains the regular expression."""
        return len(re.findall(pattern, self.sass))


def bound(launch: Launch, arch: int) -> tuple[Any, ...]:
    """Return (target, backend, kwargs, arguments by name, specialization, options) of a launch."""
    kernel = launch.kernel
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = dict(launch.kwargs, debug=False, instrumentation_mode="")
    return target, backend, kwargs, *binder(*launch.args, **kwargs)


def variant(launch: Launch, arch: int = 90) -> str:
    """Return what a launch is compiled for: two launches of one variant share one binary."""
    *_, specialization, options = bound(launch, arch)
    return f"{launch.kernel.fn.__name__} {specialization} {options}"


@contextmanager
def speaking() -> Iterator[list[str]]:
    """Compile anew, not from Triton's cache, and collect what the assembler prints."""
    messages: list[str] = []
    knobs = triton.knobs
    before = knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log
    printed = io.StringIO()
    try:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        with redirect_stdout(printed):
            yield messages
    finally:
        knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = before
        messages.append(printed.getvalue())


def compiled(launch: Launch, arch: int, messages: bool = False) -> Binary:
    """Compile a launch for sm_ARCH, specialized as it would have been; `messages`: compile anew."""
    kernel = launch.kernel
    target, backend, kwargs, arguments, specialization, options = bound(launch, arch)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, arguments, specialization, options
    )
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(kernel, signature, constants, attributes)
    said: list[str] = []
    with speaking() if messages else nullcontext(said) as said:
        result = triton.compile(source, target=target, options=options.__dict__)
    sass, usage = disassembled(result.asm["cubin"])
    return Binary(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=int(result.metadata.shared),
        sass=sass,
        ptx=result.asm["ptx"],
        messages="".join(said),
    )


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Return (SASS, resource usage line) of a cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(flag: str) -> str:
            return subprocess.run(
                [tool, flag, path], check=True, capture_output=True, text=True
            ).stdout

        listing, usage = run("-sass"), run("-res-usage")
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing)
    return "\n".join(instructions), usage
