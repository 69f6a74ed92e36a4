"""LoRA: merged before quantizing, or beside the layers of a packed pipeline on every engine."""

import copy
import itertools
import json
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import quantempo
from quantempo.cli import app
from quantempo.engines import ENGINES, attach
from quantempo.engines.base import BACKENDS
from quantempo.engines.fusion import report
from quantempo.engines.layerwise import execution
from quantempo.errors import QuantempoError
from quantempo.models.load import load_pipeline, named_lora
from quantempo.models.lora import read_lora
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline import stages
from quantempo.quantized import QLayer, quantized_layers
from tests.engines.one_by_one import (
    ENGINE,
    NETWORKS,
    call,
    check_errors,
    errors,
    quantized,
    reasons,
)
from tests.engines.truth import relative
from tests.packed import CALLS, packed, recipe, saved
from tests.tiny import TEXT_TOKENS, TEXT_WIDTH, noise

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
# Integer layers; float ones, of which blocks share products; one of another component.
LAYERS = (ATTENTION, "up_blocks.1.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj")
LAYERS += ("time_embedding.linear_1", "conv_in")
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
STYLES = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}
GIVEN = (noise(2, 4, 8, 8), torch.tensor(500), noise(2, TEXT_TOKENS, TEXT_WIDTH))


def adapters(pipe, layers=LAYERS, rank=4, seed=0):
    """Return down and up of layers, as large together as a few percent of the weight."""
    found = {}
    for i, name in enumerate(layers):
        weight = pipe.unet.get_submodule(name).weight
        down = noise(rank, *weight.shape[1:], seed=seed + i)
        ones = (1,) * (weight.ndim - 2)
        found[name] = down, 0.02 * noise(len(weight), rank, *ones, seed=seed + 50 + i)
    return found


def write(path, found, style="peft", **more):
    """Write a LoRA file."""
    flat = "_" if style == "kohya" else "."
    tensors = {
        form.format(name.replace(".", flat)): value
        for name, pair in found.items()
        for form, value in zip(STYLES[style], pair, strict=True)
    }
    save_file(tensors | more, path)
    return str(path)


@pytest.fixture(scope="module")
def float_pipe():
    return load_pipeline(saved("text"))


@pytest.fixture
def pipe():
    return load_pipeline(packed("text").folder)


@pytest.fixture(autouse=True)
def triton_on_a_cpu(monkeypatch):
    monkeypatch.setattr(BACKENDS.get("triton"), "missing", lambda: None)
    monkeypatch.setattr(ENGINES.get("triton"), "devices", ("cpu",))


@torch.no_grad()
def eps(pipe):
    return pipe.unet(*GIVEN).sample


@pytest.mark.parametrize("style", STYLES)
def test_names_of_files(style, float_pipe, tmp_path):
    found = adapters(float_pipe, [ATTENTION])
    alpha = {f"lora_unet_{ATTENTION.replace('.', '_')}.alpha": torch.tensor(2.0)}
    file = write(tmp_path / "a.safetensors", found, style, **(alpha if style == "kohya" else {}))
    read = read_lora(float_pipe, file)
    down, up = found[ATTENTION]
    scale = 0.5 if style == "kohya" else 1
    assert list(read) == [("unet", ATTENTION)]
    assert torch.equal(read["unet", ATTENTION][0], down)
    assert torch.equal(read["unet", ATTENTION][1], up * scale)


@pytest.mark.parametrize("engine", ["simulated", "onednn", "triton"])
def test_a_branch_on_every_engine(engine, pipe, float_pipe, tmp_path):
    found, other = adapters(float_pipe), adapters(float_pipe, [ATTENTION], 2, seed=9)
    one = write(tmp_path / "one.safetensors", found, "diffusers")
    two = write(tmp_path / "two.safetensors", other)
    wanted = load_pipeline(packed("text").folder).unet
    attach(pipe.unet, engine)
    before, table = eps(pipe), execution(pipe.unet)
    kernel = pipe.unet.get_submodule(ATTENTION).kernel
    quantempo.load_lora(pipe, one, 0.8)
    # By this CUDA graphs are recorded again, see `Graphed`.
    assert pipe.unet.get_submodule(ATTENTION).kernel is not kernel
    quantempo.load_lora(pipe, two, 0.5, name="b")
    refused = {row.kind for row in report(pipe.unet) if "LoRA" in (row.reason or "")}
    # The ends are convolutions in float.
    kinds = {"simulated": set(), "triton": {"UNet2DConditionModel"}}
    assert refused == kinds.get(engine, refused) and bool(refused) == (engine != "simulated")

    @torch.no_grad()
    def exact(*scales):
        with ExitStack() as stack:
            for scale, pairs in zip(scales, (found, other), strict=True):
                for name, (down, up) in pairs.items():

                    def hook(layer, args, y, down=down, up=scale * up):
                        if down.ndim == 2:
                            return y + args[0] @ down.T @ up.T
                        return y + F.conv2d(F.conv2d(args[0], down, None, padding=1), up)

                    layer = wanted.get_submodule(name)
                    stack.enter_context(layer.register_forward_hook(hook))
            attach(wanted, "simulated")
            return wanted(*GIVEN).sample

    def far(y, right):
        return float((y - right).norm() / right.norm())

    # Codes that rounding moves between engines.
    moved = 1.5 * far(before, exact(0.0, 0.0)) + 1e-5
    assert far(eps(pipe), exact(0.8, 0.5)) < moved
    assert far(eps(pipe), before) > 5 * moved
    kernel = pipe.unet.get_submodule(ATTENTION).kernel
    quantempo.set_lora(pipe, {"one": -2.0, "b": 0.0})
    assert far(eps(pipe), exact(-2.0, 0.0)) < moved
    quantempo.load_lora(pipe, two, 1.0, name="b")
    eps(pipe)
    assert pipe.unet.get_submodule(ATTENTION).kernel is kernel
    quantempo.unload_lora(pipe, "one")
    assert far(eps(pipe), exact(0.0, 1.0)) < moved
    quantempo.unload_lora(pipe)
    assert torch.equal(eps(pipe), before)
    assert execution(pipe.unet) == table


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_blocks_stay_fused_around_branches(kind, tmp_path):
    network, tensors = copy.deepcopy(quantized(kind)), {}
    pipe, given = SimpleNamespace(components={"transformer": network}), call(kind)
    for i, (name, layer) in enumerate(network.named_modules()):
        if isinstance(layer, QLayer | nn.Linear):
            out, *width = getattr(layer, "weight_shape", None) or layer.weight.shape
            down, up = noise(3, *width, seed=i) / width[0] ** 0.5, 0.1 * noise(out, 3, seed=-i)
            ones = [1] * (len(width) - 1)
            tensors |= {f"transformer.{name}.lora_A.weight": down}
            tensors |= {f"transformer.{name}.lora_B.weight": up.view(out, 3, *ones)}
    save_file(tensors, file := tmp_path / "one.safetensors")
    ENGINE.attach(network)
    before = network(**given)[0]
    quantempo.load_lora(pipe, file, 0.0)
    ENGINE.attach(network)
    places = [layer.kernel.constants.adapters.up.data_ptr() for layer in on_triton(network)]
    quantempo.set_lora(pipe, {"one": 1.0})
    fused = network(**given)[0]
    assert places == [layer.kernel.constants.adapters.up.data_ptr() for layer in on_triton(network)]
    assert reasons(network) == {None}
    check_errors(errors(network, **given))
    ENGINE.attach(network)
    assert torch.equal(network(**given)[0], fused)
    attach(network, "simulated")
    # A branch reads codes, and its first product is one of 8 bits.
    assert relative(fused, network(**given)[0]) < 0.1 * relative(fused, before)
    attach(network, "triton")
    quantempo.unload_lora(pipe)
    assert torch.equal(network(**given)[0], before)


def on_triton(network):
    """Return the layers that run there."""
    return [q for _, q in quantized_layers(network) if getattr(q.kernel, "constants", None)]


def test_a_compiled_layer_follows_and_is_not_compiled_for_a_scale(pipe, float_pipe, tmp_path):
    file = write(tmp_path / "one.safetensors", adapters(float_pipe, [ATTENTION]))
    attach(pipe.unet, "simulated")
    eps(pipe)
    layer, seen = pipe.unet.get_submodule(ATTENTION), []
    compiled, x = torch.compile(layer, backend="eager"), noise(4, 16, 32)
    for change, again in (
        (lambda: None, False),
        (lambda: quantempo.load_lora(pipe, file), False),
        (lambda: quantempo.set_lora(pipe, {"one": 3.0}), True),
        (lambda: quantempo.load_lora(pipe, file, 2.0), True),
        (lambda: quantempo.unload_lora(pipe), False),
    ):
        change()
        eps(pipe)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=again):
            seen.append(compiled(x))
            assert torch.equal(seen[-1], layer(x))
    assert torch.equal(seen[0], seen[-1])
    assert not torch.equal(seen[1], seen[2])


def test_merged_adapters_are_another_run(float_pipe, tmp_path):
    found, run = adapters(float_pipe, [ATTENTION]), tmp_path / "run"
    inner = {"lora_A.weight": noise(2, TEXT_WIDTH, seed=3), "lora_B.weight": noise(TEXT_WIDTH, 2)}
    text = {f"{TEXT}.{part}": value for part, value in inner.items()}
    file = write(tmp_path / "one.safetensors", found, **text)
    how = {"call": CALLS["text"], "lora": [f"{file}:0.5"]}
    session = stages.load(saved("text"), run, recipe(), **how)
    (kept,) = json.loads((run / "manifest.json").read_text())["loading"]["lora"]
    assert kept == named_lora(f"{file}:0.5")
    again = stages.reopen(run)
    down, up = found[ATTENTION]
    wanted = float_pipe.unet.get_submodule(ATTENTION).weight + 0.5 * up @ down
    torch.testing.assert_close(again.denoiser.get_submodule(ATTENTION).weight, wanted)
    session.save({}, tmp_path / "saved")
    made, before = load_pipeline(tmp_path / "saved").text_encoder, float_pipe.text_encoder
    a, b = (dict(part.named_parameters()) for part in (made, before))
    (changed,) = (name for name in b if not torch.equal(a[name], b[name]))
    more = 0.5 * inner["lora_B.weight"] @ inner["lora_A.weight"]
    torch.testing.assert_close(a[changed], b[changed] + more)
    with pytest.raises(QuantempoError, match="belongs to another model"):
        stages.load(saved("text"), run, recipe(), call=CALLS["text"])
    write(file, found)
    with pytest.raises(QuantempoError, match="has changed"):
        stages.reopen(run)


def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, float_pipe, tmp_path):
    found, file = adapters(float_pipe, [ATTENTION]), tmp_path / "one.safetensors"
    name = STYLES["peft"][0].format(ATTENTION)
    before = pipe.unet.state_dict().keys()
    for change, message in (
        ({name: noise(4, 7)}, "does not fit"),
        ({"unet.none.lora_A.weight": noise(4, 16)}, "does not fit 'none'"),
        ({f"unet.{ATTENTION}.dora_scale": noise(16)}, "DoRA"),
        ({f"unet.{ATTENTION}.lora_B.bias": noise(16)}, "down, up and alpha alone"),
    ):
        write(file, found, **change)
        with pytest.raises(QuantempoError, match=message):
            quantempo.load_lora(pipe, file)
    file.write_bytes(b"no tensors")
    with pytest.raises(QuantempoError, match="cannot read the LoRA"):
        quantempo.load_lora(pipe, file)
    write(file, found)
    for name in ("load_lora_adapter", "unload_lora", "fuse_lora", "set_adapters", "disable_lora"):
        with pytest.raises(QuantempoError, match=r"quantempo.load_lora\(pipe"):
            getattr(pipe.unet, name)({})
    with pytest.raises(QuantempoError, match="which is packed"):
        load_pipeline(packed("text").folder, lora=[str(file)])
    if ENGINES.get("openvino").missing() is None:
        attach(pipe.unet, "openvino")
        with pytest.raises(QuantempoError, match="engine 'openvino' would leave out"):
            quantempo.load_lora(pipe, file)
    assert pipe.unet.state_dict().keys() == before
    attach(pipe.unet, "simulated")
    quantempo.load_lora(pipe, file)
    with pytest.raises(QuantempoError, match="unload_lora"):
        pipe.unet.save_pretrained(tmp_path / "saved")


def test_samples_of_a_packed_folder(pipe, float_pipe, tmp_path):
    files = [write(tmp_path / f"{n}.safetensors", adapters(float_pipe, seed=n)) for n in (1, 2)]
    inner = {"lora_A.weight": noise(2, TEXT_WIDTH, seed=3), "lora_B.weight": noise(TEXT_WIDTH, 2)}
    text = str(tmp_path / "text.safetensors")
    save_file({f"{TEXT}.{part}": value for part, value in inner.items()}, text)
    (prompts := tmp_path / "prompts.txt").write_text("a b\nc d\n")
    base = ["sample", str(packed("text").folder), "--images=1", "--steps=2", f"--prompts={prompts}"]

    def image(*loras):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        more = ["--engine", "simulated", "--out", str(out), *[f"--lora={lora}" for lora in loras]]
        result = CliRunner().invoke(app, base + more)
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(out / "0.png")).tolist()

    attach(pipe.unet, "simulated")
    for file, scale in zip(files, (0.8, -2.0), strict=True):
        quantempo.load_lora(pipe, file, scale)
    (made,) = run_pipeline(pipe, [0], steps=2, **CALLS["text"])
    images = [image(), image(files[0]), image(text), image(f"{files[0]}:0.8", f"{files[1]}:-2")]
    assert images[-1] == made.tolist()
    assert all(a != b for a, b in itertools.combinations(images, 2))
