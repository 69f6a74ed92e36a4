"""Round a whole denoiser, block after block in the order in which it runs them.

Each block is rounded on the inputs it will really get: those behind the blocks that are quantized
already. Its target is what the float block makes of the float network's inputs. Afterwards the
mean output of every layer can be made that of the float layer:

    bias[o] += mean over rows and positions of (y_float - y_quantized)[o]

Source: Nagel et al. 2019, "Data-free quantization", section 4.2 in its empirical form.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import CalibrationData
from quantempo.calibration.rows import Law, UnmeasuredError, laws
from quantempo.core import Paged, held, ranks
from quantempo.core.progress import Progress
from quantempo.engines.base import BACKENDS
from quantempo.engines.simulated import once
from quantempo.errors import QuantempoError, log
from quantempo.models.layers import Block, blocks, hooked
from quantempo.quantized import QConv2d, QLayer, find_clock, quantized_layers
from quantempo.quantized.layers import QPatches
from quantempo.recipe import RoundingSettings
from quantempo.rounding.adaround import START_KEPT
from quantempo.rounding.base import ROUNDINGS, BlockRun, Inputs, Unit, check_start, record
from quantempo.rounding.chain import links
from quantempo.run_folder import Kept, hash_of

__all__ = ["BUDGET", "apply_rounding", "correct_bias", "round_denoiser"]

# Bytes that stay on the device: of the float inputs of all blocks, recorded at once if they fit,
# and of the inputs of one block.
BUDGET = 4 * 2**30
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d | QConv2d | QPatches


def round_denoiser(
    denoiser: nn.Module, copied: nn.Module, data: CalibrationData, settings: RoundingSettings, *,
    kept: Kept | None = None, budget: int = BUDGET,
) -> dict[str, Tensor]:  # fmt: skip
    """Choose the integers of every quantized layer; return the tensors of `rounding.safetensors`.

    For each layer NAME (codes, int8, the shape of the weight); NAME.bias (O,) float32 if
    `settings.bias`; NAME.weight_scale, NAME.weight_group of weights in groups, which roundings may
    choose again.

    Args:
        copied: quantized copy of `denoiser`, on the same device; it ends with what is returned, and
            with simulated kernels.
        data: the calibration set; `settings.samples` rows of it are drawn by `settings.seed`.
        kept: finished blocks, by all else that decides the result (model, trace, scales).
        budget: bytes of a block's inputs kept on the device, see `Inputs`.
    Raises QuantempoError: unknown rounding; `copied` is not quantized.
    """
    job, kept = _Job(denoiser, copied, data, settings, budget), kept or Kept()
    run, digest, result = kept.folder, hash_of([kept.key, asdict(settings)]), dict[str, Tensor]()
    for number, block in enumerate(Progress(job.blocks, desc="round")):
        digest = hash_of([digest, block.name, block.layers])
        name, kept = f"{number:04d}.safetensors", Kept(run, digest)
        known, found = ranks.told(kept.read(name))
        with job.at_hand(block):
            if known:
                log.debug("%s: rounded before", block.name)
            else:
                found = job.round(block)
                if not ranks.rank():
                    kept.write(name, True, found)
                found = ranks.told(found)
            if known or ranks.rank():
                apply_rounding(copied, found)
                for layer in map(copied.get_submodule, block.layers):
                    layer.kernel.prepare(job.device)  # type: ignore[operator, union-attr]
        if run and job.folder:
            found = run.read_safetensors(name, paged=True)
        result |= {k: v.cpu() for k, v in found.items()}
    if job.rounding.needs == "block":
        log.debug("%d of %d blocks keep their start", job.kept, len(job.blocks))
    # Layers that no call runs stay as packed.
    layers: dict[str, Any] = {name: copied.get_submodule(name) for name in job.idle}
    return result | {name: layer.weight_codes.cpu() for name, layer in layers.items()}


@torch.no_grad()
def apply_rounding(packed: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `round_denoiser` returned into the layers of a quantized copy, in place.

    An engine has to be attached again. Not for a denoiser to be saved: its hash is that of packing.
    """
    for name, layer in quantized_layers(packed):
        for part in ("weight_scale", "weight_group", "bias"):
            if (value := tensors.get(f"{name}.{part}")) is not None:
                getattr(layer, part).copy_(value)
        if name in tensors:
            layer.set_codes(tensors[name])


@dataclass
class _Job:
    """What is the same for every block."""

    denoiser: nn.Module
    copied: nn.Module
    data: CalibrationData
    settings: RoundingSettings
    budget: int

    def __post_init__(self) -> None:
        clock = find_clock(self.copied)
        if clock is None:
            raise QuantempoError("got a copy that is not quantized; see Quantized.install")
        self.clock = clock
        self.device = next(self.denoiser.parameters()).device
        self.copied.to(self.device)
        layers = [layer for _, layer in quantized_layers(self.copied)]
        codes = (layer.weight_int for layer in layers)
        files = [value.place.file for value in codes if isinstance(value, Paged)]
        # Where what does not fit the memory lies, if anything does.
        self.folder = files[0].with_name("inputs") if files else None
        for layer in layers:
            self._lower(layer)
        self.rounding = ROUNDINGS.get(self.settings.name)
        if self.rounding.needs == "block":
            check_start(self.settings)
        self.calls = _draw(self.data, self.settings)
        self.batches = [self.data.rows(rows) for rows in self.calls]
        self.blocks = self._in_order()
        # Two rows of each kind of arguments.
        kinds = self.data.calls(torch.cat(self.calls), self.settings.samples)
        kinds = [rows[:2] for rows in kinds]
        self.laws = self._measured(kinds)
        modules = {block.name: block.module for block in self.blocks}
        again = [partial(self.data.replay, self.denoiser, self.data.rows(rows)) for rows in kinds]
        self.links = links(modules, again)
        self.after = {link.last: name for name, link in self.links.items()}
        self.kept = 0
        # Inputs of the float blocks, from one run for all of them if they fit the budget, and of
        # the quantized ones; of those that follow from the block before, of the next at most.
        self.exact: dict[str, Inputs] | None = None
        self.quantized: dict[str, Inputs] = {}

    def _lower(self, layer: QLayer) -> None:
        kernel: Any = partial(once, layer, True) if isinstance(layer.weight_int, Paged) else None
        layer.kernel = kernel or BACKENDS.get("simulated").lower(layer)

    @contextmanager
    def at_hand(self, block: Block) -> Iterator[None]:
        """Hold a block of both networks in memory, if they are paged."""
        layers: list[Any] = [self.copied.get_submodule(name) for name in block.layers]
        paged = [layer for layer in layers if isinstance(layer.weight_int, Paged)]
        with ExitStack() as stack:
            stack.enter_context(held(block.module))
            for layer in paged:
                stack.enter_context(held(layer, write=True))
                self._lower(layer)
            yield
        for layer in paged:
            self._lower(layer)

    @torch.no_grad()
    def _in_order(self, whole: frozenset[str] = frozenset()) -> list[Block]:
        """Return the blocks with integer layers, and those layers, as a run meets them.

        whole: modules around layers that run outside their block; without one, these are blocks.
        """
        names = {name for name, _ in quantized_layers(self.copied)}
        layers = {block.name: names & {*block.layers} for block in blocks(self.denoiser, whole)}
        owner = {n: block for block, mine in layers.items() if mine for n in (block, *mine)}
        modules = {name: self.denoiser.get_submodule(name) for name in owner}
        order: dict[str, None] = {}
        running, outside = set[str](), set[str]()

        def enter(name: str, *_: Any) -> None:
            order.setdefault(name)
            running.add(name)
            if owner[name] not in running:
                outside.add(name)

        with hooked(modules, enter, before=True), hooked(modules, lambda n, *_: running.discard(n)):
            self.data.replay(self.denoiser, self.batches[0])
        if around := {owner[name].rpartition(".")[0] for name in outside} - {""}:
            return self._in_order(whole | around)
        self.idle = sorted(names - set(order))
        if self.idle:
            log.warning("never run by the trace, rounded as packed: %s", ", ".join(self.idle))
        result = []
        for name in order:
            inside = {name} if name in outside else layers.get(name, set()) - outside
            if run := tuple(n for n in order if n in inside):
                result.append(Block(name, modules[name], run))
        return result

    def _measured(self, calls: list[Tensor]) -> dict[str, list[Law]]:
        """Return where the rows are in each kind of call of every block, see `rows.laws`."""
        found: dict[str, list[Law]] = {block.name: [] for block in self.blocks}
        modules = {block.name: block.module for block in self.blocks}
        for rows in calls:
            more = laws(modules, lambda i: self.data.replay(self.denoiser, self.data.rows(i)), rows)
            for name, law in more.items():
                found[name] += [law] * (law not in found[name])
        return found

    @torch.no_grad()
    def round(self, block: Block) -> dict[str, Tensor]:
        """Round one block; its layers in the copy hold the result."""
        floats = {name: self.denoiser.get_submodule(name) for name in block.layers}
        copies: dict[str, Any] = {name: self.copied.get_submodule(name) for name in block.layers}
        shapes = {name: layer.weight_shape for name, layer in copies.items()}
        weights = {n: layer.weight.reshape(shapes[n]) for n, layer in floats.items()}  # type: ignore[operator]
        scales = {name: layer.weight_scale for name, layer in copies.items()}
        specs = {name: layer.weight_format for name, layer in copies.items()}
        groups = {n: o.weight_group for n, o in copies.items() if o.weight_group is not None}
        settings, run = self.settings, self._record(block, floats)
        unit = Unit(weights, scales, specs, settings, run, groups=groups)
        watched = log.isEnabledFor(logging.DEBUG)
        powers = run.powers() if watched else []
        before = run.loss(powers) if watched else 0.0
        codes = self.rounding.codes(unit)
        for name, value in codes.items():
            run.assign(name, value)
        result = dict(codes)
        for name, group in groups.items():
            result |= {f"{name}.weight_scale": scales[name].clone()}
            result |= {f"{name}.weight_group": group.clone()}
        if settings.bias:
            result |= {f"{name}.bias": bias for name, bias in correct_bias(run).items()}
        self.kept += any(START_KEPT in note for note in unit.notes)
        notes = "".join(f"; {note}" for note in unit.notes)
        if watched:
            log.debug("%s: error %.3e -> %.3e%s", block.name, before, run.loss(powers), notes)
        self._follow(run)
        return result

    def _record(self, block: Block, floats: Mapping[str, nn.Module]) -> BlockRun:
        """Record the inputs of a block in both networks."""
        try:
            return self._recorded(block, floats)
        except UnmeasuredError:
            # What two rows may not have, a mask of captions of other lengths, say.
            self.laws = self._measured(self.calls)
            return self._recorded(block, floats)

    def _recorded(self, block: Block, floats: Mapping[str, nn.Module]) -> BlockRun:
        copied = self.copied.get_submodule(block.name)

        def inputs(network: nn.Module, modules: dict[str, nn.Module]) -> dict[str, Inputs]:
            calls = [(len(b.x_t), partial(self.data.replay, network, b)) for b in self.batches]
            place = partial(self._place, network is self.denoiser)
            return record(modules, calls, self.budget, self.laws, place) or {}

        if self.exact is None:
            alone = {b.name: b.module for b in self.blocks if b.name not in self.links}
            self.exact = inputs(self.denoiser, alone)
        if block.name not in self.exact:
            self.exact |= inputs(self.denoiser, {block.name: block.module})
        if block.name not in self.quantized:
            self.quantized = inputs(self.copied, {block.name: copied})
        exact, quantized = self.exact.pop(block.name), self.quantized.pop(block.name)
        if exact.halved:
            log.debug("%s: its inputs lie on the host in half precision", block.name)
        layers: dict[str, Any] = {n: self.copied.get_submodule(n) for n in block.layers}
        times = torch.cat([b.t for b in self.batches])
        names = (block.name, block.module, copied, floats, layers)
        return BlockRun(*names, exact, quantized, times, self.clock, self.settings.batch)

    def _place(self, exact: bool, name: str) -> Path | None:
        """Return where calls of a block are kept for the next one."""
        return self.folder / name / str(exact) if self.folder and name in self.after else None

    def _follow(self, run: BlockRun) -> None:
        """Keep the inputs of the next block if they follow from this one, rounded now."""
        if (after := self.after.get(run.name)) is not None:
            sizes, laws = [len(batch.t) for batch in self.batches], self.laws[after]
            for known, exact in ((self.exact, True), (self.quantized, False)):
                found = Inputs(sum(sizes), self.budget, *laws, folder=self._place(exact, after))
                # What was not measured is recorded from the start.
                with suppress(UnmeasuredError):
                    if run.follow(self.links[after], sizes, found, exact=exact):
                        known[after] = found  # type: ignore[index]
                # Done with: not in memory beside those of the next block.
                setattr(run, "exact" if exact else "quantized", None)
            if self.folder:
                shutil.rmtree(self.folder / run.name, ignore_errors=True)
        if self.folder and run.device.type == "cuda":
            # What one block left in the allocator's pools rarely fits the next one.
            torch.cuda.empty_cache()


def _draw(data: CalibrationData, settings: RoundingSettings) -> list[Tensor]:
    """Return the numbers of the rows to look at, in calls of one row, then `batch` rows each."""
    generator = torch.Generator().manual_seed(settings.seed)
    count = min(settings.samples, len(data))
    index = torch.randperm(len(data), generator=generator)[:count].sort().values
    rest = data.calls(index[1:], settings.batch) if len(index) > 1 else []
    return [index[:1], *rest]


@torch.no_grad()
def correct_bias(block: BlockRun) -> dict[str, Tensor]:
    """Change the biases of a block's layers in place and return them, (O,) float32 each.

    A layer without a bias is left alone and logged. Error: float64 means of float32 outputs.
    """
    wanted = _float_means(block)
    biases: dict[str, Any] = {n: v.bias for n, v in block.copies.items() if v.bias is not None}
    if without := block.copies.keys() - biases:
        log.debug("bias: without one their mean outputs stay: %s", ", ".join(sorted(without)))
    for step in block.steps:
        layers = {n: block.copies[n] for n in ranks.mine(n for n in step if n in biases)}
        sums: dict[str, list[Any]] = {name: [] for name in layers}
        for inputs in block.layer_inputs([*layers]):
            for name, x in inputs.items():
                sums[name].append(_sums(layers[name], layers[name](x)))
        found = {name: (wanted[name] - _mean(some)).float() for name, some in sums.items()}
        for name, more in ranks.merged(found).items():
            biases[name] += more.to(biases[name].device)
    return {name: bias.clone() for name, bias in biases.items()}


def _float_means(block: BlockRun) -> dict[str, Tensor]:
    """Return (O,) float64 mean output of each float layer, in one pass over the rows."""
    parts: dict[str, list[tuple[Tensor, int]]] = {}

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        parts.setdefault(name, []).append(_sums(module, output))

    with hooked(block.floats, see):
        for index in block.batches():
            block.run(index, exact=True)
    return {name: _mean(found) for name, found in parts.items()}


def _mean(parts: list[tuple[Tensor, int]]) -> Tensor:
    return sum((total for total, _ in parts), torch.zeros(())) / sum(n for _, n in parts)


def _sums(layer: nn.Module, output: Tensor) -> tuple[Tensor, int]:
    """Return (O,) float64 sums over rows and positions, and how many terms each has."""
    axis = 1 if isinstance(layer, _CONVOLUTIONS) else output.ndim - 1
    others = [i for i in range(output.ndim) if i != axis]
    return output.double().sum(others), output.numel() // output.shape[axis]
