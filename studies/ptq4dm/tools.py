"""What all cells of one process share: pipeline, networks, float images, references."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.errors import QuantempoError
from quantempo.evaluation import load_images
from quantempo.evaluation.features import Extractor, Features, extract, load_extractor
from quantempo.models.layers import denoiser_of
from quantempo.models.load import check_finite, load_pipeline, model_digest
from quantempo.models.sampling import run_pipeline, swap_scheduler
from quantempo.quantized import find_clock
from quantempo.run_folder import atomic_path
from studies.ptq4dm.calibrations import Calibrator
from studies.ptq4dm.cells import Cell, Sampler
from studies.ptq4dm.networks import Frontend, Networks
from studies.ptq4dm.sampler_tensors import attach_to_scheduler

__all__ = ["Settings", "Tools"]

# First seeds of what must not share noise; repetitions are a stride apart.
STRIDE = 1_000_000
IMAGES, CALIBRATION, PROBE, STAND_IN = 0, 100_000_000, 200_000_000, 300_000_000


@dataclass(frozen=True)
class Settings:
    """How a study runs; everything but `out`, `device`, `compiled` and `batch_size` decides it.

    source: the float pipeline; data: folder of real images, None for the model's own samples of
    other seeds; reference: images of it that are used; extractor and weights: of the scores;
    call: further arguments of the pipeline; tf32: let float32 products of the float network and
    of layers left in float run in TF32; probe: chains and steps of each on which the error of
    single steps is measured.
    """

    source: str
    out: Path
    data: str | None = None
    reference: int = 10_000
    extractor: str = "lite0"
    weights: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    compiled: bool = False
    tf32: bool = False
    batch_size: int = 64
    probe: tuple[int, int] = (16, 16)


class Tools:
    """Open the model once and hand out what cells need; results are cached in memory or on disk.

    Raises QuantempoError: see `load_pipeline`; a quantized model, broken weights, no images.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.source = load_pipeline(settings.source).to(settings.device)
        self.component, denoiser = denoiser_of(self.source)
        if find_clock(denoiser) is not None:
            raise QuantempoError(f"'{settings.source}' is quantized; study the float model")
        check_finite(denoiser)
        self.denoiser = denoiser.eval()
        self.networks = Networks(self.denoiser, settings.compiled)
        digest = model_digest(self.denoiser)
        self.calibrator = Calibrator(settings.out / "scratch", digest, settings.batch_size)
        self._images: dict[tuple[Sampler, int], np.ndarray] = {}
        self._features: dict[tuple[Sampler, int, int], Features] = {}
        self._outputs: dict[Sampler, list[torch.Tensor]] = {}
        self._calibrated: tuple[str, TraceSet, dict[str, torch.Tensor]] | None = None
        self._traced: tuple[str, TraceSet] | None = None
        self._kept, self._sourced = ExitStack(), ExitStack()
        self.digest = digest

    @cached_property
    def identity(self) -> str:
        """Hash of what all cells depend on: model, data, extractor, precision."""
        s = self.settings
        parts = [self.digest, s.reference, s.extractor, s.call, s.tf32, s.probe]
        parts.append(hashlib.sha256(self.data.tobytes()).hexdigest() if s.data else None)
        parts += [self.extractor.sha256] if s.weights else []
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def call(self, sampler: Sampler) -> dict[str, Any]:
        """Return the further arguments of the pipeline's call under a sampler."""
        return {**self.settings.call, **({"eta": sampler.eta} if sampler.eta else {})}

    def pipe(self, sampler: Sampler, network: Frontend | None = None) -> Any:
        """Return a pipeline with a scheduler of its own, and another network if one is given."""
        pipe = swap_scheduler(self.source, sampler.name)
        if network is not None:
            setattr(pipe, self.component, network)
        return pipe

    def sample(self, pipe: Any, sampler: Sampler, first: int, count: int) -> np.ndarray:
        """Return (count, H, W, C) uint8 images of seeds first, first + 1, ...

        A compiled network sees batches of one size: the last one is filled up and cut.
        """
        size = self.settings.batch_size
        whole = -(-count // size) * size if self.settings.compiled else count
        seeds = range(first, first + whole)
        how: dict[str, Any] = {"steps": sampler.steps, "batch_size": size}
        images = run_pipeline(pipe, seeds, **how, **self.call(sampler))[:count]
        # As they would be read back from disk: sums over them depend on the layout.
        return np.ascontiguousarray(images)

    def float_images(self, sampler: Sampler, repetition: int, count: int) -> np.ndarray:
        """Return the float model's images of a repetition, from disk if they were made before."""
        key = (sampler, repetition)
        known = self._images.get(key)
        if known is None or len(known) < count:
            text = f"{self.identity} {sampler!r} {repetition}"
            name = hashlib.sha256(text.encode()).hexdigest()[:20]
            path = self.settings.out / "float" / f"{name}.npy"
            known = np.load(path) if path.is_file() else None
            if known is None or len(known) < count:
                network = self.networks.exact()
                pipe = self.pipe(sampler, network)
                known = self.sample(pipe, sampler, IMAGES + repetition * STRIDE, count)
                with atomic_path(path) as temporary, temporary.open("wb") as stream:
                    np.save(stream, known)
            self._images[key] = known
        return known[:count]

    def float_features(self, sampler: Sampler, repetition: int, count: int) -> Features:
        """Return the features of `float_images`."""
        key = (sampler, repetition, count)
        if key not in self._features:
            self._features[key] = self.features(self.float_images(*key))
        return self._features[key]

    def calibrate(self, cell: Cell) -> tuple[TraceSet, dict[str, torch.Tensor]]:
        """Return a cell's calibration set and statistics; the last ones are kept for the next."""
        assert cell.recipe is not None
        if self._calibrated is None or self._calibrated[0] != cell.inputs:
            self._calibrated = None
            self._sourced.close()
            network = self.networks.exact()
            # A network compiled for one batch size is not compiled again for another.
            network.compiled &= cell.recipe.trace.chains % self.settings.batch_size == 0
            pipe = self.pipe(cell.calibrated, network)
            if self._traced is None or self._traced[0] != cell.trajectories:
                self.close()
                how = (CALIBRATION + cell.repetition * STRIDE, self.call(cell.calibrated))
                traced = self._kept.enter_context(self.calibrator.traced(pipe, cell, *how))
                self._traced = (cell.trajectories, traced)
            sourced = self.calibrator.sourced(self._traced[1], pipe, cell, self.data)
            data = self._sourced.enter_context(sourced)
            found = self.calibrator.statistics(self.denoiser, cell, data)
            self._calibrated = (cell.inputs, data, found)
        return self._calibrated[1:]

    def close(self) -> None:
        """Remove the trajectories and the calibration set that are kept."""
        self._sourced.close()
        self._kept.close()
        self._calibrated = self._traced = None

    def quantized(self, cell: Cell) -> Any:
        """Return the pipeline of a cell: its network and its sampler tensors quantized."""
        assert cell.recipe is not None
        data, stats = self.calibrate(cell)
        if cell.graph == "float":
            network = self.networks.exact()
        else:
            scales = self.calibrator.scales(self.denoiser, cell, stats)
            if cell.graph == "output":
                network = self.networks.output_side(cell.recipe, scales)
            else:
                network = self.networks.input_side(cell.recipe, scales, data)
        network.grids = self.calibrator.grids(self.pipe(cell.calibrated), cell, stats)
        pipe = self.pipe(cell.sampler, network)
        attach_to_scheduler(pipe.scheduler, network.grids, self.denoiser)
        return pipe

    def probe(self, sampler: Sampler) -> TraceSet:
        """Return inputs along float trajectories of seeds that nothing else uses."""
        chains, steps = self.settings.probe
        slug = hashlib.sha256(f"{self.identity} {sampler!r}".encode()).hexdigest()[:20]
        folder = self.settings.out / "probe" / slug
        # No batch size of the study's: the probe must be the same wherever it is continued.
        how: dict[str, Any] = {"steps": sampler.steps, "chains": chains, "batch_size": chains}
        how |= {"picks": min(steps, sampler.steps), "seed": PROBE, "call": self.call(sampler)}
        how |= {"time_sampler": make_time_sampler("linspace"), "model_hash": self.digest}
        return trace(self.pipe(sampler), self.denoiser, folder, **how)

    def calls(self, data: TraceSet) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """Yield (args, kwargs, place in time) of recorded calls, batch by batch."""
        like = next(self.denoiser.parameters())
        for batch in data.batches(self.settings.batch_size):
            yield (), data.arguments(batch, like), data.times.place(batch.t)

    @torch.no_grad()
    def probe_outputs(self, sampler: Sampler, data: TraceSet) -> list[torch.Tensor]:
        """Return what the float network answers to `probe`, one tensor a batch; kept."""
        if sampler not in self._outputs:
            batches = data.batches(self.settings.batch_size)
            self._outputs[sampler] = [data.replay(self.denoiser, b).cpu() for b in batches]
        return self._outputs[sampler]

    @cached_property
    def data(self) -> np.ndarray:
        """(n, H, W, C) uint8 real images, or the model's own of other seeds (DDIM)."""
        if self.settings.data is None:
            sampler = Sampler("ddim", 10)
            count = min(self.settings.reference, 64)
            pipe = self.pipe(sampler, self.networks.exact())
            return self.sample(pipe, sampler, STAND_IN, count)
        size = getattr(self.denoiser.config, "sample_size", None)
        sides = (size, size) if isinstance(size, int) else size
        if hasattr(self.source, "vae"):
            sides = None
        return load_images(self.settings.data, sides, self.settings.reference).images

    @cached_property
    def extractor(self) -> Extractor:
        """The network of the scores."""
        s = self.settings
        return load_extractor(s.extractor, s.weights, device=s.device)

    @cached_property
    def data_features(self) -> Features:
        """Features of `data`."""
        return self.features(self.data)

    def features(self, images: np.ndarray) -> Features:
        """Return the features of images on the study's device."""
        batch = 32 if self.settings.device == "cpu" else 256
        return extract(self.extractor, images, batch, self.settings.device)
