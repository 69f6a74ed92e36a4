"""A small study folder with every part the study page reads, made up but shaped like a real one."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quantempo.run_folder import RunFolder

SEEDS, IMAGES, STEPS, T = 3, 192, 50, 1000


def score(mean: float, spread: float, rng: Any) -> dict[str, Any]:
    """Return a score over the seeds whose mean and deviation are those of its values."""
    values = rng.normal(mean, spread, SEEDS)
    return {"mean": float(values.mean()), "std": float(values.std(ddof=1)),
            "values": values.tolist()}  # fmt: skip


def study_row(label: str, quality: float, rng: Any, **changes: Any) -> dict[str, Any]:
    """Return a row; `quality` is 1 for the float model and falls towards 0."""
    row = {
        "label": label, "group": "W8A8", "bits": "W8A8", "law": "ndtc", "metric": "lp",
        "samples": 1024, "source": "trajectory", "sampler": "DDIM 100", "float_layers": 3,
        "images": IMAGES, "seeds": SEEDS, "failed": 0,
        "psnr_db": score(18 + 18 * quality, 0.4, rng), "ssim": score(0.98 * quality, 0.003, rng),
        "sqnr_db": score(10 + 20 * quality, 0.3, rng),
        "fed_float": score(14 / quality - 12, 0.6, rng),
        "fed_data": score(60 / quality, 1.5, rng), "sfed_data": None,
        "kid_data": score(0.004 / quality, 0.0004, rng), "is": score(6 * quality, 0.1, rng),
        "pooled": None, "picture": None, "curve": None,
    }  # fmt: skip
    return row | changes


def float_row(rng: Any, **changes: Any) -> dict[str, Any]:
    """Return the row of the model in float: nothing to compare it with but the data."""
    empty = dict.fromkeys(("psnr_db", "ssim", "sqnr_db", "fed_float", "law", "metric", "samples"))
    return study_row("float", 1.0, rng, bits="float32", **empty) | changes


def make_study(path: Path) -> RunFolder:
    """Write a whole study folder under `path`; F5 left no file and T4 has a failed cell."""
    run = RunFolder(path)
    rng = np.random.default_rng(0)
    items = (_operations(rng), _inputs(rng), _activations(rng), _single(run, rng),
             _laws(run, rng), _metrics(rng), _samplers(rng))  # fmt: skip
    for item in items:
        run.write_json(f"items/{item['name']}.json", item)
    run.write_json(
        "study.json",
        {
            "name": "ddpm <cifar10> & more",
            "model": {"path": "some/where/ddpm-tiny", "class": "UNet2DModel",
                      "parameters": 35_700_000, "sha256": "ab" * 32},
            "data": {"path": "some/where/cifar10", "images": 10_000},
            "settings": {"extractor": "lite0", "seeds": [0, 1, 2], "sampler": "DDIM",
                         "steps": STEPS, "transfer": True},
            "machine": {"cpu": "Some CPU", "cores": 2, "gpu": None},
            "versions": {"quantempo": "0.1.0", "torch": "2.13.0"},
            "items": ["T1", "T2", "F3", "F4", "T3", "T4", "T5", "F5"],
            "not_run": [{"item": "T5", "row": "DDPM 1000", "reason": "the budget was spent"}],
            "failed": [{"item": "T4", "row": "kl", "error": "scale of layer x is not finite"}],
            "seconds": 1432.0,
        },
    )  # fmt: skip
    return run


def _item(name: str, title: str, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    item = {
        "name": name, "title": title, "question": f"What does {title.lower()} do to the images?",
        "reading": "The rows differ by less than their spread, so the order is not settled.",
        "paper": None, "rows": rows, "claims": [], "extra": {},
    }  # fmt: skip
    return item | changes


def _claim(verdict: str, text: str = "The three operations are insensitive") -> dict[str, str]:
    return {"text": text, "paper": "FID 21.63 → 21.99", "verdict": verdict,
            "detail": "FED 60.1 ± 1.2 against 60.9 ± 1.5, 3 seeds"}  # fmt: skip


def _operations(rng: Any) -> dict[str, Any]:
    # The float row of another sampler, and a variance DDIM never uses: identical images.
    unused = {"psnr_db": None, "identical": IMAGES}
    rows = [
        float_row(rng, group="DDIM 100, η = 0"),
        study_row("µ", 0.97, rng, group="DDIM 100, η = 0"),
        study_row("Σ", 1.0, rng, group="DDIM 100, η = 0", **unused),
        study_row("x_prev", 0.95, rng, group="DDIM 100, η = 0"),
        study_row("µ + Σ + x_prev", 0.93, rng, group="DDIM 100, η = 0", failed=1),
        float_row(rng, group="DDPM 1000", sampler="DDPM 1000"),
        study_row("Σ", 0.9, rng, group="DDPM 1000", sampler="DDPM 1000"),
    ]
    paper = {
        "caption": "Table 1, only that operation in 8 bit (ImageNet64, DDIM 250)",
        "head": ["", "IS", "FID", "sFID"],
        "rows": [["FP", 14.88, 21.63, 17.66], ["µ", 15.51, 21.38, None]],
    }
    claims = [_claim("confirmed"), _claim("tie", "Quantizing improves IS")]
    return _item("T1", "Which operations may be quantized", rows, paper=paper, claims=claims)


def _inputs(rng: Any) -> dict[str, Any]:
    rows = [
        study_row(f"{source}, {law}", 0.9 - 0.2 * i + 0.02 * j, rng, group=f"N = {n}",
                  source=source, law=law, samples=n)
        for n in (128, 1024)
        for i, source in enumerate(("trajectory", "mimic", "raw", "noise"))
        for j, law in enumerate(("uniform", "ndtc", "skew_normal"))
    ]  # fmt: skip
    return _item("T2", "Calibration inputs", rows, claims=[_claim("refuted", "Noise beats mimic")])


def _activations(rng: Any) -> dict[str, Any]:
    times, layers = np.arange(T // 16, T, T // 8), []
    grid = np.linspace(-4, 6, 65)
    middle = (grid[1:] + grid[:-1]) / 2
    for depth, role in enumerate(("conv", "attention", "shortcut")):
        width = 0.5 + depth / 3 + times / T
        shares = np.array([-2.33, -0.67, 0.0, 0.67, 2.33])
        density = {
            str(t): (np.exp(-0.5 * (middle / w) ** 2) / (2.5 * w)).round(4).tolist()
            for t, w in list(zip(times.tolist(), width, strict=True))[::3]
        }
        layers.append(
            {
                "name": f"up_blocks.{depth}.resnets.0.conv1", "role": role, "t": times.tolist(),
                "quantiles": (width[:, None] * shares).tolist(),
                "extremes": (width[:, None] * np.array([-3.8, 4.1])).tolist(),
                "grid": grid.tolist(), "densities": density,
            }
        )  # fmt: skip
    return _item("F3", "Activations over time", [], extra={"layers": layers})


def _picture(run: RunFolder, name: str, noise: float, rng: Any) -> str:
    y, x = np.mgrid[0:32, 0:32] / 32
    waves = [
        np.sin(6 * (a * x + b * y) + a * b) for a, b in np.linspace(0.2, 1.8, 16).reshape(8, 2)
    ]
    strip = np.concatenate([128 + 90 * np.stack([w, w**2, -w], axis=-1) for w in waves], axis=1)
    pixels = np.clip(strip + noise * rng.normal(size=strip.shape), 0, 255).astype(np.uint8)
    target = run / f"pictures/{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(target)
    return f"pictures/{name}.png"


def _single(run: RunFolder, rng: Any) -> dict[str, Any]:
    t = np.arange(0, T, T // STEPS)
    rows = [float_row(rng, group="single t", picture=_picture(run, "f4-float", 0, rng))]
    for i, place in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.0)):
        values = 26 - 14 * np.abs(t / T - place) + 0.2 * rng.normal(size=len(t))
        curve = {"t": t.tolist(), "sqnr_db": values.tolist(), "std": [0.6] * len(t)}
        picture = _picture(run, f"f4-{i}", 8.0 * i, rng)
        rows.append(study_row(f"t = {place:g} T", 0.9 - 0.15 * i, rng, group="single t",
                              law="single", curve=curve, picture=picture))  # fmt: skip
    claims = [_claim("mixed", "Quality grows towards the image")]
    return _item("F4", "Calibration at a single time-step", rows, claims=claims)


def _laws(run: RunFolder, rng: Any) -> dict[str, Any]:
    names = ("single", "uniform", "linspace", "ndtc", "ndtc_paper", "ndtc_repo", "skew_normal")
    rows, laws = [float_row(rng, group="laws")], {}
    for i, name in enumerate(names):
        density = np.exp(-0.5 * ((np.arange(STEPS) / STEPS - 0.4) / (0.1 + 0.1 * i)) ** 2)
        density /= density.sum()
        drawn = np.bincount(rng.choice(STEPS, 1024, p=density), minlength=STEPS)
        laws[name] = {"density": density.tolist(), "drawn": drawn.tolist()}
        pooled = {"fed_float": 3.1 + i, "fed_data": 58.2 + i, "images": IMAGES}
        picture = _picture(run, f"t3-{name}", 4.0 * i, rng)
        rows.append(study_row(name, 0.85 + 0.01 * i, rng, group="laws", law=name, pooled=pooled,
                              sfed_data=score(31 + i, 0.4, rng), picture=picture))  # fmt: skip
    extra = {"laws": laws, "steps": STEPS}
    return _item("T3", "Laws of time-steps", rows, extra=extra, claims=[_claim("tie", "NDTC wins")])


def _metrics(rng: Any) -> dict[str, Any]:
    # One seed, no data: no spread, and the distance to the float model instead.
    rows = []
    for i, metric in enumerate(("l1", "cosine", "mse", "lp")):
        row = study_row(metric, 0.7 + 0.05 * i, rng, group="metrics", metric=metric, seeds=1,
                        images=64, fed_data=None, kid_data=None)  # fmt: skip
        for key in ("psnr_db", "ssim", "sqnr_db", "fed_float", "is"):
            first = row[key]["values"][0]
            row[key] = {"mean": first, "std": None, "values": [first]}
        rows.append(row)
    claims = [_claim("not run", "Lp is best")]
    return _item("T4", "Metrics of the scale search", rows, claims=claims)


def _samplers(rng: Any) -> dict[str, Any]:
    t = np.linspace(0, T - 1, 20)
    rows = []
    for i, sampler in enumerate(("DDIM 50", "DDIM 100", "DPM++ 20", "Euler 30")):
        rows.append(float_row(rng, sampler=sampler, group="main"))
        for j, label in enumerate(("own calibration", "calibration of DDIM 100")):
            curve = {"t": t.tolist(), "sqnr_db": (20 + i - j + 8 * t / T).tolist(), "std": None}
            rows.append(study_row(label, 0.9 - 0.05 * j, rng, sampler=sampler, curve=curve,
                                  group=("main", "transfer")[j]))  # fmt: skip
    return _item("T5", "Main table and transfer", rows)
