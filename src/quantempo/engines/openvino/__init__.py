"""The OpenVINO engine: the whole denoiser as one graph."""

from quantempo.engines.openvino.engine import OpenVinoEngine
from quantempo.engines.select import ENGINES

__all__: list[str] = []

ENGINES.register("openvino")(OpenVinoEngine())
