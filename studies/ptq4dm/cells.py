"""What a study is made of: samplers, rows of a table, and their cells, which are jobs.

A row is what a table prints in one line; a cell is one of its repetitions with its own calibration
seed and image seeds. Cells hold settings only, and equal settings are one cell whichever table
asks. What runs them is in `run_cell`.

The name of a result is a hash of what `Cell.describe` returns. Its form is frozen, so that results
stay valid when recipes gain or lose keys; what a later recipe says beyond it joins the hash only
where it matters.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantempo.calibration.timesteps import make_time_sampler
from quantempo.recipe import Recipe

__all__ = ["Cell", "Row", "Sampler", "digest"]

# Raised when the meaning of a result file changes.
FORMAT = 1
# What searching scales and scoring images takes, in network calls.
OVERHEAD = 20_000
# Sections and keys that are always part of a description, in the form of `docs/study/cells.jsonl`.
_FROZEN = {
    "trace": ("steps", "chains", "picks", "seed", "time_sampler", "time_sampler_args", "source"),
    "layers": ("float_roles", "exclude", "split_skips"),
    "activations": ("bits", "symmetric", "metric", "p", "buckets", "min_gain"),
    "weights": ("bits", "metric", "p"),
}
# Parameters of distributions of time-steps that go without saying; others are described in full.
USUAL = {
    "ndtc": {"mean": 0.4, "std": 0.4},
    "ndtc_paper": {"mean": 0.4},
    "ndtc_repo": {"mean": 0.4, "std": 0.4},
    "single": {"fraction": 0.4},
    "skew_normal": {"xi": 0.1, "omega": 0.4, "alpha": 4.0},
}
_NAMES = {"ddim": "DDIM", "ddpm": "DDPM", "dpm++": "DPM++", "euler": "Euler"}


@dataclass(frozen=True)
class Sampler:
    """A scheduler's name in `SCHEDULERS`, its number of steps and, for DDIM, its share of noise."""

    name: str = "ddim"
    steps: int = 100
    eta: float = 0.0

    def __str__(self) -> str:
        eta = f", eta {self.eta:g}" if self.eta else ""
        return f"{_NAMES.get(self.name, self.name)} {self.steps}{eta}"


@dataclass(frozen=True)
class Cell:
    """One job.

    sampler: that makes the images; recipe: that makes the integers, None for the float model;
    calibrated: sampler of the calibration trace; graph: "input" (quantizers where integer kernels
    need them), "output" (where the released program had them) or "float" (no layer); measured:
    sampler tensors that the calibration measures; sites: those of them that are on 8-bit grids;
    released: pair x_t and t as the released program did; repetition: which seeds; images: how
    many; beside: repetition of the float model whose images are the floor of its distances.
    """

    sampler: Sampler
    recipe: Recipe | None
    calibrated: Sampler
    graph: str
    sites: tuple[str, ...]
    repetition: int
    images: int
    beside: int | None = None
    measured: tuple[str, ...] = ()
    released: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the settings in JSON types and their frozen form, without the recipe's name."""
        values = asdict(self)
        del values["measured"], values["released"]
        if self.beside is None:
            del values["beside"]
        if self.recipe is not None:
            values["recipe"] = _describe(self.recipe)
            values["recipe"]["trace"]["legacy_pairing"] = self.released
            values["recipe"]["layers"]["sites"] = list(self.measured)
            # A setting that recipes had when the first cells were made.
            if "iterations" in values["recipe"]["rounding"]:
                values["recipe"]["rounding"]["refine"] = 0
        return values

    @property
    def cost(self) -> int:
        """Rough number of network calls of one image: sampling, calibration, and the rest."""
        chains = self.recipe.trace.chains * self.calibrated.steps if self.recipe else 0
        return self.images * self.sampler.steps + chains + OVERHEAD

    def key(self, model: str) -> str:
        """Return the name of the result: a hash of the settings and of what all cells share."""
        return digest([FORMAT, model, self.describe()])

    @property
    def inputs(self) -> str:
        """Name of what its statistics are of."""
        assert self.recipe is not None
        side = "output" if self.graph == "output" else "input"
        of = (self.calibrated, self.measured, self.released, side, self.repetition)
        return repr((self.recipe.trace, self.recipe.layers, of))

    @property
    def trajectories(self) -> str:
        """Name of the trajectories that its calibration set comes from."""
        assert self.recipe is not None
        trace = replace(self.recipe.trace, source="trajectory")
        return repr((trace, self.calibrated, self.released, self.repetition))

    def group(self, main: Sampler) -> str:
        """Return what it shares with others that one process should run, given the main sampler.

        Cells of another sampler share its float images and calibrations; the others share the
        inputs they are calibrated on.
        """
        others = {self.sampler, self.calibrated} - {main}
        if others or self.recipe is None:
            return repr((sorted(map(str, others)), self.repetition))
        recipe = self.recipe
        return repr(
            (
                self.trajectories,
                recipe.layers,
                recipe.weights,
                self.measured,
                self.graph == "output",
            )
        )

    @property
    def structure(self) -> str | None:
        """Name of the network it needs compiled, None for the float one."""
        if self.recipe is None or self.graph != "input":
            return None
        weights, layers = self.recipe.weights, self.recipe.layers
        return repr((layers.float_roles, layers.split_skips, self.recipe.activations.buckets,
                     weights))  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of a table: see `Cell`.

    label and group say where it stands; images are those of all repetitions; floor: of a float
    row, also ask for the distance that other seeds alone make.
    """

    label: str
    sampler: Sampler
    images: int
    recipe: Recipe | None = None
    calibrated: Sampler | None = None
    graph: str = "input"
    sites: tuple[str, ...] = ()
    group: str = ""
    floor: bool = False
    measured: tuple[str, ...] = ()
    released: bool = False

    def cells(self, seeds: int) -> list[Cell]:
        """Return the repetitions of this row; `images` is divided among them, rounded up."""
        share = -(-self.images // seeds)
        under = self.calibrated or self.sampler
        asked = self.floor and self.recipe is None and seeds > 1
        next_one = [(r + 1) % seeds if asked else None for r in range(seeds)]
        how = self.sampler, self.recipe, under, self.graph, self.sites
        last = self.measured, self.released
        return [Cell(*how, r, share, beside, *last) for r, beside in enumerate(next_one)]

    def columns(self) -> dict[str, Any]:
        """Return what the table says of this row besides the results."""
        trace = self.recipe.trace if self.recipe else None
        quantized = self.recipe is not None and self.graph != "float"
        return {
            "label": self.label,
            "group": self.group,
            "bits": _bits(self.recipe) if quantized and self.recipe else "float",
            "law": _law(self.recipe) if self.recipe else None,
            "metric": _metric(self.recipe) if self.recipe else None,
            "samples": trace.chains * trace.picks if trace else None,
            "source": trace.source + (", legacy pairs" if self.released else "") if trace else None,
            "sampler": str(self.sampler),
            "calibrated": str(self.calibrated or self.sampler) if self.recipe else None,
            "graph": self.graph,
            "sites": list(self.sites),
            "recipe": self.recipe.name if self.recipe else None,
        }


def _describe(recipe: Recipe) -> dict[str, Any]:
    full = recipe.to_dict()
    values = {
        section: {key: full[section][key] for key in keys} for section, keys in _FROZEN.items()
    }
    trace, rounding = values["trace"], recipe.rounding
    law: Any = make_time_sampler(trace["time_sampler"], trace["time_sampler_args"])
    resolved = asdict(law)
    if resolved != USUAL.get(trace["time_sampler"], {}) | trace["time_sampler_args"]:
        trace["time_sampler_args"] = resolved
    if full["layers"]["bits"]:
        values["layers"]["bits"] = full["layers"]["bits"]
    plain = rounding.name == "nearest" and not rounding.bias
    if not rounding.correct:
        del full["rounding"]["correct"]
    values["rounding"] = {"name": "nearest"} if plain else full["rounding"]
    return values


def _bits(recipe: Recipe) -> str:
    return f"W{recipe.weights.bits}A{recipe.activations.bits}"


def _law(recipe: Recipe) -> str:
    arguments = recipe.trace.time_sampler_args
    text = ", ".join(f"{key} {value:g}" for key, value in arguments.items())
    return recipe.trace.time_sampler + (f" ({text})" if text else "")


def _metric(recipe: Recipe) -> str:
    name = recipe.activations.metric
    return f"{name} {recipe.activations.p:g}" if name == "lp" else name


def digest(value: Any) -> str:
    """Return 20 hexadecimal digits of the SHA-256 of a value's JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
