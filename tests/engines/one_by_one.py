"""Run the fused blocks of transformers against their layers one by one, on a CPU."""

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from quantempo.engines import ENGINES
from quantempo.engines.cuda.unet import BLOCKS
from quantempo.engines.fusion import fuse, report, unfuse
from quantempo.models.layers import hooked
from quantempo.quantized import quantized_layers
from tests.engines.truth import relative


def randomized(network: nn.Module) -> nn.Module:
    """Give norms weights that matter; else gates and shifts are next to nothing."""
    for module in network.modules():
        if isinstance(module, nn.RMSNorm | RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)
            nn.init.normal_(module.bias, std=0.3)
    return network.eval()


def by_token(network: nn.Module, every: int) -> nn.Module:
    """Give every so manyth layer a scale for every token."""
    for _, layer in list(quantized_layers(network))[::every]:
        layer.act_scale = layer.act_scale[:, :0]
        layer.act_zero_point.fill_(128)
    ENGINES.get("triton").attach(network)
    return network


def reasons(network: nn.Module) -> set[str | None]:
    return {row.reason for row in report(network)}


@torch.no_grad()
def errors(network: nn.Module, **arguments: Any) -> list[float]:
    """Return how far each stream of each block is from its layers run one by one."""
    seen: dict[str, Any] = {}

    def see(name: str, block: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        seen[name] = args, kwargs, y

    rows = report(network)
    unfuse(network)
    blocks = {row.name: network.get_submodule(row.name) for row in rows if row.reason is None}
    with hooked(blocks, see):
        network(**arguments)
    fuse(network, BLOCKS)
    found = []
    for name, (args, kwargs, expected) in seen.items():
        blocks[name].forward.prepare(torch.device("cpu"))
        pairs = zip(_streams(blocks[name](*args, **kwargs)), _streams(expected), strict=True)
        for y, truth in pairs:
            assert y.dtype == truth.dtype and y.shape == truth.shape
            found.append(relative(y, truth))
    return sorted(found)


def check_errors(found: list[float]) -> None:
    # A code of 255 that moves by one costs about 1e-3; where none does, nothing hides an error.
    assert found[-1] <= 8e-3 and found[len(found) // 4] <= 2e-6, found


def _streams(y: Any) -> list[Tensor]:
    return [part for part in (y if isinstance(y, tuple) else (y,)) if part is not None]
