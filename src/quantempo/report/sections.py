"""What each section of the report shows: one function a section, files in, blocks out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantempo.report import plots, sensitivity_plot
from quantempo.report.bits import bits_facts, bits_label
from quantempo.report.pictures import compare, seeds_of
from quantempo.run_folder import RunFolder, read_tensors

__all__ = ["SECTIONS", "Block", "NotRunError", "window_of"]

SEEDS_A_ROW = 8
LAYERS_SHOWN = 4
FLOAT_TYPES = ("fp32/", "bf16/")


class NotRunError(Exception):
    """Say why a section is empty and which command fills it."""


class Block(NamedTuple):
    """One piece of a section: kind says how the template shows it."""

    kind: str
    content: Any
    caption: str = ""
    head: Sequence[str] = ()


def _file(run: RunFolder, name: str, command: str) -> Any:
    """Return the JSON value, or the arrays by name, of a file that a command writes."""
    if not run.has(name):
        raise NotRunError(f"{name} is missing: quantempo {command}")
    if name.endswith(".json"):
        return run.read_json(name)
    return {key: value.numpy() for key, value in run.read_safetensors(name).items()}


def _optional(run: RunFolder, name: str) -> Any:
    return run.read_json(name) if run.has(name) else {}


def _metric(metrics: dict[str, Any], key: str, form: str = "{:.2f}", scale: float = 1.0) -> str:
    value = metrics.get(key)
    return "not run" if value is None else form.format(value * scale)


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value < 1e8 else f"{value / 1e6:,.0f} MB"


def _listed(value: Any) -> str:
    """Return a JSON value as a phrase; runs of integers as first to last."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listed(item)}" for key, item in value.items())
    if isinstance(value, list):
        whole = len(value) > 1 and all(isinstance(item, int) for item in value)
        # [first, last] or every one of them.
        if whole and (len(value) == 2 or value == list(range(value[0], value[0] + len(value)))):
            return f"{value[0]} to {value[-1]}"
        return ", ".join(map(str, value))
    return "not recorded" if value is None else str(value)


def _quality_rows(metrics: dict[str, Any], label: str) -> list[tuple[str, str]]:
    rows = [
        ("PSNR, mean of images", _metric(metrics, "psnr_db_mean", "{:.2f} dB")),
        ("PSNR, 5th percentile", _metric(metrics, "psnr_db_p05", "{:.2f} dB")),
        ("SSIM, mean of images", _metric(metrics, "ssim_mean", "{:.4f}")),
    ]
    if metrics.get("psnr_identical"):
        rows.append(("identical images", str(metrics["psnr_identical"])))
    for row in metrics.get("scores", []):
        against = f", against {row['reference_images']} {row['reference']}"
        against = against if row["reference"] else ""
        spread = f" ± {row['std']:.3g}" if row.get("std") else ""
        of = label if row["set"] == "int8" else row["set"]
        rows.append((f"{row['name']}, {of}{against}", f"{row['value']:.4g}{spread}"))
    ties = {True: "a tie (95 % interval of four parts)", False: "differ (95 %, four parts)"}
    for key, value in metrics.items():
        if key.endswith("_reference_tie") and value is not None:
            name = key.removesuffix("_reference_tie")
            rows.append((f"{name}, float against {label}", ties[value]))
    return rows


def _times(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Return batch -> CPU measurements of `bench.json`, or else of `metrics.json`."""
    batches: dict[str, dict[str, Any]] = {}
    if timed := _optional(run, "bench.json").get("cpu"):
        for row in timed["rows"]:
            if row["kind"] == "forward" and "failed" not in row:
                batch = batches.setdefault(str(row["batch"]), {"ms_per_forward": {}})
                batch["ms_per_forward"][row["candidate"]] = row["ms_per_forward"]
                for key in ("speedup_vs_best_fp32", "speedup_vs_best_bf16"):
                    batch[key] = timed[key][f"{row['model']}_b{row['batch']}"]
        return batches
    metrics = _optional(run, "metrics.json")
    for key, value in (metrics.get("ms_per_forward") or {}).items():
        name, _, batch_size = key.partition("@")
        batches.setdefault(batch_size, {"ms_per_forward": {}})["ms_per_forward"][name] = value
    return dict(sorted(batches.items(), key=lambda item: (len(item[0]), item[0])))


def _summary(run: RunFolder) -> list[Block]:
    metrics, rows = _file(run, "metrics.json", "evaluate"), _optional(run, "layers.json")
    for measured in _times(run).values():
        metrics |= {k: v for k, v in measured.items() if metrics.get(k) is None}
    packed = metrics.get("bytes_packed")
    smaller = metrics.get("bytes_float32", 0) / packed if packed else None
    tiles = [
        ("PSNR to float", _metric(metrics, "psnr_db_mean", "{:.1f} dB")),
        ("faster than best fp32", _metric(metrics, "speedup_vs_best_fp32", "{:.2f}×")),
        ("faster than best bf16", _metric(metrics, "speedup_vs_best_bf16", "{:.2f}×")),
        ("smaller than float32", f"{smaller:.2f}×" if smaller else "not run"),
        ("of MACs in integers", _metric(metrics, "int8_mac_share", "{:.1f} %", 100)),
    ]
    cost = [
        ("packed on disk", _megabytes(packed) if packed else "not run"),
        ("engine", _listed(metrics.get("engine"))),
        ("calibration", _metric(metrics, "calibration_seconds", "{:.0f} s")),
        ("peak memory", _metric(metrics, "peak_rss_bytes", "{:,.0f} MB", 1e-6)),
        ("layers kept in float", str(len(metrics.get("float_layers", [])) or "none")),
    ]
    keys, label = ("sampler", "steps", "images", "seeds", "extractor"), bits_label(rows)
    setup = [(key, _listed(metrics.get(key))) for key in keys]
    groups = [
        (f"Quality: {label} against float, same seeds", _quality_rows(metrics, label)),
        ("Cost", cost + bits_facts(rows, metrics.get("weight_bits_mean"))),
        ("How it was measured", setup),
    ]
    blocks = [Block("tiles", tiles), Block("facts", groups)]
    if note := metrics.get("extractor_note"):
        count = metrics.get("images")
        blocks.append(Block("text", f"{note}. Scores here are of {count} images."))
    return blocks


def _samples(run: RunFolder) -> list[Block]:
    folders = run / "samples/float", run / "samples/int8"
    common = seeds_of(*folders)
    if not common:
        raise NotRunError("samples/ holds no pairs of images: quantempo evaluate")
    cells, gain, enlarged = compare(*folders, common)
    bands = [cells[i : i + SEEDS_A_ROW] for i in range(0, len(cells), SEEDS_A_ROW)]
    labels = ("float", bits_label(_optional(run, "layers.json")), f"difference × {gain}")
    side = "Enlarged without smoothing. " if enlarged else ""
    caption = f"{side}{len(cells)} of {len(common)} pairs, by seed."
    return [Block("grid", bands, caption, labels)]


def _timesteps(run: RunFolder) -> list[Block]:
    trace = _file(run, "trace.json", "trace")
    settings = trace["settings"]
    last, times = trace["times"]["count"], []
    for chunk in trace["chunks"]:
        if run.has(f"trace/{chunk['file']}"):
            times.append(read_tensors(run / f"trace/{chunk['file']}")[0]["place"].double().numpy())
    actual = np.concatenate(times) if times else None
    density = np.asarray(trace["density"]) if trace.get("density") else None
    drawn = np.asarray(trace["target_steps"]).ravel()
    sampler = dict(settings["time_sampler"])
    name, details = sampler.pop("name"), _listed(sampler)
    caption = (
        f"{settings['chains']} chains of {settings['steps']} steps, {settings['picks']} inputs "
        f"kept of each, drawn from {name}{f' ({details})' if details else ''}."
    )
    figure = plots.timestep_distribution(drawn, density, actual, int(settings["steps"]), last)
    return [Block("svg", figure, caption)]


def _choose(rows: list[dict[str, Any]], known: set[str]) -> list[dict[str, Any]]:
    """Return a few integer layers, spread over depth, with as many roles as possible."""
    rows = [row for row in rows if row["buckets"] is not None and row["name"] in known]
    chosen: list[dict[str, Any]] = []
    for place in range(min(LAYERS_SHOWN, len(rows))):
        goal = (place + 0.5) * len(rows) / min(LAYERS_SHOWN, len(rows)) - 0.5
        roles = {row["role"] for row in chosen}
        ranked = sorted(
            (i for i, row in enumerate(rows) if row not in chosen),
            key=lambda i: abs(i - goal) + (len(rows) / 4 if rows[i]["role"] in roles else 0),
        )
        chosen.append(rows[ranked[0]])
    return sorted(chosen, key=rows.index)


def window_of(scales: dict[str, np.ndarray], name: str, bits: int) -> np.ndarray | None:
    """Return (T, 2): the smallest and largest value the layer's codes stand for at each t."""
    if f"{name}.act_scale" not in scales or "bucket_of" not in scales:
        return None
    scale = scales[f"{name}.act_scale"][0]
    if not len(scale):
        # Every token has its own.
        return None
    zero, top = scales[f"{name}.act_zero_point"][0], 2**bits - 1
    per_time = np.broadcast_to(scale, (max(scales["bucket_of"].max() + 1, len(scale)),))
    per_time = per_time[scales["bucket_of"]]
    return np.stack([-zero * per_time, (top - zero) * per_time], axis=1)


def _activations(run: RunFolder) -> list[Block]:
    stats = _file(run, "stats.safetensors", "calibrate")
    rows = _file(run, "layers.json", "pack")
    scales = _file(run, "scales.safetensors", "search")
    names = {key.removesuffix(".hist") for key in stats if key.endswith(".hist")}
    layers = []
    for row in _choose(rows, names):
        name, part = row["name"], "" if len(row["segments"]) < 2 else ", first part"
        lo, hi = map(float, stats[f"{name}.edges"][0])
        hist = stats[f"{name}.hist"][0].astype(np.float64)
        if hi > lo and hist.sum() > 0:
            label, extremes = f"{name}  ({row['role']}{part})", stats[f"{name}.range"][0]
            times, window = stats["time_bin_edges"], window_of(scales, name, row["bits_activation"])
            layers.append(plots.Activation(label, hist, (lo, hi), extremes, times, window))
    if not layers:
        raise NotRunError("stats.safetensors holds no integer layer: quantempo calibrate")
    boxes = (
        "Inputs of a few layers over time. Box 25 to 75 %, whiskers 1 to 99 %, dots the extremes; "
        "the orange lines bound what the scale of each time bucket can represent."
    )
    densities = plots.activation_densities(layers)
    return [
        Block("svg", plots.activation_boxes(layers), boxes),
        Block("svg", densities, "The same inputs as densities (log axis)."),
    ]


def _scales(run: RunFolder) -> list[Block]:
    tensors = _file(run, "scales.safetensors", "search")
    roles = {row["name"]: row["role"] for row in _file(run, "layers.json", "pack")}
    bucket_of = tensors.get("bucket_of")
    moving, fixed, tokens = [], 0, 0
    for key, scale in tensors.items():
        if key.endswith(".act_scale"):
            if scale.shape[1] == 0:
                tokens += 1
            elif scale.shape[1] == 1 or bucket_of is None:
                fixed += 1
            else:
                role = roles.get(key.removesuffix(".act_scale"), "other")
                moving += [(role, values) for values in scale]
    each = f" {tokens} layers have a scale for every token." if tokens else ""
    if not moving or bucket_of is None:
        text = f"All {fixed} {'other ' if tokens else ''}integer layers keep one activation scale"
        return [Block("text", f"{text} over time.{each}")]
    count = int(bucket_of.max()) + 1
    caption = (
        f"{len(moving)} inputs with scales of their own in {count} time buckets; {fixed} layers "
        f"gain too little from it and keep one. A skip input in two parts counts twice.{each}"
    )
    return [Block("svg", plots.scale_curves(moving, bucket_of), caption)]


def _layer_sqnr(run: RunFolder) -> list[Block]:
    rows = [r for r in _file(run, "layers.json", "pack") if r["sqnr_db"] is not None]
    if not rows:
        raise NotRunError("layers.json holds no SQNR: quantempo pack")
    lowest = sorted(range(len(rows)), key=lambda i: rows[i]["sqnr_db"])[:3]
    named = ", ".join(
        f"{n} {rows[i]['name']} ({rows[i]['sqnr_db']:.1f} dB)" for n, i in enumerate(lowest, 1)
    )
    values, roles = [row["sqnr_db"] for row in rows], [row["role"] for row in rows]
    figure = plots.layer_bars(values, roles, lowest)
    return [Block("svg", figure, f"Each layer alone, errors do not add up. Lowest: {named}.")]


def _sensitivity(run: RunFolder) -> list[Block]:
    table = _file(run, "sensitivity.json", "sensitivity")
    how, choice = table["settings"], table["choice"]
    caption = f"{how['chains']} chains of {how['steps']} steps, one layer quantized at a time."
    caption += " Rings: the bits chosen." if choice else ""
    head, cells = sensitivity_plot.layer_cells(table)
    blocks = [Block("svg", sensitivity_plot.draw(table), caption)]
    blocks += [Block("facts", sensitivity_plot.budget_facts(table))] if choice else []
    return [*blocks, Block("table", cells, "Largest loss first.", head)]


def _step_sqnr(run: RunFolder) -> list[Block]:
    curve = _file(run, "metrics.json", "evaluate").get("eps_sqnr_db")
    if not curve or not curve["t"]:
        raise NotRunError("metrics.json holds no eps_sqnr_db: quantempo evaluate")
    trace = _optional(run, "trace.json")
    last = trace.get("times", {}).get("count") or max(curve["t"])
    figure = plots.step_curve(curve["t"], curve["sqnr_db"], float(last))
    return [Block("svg", figure, "Both models see the float model's inputs.")]


def _speed(run: RunFolder) -> list[Block]:
    metrics = _optional(run, "metrics.json")
    blocks, times = [], _times(run)
    for batch, measured in times.items():
        rows = [
            (name, ms, f"{ms:.4g} ms", not name.startswith(FLOAT_TYPES))
            for name, ms in sorted(measured["ms_per_forward"].items(), key=lambda item: item[1])
        ]
        title = "milliseconds per forward pass" + (f", batch {batch}" if batch else "")
        blocks.append(Block("svg", plots.bars(rows, title)))
    sizes = [(k.removeprefix("bytes_"), v) for k, v in metrics.items() if k.startswith("bytes_")]
    if sizes:
        rows = [(k, v / 1e6, _megabytes(v), k == "packed") for k, v in sizes]
        blocks.append(Block("svg", plots.bars(rows, "megabytes of the network on disk")))
    if not blocks:
        raise NotRunError("no times and no sizes yet: quantempo bench, quantempo evaluate")
    if times:
        blocks.append(Block("text", "Medians of interleaved runs in one process, same inputs."))
    return blocks


def _layers(run: RunFolder) -> list[Block]:
    return [Block("layers", _file(run, "layers.json", "pack"))]


def _recipe(run: RunFolder) -> list[Block]:
    recipe = _file(run, "manifest.json", "trace").get("recipe_toml")
    if not recipe:
        raise NotRunError("manifest.json holds no recipe: quantempo trace")
    return [Block("pre", recipe)]


def _environment(run: RunFolder) -> list[Block]:
    manifest = _file(run, "manifest.json", "trace")
    model = _optional(run, "model.json")
    facts = [
        ("model", f"{Path(model['path']).name} ({model['class']})" if model else "not recorded"),
        ("parameters", f"{model['parameters']:,}" if model else "not recorded"),
        ("model SHA-256", _listed(model.get("sha256"))),
        ("recipe SHA-256", _listed(manifest.get("recipe_sha256"))),
        ("scheduler", _listed(manifest.get("scheduler") or model.get("scheduler"))),
        *((key, _listed(manifest.get(key))) for key in ("seeds", "versions", "machine")),
    ]
    groups = [("Model, settings, machine", facts)]
    if stages := manifest.get("stages"):
        seconds = [(name, f"{entry['seconds']:.1f} s") for name, entry in stages.items()]
        groups.append(("Seconds per stage", seconds))
    return [Block("facts", groups)]


SECTIONS: tuple[tuple[str, str, Callable[[RunFolder], list[Block]]], ...] = (
    ("summary", "Summary", _summary),
    ("samples", "Same seeds, two models", _samples),
    ("steps", "Error at each step", _step_sqnr),
    ("speed", "Speed and size", _speed),
    ("timesteps", "Which inputs were looked at", _timesteps),
    ("activations", "Activations over time", _activations),
    ("scales", "Scales over time", _scales),
    ("layer-sqnr", "Error of each layer", _layer_sqnr),
    ("sensitivity", "What the bits of each layer cost", _sensitivity),
    ("layers", "Layers", _layers),
    ("recipe", "Recipe", _recipe),
    ("environment", "Where this comes from", _environment),
)
