"""Networks and backends that several tests of the engines run."""

import pytest
from torch import nn

from quantempo.engines import ENGINES
from quantempo.engines.base import BACKENDS, Backend
from quantempo.engines.openvino.engine import OpenVinoEngine
from tests.engines.openvino_nets import packed
from tests.engines.quantized import quantized_unet
from tests.uses import small


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return small("pixels")


@pytest.fixture(scope="module")
def engine_unet(unet: nn.Module) -> nn.Module:
    net = packed(unet, buckets=3)
    OpenVinoEngine().attach(net)
    return net


@pytest.fixture(scope="module")
def packed_unet() -> nn.Module:
    """The quantized U-Net, no engine attached; copy it before that."""
    return quantized_unet()


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that `triton` has all it needs: its operators have an exact definition on a CPU."""
    monkeypatch.setattr(BACKENDS.get("triton"), "missing", lambda: None)


@pytest.fixture(params=BACKENDS.names())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    found = BACKENDS.get(request.param)
    if "cuda" in ENGINES.get(request.param).devices:
        monkeypatch.setattr(found, "missing", lambda: None)
    if found.missing() is not None:
        pytest.skip(found.missing())
    return found
