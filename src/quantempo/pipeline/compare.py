"""Compare any models, float or quantized by whomever, by images of equal seeds and prompts."""

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from quantempo.calibration.trace import picture_size
from quantempo.core.machine import machine
from quantempo.core.progress import tell
from quantempo.errors import QuantempoError, log
from quantempo.evaluation import load_images, load_tools
from quantempo.evaluation.judge import ENOUGH, judge, parse_gate, passed
from quantempo.models.layers import denoiser_of
from quantempo.models.load import model_digest
from quantempo.models.sampling import scheduler_settings
from quantempo.pipeline.arguments import merged, read_call, read_settings
from quantempo.pipeline.samples import engine_of, open_model, sample
from quantempo.run_folder import RunFolder, hash_of

__all__ = ["compare"]

_RESULT, _GATES = "compare.json", "gates.json"


def compare(
    models: Sequence[str | Path], out: str | Path, *, images: int = 64, steps: int = 50,
    seed: int = 0, batch_size: int = 16, gate: str = "", weights: Sequence[str] = (),
    data: str | Path | None = None, call: dict[str, Any] | None = None, engine: str = "auto",
    force: bool = False, **loading: Any,
) -> dict[str, Any]:  # fmt: skip
    """Sample the same seeds from each model into OUT, judge all by the first: `compare.json`.

    Args:
        models: FOLDER or NAME=FOLDER, of diffusers or a run (its packed model, its call).
        gate: "psnr>=40, lpips<=0.05", what each model but the first has to meet; kept in OUT
            before anything is sampled.
        weights: of learned scores, see `load_tools`; data: a folder of real images, to which the
            distance of each model is added.
        call: over the arguments that the first of them was traced with, for all.
        engine, loading: of `open_model`; the engine is that of models packed here.
    Returns what is written: see `judge`, and `models`, `missing` (score -> what it needs), `gate`.
    Raises QuantempoError: a gate that cannot be read; models of other inputs or sizes than the
    first; see `load_tools`, `open_model`, `sample` and `judge`.
    """
    folders, store = _folders(models), RunFolder(out)
    if images < ENOUGH:
        raise QuantempoError(f"got {images} images; intervals need at least {ENOUGH}")
    call = _common_call(folders.values(), call)
    files = {name: folder.glob("*/config.json") for name, folder in folders.items()}
    ours = {n for n, each in files.items() if any('"quantempo"' in f.read_text() for f in each)}
    if engine != "auto" and not ours:
        raise QuantempoError(f"got --engine {engine}, but no model that was packed here")
    tools = load_tools(weights, bool(call.get("prompt")))
    rules, late = parse_gate(gate, tools, data is not None), _register(store, gate, folders)
    seeds, first = list(range(seed, seed + images)), next(iter(folders))
    sets, about, real = dict[str, np.ndarray](), dict[str, dict[str, Any]](), None
    for name, folder in folders.items():
        pipe = open_model(folder, **loading, **({"engine": engine} if name in ours else {}))
        about[name] = _about(pipe, folder, about.get(first), steps, call)
        if data is not None and real is None:
            real = load_images(data, about[first]["size"]).images
        sets[name] = sample(
            pipe, store / name, seeds, steps=steps, batch_size=batch_size, call=call, force=force,
            identity=about[name]["sha256"],
        )  # fmt: skip
        about[name]["engine"] = engine_of(pipe)
        del pipe
    prompts = np.resize(text, images).tolist() if (text := call.get("prompt")) else []
    found = judge(sets, tools, prompts=prompts, data=real)
    met = {n: [passed(r, found["scores"][r[0]][n]) for r in rules] for n in list(folders)[1:]}
    result = {
        "reference": first, "models": about, **found, "missing": tools.missing, "seeds": seeds,
        "steps": steps, "batch_size": batch_size, "call": hash_of(call), "machine": machine(),
        "weights": {n: m.sha256 for n, m in tools.measures.items() if m.sha256}
        | {e.name: e.sha256 for e in tools.extractors},
        "gate": {"text": gate, "after_images": late, "models": met},
        "passed": all(row["passed"] for rows in met.values() for row in rows),
    }  # fmt: skip
    store.write_json(_RESULT, result)
    tell("metrics", **result)
    return result


def _folders(models: Sequence[str | Path]) -> dict[str, Path]:
    """Return the folder of each model by its name: given, or the last of its path."""
    found = dict[str, Path]()
    for model in map(str, models):
        match = re.fullmatch(r"(?:([\w.-]+)=)?(.+)", model)
        name, path = match.groups() if match and not Path(model).exists() else (None, model)
        folder = Path(path)
        name = name or (folder.parent if folder.name == "packed" else folder).resolve().name
        if name in found or not re.fullmatch(r"\w[\w.-]*", name):
            raise QuantempoError(f"'{name}' is taken or no name; call it otherwise: NAME={path}")
        found[name] = folder / "packed" if RunFolder(folder).is_run else folder
    if len(found) < 2:
        raise QuantempoError(f"got {len(found)} models; give at least two")
    return found


def _common_call(folders: Iterable[Path], given: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments for all models: given ones over those the first of them has."""
    call = dict[str, Any]()
    for folder in reversed(list(folders)):
        run = RunFolder(folder.parent)
        ours = folder.name == "packed" and run.is_run
        own = read_call(run, run.read_json("manifest.json")["call"]) if ours else None
        call = merged(call, read_settings(str(folder)) if own is None else own)
    return merged(call, given)


def _register(store: RunFolder, gate: str, names: Iterable[str]) -> bool:
    """Keep a gate; return whether images had been made before it was given first."""
    if store.foreign() and not store.has(_GATES):
        raise QuantempoError(f"{store.path} is not empty; choose another folder for the images")
    gates = store.read_json(_GATES) if store.has(_GATES) else {}
    if gate not in gates:
        gates[gate] = any(store.has(name) for name in names)
        store.write_json(_GATES, gates)
    if gates[gate]:
        before = ", ".join(f"'{text}'" for text, late in gates.items() if not late)
        log.warning("the gate '%s' was given when images were there; before them: %s", gate, before)
    return bool(gates[gate])


def _about(
    pipe: Any, folder: Path, first: dict[str, Any] | None, steps: int, call: dict[str, Any]
) -> dict[str, Any]:
    """Return what a model is, takes and makes; refuse one that cannot be paired with the first."""
    known = {*inspect.signature(pipe.__call__).parameters}
    takes = sorted({"prompt", "class_labels", "image"} & known)
    about: dict[str, Any] = {"folder": str(folder), "takes": takes}
    about["sampler"] = scheduler_settings(pipe.scheduler)
    for key in ("takes", "size"):
        if key == "size":
            about[key] = list(picture_size(pipe, denoiser_of(pipe)[1], steps, call))
        if first and about[key] != first[key]:
            text = (
                f"{folder}: {key} {about[key] or 'nothing'}, but {first['folder']} has {first[key]}"
            )
            raise QuantempoError(f"{text}; compare models of the same inputs and sizes")
    if first and about["sampler"] != first["sampler"]:
        text = "the samplers of %s and %s differ, and so do images; --scheduler sets one"
        log.warning(text, folder, first["folder"])
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    about["bytes"] = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return about | {"sha256": hash_of([model_digest(network) for network in networks])}
