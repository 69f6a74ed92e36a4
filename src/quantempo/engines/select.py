"""Engines: what executes a packed denoiser, behind one contract.

An engine attaches to a quantized denoiser by setting attributes of that instance (each layer's
`kernel`, the `forward` of blocks or of the whole network) and detaches by deleting them. Weights
and files never depend on it.
"""

import gc
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quantempo.core.instance import Forward, own_forward, put_forward, reset_forward, set_forward
from quantempo.core.machine import parse_bytes, trim
from quantempo.engines import calls
from quantempo.engines.base import TARGET, warn_once
from quantempo.engines.streaming import Lane, Streamed
from quantempo.errors import QuantempoError, log
from quantempo.models.layers import bind_inputs, lists_of
from quantempo.quantized import QLayer, find_clock, quantized_layers
from quantempo.registry import Registry, check_known

__all__ = [
    "ATTACHING", "ENGINES", "ByShape", "Engine", "attach", "attach_lazily", "attached", "choose",
    "detach", "run_instead",
]  # fmt: skip

# One at a time: attaching and tracing change a network that other threads may call.
ATTACHING = threading.RLock()
PACKED = ("keep", "unpack", "auto")
# Bytes must save this share of the time, or a weight stays packed.
LEAST = 0.03


class Engine:
    """What every engine offers.

    devices: torch device types it runs on; the fastest engine of a device is registered first.
    few: rows up to which it is faster than that one all the same; copies: bytes in memory for a
    weight in groups that is held as bytes, 0 where it is held in one form only.
    """

    name: str
    devices: tuple[str, ...]
    few = copies = 0

    def missing(self) -> str | None:
        """Return why it cannot run here (one clause), or None."""
        return None

    def handicap(self) -> str | None:
        """Return why it is slower here than it should be (one clause), or None."""
        return None

    def holds(self, layer: QLayer) -> str:
        """Say how a weight in groups lies in memory while it runs."""
        return "as bytes"

    def attach(self, denoiser: nn.Module) -> None:
        """Make `denoiser(...)` run on this engine."""
        raise NotImplementedError

    def detach(self, denoiser: nn.Module) -> None:
        """Undo `attach`."""
        raise NotImplementedError

    def forget(self, denoiser: nn.Module) -> None:
        """Free what is held of a network that was moved; `attach` or `detach` follows."""
        self.detach(denoiser)

    def first_wrong(self, denoiser: nn.Module, args: Any, kwargs: Any, output: Any) -> str | None:
        """Return the first part that is far from the exact integers in the first call, or None."""
        return None

    def watched(self, denoiser: nn.Module) -> Iterable[nn.Module]:
        """Yield the modules whose change makes what was attached wrong."""
        return (layer for _, layer in quantized_layers(denoiser))


ENGINES: Registry[Engine] = Registry("engine")


def choose(device: str, but: str | None = None) -> Engine:
    """Return the fastest engine (but one) of a device type, else QuantempoError; log the others."""
    found: list[tuple[str, Engine, str | None]] = []
    for name in ENGINES.names():
        engine = ENGINES.get(name)
        if name == but or (device not in engine.devices and "any" not in engine.devices):
            continue
        reason = engine.missing()
        if reason is None:
            found.append((name, engine, engine.handicap()))
        else:
            warn_once(f"engine {name} is not used: {reason}")
    if not found:
        raise QuantempoError(f"no engine can run on device '{device}'")
    # Sorting is stable: registration order decides among equals.
    chosen = sorted(found, key=lambda item: item[2] is not None)[0]
    for name, _, reason in found[: found.index(chosen)]:
        log.warning("engine %s is not the default here: %s", name, reason)
    return chosen[1]


def attach(
    denoiser: nn.Module, engine: str = "auto", packed: str = "keep", call: Any = None,
    memory: int | str | None = None,
) -> str:  # fmt: skip
    """Attach an engine to a quantized denoiser and return its name.

    It is attached again when a call finds the network changed: moved, loaded, other processors.
    engine: a registered name, or "auto": the fastest, see `ByShape`, installed for its device.
    packed: "keep" weights in groups packed where the engine can, "unpack" them, or "auto": bytes
    where the first call finds them faster; call: its (args, kwargs), where it is known.
    memory: of the GPU, "12GB", calls included: blocks beyond it are copied from the host while
    others run (`streaming`). Detached, it is there.
    Raises QuantempoError: not quantized, unknown engine or `packed`, or it cannot run here.
    """
    check_known([packed], PACKED, "got packed")
    if (clock := find_clock(denoiser)) is None:
        text = f"{type(denoiser).__name__} is not quantized"
        raise QuantempoError(f"{text}; run `quantempo quantize`")
    lane = None if memory is None else _lane(denoiser, packed)
    device = _device(denoiser) if lane is None else lane.device.type
    chosen = choose(device) if engine == "auto" else ENGINES.get(engine)
    reason = chosen.missing()
    if reason is None and device not in chosen.devices and "any" not in chosen.devices:
        reason = f"it runs on {', '.join(chosen.devices)}, the model is on {device}"
    if reason is not None:
        raise QuantempoError(f"engine '{chosen.name}' cannot run this model here: {reason}")
    calls.check_network(denoiser)
    if (away := lane is None and _away(denoiser)) and own_forward(denoiser) is None:
        raise QuantempoError("the model is offloaded; attach, then enable_model_cpu_offload()")
    root, budget = put_forward(denoiser, _Denoiser), parse_bytes(memory or 0)
    if away:
        # Attached where it will be.
        root.asked, root.watch = (engine, packed, memory), None
        return chosen.name
    again = root.parked and root.name == chosen.name and root.asked[2] == memory
    if not again:
        root.release()
    if lane is not None:
        nn.Module.to(denoiser, "cpu")
    token = TARGET.set(lane and lane.device)
    try:
        _choose_forms(denoiser, chosen, packed, call)
        chosen.attach(denoiser)
        if lane is not None:
            set_forward(denoiser, Streamed(denoiser, lane, budget))
    finally:
        TARGET.reset(token)
    rival = _rival(denoiser, chosen, device) if engine == "auto" and lane is None else chosen
    convolutions = (m for m in denoiser.modules() if isinstance(m, nn.Conv2d))
    watched = (*chosen.watched(denoiser), *rival.watched(denoiser), *convolutions)
    root.watch, root.timed = calls.Watch(denoiser, watched), call is not None
    root.name, root.asked = chosen.name, (engine, packed, memory)
    root.know("dtype")
    root.proved = again and root.proved
    clock.moved, root.parked = root.park, False
    log.debug("engine: %s", chosen.name)
    return chosen.name


def _lane(denoiser: nn.Module, packed: str) -> Lane:
    """Return a way to the GPU on which a denoiser is to be streamed."""
    if not torch.cuda.is_available():
        raise QuantempoError("memory is that of a GPU, and torch finds none; leave it out")
    if packed == "auto" or any(tensor.is_meta for tensor in denoiser.parameters()):
        text = "neither with packed = 'auto' nor of a model that is offloaded in parts"
        raise QuantempoError(f"memory can be given {text}; give packed = 'keep', take hooks off")
    return Lane(torch.device("cuda", torch.cuda.current_device()))


def _choose_forms(denoiser: nn.Module, engine: Engine, packed: str, call: Any) -> None:
    """Tell layers in groups whether the engine is to hold them as bytes; log what these take."""
    layers = {name: q for name, q in quantized_layers(denoiser) if q.weight_group is not None}
    if not layers or not engine.copies:
        if packed != "keep":
            text = f"packed '{packed}' changes nothing: {engine.name} has no weights of two forms"
            warn_once(text)
        return
    for layer in layers.values():
        layer.unpack = packed == "unpack"
    if packed == "auto" and call:
        # Here: `simulated`, which this runs, is an engine.
        from quantempo.engines.forms import time_forms

        for row in time_forms(engine.name, denoiser, *call):
            for name in set(row["layers"]) & set(layers):
                layers[name].unpack = row["w8a8_ms"] < (1 - LEAST) * row["w4a8_ms"]
    if packed != "keep":
        sizes = [math.prod(layer.weight_shape) for layer in layers.values() if layer.unpack]
        text = "engine %s holds %d of %d weights in groups as bytes, which take %.1f MB"
        log.info(text, engine.name, len(sizes), len(layers), engine.copies * sum(sizes) / 1e6)


def _rival(denoiser: nn.Module, chosen: Engine, device: str) -> Engine:
    """Return an engine that is faster for few rows and now shares the calls, or the chosen one."""
    for rival in map(ENGINES.get, ENGINES.names()):
        able = rival.few and rival is not chosen and device in rival.devices
        if able and rival.missing() is None:
            try:
                rival.attach(denoiser)
            except QuantempoError as error:
                log.info("all calls run on %s: %s", chosen.name, error)
                continue
            run = own_forward(denoiser).active
            set_forward(denoiser, ByShape(denoiser, chosen.name, rival.name, run, rival.few))
            return rival
    return chosen


class ByShape:
    """The forward of a denoiser that chooses at the first call of each shape of its inputs.

    base: attached to its layers; rival, run: the other one, faster up to `few` rows; last: ran
    last.
    """

    def __init__(
        self, denoiser: nn.Module, base: str, rival: str, run: Callable[..., Any], few: int
    ) -> None:
        self.denoiser, self.base, self.rival, self.run, self.few = denoiser, base, rival, run, few
        self.last, self.chosen, self.lock = base, dict[Any, str](), threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser."""
        if torch.compiler.is_compiling():
            return self._on(self.base, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        key = (*((x.shape, x.dtype) for x in tensors), torch.get_num_threads())
        with self.lock:
            if key not in self.chosen:
                shape = tuple(bind_inputs(self.denoiser, args, kwargs).sample.shape)
                self.chosen[key], why = self._choose(shape[0], args, kwargs)
                log.info("engine %s for inputs %s: %s", self.chosen[key], shape, why)
        self.last = self.chosen[key]
        return self._on(self.last, args, kwargs)

    def _on(self, name: str, args: Any, kwargs: Any) -> Any:
        if name == self.base:
            return own_forward(self.denoiser).plain(*args, **kwargs)
        return self.run(*args, **kwargs)

    def _choose(self, rows: int, args: Any, kwargs: Any) -> tuple[str, str]:
        """Return the engine for calls like this one, and why."""
        try:
            self._on(self.rival, args, kwargs)
        except QuantempoError as error:
            return self.base, str(error)
        if own_forward(self.denoiser).active is not self:
            # It was wrong, and has been replaced.
            return self.base, f"{self.rival} is wrong"
        if rows <= self.few:
            return self.rival, f"faster up to {self.few} rows"
        self._on(self.base, args, kwargs)
        best = {self.base: float("inf"), self.rival: float("inf")}
        for name in (*best, *best):
            start = time.perf_counter()
            self._on(name, args, kwargs)
            best[name] = min(best[name], time.perf_counter() - start)
        times = (f"{name} {1e3 * seconds:.1f} ms" for name, seconds in best.items())
        return min(best, key=best.__getitem__), ", ".join(times)


def run_instead(denoiser: nn.Module, wrong: str, layer: str, args: Any, kwargs: Any) -> Any:
    """Attach the best engine but a wrong one, for good, and return what it makes of a call."""
    engine = choose(_device(denoiser), but=wrong)
    log.warning(
        "engine %s is far from the exact integers on %s, from %s on: %s runs it instead",
        wrong, type(denoiser).__name__, layer, engine.name,
    )  # fmt: skip
    with ATTACHING:
        attach(denoiser, engine.name, own_forward(denoiser).asked[1], (args, kwargs))
    return type(denoiser).forward(denoiser, *args, **kwargs)


def _device(denoiser: nn.Module) -> str:
    """Return the type of the device on which a denoiser runs, also while it is offloaded."""
    hooks = (getattr(module, "_hf_hook", None) for module in denoiser.modules())
    places = [getattr(hook, "execution_device", None) for hook in hooks]
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if tensor.device.type != "meta" and places[0] is None:
            return tensor.device.type
    return torch.device(next((place for place in places if place is not None), "cpu")).type


def _away(denoiser: nn.Module) -> bool:
    """Return whether a hook moves a denoiser to where it runs at its next call."""
    place = getattr(getattr(denoiser, "_hf_hook", None), "execution_device", None)
    here = next((tensor.device.type for tensor in denoiser.parameters()), "meta")
    return place is not None and here not in ("meta", torch.device(place).type)


def attached(denoiser: nn.Module) -> str | None:
    """Return the name of the attached engine, of two that of the one that ran last; or None."""
    root = own_forward(denoiser)
    return getattr(root, "last", None) or getattr(root, "name", None)


def detach(denoiser: nn.Module) -> None:
    """Remove the attached engine, if any (also a lazy one)."""
    root = own_forward(denoiser)
    if root is not None:
        root.release()
        root.asked, root.fixed = None, False
        reset_forward(denoiser)


class _Denoiser(Forward):
    """The `forward` of a denoiser with an engine, or with one that its next call attaches."""

    __slots__ = ("asked", "name", "parked", "proved", "timed", "watch")

    def __init__(self, module: nn.Module, before: Any = None, asked: Any = None) -> None:
        super().__init__(module, before)
        # The engine and how it is to hold weights in groups, see `attach`.
        self.asked, self.fixed, self.proved, self.timed = asked, True, False, False
        self.name: str | None = None
        self.watch: calls.Watch | None = None
        # Whether the network was moved since, and the engine holds nothing.
        self.parked = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.before, self.asked)

    def release(self) -> None:
        if self.name is not None:
            if isinstance(self.active, Streamed):
                self.active.close()
                nn.Module.to(self.module, "cpu")
            ENGINES.get(self.name).detach(self.module)
            self.name = self.active = None
            self.parked = False

    def park(self) -> None:
        """Free what the engine holds where the network was; the next call attaches it again."""
        if self.name is not None and not self.parked:
            if isinstance(self.active, Streamed):
                self.active.close()
            ENGINES.get(self.name).forget(self.module)
            self.parked, self.active, self.watch = True, None, None
            # Copies that the engine was compared with are circles.
            gc.collect()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if self.name is None:
                text = "the engine is attached by the first call, which a compiler cannot follow;"
                raise QuantempoError(f"{text} call quantempo.attach(denoiser) before torch.compile")
            return super().__call__(*args, **kwargs)
        lists = lists_of(self.module, args, kwargs)
        given = calls.tensors_of(args, kwargs, lists)
        calls.check_call(self.module, given)
        empty = any(value.ndim and not len(value) for value in given)
        if self.asked is not None and self._stale(empty):
            with ATTACHING:
                if self._stale(empty):
                    engine, packed, memory = self.asked
                    given_call = None if empty else (args, kwargs)
                    attach(self.module, engine, packed, given_call, memory)
        with torch.no_grad():
            if empty:
                args, kwargs = tree_map_only(Tensor, calls.one_row, (args, kwargs))
                return tree_map_only(Tensor, lambda y: y[:0], super().__call__(*args, **kwargs))
            output = super().__call__(*args, **kwargs)
            busy = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
            if self.name is not None and not self.proved and not busy:
                self.proved = True
                trim()
                wrong = ENGINES.get(self.name).first_wrong(self.module, args, kwargs, output)
                if wrong is not None:
                    return run_instead(self.module, self.name, wrong, args, kwargs)
            return calls.keep_nan(output, given, bool(lists)) if given else output

    def _stale(self, empty: bool) -> bool:
        untimed = self.asked[1] == "auto" and not self.timed and not empty
        return untimed or self.name is None or self.watch is None or self.watch.changed()


def attach_lazily(denoiser: nn.Module, engine: str = "auto") -> None:
    """Attach at the first call: only then is it known on which device the model ended up."""
    put_forward(denoiser, _Denoiser).asked = engine, "keep", None
