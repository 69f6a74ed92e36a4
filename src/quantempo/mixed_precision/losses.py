"""Measure what each layer costs in the image at each number of bits.

    loss[l, o] = mean (x_0 with only layer l at option o - x_0 in float)^2, same seeds and noise

over short trajectories of the float pipeline, on which the error of a step changes all later ones.
Losses of several layers are added as if they did not meet: good enough to rank, no forecast.
Source: after MixDQ (Zhao et al., ECCV 2024), with the error of the latent in place of SSIM.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantempo.calibration.dataset import TraceSet
from quantempo.core import weight_format
from quantempo.engines.base import BACKENDS
from quantempo.errors import QuantempoError, log
from quantempo.models.call import call_pipeline, wrapped_step
from quantempo.models.macs import count_macs
from quantempo.pipeline.quantize import Quantized
from quantempo.pipeline.session import Session
from quantempo.pipeline.stages import calibrate, trace
from quantempo.quantized import LayerPlan, Times
from quantempo.recipe import Recipe, parse_bits
from quantempo.report.sensitivity_plot import draw, standalone
from quantempo.rounding import nearest
from quantempo.run_folder import RunFolder, atomic_path, hash_of, reading
from quantempo.scales import search_scales, search_weights

__all__ = [
    "ARTEFACT", "OPTIONS", "SEED", "grouped", "last_latent", "measure", "outline", "table_rows",
    "write_plot",
]  # fmt: skip

ARTEFACT, PLOT = "sensitivity.json", "sensitivity.svg"
OPTIONS = ("w4a4", "w4a8", "w8a4", "w8a8")
# Seeds of their own: scales were chosen on those of the trace.
SEED = 3_000_000


def grouped(recipe: Recipe) -> Recipe:
    """Return a recipe whose weights of up to 4 bits have groups: its own, else those of `w4a8`."""
    group = recipe.weights.group or Recipe.load("w4a8").weights.group
    return recipe.override("weights", group=group)


def measure(session: Session, options: Sequence[str] = OPTIONS, **rollout: int) -> dict[str, Any]:
    """Measure every integer layer at every option and write `sensitivity.json`; return it.

    Trace and calibrate are run if they are not done. Losses measured before with the same settings
    are kept, so a killed run resumes and further options can be added. The recipe's bits do not
    matter, few are in groups (`grouped`); `rollout`: chains, steps and seed of `outline`.
    Raises QuantempoError: an option that is none, no integer layer, a file of other settings
    without `force`, or a loss that is not finite.
    Error: the loss is exact for these chains; its spread over chains is not estimated.
    """
    table = outline(session, options, **rollout)
    bits = {option: parse_bits(option, "options") for option in options}
    todo = ((row, [o for o in bits if o not in row["losses"]]) for row in table["layers"])
    if missing := [(row, some) for row, some in todo if some]:
        _measure(session, table, missing, bits)
    else:
        log.info("sensitivity: done before (%s)", ARTEFACT)
    if missing or not session.run.has(PLOT):
        write_plot(session.run, table)
    return table


def outline(
    session: Session, options: Sequence[str] = OPTIONS, *, chains: int = 8, steps: int = 10,
    seed: int = SEED,
) -> dict[str, Any]:  # fmt: skip
    """Return the table as far as it is measured, with the size of every layer; write nothing."""
    for number, name in ((chains, "chains"), (steps, "steps")):
        if number < 1:
            raise QuantempoError(f"got {number} {name}; expected at least 1")
    if not options:
        raise QuantempoError(f"got no options; give some like {', '.join(OPTIONS)}")
    for option in options:
        parse_bits(option, "options")
    trace(session)
    calibrate(session)
    settings = {"chains": chains, "steps": steps, "seed": seed}
    recipe = grouped(session.recipe)
    chosen = {name: getattr(recipe, name) for name in ("activations", "weights")}
    # `bits` are what is varied here.
    text: dict[str, Any] = {k: {**vars(v), "bits": None} for k, v in chosen.items()}
    key = hash_of({**text, "inputs": session.key("calibrate"), "settings": settings})
    if session.run.has(ARTEFACT):
        table: dict[str, Any] = session.run.read_json(ARTEFACT)
        with reading(session.run / ARTEFACT):
            known = table["key"]
        if known == key:
            return table
        if not session.force:
            what = f"{session.run / ARTEFACT} was made with other settings"
            raise QuantempoError(f"{what}; use another --run folder, or --force to redo it")
    plans = [p for p in session.plans if p.kind == "int8"]
    if not plans:
        raise QuantempoError("the recipe keeps every layer in float; nothing to measure")
    data = TraceSet(session.run / "trace")
    batch = data.rows(torch.zeros(1, dtype=torch.long))
    macs = count_macs(session.denoiser, lambda: data.replay(session.denoiser, batch), 1)
    layers = []
    for p in plans:
        weight: Any = session.denoiser.get_submodule(p.name).weight
        row = {"name": p.name, "role": p.role, "macs": macs.get(p.name, 0)}
        layers.append({**row, "weight_shape": list(weight.shape), "losses": {}})
    empty = {"key": key, "settings": settings, "signal": None, "seconds": 0.0}
    empty["group"] = recipe.weights.group
    return {**empty, "layers": layers, "choice": None}


def _measure(
    session: Session, table: dict[str, Any], missing: list[tuple[dict[str, Any], list[str]]],
    bits: Mapping[str, tuple[int, int]],
) -> None:  # fmt: skip
    """Fill in the missing losses of a table; written after every layer."""
    settings, before, start = table["settings"], table["seconds"], time.perf_counter()
    seeds = range(settings["seed"], settings["seed"] + settings["chains"])

    def rollout() -> Tensor:
        return last_latent(session.pipe, seeds, settings["steps"], session.call)

    stats, recipe = session.run.read_safetensors("stats.safetensors"), grouped(session.recipe)
    plans = {p.name: p for p in session.plans}
    times = TraceSet(session.run / "trace").times
    target = rollout()
    table["signal"] = float(target.square().mean())
    count = sum(len(todo) for _, todo in missing)
    with tqdm(total=count, desc="sensitivity", unit="rollout", disable=None) as bar:
        for done, (row, todo) in enumerate(missing, 1):
            name = row["name"]
            layer = OneLayer(session.denoiser, stats, plans[name], recipe, times)
            for option in todo:
                with patch.object(session.pipe, session.component, layer.at(*bits[option])):
                    loss = float((rollout() - target).square().mean())
                if not math.isfinite(loss):
                    text = f"the image is not finite with '{name}' at {option}; leave the option"
                    raise QuantempoError(f"{text} out, or keep the layer in float (layers.exclude)")
                row["losses"][option] = loss
                bar.update()
            seconds = time.perf_counter() - start
            table["seconds"] = round(before + seconds, 3)
            session.run.write_json(ARTEFACT, table)
            if bar.disable:
                left = seconds / done * (len(missing) - done)
                log.info("sensitivity: %d of %d, %s; %.0f s left", done, len(missing), name, left)
    entry = {"key": table["key"], "seconds": table["seconds"]}
    session.run.update_manifest(stages={"sensitivity": entry})
    log.info("sensitivity: %.1f s -> %s", table["seconds"], ARTEFACT)


def table_rows(table: dict[str, Any], options: Sequence[str]) -> list[dict[str, Any]]:
    """Return the layers of a table, the largest loss first, with bytes for each weight width."""
    widths = sorted({parse_bits(option, "options")[0] for option in options})
    stored = {f"w{bits}": weight_format(bits, table["group"]) for bits in widths}
    rows = [
        {
            **{key: row[key] for key in ("name", "role", "macs")},
            "bytes": {name: spec.nbytes(row["weight_shape"]) for name, spec in stored.items()},
            "losses": {option: row["losses"][option] for option in options},
        }
        for row in table["layers"]
    ]
    return sorted(rows, key=lambda row: -max(row["losses"].values()))


def write_plot(run: RunFolder, table: dict[str, Any]) -> None:
    """Write `sensitivity.svg`; a missing matplotlib is said, not fatal: the numbers are there."""
    try:
        picture = standalone(draw(table))
    except QuantempoError as error:
        log.warning("no %s: %s", PLOT, error)
        return
    with atomic_path(run / PLOT) as temporary:
        temporary.write_text(picture, encoding="utf-8")


def last_latent(pipe: Any, seeds: Sequence[int], steps: int, call: dict[str, Any]) -> Tensor:
    """Return the last sample that the scheduler of a pipeline made, float64 on the CPU.

    (B, C, H, W), before any decoder; 2 B where the halves of guidance stay together to the end.
    Raises QuantempoError: see `call_pipeline`; the pipeline did not step its scheduler.
    """
    last = list[Any]()

    def keep(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    with wrapped_step(pipe.scheduler, keep):
        call_pipeline(pipe, seeds, steps=steps, output_type="latent", **call)
    if not last:
        raise QuantempoError(f"{type(pipe).__name__} did not call the step of its scheduler")
    return last[0].detach().double().cpu()


@dataclass
class OneLayer:
    """Quantize one layer alone, whatever its plan's bits; scales are searched once for each."""

    denoiser: nn.Module
    stats: Mapping[str, Tensor]
    plan: LayerPlan
    recipe: Recipe
    times: Times

    def __post_init__(self) -> None:
        layer: Any = self.denoiser.get_submodule(self.plan.name)
        self.weight = layer.weight.detach().float().cpu()
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.activations: dict[int, dict[str, Tensor]] = {}

    def at(self, weight_bits: int, act_bits: int) -> nn.Module:
        """Return a copy of the denoiser in which the layer is integer, rounded to nearest."""
        name, how = self.plan.name, self.recipe.weights
        spec, bits = weight_format(weight_bits, how.group), {name: (weight_bits, act_bits)}
        if weight_bits not in self.weights:
            self.weights[weight_bits] = search_weights(name, self.weight, how, weight_bits)
        known = self.weights[weight_bits]
        if act_bits not in self.activations:
            given = (self.stats, {name: self.weight}, self.recipe, known, bits)
            self.activations[act_bits] = search_scales(*given)
        kept = {k: v for k, v in self.activations[act_bits].items() if ".weight_" not in k}
        scale, groups = known[f"{name}.weight_scale"], known.get(f"{name}.weight_group")
        group = 0 if groups is None else how.group
        plan = replace(self.plan, weight_bits=weight_bits, act_bits=act_bits, group=group)
        codes = {name: nearest(self.weight, scale, spec.grid(self.weight.shape, groups))}
        found = Quantized.of(self.recipe, [plan], kept | known, codes, self.times)
        quantized = found.install(self.denoiser, copy=True)
        layer: Any = quantized.get_submodule(name)
        layer.kernel = BACKENDS.get("simulated").lower(layer)
        return quantized
