"""The affine correction around a quantized network: fit it, put it on before packing."""

from __future__ import annotations

from typing import Any

from torch import nn

from quantempo.calibration.correction import fit_correction
from quantempo.engines.select import attach
from quantempo.pipeline.session import Session
from quantempo.quantized.correction import OutputCorrection, install_correction

__all__ = ["around", "fit"]


def fit(session: Session, packed: nn.Module) -> None:
    """Fit the correction of a quantized network; writes `correction.safetensors` and `.json`."""
    attach(packed, "auto" if session.device == "cpu" else "simulated")
    settings, steps = session.recipe.correction, session.recipe.trace.steps
    fitted = fit_correction(session.pipe, packed, settings, steps=steps, call=session.call)
    session.run.write_json("correction.json", fitted.report)
    session.run.write_safetensors("correction.safetensors", fitted.tensors)


def around(session: Session, packed: nn.Module) -> dict[str, Any]:
    """Install what was fitted; return what the checkpoint says of it, {} for no correction."""
    if not session.recipe.correction.affine:
        return {}
    tables = OutputCorrection.of(session.run.read_safetensors("correction.safetensors"))
    install_correction(packed, tables.to(session.device))
    return tables.settings
