"""Text encoders and VAEs whose weights alone are int8: saved, and loaded by their library."""

import copy
import json
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from quantempo.core.paged import save_tensors

__all__ = ["register", "save_weights"]

METHOD = "quantempo_weights"
# As transformers and diffusers name the files of a component.
_FILES = {"transformers": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}


class _Method(str, Enum):  # noqa: UP042
    WEIGHTS = METHOD


def register(library: str) -> None:
    """Add the method to the quantizers that a library knows, of which it is importing the list."""
    known, base = (import_module(f"{library}.quantizers.{name}") for name in ("auto", "base"))
    kind = base.HfQuantizer if library == "transformers" else base.DiffusersQuantizer

    class WeightsConfig(base.QuantizationConfigMixin):  # type: ignore[name-defined, misc]
        def __init__(self, layers: Any = (), **_: Any) -> None:
            self.quant_method, self.layers = _Method.WEIGHTS, list(layers)

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD, "layers": self.layers}

        to_diff_dict = to_dict

    class WeightsQuantizer(kind):  # type: ignore[misc, valid-type]
        requires_calibration, is_trainable = True, False
        # A property there, a method here.
        is_serializable = True if library == "diffusers" else lambda self: True

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            # Not above: the library is only half imported there.
            from quantempo.quantized import store_int8

            for name in self.quantization_config.layers:
                store_int8(model.get_submodule(name))

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            return model

    known.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, WeightsConfig)
    known.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, WeightsQuantizer)


def save_weights(component: Any, to: str | Path) -> None:
    """Write a float component with int8 weights of its convolutions and linear layers."""
    from quantempo.models.layers import LAYERS
    from quantempo.quantized import store_int8

    state = [*component.parameters(), *component.buffers()]
    copied = copy.deepcopy(component, {id(tensor): tensor for tensor in state})
    names = [name for name, layer in copied.named_modules() if isinstance(layer, LAYERS)]
    for name in names:
        store_int8(copied.get_submodule(name))
    Path(to).mkdir(parents=True, exist_ok=True)
    library = type(component).__module__.partition(".")[0]
    config: Any = component if library == "diffusers" else component.config
    values = json.loads(config.to_json_string())
    values["quantization_config"] = {"quant_method": METHOD, "layers": names}
    (Path(to) / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    save_tensors(Path(to) / _FILES[library], copied.state_dict(), {"format": "pt"})
