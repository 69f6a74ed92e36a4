"""Take a tiny pipeline through everything a user does, and say how far it came.

quantize (recipe w8a8, shortened) -> evaluate -> inspect here; reload, sample and compare every call
of the denoisers with float in another process, which has seen nothing of this one.
"""

import functools
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

import quantempo
from quantempo.cli import app
from quantempo.errors import QuantempoError
from quantempo.pipeline.layer_table import describe
from quantempo.quantized import find_clock
from quantempo.recipe import Recipe
from tests.pipelines.transformers_2d import TRANSFORMERS
from tests.pipelines.unets import UNETS
from tests.pipelines.videos import VIDEOS

__all__ = ["FAMILIES", "fresh", "run"]

FAMILIES = {**UNETS, **TRANSFORMERS, **VIDEOS}

ENGINES = ("simulated", "auto")
STEPS = 4
SEEDS = (0, 1)


def recipe() -> Recipe:
    """Return the default recipe with little data; every stage of it runs."""
    short = Recipe.load("w8a8").override("trace", steps=STEPS, chains=4, picks=3)
    return short.override("rounding", samples=6)


def run(name: str, engine: str = "auto") -> dict[str, Any]:
    """Return a family's figures, of images by `engine`; or the stage it ended in and the error."""
    row: dict[str, Any] = {"family": name, "stage": "build"}
    with tempfile.TemporaryDirectory(prefix="quantempo-pipeline-") as folder:
        try:
            _run(name, Path(folder), row, engine)
            row.pop("stage")
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "quantempo" in f.filename] or frames
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            row["clear"] = isinstance(error, QuantempoError)
            row["where"] = f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}"
            row["raised"] = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}"
    return row


def _run(name: str, folder: Path, row: dict[str, Any], engine: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, call = FAMILIES[name]()
    row["pipeline"] = type(pipe).__name__
    source, out = folder / "float", folder / "run"
    pipe.save_pretrained(source)
    row["stage"] = "quantize"
    packed = _quantize(source, out, call)
    row["stage"] = "evaluate"
    session = quantempo.reopen(out)
    metrics = quantempo.evaluate(session, images=len(SEEDS), steps=STEPS, engine=engine)
    row |= {"share": metrics["int8_mac_share"], "engine": metrics["engine"]}
    row["float"] = dict(Counter(layer["reason"] for layer in metrics["float_layers"]))
    row["stage"] = "inspect"
    describe(packed)
    row["stage"] = "reload"
    row |= fresh().submit(reload, source, packed, folder, call).result()


def _quantize(source: Path, out: Path, call: dict[str, Any]) -> Path:
    """Quantize by the command line; pictures and tensors of the call are files."""
    folder = out.parent
    (folder / "recipe.toml").write_text(recipe().to_toml())
    words = ["--quiet", "quantize", source, "--run", out, "--recipe", folder / "recipe.toml"]
    for key, value in call.items():
        if isinstance(value, torch.Tensor):
            save_file({key: value.contiguous()}, folder / f"{key}.safetensors")
            value = folder / f"{key}.safetensors"
        elif isinstance(value, Image.Image):
            value.save(folder / f"{key}.png")
            value = folder / f"{key}.png"
        elif isinstance(value, list) and isinstance(value[0], Image.Image):
            for number, picture in enumerate(value):
                picture.save(folder / f"{key}-{number}.png")
            value = folder / f"{key}-*.png"
        words += ["--set", f"{key}={value if isinstance(value, Path) else repr(value)}"]
    app([str(word) for word in words], standalone_mode=False)
    return out / "packed"


@functools.cache
def fresh() -> ProcessPoolExecutor:
    """Return a second process; one for all families, since importing costs seconds."""
    how: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), **how)


def reload(source: Path, packed: Path, folder: Path, call: dict[str, Any]) -> dict[str, Any]:
    """Sample from both; return the worst SQNR of a denoiser call by engine, and what is packed."""
    whole, integer = quantempo.open_model(source), quantempo.open_model(packed)
    parts = {
        name: part
        for name, part in integer.components.items()
        if isinstance(part, torch.nn.Module) and find_clock(part) is not None
    }
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
    hang = {name: getattr(whole, name).register_forward_hook for name in parts}
    hooks = [add(_keep(name, calls), with_kwargs=True) for name, add in hang.items()]
    options: dict[str, Any] = {"steps": STEPS, "call": call}
    quantempo.sample(whole, folder / "samples-float", SEEDS, **options)
    for hook in hooks:
        hook.remove()
    if {name for name, *_ in calls} != set(parts):
        raise AssertionError("a packed network was never called")
    found = {}
    for engine in ENGINES:
        for part in parts.values():
            quantempo.attach(part, engine)
        quantempo.sample(integer, folder / f"samples-{engine}", SEEDS, **options)
        with torch.no_grad():
            found[engine] = min(
                _sqnr_db(want, parts[name](*_copied(args), **_copied(kwargs)))
                for name, args, kwargs, want in calls
            )
    return {"sqnr_db": found, "packed": sorted(parts)}


def _keep(name: str, calls: list[Any]) -> Callable[..., None]:
    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((name, _copied(args), _copied(kwargs), _copied(output)))

    return hook


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, tree)


def _sqnr_db(want: Any, got: Any) -> float:
    """Return 10 log10(|want|^2 / |want - got|^2) over all tensors of an answer."""
    leaves = map(pytree.tree_leaves, (want, got))
    wants, gots = (torch.cat([t.double().flatten() for t in found]) for found in leaves)
    noise = (wants - gots).square().sum()
    return float(10 * torch.log10(wants.square().sum() / noise.clamp(min=1e-30)))
