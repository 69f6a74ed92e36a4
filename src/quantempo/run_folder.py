"""A run folder: every stage leaves one artefact in it, written whole or not at all."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantempo.core import ranks
from quantempo.core.paged import paged_tensors, save_tensors
from quantempo.errors import QuantempoError, log

__all__ = [
    "Kept", "RunFolder", "atomic_path", "canonical", "file_sha256", "hash_of", "private_folder",
    "read_tensors", "reading", "tensors_sha256",
]  # fmt: skip

_ASIDE = "aside"
# Times what a `Kept` file took to write that pass before it is written again.
_PAUSE = 20
# What is written bit by bit carries its hash itself; those of stages stand in the manifest.
_SEALED, _SEAL = ("sensitivity.json", "metrics.json", "bench.json"), "json_sha256"
# Artefact -> the verb that writes it; `quantize` starts a run and goes on with one.
_WRITTEN_BY = {"metrics.json": "evaluate", "bench.json": "bench", "sensitivity.json": "sensitivity"}
# What reading a broken file raises.
_DAMAGE = (SafetensorError, OSError, ValueError, RuntimeError)


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn what reading a file, cut or edited since it was written, raises into one sentence."""
    try:
        yield
    except QuantempoError:
        raise
    except (*_DAMAGE, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        text = f"{what} is damaged ({reason}); delete it and rerun what writes it"
        raise QuantempoError(f"{text}, or fetch it again") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path (file or folder) beside `path`; rename it to `path` on success.

    What is there is moved aside first. Raises QuantempoError where the disk is full or refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            _settle(temporary, folder)
            if path.is_dir():
                path.rename(folder / _ASIDE)
            temporary.replace(path)
    except OSError as error:
        raise _explain(error, path) from error
    except SafetensorError as error:
        # safetensors reports a full disk as its own error type with the system's text in it.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _explain(OSError(errno.ENOSPC, str(error)), path) from error
        raise


@contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` in which it is made, and remove it at the end.

    Those that killed processes left are removed first, and what they had moved aside is put back;
    those of living ones stay: a folder is held as long as its process lives.
    """
    name = path.name[:60]
    for left in path.parent.glob(f".{escape(name)}.*.tmp"):
        if (held := _hold(left, wait=False)) is not None:
            if (left / _ASIDE).exists() and not path.exists():
                (left / _ASIDE).rename(path)
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    held = None
    while held is None:
        folder = Path(tempfile.mkdtemp(".tmp", f".{name}.", path.parent))
        # None if another process took it for a dead one's before it was held.
        held = _hold(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _hold(folder: Path, wait: bool = True) -> int | None:
    """Return a descriptor that holds a folder until it is closed or the process ends, or None."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # A file system without locks: nobody is waited for, and nothing of others removed.
        if not wait or error.errno == errno.EWOULDBLOCK:
            os.close(held)
            return None
    if folder.exists():
        return held
    os.close(held)
    return None


def _settle(made: Path, folder: Path) -> None:
    """Give files the mode of any new file (safetensors has its own) and put them on the disk."""
    (folder / _ASIDE).touch()
    mode = (folder / _ASIDE).stat().st_mode & 0o777
    (folder / _ASIDE).unlink()
    for file in [made, *made.rglob("*")]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def _explain(error: OSError, path: Path) -> QuantempoError:
    if error.errno == errno.ENOSPC:
        return QuantempoError(f"the disk is full while writing {path}; free some space and rerun")
    return QuantempoError(f"cannot write {path}: {error.strerror or error}; check the folder")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    """Return settings as JSON types, else TypeError: tensors and pictures by hash, inf as text."""
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
    """Return the tensors and the metadata of a safetensors file, else QuantempoError."""
    if not path.is_file():
        raise QuantempoError(f"no file {path}; run the stage that writes it first")
    with reading(path), safe_open(path, framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        return tensors, dict(stream.metadata() or {})


class RunFolder:
    """Name, write and read the artefacts of one run; the folder is made at the first write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_run(self) -> bool:
        """Whether a run was started here, be it that it was killed at once."""
        return self.has("model.json") or self.has("manifest.json")

    def foreign(self) -> bool:
        """Return whether the path holds anything but what a killed write left, or is a file."""
        if not (self.has("") and self.path.is_dir()):
            return self.has("")
        return any(not re.fullmatch(r"\..*\.(tmp|old)", p.name) for p in self.path.iterdir())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, made if need be; wait for another process that does, not one of us."""
        if ranks.rank():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explain(error, self.path) from error
        held = _hold(self.path, wait=False)
        if held is None:
            log.warning("waiting for another process, which works in %s", self.path)
            held = _hold(self.path)
        try:
            yield
        finally:
            if held is not None:
                os.close(held)

    def stages(self) -> dict[str, Any]:
        """Return stage -> {"key", "seconds", "sha256" of files by name} of what is done here."""
        if not self.has("manifest.json"):
            return {}
        stages = self.read_json("manifest.json")
        with reading(self / "manifest.json"):
            return {name: dict(entry) for name, entry in stages["stages"].items()}

    def has(self, name: str) -> bool:
        """Return whether the artefact is there (artefacts are only ever whole)."""
        try:
            return (self.path / name).exists()
        except OSError as error:
            raise _explain(error, self.path / name) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as indented JSON, the first rank alone; refuses NaN (JSON has none)."""
        sealed = {**value, _SEAL: hash_of(value)} if name in _SEALED else value
        text = json.dumps(sealed, indent=1, allow_nan=False) + "\n"
        if not ranks.rank():
            with atomic_path(self.path / name) as temporary:
                temporary.write_text(text)

    def read_json(self, name: str) -> Any:
        """Return the JSON artefact `name`; QuantempoError where it is missing or damaged."""
        path = self.path / name
        if not path.is_file():
            verb = _WRITTEN_BY.get(name, "quantize MODEL")
            text = f"no {name} in {self.path}"
            raise QuantempoError(f"{text}; run quantempo {verb} --run {self.path} first")
        if name != "manifest.json":
            self._compare(name)
        with reading(path):
            value = json.loads(path.read_text())
            known = value.pop(_SEAL, None) if name in _SEALED else None
            if known not in (None, hash_of(value)):
                raise ValueError("it does not match its hash")
            return value

    def _compare(self, name: str) -> None:
        """Raise QuantempoError unless a file is what its stage wrote, if the manifest knows it."""
        with reading(self / "manifest.json"):
            for stage, entry in self.stages().items():
                if entry.get("sha256", {}).get(name) not in (None, file_sha256(self / name)):
                    text = f"{self / name} is not what {stage} wrote, it was damaged or edited"
                    raise QuantempoError(f"{text}; delete it and rerun {stage}")

    def write_safetensors(
        self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *,
        everyone: bool = False,
    ) -> None:  # fmt: skip
        """Write tensors (any device; made contiguous) and metadata; but for `everyone`, rank 0."""
        if everyone or not ranks.rank():
            with atomic_path(self.path / name) as temporary:
                save_tensors(temporary, tensors, metadata)

    def read_safetensors(self, name: str, *, paged: bool = False) -> dict[str, Tensor]:
        """Return the tensors of artefact `name`, `Paged` or not; see `read_tensors` for errors."""
        if self.has(name):
            self._compare(name)
            if paged:
                with reading(self / name):
                    return {**paged_tensors(self / name)}
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


@dataclass
class Kept:
    """What a loop of a stage has found so far, for whoever starts it again after a kill."""

    folder: RunFolder | None = None
    key: str = ""
    due: float = 0

    def read(self, name: str) -> tuple[Any, dict[str, Tensor]]:
        """Return what was written last, whole and under this key, else (None, {})."""
        with suppress(QuantempoError):
            if self.folder is not None and self.folder.has(name):
                tensors, about = read_tensors(self.folder / name)
                if about.get("key") == hash_of([self.key, about.get("note"), tensors]):
                    return json.loads(about["note"]), tensors
        return None, {}

    def every(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of what all ranks wrote last, `name`-0, `name`-1 and so on."""
        files = () if self.folder is None else sorted(self.folder.path.glob(f"{name}-*"))
        return {key: value for f in files for key, value in self.read(f.name)[1].items()}

    def write(self, name: str, note: Any, tensors: dict[str, Tensor], last: bool = True) -> None:
        """Keep how far a loop is, in JSON types, and its tensors; not `last`: if it is due."""
        if self.folder is not None and (last or time.monotonic() > self.due):
            start, text = time.monotonic(), json.dumps(note)
            about = {"note": text, "key": hash_of([self.key, text, tensors])}
            self.folder.write_safetensors(name, tensors, about, everyone=True)
            self.due = time.monotonic() + _PAUSE * (time.monotonic() - start)
