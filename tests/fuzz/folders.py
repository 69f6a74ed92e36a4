"""Packed folders: flipped bits, cut, lost, exchanged and edited files, senseless values."""

import functools
import json
import shutil
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from quantempo.core.instance import put_buffer
from quantempo.engines.select import attach
from quantempo.models.load import load_pipeline
from quantempo.quantized import quantized_layers
from tests.packed import CALLS, packed

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e-9, 1e300, 10**9, 10**30, "", "x", "8", []),
    *({}, [0], [8, 8], ["a"], {"a": 1}, [[1]], float("nan"), float("inf")),
]
ENGINES = ("simulated", "onednn")


def image(folder: Path, kind: str, engine: str) -> np.ndarray:
    """Return what a folder makes of two seeds."""
    pipe = load_pipeline(folder)
    attach(pipe.unet, engine)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    how = {"num_inference_steps": 2, "generator": seeds, "output_type": "np"}
    how |= {"batch_size": 2} if kind == "unconditional" else CALLS[kind]
    return pipe(**how).images


@functools.cache
def undamaged(kind: str, engine: str) -> np.ndarray:
    return image(packed(kind).folder, kind, engine)


def case(rng: Random, place: Path) -> str:
    kind, engine = rng.choice(("unconditional", "unconditional", "text")), rng.choice(ENGINES)
    wanted, folder = undamaged(kind, engine), place / "packed"
    shutil.copytree(packed(kind).folder, folder)
    change = rng.choice((bits, bits, bits, cut, lose, swap, noise, entry, entry, entry, values))
    change(rng, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = image(folder, kind, engine)
    if np.array_equal(found, wanted) and change is not values:
        return "same"
    return f"another image without a word: {change.__name__} of {kind} on {engine}"


def one(rng: Random, folder: Path, end: str = "") -> Path:
    return rng.choice(sorted(f for f in folder.rglob(f"*{end}") if f.is_file()))


def bits(rng: Random, folder: Path) -> None:
    file = one(rng, folder)
    raw = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 3))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def cut(rng: Random, folder: Path) -> None:
    file = one(rng, folder)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def lose(rng: Random, folder: Path) -> None:
    found = one(rng, folder)
    shutil.rmtree(found.parent) if rng.random() < 0.2 else found.unlink()


def swap(rng: Random, folder: Path) -> None:
    first, second = one(rng, folder), one(rng, folder)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def noise(rng: Random, folder: Path) -> None:
    file, raw = one(rng, folder), rng.randbytes(40)
    whole = file.read_bytes()
    start = rng.randrange(len(whole) + 1)
    file.write_bytes(whole[:start] + raw + whole[start + rng.choice((0, 40)) :])


def entry(rng: Random, folder: Path) -> None:
    """Change, rename, add or drop an entry of a JSON file, at any depth."""
    file = one(rng, folder, ".json")
    values = inner = json.loads(file.read_text())
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.7:
            inner = inner[key]
            continue
        break
    how = rng.random()
    if how < 0.6:
        inner[key] = rng.choice(ODD)
    elif how < 0.8 or isinstance(inner, list):
        del inner[key]
    else:
        inner[f"{key}x"] = inner.pop(key)
    file.write_text(json.dumps(values))


def values(rng: Random, folder: Path) -> None:
    """Write senseless tensors under a right hash, as a writer with a bug would."""
    unet = load_pipeline(folder).unet
    name, layer = rng.choice(list(quantized_layers(unet)))
    leaf = rng.choice([n for n, tensor in layer.named_buffers() if tensor is not None])
    tensor = layer.get_buffer(leaf).clone()
    if tensor.is_floating_point():
        bad = [float("nan"), float("inf"), -float("inf")] + ["scale" in leaf and -1.0] * 2
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([b for b in bad if b])
    elif leaf == "weight_int":
        tensor.view(-1)[rng.randrange(tensor.numel())] = -128
    else:
        tensor.view(-1)[0] = rng.choice((-1, 256, 10**6))
    if rng.random() < 0.3:
        tensor = tensor.to(torch.float64)
    put_buffer(unet, f"{name}.{leaf}", tensor)
    unet.save_pretrained(folder / "unet")
