"""Quantize the tiny pipelines once for all tests of a process; nothing here asserts."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantempo.pipeline import stages as pipeline
from quantempo.recipe import Recipe
from tests.tiny import tiny_dit, tiny_text, tiny_unconditional

MAKERS: dict[str, Callable[[], Any]] = {
    "unconditional": tiny_unconditional,
    "text": tiny_text,
    "dit": tiny_dit,
}
KINDS = tuple(MAKERS)
CALLS: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "text": {"prompt": ["a b", "c d"]},
    "dit": {"class_labels": [1, 2]},
}


@dataclass(frozen=True)
class Packed:
    """A float pipeline folder, the run folder made from it, and what its call needs."""

    source: Path
    run: Path
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.run / "packed"


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="quantempo-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def plain() -> Recipe:
    """Return w8a8 with integers and scales only, whatever the shipped recipe adds to them.

    Rounded to nearest, float biases as they are: what a packed layer holds and
    computes can be said from its float layer alone.
    """
    chosen = Recipe.load("w8a8").override("rounding", name="nearest", bias=False)
    return chosen.override("layers", float_macs=0.0)


def recipe(symmetric: bool = True, buckets: int = 2, **layers: Any) -> Recipe:
    """Return a plain recipe of seconds; symmetric scales are searched 40 times faster than affine.

    What costs time where a test switches it on (rounding) is small as well.
    """
    tiny = plain().override("trace", steps=4, chains=2, picks=2)
    tiny = tiny.override("rounding", samples=8, iterations=10, batch=4)
    tiny = tiny.override("activations", buckets=buckets, symmetric=symmetric, min_gain=0.0)
    return tiny.override("layers", **layers)


@functools.cache
def saved(kind: str) -> Path:
    """Return a folder that holds the float pipeline; do not write into it."""
    folder = _root() / kind
    MAKERS[kind]().save_pretrained(folder)
    return folder


@functools.cache
def packed(kind: str) -> Packed:
    """Return the run folder of a tiny pipeline; do not write into it."""
    source, run = saved(kind), _root() / f"run-{kind}"
    # The transformer has few layers: the affine search is quick enough there.
    pipeline.quantize(source, run, recipe(symmetric=kind != "dit"), call=CALLS[kind])
    return Packed(source, run, CALLS[kind])
