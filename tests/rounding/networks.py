"""Tiny float networks, their traces and packed twins, made once for all tests of a process."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from quantempo.calibration.dataset import TraceSet
from quantempo.checkpoint.pack import pack_denoiser
from quantempo.core import WEIGHT, Format
from quantempo.pipeline import stages as pipeline
from quantempo.pipeline.session import Session
from quantempo.quantized import bits_of
from quantempo.quantized.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.rounding import nearest
from quantempo.scales.search import LayerScales
from tests.packed import recipe as tiny_recipe
from tests.packed import saved

__all__ = ["Case", "case"]


@dataclass(frozen=True)
class Case:
    """A float denoiser, its trace, and what the search chose."""

    session: Session
    data: TraceSet
    scales: dict[str, LayerScales]
    specs: dict[str, Format]

    @property
    def denoiser(self) -> nn.Module:
        return self.session.denoiser

    def twin(self) -> nn.Module:
        """Return a new packed copy with the nearest codes."""
        twin, recipe = copy.deepcopy(self.denoiser), self.session.recipe
        plans = [
            replace(p, buckets=self.scales[p.name].act_scale.shape[1]) if p.kind == "int8" else p
            for p in plan_layers(self.session.sites, recipe)
        ]
        codes = {
            name: nearest(
                self.denoiser.get_submodule(name).weight.detach(), s.weight_scale, self.specs[name]
            )
            for name, s in self.scales.items()
        }
        tensors = self.session.run.read_safetensors("scales.safetensors")
        pack_denoiser(
            twin, plans, self.scales, codes, bucket_of=tensors["bucket_of"], per_unit=1.0,
            recipe=recipe, source_sha256="",
        )  # fmt: skip
        return twin


@functools.cache
def case(kind: str, bits: int = 3, buckets: int = 1) -> Case:
    """Return a tiny network with weights of few bits; do not change its parts."""
    root = Path(tempfile.mkdtemp(prefix="quantempo-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    recipe: Recipe = tiny_recipe(buckets=buckets).override("weights", bits=bits)
    recipe = recipe.override("trace", steps=4, chains=2, picks=4)
    call = {"dit": {"class_labels": [1, 2]}, "text": {"prompt": list("ab")}}.get(kind, {})
    session = pipeline.load(saved(kind), root / "run", recipe, call=call)
    for stage in (pipeline.trace, pipeline.calibrate, pipeline.search):
        stage(session)
    scales = LayerScales.read(session.run.read_safetensors("scales.safetensors"))
    plans = bits_of(plan_layers(session.sites, recipe))
    specs = {name: replace(WEIGHT, bits=w) for name, (w, _) in plans.items()}
    scales = {name: scales[name] for name in specs}
    return Case(session, TraceSet(session.run / "trace"), scales, specs)
