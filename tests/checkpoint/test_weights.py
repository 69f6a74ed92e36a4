"""Text encoders and VAEs with int8 weights: what is stored, what loads, what is said of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from quantempo.errors import QuantempoError
from quantempo.models.load import load_pipeline
from quantempo.pipeline import quality, stages
from quantempo.pipeline.layer_table import describe
from tests.packed import CALLS, recipe, saved

ALSO = ("text_encoder", "vae")


def test_weights_of_components_are_int8_on_disk_and_loaded_in_any_type(tmp_path: Path) -> None:
    how: dict[str, Any] = {"recipe": recipe(), "call": CALLS["text"]}
    packed = stages.quantize(saved("text"), tmp_path / "run", also="text_encoder, vae,vae", **how)
    source, found = load_pipeline(saved("text")), load_pipeline(packed)
    half = DiffusionPipeline.from_pretrained(packed, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "again")
    again, count = load_pipeline(tmp_path / "again"), 0
    for name in ALSO:
        for place, layer in getattr(found, name).named_modules():
            if not hasattr(layer, "parametrizations"):
                continue
            weight, count = getattr(source, name).get_submodule(place).weight, count + 1
            step = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1)) / 127
            # A rounding to nearest of float32 numbers.
            assert bool(((layer.weight - weight).abs() <= step * 0.5001).all())
            in_half = getattr(half, name).get_submodule(place).weight
            assert torch.equal(in_half, layer.weight.bfloat16())
            assert torch.equal(getattr(again, name).get_submodule(place).weight, layer.weight)
    # No byte is left to chance.
    state = [*found.vae.state_dict().items(), *found.text_encoder.state_dict().items()]
    assert not any(bool(value.any()) for name, value in state if name.endswith(".like"))
    rows = [row for row in describe(packed)[0] if row["name"].startswith(ALSO)]
    assert len(rows) == count == 42 and {row["bits_weight"] for row in rows} == {8}
    session = stages.reopen(tmp_path / "run")
    assert session.also == [*ALSO] and not session.stale("pack")
    files = (f for n in ("unet", *ALSO) for f in (packed / n).glob("*.safetensors"))
    assert quality.summary(session)["bytes_packed"] == sum(f.stat().st_size for f in files)
    with pytest.raises(QuantempoError, match="packed was made with other settings"):
        stages.load(saved("text"), tmp_path / "run", **how)
    with pytest.raises(QuantempoError, match="also names 'vea'; did you mean 'vae'"):
        stages.load(saved("text"), tmp_path / "other", **how, also="vea")
