"""Register quantempo with diffusers, so that `from_pretrained` just loads.

On disk a quantized model is an ordinary diffusers folder: safetensors plus `quantization_config`
in the component's config.json. Two public dictionaries of diffusers are extended at import; no
class is patched. This file and `models/` are the only ones that import diffusers.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from quantempo import __version__, quantized
from quantempo.checkpoint.hashes import check_files, digest, joined, seal, settings_digest
from quantempo.checkpoint.values import check_layers, check_plans, check_tensor, check_times
from quantempo.checkpoint.without_data import has_time, install, resolved
from quantempo.core import unpack_int12
from quantempo.core.instance import put_buffer
from quantempo.core.paged import Paged, paged_tensors
from quantempo.errors import QuantempoError, log
from quantempo.models.layers import sites
from quantempo.quantized.attention import mark_attention
from quantempo.recipe import Recipe
from quantempo.run_folder import canonical, reading

__all__ = [
    "FORMAT_VERSION", "QuantempoConfig", "QuantempoQuantizer", "mark_quantized", "register", "seal",
]  # fmt: skip

# 2: weights of at most 4 bits two to a byte, activations below 8 bits. 3: the time embedding in
# float16 instead of 12 bits; no deltas, no attention products. 4: places in time, of any unit.
# 5: weights of at most 4 bits in groups; modulations of blocks in int8 or in groups.
FORMAT_VERSION = 5
# The dictionaries of a configuration, empty where a file has none.
_TABLES = (
    *("recipe", "float16", "weight_only", "float_layers", "segments", "buckets", "reasons"),
    *("bits", "roles", "attention_errors", "network", "hashes"),
)
# Kind of a layer that is not an integer one -> the table of its name and reason.
_KINDS = {"float": "float_layers", "float16": "float16", "weight_only": "weight_only"}
# Keys of format 2 for what is no longer run; empty ones are harmless.
_REMOVED = {
    "correction": "a correction around the network",
    "delta": "layers that quantize changes between steps",
    "attention": "attention products on rounded operands",
    "sites": "quantized tensors of the sampler",
}
# The parts of a 12-bit weight in format 2: W = scale (16 high + low).
_INT12 = ("weight_high", "weight_low", "weight_scale")
_OURS = (quantized.QLayer, quantized.StoredLinear)
# Of weights of up to 4 bits from before format 5: engines keep those in groups packed.
_OLD_GROUP = 64


class _Method(str, Enum):  # noqa: UP042
    # diffusers reads `.value` of a quantization method; a plain string would not do.
    QUANTEMPO = "quantempo"


class QuantempoConfig(QuantizationConfigMixin):
    """What `quantization_config` in config.json holds; JSON types only.

    Given to `from_pretrained` with a recipe alone it quantizes a float model without data, see
    `quantize_`: `QuantempoConfig(recipe="w8a8")`.

    Args:
        recipe: the resolved recipe; to quantize with, also the name of one, a file or a `Recipe`.
        float16: name -> reason of float layers whose weights are stored in float16.
        weight_only: name -> reason of layers of float inputs whose weights are integers.
        float_layers: name -> reason of layers left in float.
        segments: name -> input channels of each segment, where there is more than one.
        buckets: name -> number of time buckets, where it is not 1; 0: a scale for every token.
        reasons: name -> why an integer layer has the scales it has, where it was measured.
        bits: name -> [weight bits, activation bits], where they are not [8, 8]; and the input
            channels that share a scale, of weights in groups (32 activation bits: float inputs).
        roles: name -> role, as measured.
        attention_errors: module -> [largest error of its attention in 8 bits, most tokens].
        times: fields of `Times`, the places in time of the clock's table.
        network: the network's own configuration as it was saved.
        hashes: SHA-256, checked at load: "tensors": of all that are saved; "settings": of the rest
            of this. "source": of the float model; "recipe".
        format_version: of this layout; a newer one is refused.
        version: of the library that wrote it.
    """

    recipe: Any

    def __init__(
        self, times: dict[str, Any] | None = None, format_version: int = FORMAT_VERSION,
        version: str = "", **given: Any,
    ) -> None:  # fmt: skip
        self.quant_method = _Method.QUANTEMPO
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise QuantempoError(
                f"this checkpoint has format_version {format_version}; this quantempo reads up to "
                f"{FORMAT_VERSION}; upgrade quantempo, or fetch the checkpoint again"
            )
        given.pop("quant_method", None)
        for name in _TABLES:
            setattr(self, name, given.pop(name, None) or {})
        if self.recipe and not isinstance(self.recipe, dict):
            self.recipe = resolved(self.recipe).to_dict()
        # Up to format 2 the layers of the time embedding had 12 bits; they are unpacked at load.
        self.float16 |= given.pop("int12", {})
        # Up to format 3 all places were evenly spaced, the first at 0.
        if times is None:
            times = {"count": given.pop("num_train_timesteps", 1000)}
            times["per_unit"] = given.pop("per_unit", 1.0)
        self.times, self.format_version, self.version = times, format_version, version
        check_times(self.times)
        for key, what in _REMOVED.items():
            if given.pop(key, None):
                raise QuantempoError(
                    f"this checkpoint has {what}, which quantempo no longer runs; quantize the "
                    "float model again, or install the version that wrote it"
                )
        if given:
            text = f"quantization_config has unknown keys {sorted(given)}"
            raise QuantempoError(f"{text}; fetch it again")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Self:
        """Return the configuration that a file holds; QuantempoError unless it is as saved."""
        with reading("quantization_config in config.json"):
            found = super().from_dict(config_dict, *args, **kwargs)
            if found.hashes.get("settings") not in (None, settings_digest(config_dict)):
                raise ValueError("it does not match its hash")
            return found

    check_files = staticmethod(check_files)

    def check_network(self, config: Mapping[str, Any]) -> None:
        """Raise QuantempoError unless this is the configuration the network was saved with."""
        for key, value in self.network.items():
            if canonical(config.get(key)) != value:
                raise QuantempoError(
                    f"config.json says {key} = {config.get(key)!r}, the checkpoint was saved with "
                    f"{value!r}; it is damaged or was edited: save or fetch it again"
                )

    @classmethod
    def of(
        cls, recipe: Recipe, plans: list[quantized.LayerPlan], *, times: quantized.Times,
        source_sha256: str,
    ) -> "QuantempoConfig":  # fmt: skip
        """Return the configuration of a denoiser quantized by plans; `plans` gives them back."""
        int8 = [p for p in plans if p.kind == "int8"]
        why: dict[str, Any] = {
            table: {p.name: p.reason or "" for p in plans if p.kind == kind}
            for kind, table in _KINDS.items()
        }
        some = [p for p in plans if p.kind == "int8" or p.group]
        bits = {p.name: [p.weight_bits, p.act_bits, *([p.group] * (p.group > 0))] for p in some}
        return cls(
            recipe=recipe.to_dict(),
            **why,
            segments={p.name: list(p.segments) for p in int8 if len(p.segments) > 1},
            buckets={p.name: p.buckets for p in int8 if p.buckets != 1},
            reasons={p.name: p.reason for p in int8 if p.reason is not None},
            bits={name: both for name, both in bits.items() if both != [8, 8]},
            roles={p.name: p.role for p in plans},
            times=asdict(times) | {"values": list(times.values)},
            hashes={"recipe": recipe.sha256, "source": source_sha256},
            version=__version__,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        found = {**self.__dict__, "quant_method": self.quant_method.value}
        # Unknown to earlier versions, which read all but a scale for every token, 8-bit attention.
        return {k: v for k, v in found.items() if v or k not in ("reasons", "attention_errors")}

    # What diffusers logs.
    to_diff_dict = to_dict

    def __repr__(self) -> str:
        return f"QuantempoConfig(format_version={self.format_version}, recipe={self.recipe})"

    def plans(self, denoiser: nn.Module) -> list[quantized.LayerPlan]:
        """Return what each layer of the (float, maybe meta) denoiser becomes."""
        plans = []
        for site in sites(denoiser):
            every = ((kind, getattr(self, table)) for kind, table in _KINDS.items())
            known = [(kind, table[site.name]) for kind, table in every if site.name in table]
            bits = self.bits.get(site.name, (8, 8))
            if known:
                plans.append(quantized.LayerPlan(site.name, known[0][0], (), 1, known[0][1], *bits))
            else:
                segments = tuple(self.segments.get(site.name, ()))
                buckets = self.buckets.get(site.name, 1)
                why = self.reasons.get(site.name)
                plans.append(quantized.LayerPlan(site.name, "int8", segments, buckets, why, *bits))
            # Folders of format 3 from before roles were measured have none.
            plans[-1] = replace(plans[-1], role=self.roles.get(site.name, site.role))
        return plans


class QuantempoQuantizer(DiffusersQuantizer):
    """Rebuild the quantized modules of a saved denoiser while diffusers loads it."""

    is_compileable = True
    is_trainable = False
    quantization_config: Any

    def __init__(self, quantization_config: QuantempoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.model: Any = None
        self._exact, self._ours = dict[str, Tensor](), dict[str, Tensor]()
        self._digests, self._lies = dict[str, str](), dict[str, Paged]()
        self._found, self._int12 = set[str](), dict[str, dict[str, Tensor]]()
        # The files that a network is written to while it is made, see `write.Shards`.
        self.shards: Any = None

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            return
        if "settings" not in config.hashes:
            log.info("an older checkpoint, without a hash of its settings: they are not verified")
        with reading("quantization_config in config.json"):
            config.check_network(model.config)
            plans = config.plans(model)
            check_plans(model, plans)
            if errors := config.attention_errors:
                mark_attention(model, errors, config.recipe["attention"]["max_error"])
        times = check_times(config.times)
        table = torch.zeros(times.count, dtype=torch.int64)
        clock = quantized.install_clock(model, table, times)
        quantized.swap_layers(model, plans, clock)
        self._ours = dict(clock.named_buffers(quantized.CLOCK_NAME))
        for prefix, module in model.named_modules():
            if isinstance(module, _OURS):
                self._ours |= dict(module.named_buffers(prefix, recurse=False))
                self._ours |= dict(module.named_parameters(prefix, recurse=False))

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep our tensors of one file (a shard or the whole) as they are on disk."""
        if not self.pre_quantized:
            return state_dict
        # Loading in bfloat16 or half would round the scales; keep them as they are on disk.
        self._digests |= {name: digest(tensor) for name, tensor in state_dict.items()}
        state_dict = self._unpacked(state_dict)
        self._found |= state_dict.keys()
        for name, tensor in state_dict.items():
            half = name.rpartition(".")[0] in self.quantization_config.float16
            check_tensor(name, tensor, self._ours.get(name), half)
            if name in self._ours:
                self._exact[name] = tensor
        return state_dict

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """Return the names that tensors have once 12-bit weights (format 2) are unpacked."""
        if not self.pre_quantized:
            return loaded_keys
        self.quantization_config.check_files(Path(checkpoint_files[0]).parent.parent)
        for file in checkpoint_files:
            self._lies |= paged_tensors(Path(file), True)
        return list(dict.fromkeys(self._part(key)[0] for key in loaded_keys))

    def _part(self, key: str) -> tuple[str, str]:
        """Return (name of the unpacked tensor, part of it or "") of a name in the file."""
        owner, _, leaf = key.rpartition(".")
        is_part = leaf in _INT12 and owner in self.quantization_config.float16
        return (f"{owner}.weight", leaf) if is_part else (key, "")

    def _unpacked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Replace the three parts of 12-bit weights by the weight, in the file with the last."""
        result = {}
        for key, tensor in state_dict.items():
            name, part = self._part(key)
            if not part:
                result[name] = tensor
                continue
            parts = self._int12.setdefault(name, {})
            parts[part] = tensor
            if len(parts) == len(_INT12):
                high, low, scale = (parts[leaf] for leaf in _INT12)
                result[name] = unpack_int12(high, low).float() * scale[:, None]
        return result

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            self.quantization_config = quantize_without_data(model, self.quantization_config)
            return self._ready(model)
        # Left alone, diffusers fills what is missing with random numbers and logs a warning.
        wanted = set(model.state_dict())
        for what, names in ("lacks", wanted - self._found), ("has unknown", self._found - wanted):
            if names:
                text = f"the checkpoint {what} {len(names)} tensors, the first is '{min(names)}'"
                raise QuantempoError(f"{text}; it is damaged: save or fetch it again")
        device = next(p.device for p in model.parameters() if p.device.type != "meta")
        layers = {f"{k}.weight_int": q for k, q in quantized.quantized_layers(model)}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if (exact := self._exact.get(name)) is None:
                # The file is not kept mapped.
                tensor.data = tensor.data.clone()
                continue
            # What is float16 in the file is computed in float32, see `Float16Linear`.
            kind = torch.float32 if exact.dtype == torch.float16 else exact.dtype
            put_buffer(model, name, exact.to(device).to(kind, copy=True))
            if name in layers and device.type == "cpu":
                layers[name].leave(self._lies[name])
        self._exact, self._ours = {}, {}
        if self.quantization_config.hashes.get("tensors") != joined(self._digests):
            text = "the tensors do not match the hash in config.json; the checkpoint is damaged or"
            raise QuantempoError(f"{text} was edited: save or fetch it again")
        check_layers(model)
        if self.quantization_config.format_version < 5:
            for name, layer in quantized.quantized_layers(model):
                if layer.weight_format.packed:
                    layer.regroup(_OLD_GROUP)
                    both = layer.weight_bits, layer.act_bits
                    self.quantization_config.bits[name] = [*both, _OLD_GROUP]
        return self._ready(model)

    def _ready(self, model: nn.Module) -> nn.Module:
        self.saves(model)
        # Not above: this module is imported while diffusers itself is, and engines know its models.
        from quantempo.engines.select import attach_lazily

        attach_lazily(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add nothing to the header of a file; config.json holds all there is to say."""
        # No entry of ours in the header: safetensors writes several (diffusers has one) in random
        # order, and equal models should be equal files.
        return state_dict, {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        raise QuantempoError("dequantize is not supported; load the float checkpoint instead")

    def saves(self, model: nn.Module) -> None:
        """Be what saves this network, with the tensors that it has now."""
        self.model, self.names = model, set(model.state_dict(keep_vars=True))

    @property
    def is_serializable(self) -> bool:
        """Saving keeps the integers. It asks first, which is when the hashes are taken."""
        if (model := self.model) is None:
            return True
        config = self.quantization_config
        model.apply(lambda module: getattr(module, "hold", bool)())
        model.register_to_config(quantization_config=config)
        network = json.loads(model.to_json_string())
        config.network = {k: v for k, v in network.items() if k[0] != "_"}
        del config.network["quantization_config"]
        config.format_version = FORMAT_VERSION
        state = model.state_dict()
        for name in sorted(self.names ^ set(state)) + [n for n, t in state.items() if t.is_meta]:
            why = "layers were added, fused or offloaded since the network was quantized; undo it"
            text = f"cannot save '{name}': {why} first"
            raise QuantempoError(f"{text} (unfuse_qkv_projections, unload_lora, remove hooks)")
        known = self.shards.digests if self.shards else {}
        known = {n: known.get(n) or digest(value) for n, value in state.items()}
        config.hashes["tensors"] = joined(known)
        config.hashes["settings"] = settings_digest(config.to_dict())
        model.register_to_config(quantization_config=config.to_dict())
        return True


def quantize_without_data(denoiser: nn.Module, config: Any, codes: Any = None) -> QuantempoConfig:
    """Quantize a denoiser in place by a recipe, see `install`; return what it is now."""
    if not has_time(denoiser):
        text = f"{type(denoiser).__name__} has no time-step; expected a denoiser"
        raise QuantempoError(f"{text}; quantempo.quantize_(module) takes any other")
    times = quantized.Times(1)
    clock = partial(quantized.install_clock, denoiser, times=times)
    return QuantempoConfig.of(
        *install(denoiser, config, clock, codes), times=times, source_sha256=""
    )


def mark_quantized(denoiser: nn.Module, config: QuantempoConfig) -> None:
    """Make `save_pretrained` write the configuration beside the weights."""
    denoiser.is_quantized = True
    denoiser.quantization_method = config.quant_method
    denoiser.hf_quantizer = QuantempoQuantizer(config)
    denoiser.hf_quantizer.saves(denoiser)


def register() -> None:
    """Add quantempo to the quantizers diffusers knows; safe to call again."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("quantempo", QuantempoConfig)
    AUTO_QUANTIZER_MAPPING.setdefault("quantempo", QuantempoQuantizer)


register()
