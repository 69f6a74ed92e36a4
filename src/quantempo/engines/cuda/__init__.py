"""The engine for NVIDIA GPUs: int8 products, fused blocks, CUDA graphs."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.core.instance import own_forward
from quantempo.engines.cuda import dit, joint, layer, transformer, unet
from quantempo.engines.fusion import fused_modules
from quantempo.engines.layerwise import LayerwiseEngine
from quantempo.engines.select import ENGINES
from quantempo.engines.streaming import Streamed
from quantempo.errors import QuantempoError, log
from quantempo.kernels import ops
from quantempo.models.layers import hooked
from quantempo.quantized import CLOCK_NAME, find_clock, quantized_layers, weight_only_layers
from quantempo.quantized.attention import attentions, marked_attention

__all__ = ["dit", "joint", "layer", "transformer", "unet"]


class _TritonEngine(LayerwiseEngine):
    def attach(self, denoiser: nn.Module) -> None:
        for module in denoiser.modules():
            hooks: Any = getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
            by_layer = getattr(getattr(module, "_hf_hook", None), "offload", False)
            if by_layer or "group_offloading" in " ".join(hooks):
                raise QuantempoError(
                    f"{type(denoiser).__name__} is offloaded in parts, but engine triton has its "
                    "own form of the weights; take the hooks off and attach(denoiser, memory="
                    "'8GB'), which streams it, or use enable_model_cpu_offload"
                )
        for linear in weight_only_layers(denoiser):
            linear.kernel = ops.weight_only_linear
        for known in marked_attention(denoiser).values():
            known.ran = False
        super().attach(denoiser)

    def detach(self, denoiser: nn.Module) -> None:
        super().detach(denoiser)
        for linear in weight_only_layers(denoiser):
            linear.kernel = None
            # Not a part of what all blocks had in common.
            for codes in (linear.weight_int, linear.weight_group):
                if codes is not None:
                    codes.data = codes.clone()

    def first_wrong(self, denoiser: nn.Module, args: Any, kwargs: Any, output: Any) -> str | None:
        # Here: engines are registered in the order of preference.
        from quantempo.engines.simulated import float32_copy, once

        layers, clock = dict(quantized_layers(denoiser)), find_clock(denoiser)
        assert clock is not None
        # Offloaded, each layer is there for its own call only.
        streamed = isinstance(getattr(own_forward(denoiser), "active", None), Streamed)
        if streamed or any(tensor.is_meta for tensor in denoiser.parameters()):
            log.warning("engine triton is not compared with simulated: the model is offloaded")
            return None
        given = args, kwargs
        full = pytree.tree_map_only(
            Tensor, lambda x: x.float() if x.is_floating_point() else x, given
        )
        wrong: list[str] = []
        eight = {name for name, known in marked_attention(denoiser).items() if known.ran}

        def see(name: str, _: nn.Module, args: Any, kwargs: Any, truth: Any) -> None:
            part = denoiser.get_submodule(name)
            if far and not wrong and _far(part(*args, **kwargs), truth):
                wrong.append(name)

        far = False
        try:
            copied, kind = float32_copy(denoiser), type(denoiser)
            names = [*layers, *fused_modules(denoiser)]

            def attend(name: str, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
                return ops.attention.exact(q, k, v) if name in eight else y

            def run(network: nn.Module, rounded: bool, given: Any) -> Any:
                network.get_submodule(CLOCK_NAME).call.bucket = clock.now
                for _, layer in quantized_layers(network):
                    layer.kernel = partial(once, layer, rounded)
                with attentions(network, attend):
                    return kind.forward(network, *given[0], **given[1])

            # What half precision costs by itself, autocast's too, is no fault of the engine.
            free = run(float32_copy(denoiser, None), False, given)
            with (
                hooked({name: copied.get_submodule(name) for name in names}, see),
                torch.autocast(clock.now.device.type, enabled=False),
            ):
                exact = run(copied, True, full)
                far = _far(output, exact, free)
                if far:
                    run(copied, True, full)
        except Exception as error:
            # Mostly no memory for float32: what checks a call must not end it.
            text = " ".join(str(error).split())[:200]
            log.warning("engine triton is not compared with simulated here: %s", text)
        return next(iter(wrong), "its end") if far else None


def _far(*outputs: Any) -> bool:
    from quantempo.engines.simulated import too_far

    return too_far(*([x for x in pytree.tree_leaves(y) if isinstance(x, Tensor)] for y in outputs))


ENGINES.register("triton")(_TritonEngine("triton", ("cuda",), unet.BLOCKS))
