"""Ways in which people use a network they were given: each acts as it does in float, or is refused.

One row a use, on every engine for CPUs. What is compared says which: bits where nothing may change,
else decibels against the float network in the same use.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import quantempo
from quantempo.engines import attach, attached, detach
from quantempo.errors import QuantempoError
from quantempo.quantized import QConv2d, quantized_layers
from tests.engines.quantized import quantize_network
from tests.packed import packed
from tests.tiny import noise
from tests.uses import ENGINES_HERE, T, Use, call, in_threads, pair, small, sqnr_db

USES: dict[str, Callable[[str], None]] = {}


def use(body: Callable[[str], None]) -> Callable[[str], None]:
    return USES.setdefault(body.__name__, body)


def refused(match: str) -> Any:
    return pytest.raises(QuantempoError, match=match)


# State of a call


@use
def threads_with_a_scheduler_each(engine: str) -> None:
    net = Use(engine).net

    @torch.no_grad()
    def run(seed: int, steps: int) -> Tensor:
        scheduler, x = DDIMScheduler(), noise(1, 3, 8, 8, seed=seed)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
        return x

    jobs = [(seed, steps) for seed, steps in enumerate((20, 12, 16))]
    alone = [run(*job) for job in jobs]
    assert all(map(torch.equal, in_threads(run, jobs), alone))


@use
def threads_that_call_first(engine: str) -> None:
    use, jobs = Use(engine, lazy=True), [call("pixels", rows) for rows in (1, 2, 1)]
    got = in_threads(lambda *given: use.both(*given)[1], jobs)
    assert all(torch.equal(y, use.both(*given)[1]) for y, given in zip(got, jobs, strict=True))


# Modes of torch


@use
def inference_mode(engine: str) -> None:
    with torch.inference_mode():
        Use(engine, "text").near()


@use
def autocast(engine: str) -> None:
    for kind, dtype in (("pixels", torch.bfloat16), ("text", torch.float16)):
        use = Use(engine, kind)
        with torch.autocast("cpu", dtype):
            _, y = use.both()
        truth, _ = use.both()
        assert sqnr_db(truth, y) > 18, (kind, dtype)


@use
def other_precisions(engine: str) -> None:
    double = ("pixels", torch.float64)
    for kind, dtype in (("text", torch.bfloat16), ("text", torch.float16), double):
        use = Use(engine, kind, lazy=True)
        for p in (p for net in use.networks() for p in net.parameters()):
            p.data = p.data.to(dtype)
        use.near(*(v if v.ndim == 0 else v.to(dtype) for v in call(kind)), db=17)


@use
def layerwise_casting(engine: str) -> None:
    use = Use(engine, "text")
    for net in use.networks():
        apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32, ["norm"])
    if engine == "openvino":
        with refused("would leave out the hooks or the forward"):
            use.both()
    else:
        use.near()


@use
def no_images_and_a_text_of_no_tokens(engine: str) -> None:
    for t in (T, torch.zeros(0, dtype=torch.int64)):
        assert Use(engine).net(noise(0, 3, 8, 8), t).sample.shape == (0, 3, 8, 8)
    Use(engine, "text").near(*call("text")[:2], call("text")[2][:, :0])


@use
def numbers_that_are_none(engine: str) -> None:
    use = Use(engine, "text")
    for bad in (float("nan"), float("inf")):
        for place in (0, 2):
            given = [v.clone() for v in call("text")]
            given[place][1, 0, 0] = bad
            _, y = use.both(*given)
            assert y[0].isfinite().all() and not y[1].isfinite().any()
    use.net.down_blocks[0].resnets[0].conv1.bias[0] = float("nan")
    with refused("holds NaN or infinity"):
        use.both()


# What others hang on a network


class Counted(ModelHook):
    seen = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        return args, kwargs


@use
def hooks_of_accelerate(engine: str) -> None:
    for order in ("loaded", "before", "after"):
        use, hook = Use(engine, lazy=order == "loaded"), Counted()
        if order == "after":
            detach(use.net)
        add_hook_to_module(use.net, hook)
        if order == "after":
            attach(use.net, "simulated" if engine == "openvino" else engine)
        for _ in range(3):
            use.near()
        assert hook.seen == 3, order
        detach(use.net)
        with refused("before an engine was attached"):
            use.both()
        assert hook.seen == 4
        remove_hook_from_module(use.net)
        attach(use.net, engine)
        use.near()


@use
def a_wrapped_forward(engine: str) -> None:
    use, seen = Use(engine, lazy=True), []
    inner = use.net.forward
    use.net.forward = lambda *args, **kwargs: (seen.append(1), inner(*args, **kwargs))[1]
    use.near()
    attach(use.net, engine)
    use.near()
    assert len(seen) == 2


@use
def hooks_inside(engine: str) -> None:
    for hang in ("hook", "forward"):
        use = Use(engine)
        truth, plain = use.both()
        for net in use.networks():
            layer = net.mid_block.resnets[0].norm2
            if hang == "hook":
                layer.register_forward_hook(lambda m, args, y: y * 0)
            else:
                layer.forward = lambda x: x * 0
        if engine == "openvino":
            with refused("on 'mid_block.resnets.0.norm2'; use engine"):
                use.both()
            continue
        changed, y = use.both()
        assert min(sqnr_db(changed, y), sqnr_db(truth, plain)) > 18 > sqnr_db(truth, changed)


class Silent(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0 * super().__call__(*args, **kwargs)


class Stored(Silent):
    def __init__(self) -> None:
        self.maps: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.maps.append(1)
        return super().__call__(*args, **kwargs)


@use
def attention_processors(engine: str) -> None:
    for kind in ("pixels", "text"):
        use = Use(engine, kind)
        truth, _ = use.both()
        for module in (m for net in use.networks() for m in net.modules()):
            if hasattr(module, "set_processor"):
                module.set_processor(Silent())
        changed, y = use.both()
        assert sqnr_db(changed, y) > 18 > sqnr_db(truth, changed)
        stored = Stored()
        for module in use.net.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(stored)
        if engine == "openvino":
            with refused(r"what the processor of .* \(Stored\) keeps"):
                use.both()
        else:
            use.both()
            assert stored.maps


@use
def free_u(engine: str) -> None:
    for order in ("before", "after"):
        use = Use(engine, "text")
        if order == "after":
            use.near()
        for net in use.networks():
            net.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        if engine == "openvino":
            with refused("cannot convert UNet2DConditionModel as it is called"):
                use.both()
        else:
            use.near()
        for net in use.networks():
            net.disable_freeu()
        use.near()


@use
def offloading_by_layers(engine: str) -> None:
    for order in ("before", "after", "called"):
        use = Use(engine, lazy=order == "after")
        if order == "called":
            use.near()
        for net in use.networks():
            cpu_offload(net, execution_device=torch.device("cpu"), offload_buffers=True)
        assert use.net.quantempo_clock.bucket_of.is_meta
        if engine == "openvino":
            with refused("would leave out the hooks or the forward"):
                use.both()
        else:
            use.near()
            use.near()


# Copies, files, other weights


def test_a_part_without_float_layers_says_its_type() -> None:
    net = pair("text")[1]
    assert next(net.time_embedding.parameters()).dtype == torch.float32
    assert net.dtype == torch.float32
    half = copy.deepcopy(net).train(False)
    for name, p in half.named_parameters():
        p.data = p.data if "time_emb" in name else p.data.bfloat16()
    assert half.dtype == torch.bfloat16


def test_a_network_that_was_changed_loads_again_or_is_not_saved(tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(packed("text").folder)
    pipe.unet.conv_in.bias.data.add_(0.01)
    with torch.no_grad():
        y = pipe.unet(*call("text")).sample
        pipe.unet.save_pretrained(tmp_path / "edited")
        again = UNet2DConditionModel.from_pretrained(tmp_path / "edited")
        assert torch.equal(again(*call("text")).sample, y)
    pipe.unet.fuse_qkv_projections()
    for name in ("fused", "offloaded"):
        with refused("cannot save .*: layers were added, fused or offloaded"):
            pipe.unet.save_pretrained(tmp_path / name)
        assert not (tmp_path / name).exists()
        pipe = DiffusionPipeline.from_pretrained(packed("text").folder)
        cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)


@use
def copies(engine: str) -> None:
    for called in (False, True):
        use = Use(engine)
        if called:
            use.near()
        other = copy.deepcopy(use.net)
        for _, layer in quantized_layers(other):
            layer.weight_int.zero_()
        with torch.no_grad():
            changed = other(*call("pixels")).sample
        truth, y = use.both()
        assert sqnr_db(truth, y) > 18 > sqnr_db(truth, changed)
        assert attached(other) == attached(use.net) == engine


@use
def pickles(engine: str) -> None:
    use, file = Use(engine), io.BytesIO()
    _, y = use.both()
    torch.save(use.net, file)
    file.seek(0)
    loaded = [torch.load(file, weights_only=False), pickle.loads(pickle.dumps(use.net))]
    with torch.no_grad():
        assert all(torch.equal(net(*call("pixels")).sample, y) for net in loaded)


@use
def other_weights(engine: str) -> None:
    use = Use(engine)
    use.near()
    use.floating = small("pixels", seed=1)
    other = quantize_network(use.floating, [call("pixels")])
    use.net.load_state_dict(other.state_dict())
    use.near()
    attach(other, engine)
    assert torch.equal(use.both()[1], other(*call("pixels")).sample)
    use.net.load_state_dict(pair("pixels")[1].state_dict(), assign=True)
    use.floating = small("pixels")
    use.near()


@use
def another_layer(engine: str) -> None:
    use = Use(engine)
    use.near()
    for net in use.networks():
        net.conv_norm_out = nn.Identity()
    use.near()


# Settings that integer layers cannot follow


@use
def circular_padding(engine: str) -> None:
    use = Use(engine)
    use.near()
    for layer in use.net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"
    with refused("the padding of 'conv_in' was changed"):
        use.both()
    layer = next(layer for _, layer in quantized_layers(use.net) if isinstance(layer, QConv2d))
    with refused("got padding_mode 'circular' for an integer convolution"):
        layer.padding_mode = "circular"


@use
def gradients(engine: str) -> None:
    use = Use(engine)
    x, t = call("pixels")
    with refused("requires a gradient"):
        use.net(x.requires_grad_(), t)
    assert not use.net(x.detach(), t).sample.requires_grad


@use
def dropout(engine: str) -> None:
    use = Use(engine)
    for module in use.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    use.net.train()
    with refused("in training mode"):
        use.both()
    use.net.eval()
    use.near()


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("engine", ENGINES_HERE)
def test_use(name: str, engine: str) -> None:
    USES[name](engine)


def test_the_public_names_are_what_they_say() -> None:
    import pkgutil

    for found in pkgutil.iter_modules(quantempo.__path__):
        if not found.name.startswith("__"):
            __import__(f"quantempo.{found.name}")
    for name in quantempo.__all__:
        assert not isinstance(getattr(quantempo, name), type(quantempo)), name
