"""SHA-256 of what a packed folder holds: its tensors, its settings, the files beside them."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantempo.errors import QuantempoError
from quantempo.run_folder import file_sha256, hash_of, reading

__all__ = ["check_files", "digest", "joined", "seal", "settings_digest"]

# Of a packed pipeline: SHA-256 of each file beside the network, by its path.
_FILES = "quantempo.json"


def check_files(folder: Path, end: str = "") -> None:
    """Raise QuantempoError unless the files of this end beside a network are as packed."""
    if not (folder / _FILES).is_file():
        return
    with reading(folder / _FILES):
        listed = json.loads((folder / _FILES).read_text())
        known = {name: text for name, text in listed.items() if name.endswith(end)}
        for name, digest in known.items():
            if not (folder / name).is_file() or file_sha256(folder / name) != digest:
                text = f"{folder / name} is not what was packed; fetch it again"
                raise QuantempoError(f"{text}, and change a loaded pipeline rather than its files")


def seal(folder: Path, component: str) -> None:
    """Write the hashes of all files beside a packed network, without where the float model lay."""
    for file in sorted(folder.rglob("*.json")):
        with suppress(ValueError):
            values = json.loads(file.read_text())
            if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    known = {n: file_sha256(f) for n, f in found.items() if not n.startswith(f"{component}/")}
    (folder / _FILES).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def joined(digests: dict[str, str]) -> str:
    """Return the SHA-256 of all tensors from that of each."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def settings_digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a quantization configuration without its hashes."""
    return hash_of({key: value for key, value in config.items() if key != "hashes"})
