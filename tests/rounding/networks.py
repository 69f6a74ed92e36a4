"""Tiny float networks, their traces and packed copies, made once for all tests of a process."""

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from quantempo.calibration.dataset import TraceSet
from quantempo.core import Format, weight_format
from quantempo.pipeline import stages as pipeline
from quantempo.pipeline.quantize import Quantized, plan
from quantempo.pipeline.session import Session
from quantempo.quantized import bits_of
from quantempo.recipe import Recipe
from quantempo.rounding import nearest
from quantempo.scales import LayerScales
from tests.packed import recipe as tiny_recipe
from tests.packed import saved


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

    def copied(self, denoiser: nn.Module | None = None) -> nn.Module:
        """Return a new quantized copy with the nearest codes, of another float copy if given."""
        tensors = self.session.run.read_safetensors("scales.safetensors")
        codes = {}
        for name, s in self.scales.items():
            weight = self.denoiser.get_submodule(name).weight.detach()
            grid = self.specs[name].grid(weight.shape, s.weight_group)
            codes[name] = nearest(weight, s.weight_scale, grid)
        plans = plan(self.denoiser, self.session.recipe)
        found = Quantized.of(self.session.recipe, plans, tensors, codes)
        return found.install(denoiser or self.denoiser, copy=True)


@functools.cache
def case(kind: str, bits: int = 3, buckets: int = 1, group: int = 0) -> Case:
    """Return a tiny network with weights of few bits; do not change its parts."""
    root = Path(tempfile.mkdtemp(prefix="quantempo-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    recipe: Recipe = tiny_recipe(buckets=buckets).override("weights", bits=bits, group=group)
    recipe = recipe.override("trace", steps=4, chains=2, picks=4)
    call = {"dit": {"class_labels": [1, 2]}, "text": {"prompt": list("ab")}}.get(kind, {})
    session = pipeline.load(saved(kind), root / "run", recipe, call=call)
    for stage in (pipeline.trace, pipeline.calibrate, pipeline.search):
        stage(session)
    scales = LayerScales.read(session.run.read_safetensors("scales.safetensors"))
    found = bits_of(plan(session.denoiser, recipe))
    specs = {n: weight_format(w, group) for n, (w, _) in found.items()}
    scales = {name: scales[name] for name in specs}
    return Case(session, TraceSet(session.run / "trace"), scales, specs)
