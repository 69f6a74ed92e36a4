"""A small run folder with every artefact the report reads, made up but shaped like a real one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from quantempo.recipe import Recipe
from quantempo.run_folder import RunFolder

STEPS, CHAINS, PICKS, T, BINS, TIME_BINS = 20, 8, 8, 1000, 256, 16
BUCKETS = 4
# Not the default in any section that is checked, so that a section left out is seen.
RECIPE = Recipe(name="demo").override("activations", buckets=BUCKETS + 3)
RECIPE = RECIPE.override("trace", steps=STEPS)
EXTRACTOR = {"extractor": "lite0", "weights_sha256": "57" * 32, "note": "not FID", "std": None}


def make_run(path: Path, seeds: int = 10, blocks: int = 5) -> RunFolder:
    """Write a whole run folder under `path`."""
    run = RunFolder(path)
    rng = np.random.default_rng(0)
    layers = _layers(rng, blocks)
    run.write_json("layers.json", layers)
    _write_trace(run, rng)
    _write_statistics(run, layers)
    _write_samples(run, rng, seeds)
    run.write_json("metrics.json", _metrics(seeds, layers))
    run.write_json("sensitivity.json", _sensitivity(layers))
    run.write_json("bench.json", {"cpu": _bench()})
    run.write_json(
        "model.json",
        {
            "path": "some/where/ddpm-tiny", "pipeline": "DDPMPipeline", "component": "unet",
            "class": "UNet2DModel", "scheduler": "DDIMScheduler", "parameters": 8_950_000,
            "sha256": "ab" * 32,
        },
    )  # fmt: skip
    run.write_json(
        "manifest.json",
        {
            "recipe": {"name": RECIPE.name},
            "recipe_toml": RECIPE.to_toml(),
            "recipe_sha256": RECIPE.sha256,
            "scheduler": "DDIMScheduler",
            "call": {},
            "versions": {"quantempo": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
            "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "isa": ["avx512_vnni"]},
            "seeds": {"trace": 1_000_000},
            "stages": {
                name: {"key": "00", "seconds": 1.5 * i + 0.25}
                for i, name in enumerate(("trace", "calibrate", "search", "round", "pack"))
            },
        },
    )
    return run


def _layer(name: str, role: str, shape: list[int], rng: Any, **changes: Any) -> dict[str, Any]:
    row = {
        "name": name, "kind": "Conv2d" if len(shape) == 4 else "Linear", "role": role,
        "weight_shape": shape, "macs": int(np.prod(shape)) * 64, "bits_weight": 8,
        "bits_activation": 8, "segments": [], "buckets": BUCKETS, "scale_min": 0.011,
        "scale_max": 0.034, "zero_point": [121], "reason": None,
        "sqnr_db": float(34 + 4 * rng.standard_normal()),
    }  # fmt: skip
    return row | changes


def _layers(rng: Any, blocks: int) -> list[dict[str, Any]]:
    kept = {"bits_weight": 32, "bits_activation": 32, "buckets": None, "scale_min": None,
            "scale_max": None, "zero_point": None, "sqnr_db": None}  # fmt: skip
    reason = "input layer: reads x_t itself, a fraction of a percent of the work"
    rows = [_layer("conv_in", "input", [64, 3, 3, 3], rng, reason=reason, **kept)]
    for i in range(blocks):
        name = f"down_blocks.{i}.resnets.0"
        rows.append(_layer(f"{name}.conv1", "conv", [64, 64, 3, 3], rng))
        rows.append(_layer(f"{name}.conv2", "conv", [64, 64, 3, 3], rng, buckets=1))
        split = {"segments": [64, 64], "zero_point": [121, 90]}
        rows.append(_layer(f"{name}.conv_shortcut", "shortcut", [64, 128, 1, 1], rng, **split))
        rows.append(_layer(f"{name}.attentions.0.to_q", "attention", [64, 64], rng))
    matmuls = {"kind": "matmul", "reason": "product of two activations", "bits_weight": None}
    return [*rows, _layer("attention matmuls", "attention", [], rng, **kept | matmuls)]


def _sensitivity(layers: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {key: row[key] for key in ("name", "role", "macs", "weight_shape")}
        # The second layer at w8a8 is without loss, which has no place on a log axis.
        | {"losses": {"w4a8": 1e-4 * (i + 1), "w8a8": 0.0 if i == 1 else 1e-6 * (i + 1)}}
        for i, row in enumerate(row for row in layers if row["buckets"] is not None)
    ]
    bits = {row["name"]: ("w8a8", "w4a8")[i % 2] for i, row in enumerate(rows)}
    spent = {"bytes": 600_000, "bops": 12_000_000}
    choice = {"budgets": {"bytes": 640_000}, "options": ["w4a8", "w8a8"], "bits": bits,
              "spent": spent, "effective_bits": 6.02, "loss": 0.00123, "bound": 0.0012}  # fmt: skip
    settings = {"chains": 8, "steps": 10, "seed": 3_000_000}
    return {"key": "00", "settings": settings, "signal": 0.25, "seconds": 9.5, "layers": rows,
            "choice": choice}  # fmt: skip


def _bench() -> dict[str, Any]:
    times = {
        1: {"fp32/eager": 31.2, "fp32/compile": 22.9, "bf16/compile": 7.5, "ours/openvino": 8.71},
        16: {"fp32/eager": 402.0, "bf16/eager": 236.0, "ours/openvino": 118.0, "ours/other": 90.0},
    }
    rows = [
        {"kind": "forward", "model": "m", "batch": batch, "candidate": name, "ms_per_forward": ms,
         **({"engine": name.removeprefix("ours/")} if name.startswith("ours/") else {})}
        for batch, of_batch in times.items() for name, ms in of_batch.items()
    ]  # fmt: skip
    rows.append({"kind": "forward", "model": "m", "batch": 1, "candidate": "ours/y", "failed": "-"})
    return {"device": "cpu", "engine": "openvino", "rows": rows}


def _write_trace(run: RunFolder, rng: Any) -> None:
    law = np.exp(-0.5 * ((np.arange(STEPS) / STEPS - 0.4) / 0.4) ** 2)
    law /= law.sum()
    drawn = rng.choice(STEPS, (CHAINS, PICKS), p=law)
    t = torch.from_numpy(drawn.ravel() * (T // STEPS)).long()
    run.write_safetensors("trace/chunk-00000.safetensors", {"place": t})
    run.write_json(
        "trace.json",
        {
            "settings": {
                "steps": STEPS, "chains": CHAINS, "picks": PICKS,
                "time_sampler": {"name": "ndtc", "mean": 0.4, "std": 0.4},
            },
            "target_steps": drawn.tolist(),
            "density": law.tolist(),
            "times": {"count": T},
            "chunks": [{"file": "chunk-00000.safetensors", "rows": len(t)}],
        },
    )  # fmt: skip


def _write_statistics(run: RunFolder, layers: list[dict[str, Any]]) -> None:
    generator = torch.Generator().manual_seed(1)
    stats = {"time_bin_edges": torch.linspace(0, T, TIME_BINS + 1)}
    scales = {"bucket_of": torch.arange(T) * BUCKETS // T}
    for depth, row in enumerate(r for r in layers if r["buckets"] is not None):
        parts = max(1, len(row["segments"]))
        width = 1 + 0.2 * (depth % 4) + torch.linspace(0, 1.5, TIME_BINS)[:, None]
        x = width * torch.randn(parts, TIME_BINS, 4000, generator=generator)
        x = torch.nn.functional.silu(x) if depth % 2 else x
        edges = torch.tensor([[float(part.min()), float(part.max())] for part in x])
        hist = torch.zeros(parts, TIME_BINS, BINS, dtype=torch.int64)
        for s in range(parts):
            for k in range(TIME_BINS - 1):  # the last bin stays empty, as short traces leave it
                lo, hi = edges[s].tolist()
                hist[s, k] = torch.histc(x[s, k], BINS, lo, hi).long()
        extremes = torch.stack([x.amin(2), x.amax(2)], dim=2)
        extremes[:, -1] = torch.tensor([torch.inf, -torch.inf])
        stats |= {f"{row['name']}.hist": hist, f"{row['name']}.edges": edges}
        stats[f"{row['name']}.range"] = extremes
        base = (edges[:, 1] - edges[:, 0])[:, None] / 255 * 0.8
        growth = torch.linspace(0.6 + 0.05 * depth % 0.3, 1.0, row["buckets"])
        scales[f"{row['name']}.act_scale"] = (base * growth).float()
        zero = (-edges[:, 0] / base[:, 0] * 0.8).round().clamp(0, 255).int()
        scales[f"{row['name']}.act_zero_point"] = zero
        scales[f"{row['name']}.weight_scale"] = torch.full((64,), 0.002)
    run.write_safetensors("stats.safetensors", stats)
    run.write_safetensors("scales.safetensors", scales)


def _write_samples(run: RunFolder, rng: Any, seeds: int) -> None:
    y, x = np.mgrid[0:32, 0:32] / 32
    for seed in range(100, 100 + seeds):
        phase = rng.random((3, 4))
        waves = [np.sin(6 * (a * x + b * y) + 6 * c) * (0.5 + d / 2) for a, b, c, d in phase]
        image = 128 + 90 * np.stack(waves, axis=-1)
        for kind, noise in (("float", 0.0), ("int8", 5.0)):
            pixels = np.clip(image + rng.normal(0, 1, image.shape) * noise, 0, 255)
            folder = run.path / "samples" / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{seed}.png")


def _metrics(seeds: int, layers: list[dict[str, Any]]) -> dict[str, Any]:
    row = EXTRACTOR | {"images": seeds, "set": "int8", "reference": "float samples",
                       "reference_images": seeds}  # fmt: skip
    t = list(range(0, T, T // STEPS))
    return {
        "psnr_db_mean": 36.42, "psnr_db_p05": 31.7,
        # The last seed is the worst.
        "psnr_db": [40.0 - i for i in range(seeds)],
        "ssim_mean": 0.9871, "psnr_identical": 0,
        "scores": [
            row | {"name": "fed_lite0", "value": 14.2},
            row | {"name": "kid_lite0", "value": 0.0012, "std": 0.0004},
            row | {"name": "is_lite0", "value": 9.31, "reference": None, "reference_images": 0},
        ],
        "fed_lite0_reference_tie": True,
        "eps_sqnr_db": {"t": t, "sqnr_db": [22 + 20 * (v / T) ** 0.5 for v in t]},
        "engine": "openvino/int8",
        "int8_mac_share": 0.973, "bytes_float32": 35_790_000, "bytes_packed": 9_120_000,
        "calibration_seconds": 41.0, "peak_rss_bytes": 1_720_000_000,
        "float_layers": [{"name": r["name"], "reason": r["reason"]} for r in layers if r["reason"]],
        "sampler": "DDIMScheduler", "steps": STEPS, "images": seeds,
        "seeds": list(range(100, 100 + seeds)), "extractor": "lite0",
        "extractor_note": "EfficientNet-Lite0 features: a Frechet distance on them is not FID and "
        "must not be compared with one",
    }  # fmt: skip
