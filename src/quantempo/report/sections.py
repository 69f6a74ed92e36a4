"""What each section of the report shows: one function a section, files in, blocks out."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantempo.report import answers, plots, sensitivity_plot
from quantempo.report.answers import megabytes, optional
from quantempo.report.bits import bits_facts, bits_label
from quantempo.report.pictures import compare, ranked
from quantempo.run_folder import RunFolder

__all__ = ["SECTIONS", "Block", "NotRunError", "window_of"]

SEEDS_A_ROW = 8


class NotRunError(Exception):
    """Say why a section is empty, and which command line fills it."""


class Block(NamedTuple):
    """One piece of a section: kind says how the template shows it."""

    kind: str
    content: Any
    caption: str = ""
    head: Sequence[str] = ()


def _file(run: RunFolder, name: str, verb: str) -> Any:
    """Return the JSON value, or the arrays by name, of a file that a command writes."""
    if not run.has(name):
        raise NotRunError(f"{name} is missing", answers.command(run, verb))
    if name.endswith(".json"):
        return run.read_json(name)
    return {key: value.numpy() for key, value in run.read_safetensors(name).items()}


def _figure(svg: str, caption: str) -> Block:
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return Block("svg", named, caption)


def _metric(metrics: dict[str, Any], key: str, form: str = "{:.2f}", scale: float = 1.0) -> str:
    value = metrics.get(key)
    return "not run" if value is None else form.format(value * scale)


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


def _summary(run: RunFolder) -> list[Block]:
    return [Block("first", answers.first_screen(run))]


def _quality_rows(metrics: dict[str, Any], label: str) -> list[tuple[str, str]]:
    rows = [
        ("PSNR, mean of images", _metric(metrics, "psnr_db_mean", "{:.2f} dB")),
        ("PSNR, 5th percentile", _metric(metrics, "psnr_db_p05", "{:.2f} dB")),
        ("SSIM, mean of images", _metric(metrics, "ssim_mean", "{:.4f}")),
    ]
    if metrics.get("psnr_identical"):
        rows.append(("identical images", str(metrics["psnr_identical"])))
    for row in metrics.get("scores", []):
        against = f", against {row['reference_images']} {row['reference']}" * bool(row["reference"])
        spread = f" ± {row['std']:.3g}" if row.get("std") else ""
        of = label if row["set"] == "int8" else row["set"]
        rows.append((f"{row['name']}, {of}{against}", f"{row['value']:.4g}{spread}"))
    for key, value in metrics.items():
        if key.endswith("_reference_tie") and value is not None:
            said = "a tie (95 % interval of four parts)" if value else "differ (95 %, four parts)"
            rows.append((f"{key.removesuffix('_reference_tie')}, float against {label}", said))
    return rows


def _quality(run: RunFolder) -> list[Block]:
    metrics, rows = _file(run, "metrics.json", "evaluate"), optional(run, "layers.json")
    label, packed = bits_label(rows), metrics.get("bytes_packed")
    cost = [
        ("packed on disk", megabytes(packed) if packed else "not run"),
        ("work of layers in integers", _metric(metrics, "int8_mac_share", "{:.1f} %", 100)),
        ("engine", _listed(metrics.get("engine"))),
        ("calibration", _metric(metrics, "calibration_seconds", "{:.0f} s")),
        ("peak memory", _metric(metrics, "peak_rss_bytes", "{:,.0f} MB", 1e-6)),
        ("layers kept in float", str(len(metrics.get("float_layers", [])) or "none")),
    ]
    keys = ("sampler", "steps", "images", "seeds", "extractor")
    setup = [(key, _listed(metrics.get(key))) for key in keys]
    cost += bits_facts(rows, metrics.get("weight_bits_mean"))
    caption = f"Quality: {label} against float, same seeds"
    blocks = [
        Block("scores", _quality_rows(metrics, label), caption),
        Block("facts", [("Cost", cost), ("How it was measured", setup)]),
    ]
    if note := metrics.get("extractor_note"):
        blocks.append(Block("text", f"{note}. Scores here are of {metrics.get('images')} images."))
    return blocks


def _samples(run: RunFolder) -> list[Block]:
    seeds, psnr = ranked(run)
    if not seeds:
        raise NotRunError("samples/ holds no pairs of images", answers.command(run, "evaluate"))
    # The worst, then as many from there to the best.
    rest = seeds[SEEDS_A_ROW:]
    shown = seeds[:SEEDS_A_ROW] + rest[:: -(-len(rest) // SEEDS_A_ROW) or 1]
    cells, gain, enlarged = compare(run / "samples/float", run / "samples/int8", shown)
    cells = [(f"{c[0]}: {psnr[c[0]]:.1f} dB" if c[0] in psnr else c[0], *c[1:]) for c in cells]
    bands = [cells[i : i + SEEDS_A_ROW] for i in range(0, len(cells), SEEDS_A_ROW)]
    labels = ("float", bits_label(optional(run, "layers.json")), f"difference × {gain}")
    side = "Enlarged without smoothing. " if enlarged else ""
    order = "the worst first, then spread up to the best" if psnr else "by seed"
    return [Block("grid", bands, f"{side}{len(cells)} of {len(seeds)} pairs, {order}.", labels)]


def _timesteps(run: RunFolder) -> list[Block]:
    trace = _file(run, "trace.json", "trace")
    settings = trace["settings"]
    density = np.asarray(trace["density"]) if trace.get("density") else None
    drawn = np.asarray(trace["target_steps"]).ravel()
    sampler = dict(settings["time_sampler"])
    name, details = sampler.pop("name"), _listed(sampler)
    caption = (
        f"{settings['chains']} chains of {settings['steps']} steps, {settings['picks']} inputs "
        f"kept of each, drawn from {name}{f' ({details})' if details else ''}."
    )
    figure = plots.timestep_distribution(drawn, density, int(settings["steps"]))
    return [_figure(figure, caption)]


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
    known = [row for row in rows if row["buckets"] is not None and row["name"] in names]
    # Spread over depth.
    for row in known[len(known) // 8 :: -(-len(known) // 4) or 1]:
        name, part = row["name"], "" if len(row["segments"]) < 2 else ", first part"
        lo, hi = map(float, stats[f"{name}.edges"][0])
        hist = stats[f"{name}.hist"][0].astype(np.float64)
        if hi > lo and hist.sum() > 0:
            label, extremes = f"{name}  ({row['role']}{part})", stats[f"{name}.range"][0]
            times, window = stats["time_bin_edges"], window_of(scales, name, row["bits_activation"])
            layers.append(plots.Activation(label, hist, (lo, hi), extremes, times, window))
    if not layers:
        raise NotRunError(
            "stats.safetensors holds no integer layer", answers.command(run, "calibrate")
        )
    boxes = (
        "Inputs of a few layers over time. Box 25 to 75 %, whiskers 1 to 99 %, dots the extremes; "
        "the orange lines bound what the scale of each time bucket can represent."
    )
    return [_figure(plots.activation_boxes(layers), boxes)]


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
    return [_figure(plots.scale_curves(moving, bucket_of), caption)]


def _sensitivity(run: RunFolder) -> list[Block]:
    table = _file(run, "sensitivity.json", "sensitivity")
    how, choice = table["settings"], table["choice"]
    caption = f"{how['chains']} chains of {how['steps']} steps, one layer quantized at a time."
    caption += " Rings: the bits chosen." if choice else ""
    head, cells = sensitivity_plot.layer_cells(table)
    blocks = [_figure(sensitivity_plot.draw(table), caption)]
    blocks += [Block("facts", sensitivity_plot.budget_facts(table))] if choice else []
    return [*blocks, Block("table", cells, "Largest loss first.", head)]


def _step_sqnr(run: RunFolder) -> list[Block]:
    curve = _file(run, "metrics.json", "evaluate").get("eps_sqnr_db")
    if not curve or not curve["t"]:
        raise NotRunError("metrics.json holds no eps_sqnr_db", answers.command(run, "evaluate"))
    trace = optional(run, "trace.json")
    last = trace.get("times", {}).get("count") or max(curve["t"])
    figure = plots.step_curve(curve["t"], curve["sqnr_db"], float(last))
    return [_figure(figure, "Both models see the float model's inputs.")]


def _speed(run: RunFolder) -> list[Block]:
    if not (times := answers.timed(run)):
        raise NotRunError("no times yet", answers.command(run, "bench"))
    return [Block("times", (times, answers.against))]


def _layers(run: RunFolder) -> list[Block]:
    rows = _file(run, "layers.json", "pack")
    total = sum(row["macs"] for row in rows) or 1
    shown = [row for row in rows if row["reason"] is None]
    shown.sort(key=lambda row: np.inf if row["sqnr_db"] is None else row["sqnr_db"])
    kept: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row["reason"] is not None:
            share = f"{100 * row['macs'] / total:.2f} %"
            kept.setdefault(row["reason"], []).append((row["name"], share))
    caption = f"{len(rows)} rows, {total / 1e9:.3g} billion multiply-adds per image and step"
    return [Block("layers", (shown, total), caption), Block("kept", kept.items())]


def _recipe(run: RunFolder) -> list[Block]:
    recipe = _file(run, "manifest.json", "trace").get("recipe_toml")
    if not recipe:
        raise NotRunError("manifest.json holds no recipe", answers.command(run, "trace"))
    return [Block("pre", recipe)]


def _environment(run: RunFolder) -> list[Block]:
    manifest = _file(run, "manifest.json", "trace")
    model = optional(run, "model.json")
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
    ("quality", "Scores and cost", _quality),
    ("steps", "Error at each step", _step_sqnr),
    ("speed", "Speed", _speed),
    ("layers", "Layers, the worst first", _layers),
    ("sensitivity", "What the bits of each layer cost", _sensitivity),
    ("timesteps", "Which inputs were looked at", _timesteps),
    ("activations", "Activations over time", _activations),
    ("scales", "Scales over time", _scales),
    ("recipe", "Recipe", _recipe),
    ("environment", "Where this comes from", _environment),
)
