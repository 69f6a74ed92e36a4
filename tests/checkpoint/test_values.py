"""Checkpoints whose hash is right and whose values are not: one sentence each, nothing runs."""

import pytest

from quantempo.checkpoint.diffusers_plugin import mark_quantized
from quantempo.errors import QuantempoError
from quantempo.models.load import load_pipeline
from tests.checkpoint.test_format2 import FORMAT2, with_setting

LAYER = "up_blocks.0.resnets.0.conv_shortcut"


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("quantempo_clock.bucket_of", 40, -3, "from -3 to 3; expected 0 to"),
        ("quantempo_clock.bucket_of", 40, 4, "from 0 to 4; expected 0 to 3"),
        ("quantempo_clock.bucket_of", 40, 10**6, "from 0 to 1000000; expected 0 to"),
        (f"{LAYER}.act_scale", (1, 2), 0.0, "a bad value in act_scale"),
        (f"{LAYER}.act_scale", (1, 2), -1.0, "a bad value in act_scale"),
        (f"{LAYER}.act_scale", (0, 3), float("nan"), "a bad value in act_scale"),
        (f"{LAYER}.act_scale", (0, 3), float("inf"), "a bad value in act_scale"),
        (f"{LAYER}.weight_scale", 5, float("nan"), "a bad value in weight_scale"),
        (f"{LAYER}.weight_scale", 5, 0.0, "a bad value in weight_scale"),
        (f"{LAYER}.act_zero_point", 1, 100_000, r"to 100000; expected 0 to 255"),
        (f"{LAYER}.act_zero_point", 1, -1, "zero points of .* from -1 to"),
    ],
)
def test_a_bad_value_among_good_ones_is_refused(name, index, value, message, tmp_path):
    net = load_pipeline(FORMAT2 / "w8a8").unet
    net.get_buffer(name)[index] = value
    # As someone who edits it would: the hash is of the new tensors.
    mark_quantized(net, net.hf_quantizer.quantization_config)
    net.save_pretrained(tmp_path)
    with pytest.raises(QuantempoError, match=message) as caught:
        type(net).from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("num_train_timesteps", v, "expected 1 to 100000") for v in (0, -5, 10**12, "10", True)),
        *(("per_unit", v, "expected a number above 0") for v in (0, -1.0, float("nan"), None, "1")),
        ("bits", {LAYER: [9, 8]}, "unknown format 'int9'"),
        ("buckets", {LAYER: 0}, "expected 1 or more"),
        ("segments", {LAYER: [16, 15]}, "expected parts of 32"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_made(key, value, message, tmp_path):
    with_setting(tmp_path, key, value)
    with pytest.raises(QuantempoError, match=message) as caught:
        load_pipeline(tmp_path / "packed")
    assert "\n" not in str(caught.value)
