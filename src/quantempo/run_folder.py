"""A run folder: every stage leaves one artefact in it, written whole or not at all.

Files are written under a temporary name in the same folder and then renamed, so a half-written
file is never taken for a whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantempo.errors import QuantempoError

__all__ = [
    "RunFolder",
    "atomic_path",
    "canonical",
    "file_sha256",
    "hash_of",
    "read_tensors",
    "tensors_sha256",
]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path (file or folder) beside `path`; rename it to `path` on success.

    An existing folder at `path` is moved aside first and deleted only after the rename.

    Raises:
        QuantempoError: the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield temporary
        if path.is_dir():
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(aside)
            temporary.rename(path)
            shutil.rmtree(aside)
        else:
            temporary.replace(path)
    except OSError as error:
        raise _explain(error, path) from error
    except SafetensorError as error:
        # safetensors reports a full disk as its own error type with the system's text in it.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _explain(OSError(errno.ENOSPC, str(error)), path) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what a killed process left of `path`, and put back what it had moved aside."""
    for old in path.parent.glob(f".{path.name}.*.old"):
        if not path.exists():
            old.rename(path)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _explain(error: OSError, path: Path) -> QuantempoError:
    if error.errno == errno.ENOSPC:
        return QuantempoError(f"the disk is full while writing {path}; free some space and rerun")
    return QuantempoError(f"cannot write {path}: {error.strerror or error}; check the folder")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        # numpy knows no bfloat16, but bytes of any dtype.
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def canonical(value: Any) -> Any:
    """Return settings as JSON types: tensors, pictures by hash; numbers JSON lacks as text.

    Raises:
        TypeError: a value that is none of numbers, text, tensors, arrays, pictures and containers.
    """
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Image.Image):
        return f"image {value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, np.ndarray):
        # An array and a tensor of the same numbers mean different pictures to a pipeline.
        return f"array {tensors_sha256({'': torch.from_numpy(value)})}"
    if isinstance(value, Tensor):
        return f"tensor {tensors_sha256({'': value})}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"it holds a {type(value).__name__}")


def hash_of(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of settings; for errors see `canonical`."""
    return hashlib.sha256(json.dumps(canonical(value), sort_keys=True).encode()).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the string metadata of a safetensors file.

    Raises:
        QuantempoError: the file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise QuantempoError(f"no file {path}; run the stage that writes it first")
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return tensors, dict(stream.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise QuantempoError(
            f"{path} is damaged ({error}); delete it and rerun its stage, or fetch it again"
        ) from error


class RunFolder:
    """Name, write and read the artefacts of one run; the folder is made at the first write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def foreign(self) -> bool:
        """Return whether the folder holds anything but what a killed write left."""
        if not self.path.is_dir():
            return False
        return any(not re.fullmatch(r"\..*\.(tmp|old)", p.name) for p in self.path.iterdir())

    def has(self, name: str) -> bool:
        """Return whether the artefact is there (artefacts are only ever whole)."""
        return (self.path / name).exists()

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as indented JSON; refuses NaN (JSON has none)."""
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
        with atomic_path(self.path / name) as temporary:
            temporary.write_text(text)

    def read_json(self, name: str) -> Any:
        """Return the JSON artefact `name`.

        Raises:
            QuantempoError: missing or damaged.
        """
        path = self.path / name
        if not path.is_file():
            raise QuantempoError(f"no {name} in {self.path}; run the stage that writes it first")
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise QuantempoError(f"{path} is damaged ({error}); delete it and rerun") from error

    def write_safetensors(
        self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """Write tensors (any device; made contiguous) and string metadata."""
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with atomic_path(self.path / name) as temporary:
            save_file(whole, temporary, metadata)

    def read_safetensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of artefact `name`; see `read_tensors` for errors."""
        return read_tensors(self.path / name)[0]

    def update_manifest(self, **entries: Any) -> dict[str, Any]:
        """Merge entries into `manifest.json` (dicts one level deep) and return the whole."""
        manifest = self.read_json("manifest.json") if self.has("manifest.json") else {}
        for key, value in entries.items():
            if isinstance(value, dict) and isinstance(manifest.get(key), dict):
                manifest[key] = {**manifest[key], **value}
            else:
                manifest[key] = value
        self.write_json("manifest.json", manifest)
        return manifest
