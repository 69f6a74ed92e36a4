"""quantempo: time-step-aware post-training quantization for diffusion models, run in integers.

Importing this package makes diffusers load quantempo checkpoints with `from_pretrained`.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

__version__ = "0.1.0"

# Name -> module that has it; imported when first used, so that `import quantempo` is quick.
_PUBLIC = {
    "DEMO_MODEL": "quantempo.cli.run_demo",
    "QuantempoError": "quantempo.errors",
    "Recipe": "quantempo.recipe",
    **dict.fromkeys(("attach", "detach"), "quantempo.engines.select"),
    **dict.fromkeys(("evaluate", "open_model", "sample"), "quantempo.pipeline.quality"),
    **dict.fromkeys(("quantize", "reopen"), "quantempo.pipeline.stages"),
    **dict.fromkeys(("load_lora", "set_lora", "unload_lora"), "quantempo.engines.lora"),
    "graphed": "quantempo.engines.cuda.graphs",
    "render": "quantempo.report",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

_DIFFUSERS = "diffusers.quantizers.auto"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'quantempo' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def _register() -> None:
    # The plug-in registers itself; it may be what imports diffusers just now.
    importlib.import_module("quantempo.checkpoint.diffusers_plugin")


class _Registrar(importlib.abc.MetaPathFinder):
    """Register with diffusers at the moment it is imported: importing it here costs seconds."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _DIFFUSERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _DIFFUSERS in sys.modules:
    _register()
elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Registrar())
