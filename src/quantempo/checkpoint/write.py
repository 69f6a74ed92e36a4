"""Write a quantized network and its pipeline to disk, one tensor in memory at a time."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from huggingface_hub import split_state_dict_into_shards_factory

from quantempo.checkpoint.weights import save_weights
from quantempo.core.paged import save_tensors
from quantempo.errors import QuantempoError

__all__ = ["save_network", "save_pipeline"]

# As `save_pretrained` has them.
_SHARD = "10GB"
_FILE = "diffusion_pytorch_model{suffix}.safetensors"


def save_network(network: Any, to: str | Path) -> None:
    """Write a quantized network as its `save_pretrained` does, the same files byte for byte."""
    folder = Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    # Asking takes the hashes.
    if not network.hf_quantizer.is_serializable:
        raise QuantempoError(f"got a {type(network).__name__} that cannot be saved; quantize anew")
    network.save_config(folder)
    state = network.state_dict()
    split = split_state_dict_into_shards_factory(
        state, get_storage_size=lambda value: value.nbytes, filename_pattern=_FILE,
        max_shard_size=_SHARD,
    )  # fmt: skip
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: state[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)


def save_pipeline(
    pipe: Any, networks: Mapping[str, Any], copies: Mapping[str, Callable[[str], None]], to: Path,
    also: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write a pipeline with other, quantized networks; `copies` write those of its components.

    also: components of which the weights are to be int8.
    """
    savers = {**copies, **{name: partial(save_network, part) for name, part in networks.items()}}
    savers |= {name: partial(save_weights, getattr(pipe, name)) for name in also}
    with ExitStack() as stack:
        for name, network in networks.items():
            stack.enter_context(patch.object(pipe, name, network))
        for name, save in savers.items():
            # The scheduler may be another one; a tokenizer remembers how it was called last.
            part = getattr(pipe, name, None)
            if part is not None and part is not pipe.scheduler:
                stack.enter_context(patch.object(part, "save_pretrained", save))
        pipe.save_pretrained(to)
