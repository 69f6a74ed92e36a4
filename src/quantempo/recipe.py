"""A recipe: what to do, as frozen settings that round-trip through a small TOML file.

Names in it (time_sampler, metric, rounding) are resolved in registries by the stage that uses them.
"""

import hashlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any, Self

from quantempo.errors import QuantempoError
from quantempo.registry import check_known

__all__ = [
    "ActivationSettings", "AttentionSettings", "LayerSettings", "Recipe", "RoundingSettings",
    "TraceSettings", "WeightSettings", "check_numbers", "number", "parse_bits",
]  # fmt: skip

Number = int | float
GRANULARITIES = ("time", "token", "auto")
GROUPS = (0, 16, 32, 64)


def number(default: Number, low: Number, high: Number) -> Any:
    """Return a field of settings that may be from `low` to `high`."""
    return field(default=default, metadata={"limits": (low, high)})


def check_numbers(settings: Any, start: str) -> None:
    """Raise QuantempoError, beginning with `start`, for a field that is out of its limits."""
    for item in fields(settings):
        value, (low, high) = getattr(settings, item.name), item.metadata.get("limits", (None, None))
        odd = isinstance(value, bool) or not isinstance(value, Real)
        if low is not None and (odd or not low <= value <= high):
            raise QuantempoError(f"{start}{item.name} = {value!r}; expected {low} to {high}")


@dataclass(frozen=True)
class TraceSettings:
    """Which network inputs to record.

    steps: steps of the sampler that is traced; chains: images denoised; picks: inputs kept of
    each; seed: of the first chain; time_sampler: a registered timestep distribution with its own
    parameters; source: a registered source of x_t, "trajectory" for what the network received.
    """

    steps: int = number(50, 1, 100_000)
    chains: int = number(32, 1, 1_000_000)
    picks: int = number(8, 1, 100_000)
    seed: int = number(1_000_000, -(2**62), 2**62)
    time_sampler: str = "ndtc"
    time_sampler_args: dict[str, Number] = field(default_factory=dict)
    source: str = "trajectory"


@dataclass(frozen=True)
class ActivationSettings:
    """How inputs of layers are quantized.

    granularity: of the scales of linear layers: "time", found beforehand for intervals of time;
    "token", measured for each token; "auto", the one with less error. buckets: number of time
    intervals with scales of their own; a layer that gains less than min_gain (fraction of its
    error) keeps one.
    """

    bits: int = number(8, 2, 8)
    symmetric: bool = False
    metric: str = "mse"
    p: float = 2.4
    granularity: str = "time"
    buckets: int = number(8, 1, 64)
    min_gain: float = number(0.05, 0, 1)


@dataclass(frozen=True)
class WeightSettings:
    """How weights are quantized: per output channel, symmetric, narrow.

    group: 16, 32, 64 input channels of up to 4 bits with a scale (`core.GroupFormat`), or 0.
    """

    bits: int = number(8, 2, 8)
    group: int = number(0, 0, 64)
    metric: str = "lp"
    p: float = 2.4


@dataclass(frozen=True)
class AttentionSettings:
    """Which attentions may run in 8 bits: those with |y8 - y| / |y| up to this; 0: none."""

    max_error: float = number(0.0, 0, 1)


@dataclass(frozen=True)
class LayerSettings:
    """Which layers stay in float, by role or by name pattern, and their bits.

    float_roles: roles kept in higher precision; exclude: shell patterns of layer names kept in
    float; float_macs: share of the MACs that may stay in float in shortcuts, where the measured
    error is (`pipeline.quantize.keep_costly`); split_skips: one scale for each part of a
    concatenated input (skip connections, attention beside MLP); bits: a role or a shell pattern of
    layer names -> "w8a8", bits of these layers where they differ from the recipe's.
    """

    float_roles: tuple[str, ...] = ("input", "output", "time")
    exclude: tuple[str, ...] = ()
    float_macs: float = number(0.0, 0, 1)
    split_skips: bool = True
    bits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundingSettings:
    """How integer weights are chosen.

    name: a registered rounding; start: the rounding that "adaround" starts from; samples: inputs
    of the trace it looks at; iterations: of each block; batch: inputs an iteration; drop: share of
    a block's input taken from the float model while learning (QDrop); correct: share of the error
    in a layer's inputs that "gptq" makes up for in its weights (asymmetric calibration); bias:
    afterwards make every layer's mean output that of the float layer; seed: of every draw.
    """

    name: str = "nearest"
    start: str = "gptq"
    samples: int = number(256, 1, 1_000_000)
    iterations: int = number(2000, 0, 1_000_000)
    batch: int = number(32, 1, 100_000)
    drop: float = number(0.5, 0, 1)
    correct: float = number(0.0, 0, 1)
    bias: bool = False
    seed: int = number(0, -(2**62), 2**62)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the integers, in the order of the main line."""

    name: str = "w8a8"
    trace: TraceSettings = field(default_factory=TraceSettings)
    layers: LayerSettings = field(default_factory=LayerSettings)
    activations: ActivationSettings = field(default_factory=ActivationSettings)
    weights: WeightSettings = field(default_factory=WeightSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    rounding: RoundingSettings = field(default_factory=RoundingSettings)

    def __post_init__(self) -> None:
        for section in fields(self):
            if is_dataclass(settings := getattr(self, section.name)):
                check_numbers(settings, f"got {section.name}.")
        check_known([self.activations.granularity], GRANULARITIES, "got activations.granularity")
        check_known([str(self.weights.group)], map(str, GROUPS), "got weights.group")
        for key, text in self.layers.bits.items():
            parse_bits(text, f"layers.bits.{key}")

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a recipe: the name of a shipped one ("w8a8") or a TOML file; else QuantempoError."""
        shipped = files("quantempo") / "recipes"
        names = sorted(item.name[:-5] for item in shipped.iterdir() if item.name.endswith(".toml"))
        path = Path(source)
        if str(source) in names:
            text = (shipped / f"{source}.toml").read_text()
        elif path.is_file():
            try:
                text = path.read_text()
            except (UnicodeDecodeError, OSError) as error:
                raise QuantempoError(f"cannot read recipe {path}: {error}") from error
        else:
            check_known([str(source)], names, "no TOML file and no recipe")
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise QuantempoError(f"recipe {source} is not valid TOML: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a recipe from nested dictionaries; see `load` for the errors."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dictionaries (JSON and TOML types only)."""
        return json.loads(json.dumps(asdict(self)))

    def to_toml(self) -> str:
        """Return the recipe as TOML text; `from_dict(tomllib.loads(text))` gives it back."""
        top, sections = [], []
        for key, value in self.to_dict().items():
            if isinstance(value, dict):
                lines = [f"{name} = {_toml(item)}" for name, item in value.items()]
                sections.append("\n".join([f"[{key}]", *lines]))
            else:
                top.append(f"{key} = {_toml(value)}")
        return "\n\n".join(["\n".join(top), *sections]) + "\n"

    def override(self, section: str, **values: Any) -> Self:
        """Return a copy with settings of one section replaced (None values are ignored)."""
        given = {key: value for key, value in values.items() if value is not None}
        merged = {**asdict(getattr(self, section)), **given}
        return replace(self, **{section: _build(type(getattr(self, section)), merged, section)})

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON of the recipe."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def parse_bits(text: str, where: str) -> tuple[int, int]:
    """Return (weight bits, activation bits) of a text like "w4a8", 2 to 8, else QuantempoError."""
    found = re.fullmatch(r"w([2-8])a([2-8])", text) if isinstance(text, str) else None
    if found is None:
        raise QuantempoError(f'got {where} = {text!r}; expected bits of 2 to 8 like "w4a8"')
    return int(found[1]), int(found[2])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        # Quoted: a pattern of layer names has dots and stars.
        items = (f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    # For booleans, numbers, strings and lists of them JSON is TOML.
    return json.dumps(value)


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    start, result = f"{where}." if where else "", {}
    known = {start + item.name: item for item in fields(kind)}
    check_known([start + key for key in values], known, "unknown recipe key")
    for key, value in values.items():
        item = known[start + key]
        default = item.default if not callable(item.default_factory) else item.default_factory()
        result[key] = _coerce(value, default, start + key)
    return kind(**result)


def _coerce(value: Any, default: Any, path: str) -> Any:
    if is_dataclass(default):
        if not isinstance(value, dict):
            raise QuantempoError(f"recipe key '{path}' got {value!r}; expected a [{path}] section")
        return _build(type(default), value, path)
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise QuantempoError(f"recipe key '{path}' got {value!r}; expected a list of names")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        text = f"recipe key '{path}' got {value!r}"
        raise QuantempoError(f"{text}; expected {type(default).__name__}, for example {default!r}")
    return value
