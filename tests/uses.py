"""A small float network and its integer copy on an engine, used alike; nothing here collects."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from quantempo.engines import ENGINES, attach
from quantempo.engines.select import attach_lazily
from tests.engines.openvino_nets import sqnr_db
from tests.engines.quantized import quantize_network
from tests.tiny import noise

__all__ = ["ENGINES_HERE", "T", "Use", "call", "in_threads", "pair", "small", "sqnr_db"]

_ON_CPUS = [name for name in ENGINES.names() if {"cpu", "any"} & {*ENGINES.get(name).devices}]
ENGINES_HERE = [name for name in _ON_CPUS if ENGINES.get(name).missing() is None]
T = torch.tensor(450)


def call(kind: str, rows: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    if kind == "text":
        return noise(rows, 4, 8, 8, seed=seed), T, noise(rows, 8, 16, seed=seed)
    return noise(rows, 3, 8, 8, seed=seed), T


def small(kind: str, seed: int = 0) -> nn.Module:
    """Return a network of one level, which OpenVINO compiles in a second."""
    shape = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "text":
            names = {"down_block_types": ("CrossAttnDownBlock2D",)}
            names |= {"up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
            more = {"cross_attention_dim": 16, "attention_head_dim": 2, **names}
            return UNet2DConditionModel(sample_size=8, **shape, **more).eval()
        names = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
        return UNet2DModel(sample_size=8, attention_head_dim=8, **shape, **names).eval()


@functools.cache
def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    floating = small(kind)
    return floating, quantize_network(floating, [call(kind)])


class Use:
    """A float network and its integer copy with an engine."""

    def __init__(self, engine: str, kind: str = "pixels", lazy: bool = False) -> None:
        self.kind, self.engine = kind, engine
        self.floating, self.net = map(copy.deepcopy, pair(kind))
        (attach_lazily if lazy else attach)(self.net, engine)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.floating, self.net

    @torch.no_grad()
    def both(self, *given: Any) -> tuple[Tensor, Tensor]:
        given = given or call(self.kind)
        return self.floating(*given).sample, self.net(*given).sample

    def near(self, *given: Any, db: float = 18.0) -> None:
        """Assert that the integer network is near the float one."""
        truth, y = self.both(*given)
        assert y.dtype == truth.dtype and y.shape == truth.shape
        assert sqnr_db(truth, y) > db, sqnr_db(truth, y)


def in_threads(run: Callable[..., Tensor], jobs: list[tuple[Any, ...]]) -> list[Tensor]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [job.result() for job in [pool.submit(run, *job) for job in jobs]]
