"""Time a network on a CPU or a GPU; `bench` is the front door."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quantempo.bench.candidates import Candidate, cast_inputs, select
from quantempo.bench.forwards import Timer, clear, compare, images_per_second, reason_of, timer_for
from quantempo.bench.networks import Network, model_network, run_network
from quantempo.bench.results import Results, Row
from quantempo.core.machine import machine, parse_bytes
from quantempo.engines.forms import time_forms
from quantempo.engines.select import ENGINES, choose
from quantempo.errors import QuantempoError, log
from quantempo.evaluation.fidelity import prediction
from quantempo.models.load import check_device
from quantempo.models.presets import check_preset
from quantempo.pipeline.quality import SPEED_KEYS
from quantempo.pipeline.session import Session, reopen
from quantempo.run_folder import RunFolder

__all__ = ["bench", "bench_network", "describe_machine"]

_PACKAGES = ("quantempo", "torch", "triton", "diffusers")


def _check_request(
    run: bool, model: str | None, device: str, engines: Sequence[str], out: str | Path | None,
    memory: int | str | None,
) -> None:  # fmt: skip
    """Raise QuantempoError for a request that names nothing, too much, or what does not exist."""
    kind = device.partition(":")[0]
    if run and model is not None:
        raise QuantempoError("got both a run folder and a model; give one of --run and --model")
    if not run and model is None:
        raise QuantempoError("nothing to time: give --run RUN or --model NAME")
    if model is not None and not Path(model).exists():
        check_preset(model)
    check_device(device)
    if kind != "cpu" and len(engines) > 1:
        raise QuantempoError(f"got {len(engines)} engines; on a GPU bench times one, give one")
    if memory is not None and (parse_bytes(memory) < 0 or kind == "cpu"):
        raise QuantempoError("--memory is that of a GPU; add --device cuda")
    for name in engines:
        reason = ENGINES.get(name).missing()
        if reason is not None:
            raise QuantempoError(f"engine '{name}' cannot run here: {reason}")
    if out is not None and Path(out).is_dir():
        # It would be replaced by the file.
        raise QuantempoError(f"{out} is a folder; expected a file to write to")


def bench(
    run: Session | str | Path | None = None, model: str | None = None, *, device: str = "cpu",
    batches: Sequence[int] | None = None, engines: Sequence[str] = (),
    candidates: Iterable[str] = (), compiled: bool = True, out: str | Path | None = None,
    memory: int | str | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Time a run folder's network, or a model quantized without data.

    Everything is written as it comes: to `out`, and for a run folder under the device's type in its
    `bench.json`; a CPU's first batch goes into its `metrics.json` at the end.

    Args:
        run: a run folder, or its session on the device; model: a preset or a diffusers folder.
        batches: by default 8 and 16 on a CPU; 16 and 256 on a GPU, for text-to-image 2 and 8.
        engines: that run the quantized network, the first one judged by; by default all that a CPU
            has, and the fastest one of a GPU.
        candidates: shell patterns of their names, all by default; compiled: with torch.compile in
            baselines; out: JSON file; settings: of `bench_network`.
        memory: of a GPU, to time ours in it too, see `attach`.
    Returns the record, see `Results.record`. Raises QuantempoError: a request that names nothing,
    too much, or what does not exist; nothing packed yet.
    """
    _check_request(run is not None, model, device, engines, out, memory)
    kind = torch.device(device).type
    known = select(candidates, kind)
    session = reopen(run, device=device) if isinstance(run, str | Path) else run
    engine = engines[0] if engines else choose(kind).name
    chosen = [
        one
        for one in known
        if (compiled or not one.compiled or one.kind == "ours")
        and (not engines or one.engine is None or one.engine in engines)
        and (memory is not None or "streamed" not in one.name)
    ]
    head = {"device": kind, "engine": engine, "machine": describe_machine()}
    results = Results(head, _writer(session, kind, out))
    network = run_network(session) if session else model_network(str(model), device)
    sizes = list(batches or _sizes(network))
    bench_network(network, sizes, chosen, results, memory=memory, **settings)
    if session is not None and kind == "cpu":
        _into_metrics(session, results, sizes[0])
    return results.record()


def describe_machine() -> dict[str, Any]:
    """Describe the machine and the versions that a figure was measured with."""
    found = machine()
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found.setdefault("versions", {})[package] = version(package)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"sm": f"{card.major}.{card.minor}", "gpu_bytes": card.total_memory}
        found["versions"]["cuda"] = torch.version.cuda
    return found


def _writer(session: Session | None, kind: str, out: str | Path | None) -> Callable[[Row], None]:
    before: dict[str, Any] = {}
    if session is not None and session.run.has("bench.json"):
        before = session.run.read_json("bench.json")

    def write(record: Row) -> None:
        if session is not None:
            session.run.write_json("bench.json", {**before, kind: record})
        if out is not None:
            RunFolder(Path(out).parent).write_json(Path(out).name, record)

    return write


def _sizes(network: Network) -> tuple[int, int]:
    if network.device.type == "cpu":
        return 8, 16
    return (2, 8) if "encoder_hidden_states" in network.inputs(1) else (16, 256)


def _into_metrics(session: Session, results: Results, size: int) -> None:
    """Write the first batch's times and speed-ups into `metrics.json`, if that is there."""
    if not session.run.has("metrics.json"):
        return
    record = results.record()
    metrics = session.run.read_json("metrics.json")
    metrics["ms_per_forward"] = {
        row["candidate"]: row["ms_per_forward"]
        for row in record["rows"]
        if (row["kind"], row.get("batch")) == ("forward", size) and "failed" not in row
    }
    metrics |= {key: next(iter(record[key].values())) for key in SPEED_KEYS[1:]}
    session.run.write_json("metrics.json", metrics)


@contextmanager
def _many_compiled() -> Iterator[None]:
    """Compile more forms of one class than torch allows before it silently compiles no more."""
    import torch._dynamo.config as dynamo

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with dynamo.patch(recompile_limit=64, accumulated_recompile_limit=1024):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def bench_network(
    network: Network, batches: Sequence[int], candidates: Sequence[Candidate], results: Results, *,
    steps: int | None = None, timer: Timer | None = None, memory: Any = None, **settings: Any,
) -> None:  # fmt: skip
    """Time every candidate at every batch size into `results`, then the shapes of layers.

    steps: of DDIM, to measure images a second too; settings: rounds, seconds, budget of `compare`.
    """
    timer = timer or timer_for(network.device)
    for size in batches:
        log.info("bench: %s, batch %d, %d candidates", network.name, size, len(candidates))
        subject = network.subject(size, results.head["engine"], memory)
        head = {"model": network.name, "batch": size, "scales": network.scales}
        with _many_compiled():
            wanted = _float32(network, subject.inputs)
            ready = compare(candidates, subject, wanted, timer, results, head, **settings)
            if steps is not None:
                images_per_second(ready, subject, network.scheduler, steps, timer, results, head)
        if subject.packed is not None and ENGINES.get(subject.engine).copies:
            given = cast_inputs(subject.inputs, subject.dtype)
            try:
                rows = time_forms(subject.engine, subject.packed, (), given)
                results.put(*({"kind": "layer", **head, "name": r["layers"][0], **r} for r in rows))
            except Exception as error:
                log.warning("bench: no layers are timed: %s", reason_of(error))
        del ready, subject
        torch._dynamo.reset()
        clear(network.device)


@torch.no_grad()
def _float32(network: Network, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the output of the float network, without TensorFloat32 in its convolutions."""
    own = cast_inputs(inputs, next(network.floating.parameters()).dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return prediction(network.floating(**own)).float()
