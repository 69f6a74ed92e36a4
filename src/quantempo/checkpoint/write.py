"""Write a quantized network and its pipeline to disk, one tensor in memory at a time."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from quantempo.checkpoint.hashes import digest
from quantempo.checkpoint.weights import save_weights
from quantempo.core.instance import put_buffer
from quantempo.core.paged import Paged, laid_out, small
from quantempo.errors import QuantempoError
from quantempo.run_folder import Kept

__all__ = ["Shards", "save_network", "save_pipeline"]

# As `save_pretrained` has them.
_SHARD = "10GB"
_FILE = "diffusion_pytorch_model{suffix}.safetensors"


class Shards:
    """The files of a quantized network, written layer by layer; what a killed run wrote is found.

    state: all tensors, of any device and values; kept: the digests of those that are written.
    """

    def __init__(
        self, folder: Path, state: dict[str, Tensor], kept: Kept | None = None, name: str = ""
    ) -> None:
        self.folder, self.kept, self.name = folder, kept or Kept(), name
        self.places, self.digests = dict[str, Paged](), dict[str, str]()
        self.known: dict[str, str] = self.kept.read(name)[0] or {}
        folder.mkdir(parents=True, exist_ok=True)
        split = split_state_dict_into_shards_factory(
            state, get_storage_size=lambda value: value.nbytes, filename_pattern=_FILE,
            max_shard_size=_SHARD,
        )  # fmt: skip
        for file, names in split.filename_to_tensors.items():
            part = {name: state[name] for name in names}
            self.places |= laid_out(folder / file, part, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)

    def store(self, name: str, layer: nn.Module, old: Any, fill: Callable[[], None]) -> None:
        """Fill a layer and write it, or read what is written of it; page it if the old one is."""
        empty = layer.state_dict(prefix=f"{name}.")
        if all(key in self.known and digest(self.places[key]) == self.known[key] for key in empty):
            state = {key.rpartition(".")[2]: self.places[key].load() for key in empty}
            layer.load_state_dict(state)
            self.digests |= {key: self.known[key] for key in empty}
        else:
            fill()
            self.write(layer.state_dict(prefix=f"{name}."))
        for leaf, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if isinstance(old.weight, Paged) and not small(value):
                place = self.places[f"{name}.{leaf}"]
                put_buffer(layer, leaf, place.like(value.dtype, value.device))

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Write tensors that are not written yet."""
        for key in state.keys() - self.digests.keys():
            self.places[key].put(state[key])
            self.digests[key] = digest(state[key])
        self.kept.write(self.name, self.digests, {}, last=False)


def save_network(network: Any, to: str | Path) -> None:
    """Write a quantized network as its `save_pretrained` does, the same files byte for byte.

    But for those that its layers were written to, `hf_quantizer.shards`, where there are any.
    """
    state = network.state_dict()
    shards = network.hf_quantizer.shards or Shards(Path(to), state)
    shards.write(state)
    # Asking takes the hashes.
    if not network.hf_quantizer.is_serializable:
        raise QuantempoError(f"got a {type(network).__name__} that cannot be saved; quantize anew")
    network.save_config(to)


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
    # Last: what fails above leaves them to who tries again.
    for name, network in networks.items():
        for file in network.hf_quantizer.shards.folder.iterdir():
            file.rename(to / name / file.name)
