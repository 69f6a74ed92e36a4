"""Networks that several tests of the OpenVINO engine run."""

import pytest
from torch import nn

from quantempo.engines.openvino.engine import OpenVinoEngine
from tests.engines.openvino_nets import packed
from tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def engine_unet(unet: nn.Module) -> nn.Module:
    net = packed(unet, buckets=3)
    OpenVinoEngine().attach(net)
    return net
