"""The engine that runs a whole packed denoiser as OpenVINO graphs, one for the shapes of a call."""

from __future__ import annotations

import importlib.util
import inspect
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from quantempo.core.instance import own_forward, reset_forward, set_forward, touched
from quantempo.core.machine import trim
from quantempo.engines.base import too_many_terms
from quantempo.engines.select import ATTACHING, Engine, run_instead
from quantempo.engines.simulated import reference, too_far
from quantempo.errors import QuantempoError, log
from quantempo.models.layers import bind_inputs
from quantempo.quantized import CLOCK_NAME, QConv2d, quantized_layers

__all__ = ["KernelRow", "Layout", "OpenVinoEngine"]

_KERNELS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")
_INT8 = ("u8", "i8")
# Compiled graphs kept; each holds its own copy of the weights, one byte per weight.
MAX_GRAPHS = 4
# Samples in one run of a graph: with more, the activations of small networks leave the cache
# (bundled model, 2 cores: 16 samples took 197 ms at once, 8 took 58).
MAX_ROWS = 8


@dataclass(frozen=True)
class KernelRow:
    """How one convolution or linear layer was executed.

    name: of the layer, "/i" appended for segment i, or OpenVINO's name of a layer in float;
    precision: of its input, "none" when no kernel has that name; primitive: OpenVINO's kernel.
    """

    name: str
    quantized: bool
    precision: str
    primitive: str

    @property
    def int8(self) -> bool:
        """Whether the sums were done on integers."""
        # The kernel must say so too: one that widens stored int8 weights to float reports "i8".
        return self.precision in _INT8 and self.primitive.lower().endswith(_INT8)


class OpenVinoEngine(Engine):
    """Run the denoiser as one compiled graph.

    What is not int8 is in float32 (in bfloat16 10-15 % faster, for 5-6 dB of PSNR of a CIFAR-10
    DDPM whose int8 layers leave 41 dB), but for softmax(q k^T) v where the CPU has bfloat16.
    """

    name = "openvino"
    devices: tuple[str, ...] = ("cpu",)
    few = 2

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        if importlib.util.find_spec("openvino") is None:
            return "OpenVINO is not installed (pip install 'quantempo[openvino]')"
        try:
            from quantempo.engines.openvino.graph import wrong_sums

            return wrong_sums()
        except Exception as error:  # Private modules of it are imported: they may move.
            return f"this version of OpenVINO cannot be used: {error}"

    def attach(self, denoiser: nn.Module) -> None:
        """Set `denoiser.forward`; QuantempoError for a layer whose sums may overflow."""
        for name, layer in quantized_layers(denoiser):
            reason = too_many_terms(layer)
            if reason is None and isinstance(layer, QConv2d) and layer.groups > 1:
                reason = "groups and a split input" if len(layer.segments) > 1 else None
            if reason is not None:
                raise QuantempoError(f"engine 'openvino' cannot take {name}: {reason}")
        reason = _left_out(denoiser)
        if reason is not None:
            text = f"engine 'openvino' would leave out {reason}"
            raise QuantempoError(f"{text}; use engine 'onednn' or 'simulated'")
        set_forward(denoiser, _Runner(denoiser))

    def detach(self, denoiser: nn.Module) -> None:
        """Give the denoiser its own `forward` back and free the graphs."""
        reset_forward(denoiser)

    def watched(self, denoiser: nn.Module) -> Iterator[nn.Module]:
        """Yield all modules: everything in them is a constant of the graph."""
        return (module for module in denoiser.modules() if module is not denoiser)


def has_bfloat16() -> bool:
    """Return whether OpenVINO computes in bfloat16 on this CPU without emulation."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class _Runner:
    """The `forward`: finds or compiles the graph of a call."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.__signature__ = inspect.signature(type(denoiser).forward.__get__(denoiser))
        self.graphs: OrderedDict[Any, _Graph] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = bind_inputs(self.denoiser, args, kwargs)
        arguments = dict(self.__signature__.bind(*args, **kwargs).arguments)
        arguments[inputs.timestep_name] = inputs.timestep
        layout, tensors = Layout.of(arguments)
        tensors = [t.detach().contiguous() for t in tensors]
        tensors = [t.float() if t.is_floating_point() else t for t in tensors]
        bucket = self.denoiser.get_submodule(CLOCK_NAME).bucket.reshape(-1)
        # (B,) where the batch mixes several.
        values = [bucket if bool((bucket != bucket[0]).any()) else bucket[:1], *tensors]
        count, dtype = len(inputs.sample), inputs.sample.dtype
        # The entries of such a list may be a sample each: none is cut.
        listed = any(isinstance(v, list) and len(v) == count for v in arguments.values())
        chunks = _chunks(values, 0 if listed else count)
        found = [(self._graph(layout, chunk), chunk) for chunk in chunks]
        graph = found[0][0]
        wrong = next((graph.wrong for graph, _ in found if graph.wrong), None)
        if wrong is not None:
            return run_instead(self.denoiser, OpenVinoEngine.name, wrong, args, kwargs)
        parts = [graph(chunk) for graph, chunk in found]
        outputs = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        return graph.layout.fill(y.to(dtype) if y.is_floating_point() else y for y in outputs)

    def _graph(self, layout: Layout, values: list[Tensor]) -> _Graph:
        shapes = tuple((tuple(value.shape), value.dtype) for value in values)
        key = (repr(layout), shapes, torch.get_num_threads())
        with ATTACHING:
            if key not in self.graphs:
                while len(self.graphs) >= MAX_GRAPHS:
                    self.graphs.popitem(last=False)
                graph = self._compile(layout, values)
                graph.wrong = self._first_wrong(graph, layout, values)
                self.graphs[key] = graph
                trim()
            self.graphs.move_to_end(key)
            return self.graphs[key]

    def _first_wrong(self, graph: _Graph, layout: Layout, values: list[Tensor]) -> str | None:
        """Return the first layer far from `simulated`, or None; both run half types in float32."""
        arguments = layout.fill(values[1:])
        (truth, seen), (free, loose) = (
            reference(self.denoiser, values[0], arguments, rounded) for rounded in (True, False)
        )
        expected, outputs = Layout.of(truth)[1], graph(values)
        if not too_far(outputs, expected, Layout.of(free)[1]):
            return None
        probe = self._compile(layout, values, inner=True)
        layers = zip(probe.names, probe(values)[len(outputs) :], seen, loose, strict=True)
        far = (name for name, y, right, free in layers if too_far([y], [right], [free]))
        return next(far, "its end")

    def _compile(self, layout: Layout, values: list[Tensor], inner: bool = False) -> _Graph:
        """Return the graph of a call; `inner`: integer layers are outputs too, after its own."""
        import openvino as ov

        from quantempo.engines.openvino.graph import build_graph
        from quantempo.engines.openvino.rewrite import rewrite

        answer = list[Layout]()

        def run(denoiser: nn.Module, *tensors: Tensor) -> list[Tensor]:
            # Not denoiser(...): its pre-hook works on real time-steps. Under autocast the graph
            # would hold casts.
            with torch.autocast("cpu", enabled=False):
                output = type(denoiser).forward(denoiser, **layout.fill(tensors))
            made, found = Layout.of(output)
            answer[:] = [made]
            return found

        log.info("compiling the denoiser for inputs %s", [tuple(x.shape) for x in values[1:]])
        how = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            graph, calls = build_graph(self.denoiser, run, values, inner)
            rewrite(graph, bfloat16_attention=has_bfloat16())
            return _Graph(ov.Core().compile_model(graph, "CPU", how), calls, answer[0])
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no reason"]
            raise QuantempoError(
                f"engine 'openvino' cannot convert {type(self.denoiser).__name__} as it is called: "
                f"{lines[0][:200]}; use engine 'onednn' or 'simulated'"
            ) from error


class _Graph:
    def __init__(self, compiled: Any, calls: list[Any], layout: Layout) -> None:
        self.compiled, self.layout = compiled, layout
        self.names = [call.name for call in calls]
        self.wrong: str | None = None
        # One for each thread: its buffers are those of one call.
        self.own = threading.local()
        self.rows = _kernel_rows(compiled, calls)
        floats = [row.name for row in self.rows if row.quantized and not row.int8]
        if floats:
            log.warning("OpenVINO does not run these layers in int8: %s", ", ".join(floats))

    def __call__(self, values: list[Tensor]) -> list[Tensor]:
        arrays = [value.detach().numpy() for value in values]
        if not hasattr(self.own, "request"):
            self.own.request = self.compiled.create_infer_request()
        results = self.own.request.infer(arrays, share_inputs=True, share_outputs=True)
        # The buffers belong to the request and are overwritten by the next call.
        return [torch.from_numpy(np.array(array)) for array in results.values()]


def _chunks(values: list[Tensor], rows: int) -> list[list[Tensor]]:
    """Cut the tensors that have a row for each sample into equal parts of at most MAX_ROWS."""
    # Not when a tensor has several rows for each sample (frames, views).
    if rows <= MAX_ROWS or any(value.ndim and len(value) not in (1, rows) for value in values):
        return [values]
    sizes = [len(part) for part in torch.arange(rows).tensor_split(-(-rows // MAX_ROWS))]
    cut = [
        value.split(sizes) if value.ndim and len(value) == rows else [value] * len(sizes)
        for value in values
    ]
    return [[part.contiguous() for part in parts] for parts in zip(*cut, strict=True)]


def _kernel_rows(compiled: Any, calls: list[Any]) -> list[KernelRow]:
    rows = []
    left = {f"{call.name}/{i}" for call in calls for i in range(len(call.layer.segments))}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if _text(info, "layerType") not in _KERNELS:
            continue
        merged = _text(info, "originalLayersNames").split(",")
        # Low-precision transformations may leave only the rescaling after it in the list.
        origins = [origin.partition("/Dequantization")[0] for origin in merged]
        name = next((origin for origin in origins if origin in left), None)
        if name is None and _text(info, "layerType") == "MatMul":
            # A product of two activations, as in attention.
            continue
        left.discard(name or "")
        precision, primitive = _text(info, "runtimePrecision"), _text(info, "primitiveType")
        rows.append(KernelRow(name or merged[0], name is not None, precision, primitive))
    return rows + [KernelRow(name, True, "none", "") for name in sorted(left)]


@dataclass(frozen=True)
class Layout:
    """Nested values without their tensors; leaves are () for a tensor, else (value,)."""

    tree: TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> tuple[Layout, list[Tensor]]:
        """Return the layout of a value, and its tensors."""
        leaves, tree = tree_flatten(value)
        plain = (Tensor, bool, int, float, str, type(None))
        odd = next((leaf for leaf in leaves if not isinstance(leaf, plain)), None)
        if odd is not None:
            raise QuantempoError(
                f"a graph got a {type(odd).__name__} in a call of the denoiser; expected "
                "tensors, numbers and containers of them; use engine 'onednn'"
            )
        fixed = tuple(() if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves)
        return cls(tree, fixed), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def fill(self, tensors: Iterable[Tensor]) -> Any:
        """Return the value with these tensors."""
        source = iter(tensors)
        return tree_unflatten([*(x[0] if x else next(source) for x in self.leaves)], self.tree)


def _left_out(denoiser: nn.Module) -> str | None:
    """Return what acts in a denoiser at each call and a graph would not hold, or None."""
    if getattr(own_forward(denoiser), "before", None) is not None:
        return "what others have set as its forward before it was quantized"
    for name, module in denoiser.named_modules():
        if module is not denoiser and touched(module):
            return f"the hooks or the forward that others have set on '{name}'"
        processor = getattr(module, "processor", None)
        if processor is not None and (isinstance(processor, nn.Module) or vars(processor)):
            return f"what the processor of '{name}' ({type(processor).__name__}) keeps"
    return None


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""
