"""quantempo: time-step-aware post-training quantization for diffusion models, run in integers.

Importing this package makes diffusers load quantempo checkpoints with `from_pretrained`.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

__version__ = "0.2.0"

# Name -> module that has it; imported when first used, so that `import quantempo` is quick.
_PUBLIC = {
    "DEMO_MODEL": "quantempo.cli.run_demo",
    "QuantempoError": "quantempo.errors",
    "Recipe": "quantempo.recipe",
    **dict.fromkeys(("attach", "detach"), "quantempo.engines.select"),
    **dict.fromkeys(("evaluate", "open_model", "sample"), "quantempo.pipeline.quality"),
    **dict.fromkeys(("quantize", "reopen"), "quantempo.pipeline.stages"),
    **dict.fromkeys(("load_lora", "set_lora", "unload_lora"), "quantempo.engines.lora"),
    "compare": "quantempo.pipeline.compare",
    "listening": "quantempo.core.progress",
    "QuantempoConfig": "quantempo.checkpoint.diffusers_plugin",
    "graphed": "quantempo.engines.cuda.graphs",
    "quantize_": "quantempo.checkpoint.without_data",
    "render": "quantempo.report",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

# Modules with a list of quantizers -> our plug-in.
_LISTS = {
    "diffusers.quantizers.auto": "quantempo.checkpoint.diffusers_plugin",
    "transformers.quantizers.auto": "quantempo.checkpoint.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'quantempo' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def _register(name: str) -> None:
    # A plug-in may be what imports diffusers just now.
    importlib.import_module("quantempo.checkpoint.weights").register(name.partition(".")[0])
    importlib.import_module(_LISTS[name])


class _Registrar(importlib.abc.MetaPathFinder):
    """Register with a library at the moment it is imported: importing it here costs seconds."""

    def __init__(self) -> None:
        self.left = {*_LISTS}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in self.left:
            return None
        self.left.remove(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register(fullname)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Registrar())
    for _name in sys.modules.keys() & _LISTS:
        _register(_name)
