"""What a study is made of: samplers, rows of a table, and their cells, which are jobs.

A row is what a table prints in one line; a cell is one of its repetitions with its own calibration
seed and image seeds. Cells hold settings only, and equal settings are one cell whichever table
asks. What runs them is in `run_cell`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from quantempo.recipe import Recipe

__all__ = ["Cell", "Row", "Sampler"]

# Raised when the meaning of a result file changes.
FORMAT = 1
# What searching scales and scoring images takes, in network calls.
OVERHEAD = 20_000
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
    need them), "output" (where the released program had them) or "float" (no layer, only sites);
    sites: of those the recipe calibrates, the ones that are on; repetition: which seeds;
    images: how many.
    """

    sampler: Sampler
    recipe: Recipe | None
    calibrated: Sampler
    graph: str
    sites: tuple[str, ...]
    repetition: int
    images: int
    beside: int | None = None

    def describe(self) -> dict[str, Any]:
        """Return the settings in JSON types, without the recipe's name."""
        values = asdict(self)
        if self.recipe is not None:
            values["recipe"] = {k: v for k, v in self.recipe.to_dict().items() if k != "name"}
        return {k: v for k, v in values.items() if k != "beside" or v is not None}

    @property
    def cost(self) -> int:
        """Rough number of network calls of one image: sampling, calibration, and the rest."""
        chains = self.recipe.trace.chains * self.calibrated.steps if self.recipe else 0
        return self.images * self.sampler.steps + chains + OVERHEAD

    def key(self, model: str) -> str:
        """Return the name of the result: a hash of the settings and of what all cells share."""
        return _hash([FORMAT, model, self.describe()])

    @property
    def side(self) -> str:
        """Side of the layers on which activations are quantized."""
        return "output" if self.graph == "output" else "input"

    def group(self, main: Sampler) -> str:
        """Return what it shares with others that one process should run, given the main sampler.

        Cells of another sampler share its float images and calibrations; the others share the
        inputs they are calibrated on.
        """
        others = {self.sampler, self.calibrated} - {main}
        if others or self.recipe is None:
            return repr((sorted(map(str, others)), self.repetition))
        recipe = self.recipe
        return repr((recipe.trace, recipe.layers, recipe.weights, self.side, self.repetition))

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

    def cells(self, seeds: int) -> list[Cell]:
        """Return the repetitions of this row; `images` is divided among them, rounded up."""
        share = -(-self.images // seeds)
        under = self.calibrated or self.sampler
        asked = self.floor and self.recipe is None and seeds > 1
        next_one = [(r + 1) % seeds if asked else None for r in range(seeds)]
        return [
            Cell(self.sampler, self.recipe, under, self.graph, self.sites, r, share, beside)
            for r, beside in enumerate(next_one)
        ]

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
            "source": trace.source + (", legacy pairs" if trace.legacy_pairing else "")
            if trace
            else None,
            "sampler": str(self.sampler),
            "calibrated": str(self.calibrated or self.sampler) if self.recipe else None,
            "graph": self.graph,
            "sites": list(self.sites),
            "recipe": self.recipe.name if self.recipe else None,
        }


def _bits(recipe: Recipe) -> str:
    return f"W{recipe.weights.bits}A{recipe.activations.bits}"


def _law(recipe: Recipe) -> str:
    arguments = recipe.trace.time_sampler_args
    text = ", ".join(f"{key} {value:g}" for key, value in arguments.items())
    return recipe.trace.time_sampler + (f" ({text})" if text else "")


def _metric(recipe: Recipe) -> str:
    name = recipe.activations.metric
    return f"{name} {recipe.activations.p:g}" if name == "lp" else name


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
