"""The arguments of a pipeline's call: read from text and files, kept in a run folder, merged.

The manifest keeps numbers and text, and hashes of all else, kept in `call.safetensors`.
"""

import ast
import glob
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils import _pytree as pytree

from quantempo.errors import QuantempoError
from quantempo.models.call import kind_of
from quantempo.run_folder import RunFolder, canonical, read_tensors, reading, tensors_sha256

__all__ = [
    *("kept_arguments", "merged", "read_arguments", "read_call", "read_settings", "read_text"),
    *("write_call", "write_settings"),
]

_FILE = "call.safetensors"


def read_text(path: Path, expected: str) -> str:
    """Return the text of a user's file; QuantempoError says what was `expected` instead."""
    if not os.path.isfile(path):
        raise QuantempoError(f"no file '{path}'; expected {expected}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise QuantempoError(f"cannot read '{path}': {error}; expected {expected}") from error


def read_arguments(file: Path | None, settings: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of a TOML file and, over them, of `key=value` texts.

    A value is a literal of TOML or Python, None or none, a picture or several ("folder/*.png"), a
    tensor ("file.safetensors"), else text. Files are looked for beside the TOML file, then here.
    Raises QuantempoError: not TOML, not key=value, or a file that is not there or not readable.
    """
    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(read_text(file, "a TOML file of arguments"))
        except tomllib.TOMLDecodeError as error:
            raise QuantempoError(f"{file} is not valid TOML: {error}") from error
    for text in settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key.isidentifier():
            raise QuantempoError(f"got --set {text}; expected key=value: --set height=32")
        table[key] = _literal(key, value)
    folder = file.parent if file else Path()
    return {key: _found(key, value, folder) for key, value in table.items()}


def _literal(key: str, text: str) -> Any:
    """Return the value of --set KEY=TEXT."""
    bracket = text[:1] in ("[", "{", "(", '"', "'")
    # A prompt may be a number, and hold a "#".
    if not bracket and ("#" in text or (kind_of(key) == "text" and key != "class_labels")):
        return text
    for read in (lambda: tomllib.loads(f"x = {text}")["x"], lambda: ast.literal_eval(text)):
        try:
            return read()
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    if bracket:
        raise QuantempoError(f"got --set {key}={text}; expected a list or text as in TOML: [1, 2]")
    return text


def _found(key: str, value: Any, folder: Path) -> Any:
    """Replace names of files by what they hold, and "None", which TOML lacks, by None."""
    if isinstance(value, list):
        # Several patterns are one list of pictures.
        parts = [(entry, _found(key, entry, folder)) for entry in value]
        many = [p if isinstance(p, list) and isinstance(e, str) else [p] for e, p in parts]
        return [entry for part in many for entry in part]
    if not isinstance(value, str) or value in ("None", "none"):
        return value if not isinstance(value, str) else None
    name, kind, tensor = value.partition(".safetensors")
    if kind and tensor[:1] in ("", ":") and kind_of(key) != "text":
        return _tensor(key, _paths(name + kind, folder)[0], tensor[1:])
    suffixes = Image.registered_extensions()
    images = kind_of(key) in ("image", "film") or Path(value).suffix.lower() in suffixes
    if not images or kind_of(key) == "text":
        return value
    # The pictures of a folder, of a pattern, or one.
    pattern = value if Path(value).suffix else f"{value}/*"
    paths = [path for path in _paths(pattern, folder) if path.suffix.lower() in suffixes]
    found = [_picture(path) for path in paths]
    return found if glob.has_magic(pattern) else found[0]


def _paths(pattern: str, folder: Path) -> list[Path]:
    """Return the files of a pattern, sorted, beside the file that names it or else here."""
    for root in (folder, Path()) if "\0" not in pattern else ():
        given = str(root / pattern)
        if found := [given] if os.path.isfile(given) else sorted(glob.glob(given)):
            return [Path(path) for path in found]
    raise QuantempoError(f"no file '{pattern}' in {folder.resolve()}; give one that is there")


def _picture(path: Path) -> Image.Image:
    """Open a picture as diffusers does: upright, in colours."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise QuantempoError(f"cannot read '{path}' ({error}); expected a picture") from error


def _tensor(key: str, path: Path, name: str) -> Tensor:
    tensors = read_tensors(path)[0]
    name = name or (key if key in tensors or len(tensors) != 1 else next(iter(tensors)))
    if name not in tensors:
        text = f"{path} holds no '{name}' but {', '.join(sorted(tensors))}"
        raise QuantempoError(f"{text}; name one: {key}={path.name}:NAME")
    return tensors[name]


def kept_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call in types that a run folder keeps: numpy numbers as Python's.

    Raises QuantempoError: one that it cannot keep (a generator, say), or pictures of several sizes.
    """
    found = {}
    for name, value in call.items():
        try:
            found[name] = pytree.tree_map(_plain, value)
            canonical(found[name])
        except TypeError as error:
            raise QuantempoError(
                f"cannot keep the argument '{name}' of the call ({error}); expected numbers, "
                "text, tensors, arrays, pictures (PIL), or lists and dictionaries of them"
            ) from error
        leaves = pytree.tree_leaves(found[name])
        if len(sizes := {leaf.size for leaf in leaves if isinstance(leaf, Image.Image)}) > 1:
            text = f"the pictures of '{name}' have several sizes, {sorted(sizes)}"
            raise QuantempoError(f"{text}; resize them to one")
    return found


def _plain(value: Any) -> Any:
    """Return one number, text, tensor, array or picture in the type that is kept."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind == "U" else np.ascontiguousarray(value)
    # A palette is not among the pixels.
    palette = isinstance(value, Image.Image) and value.mode in ("P", "PA")
    return value.convert("RGB") if palette else value


def write_call(run: RunFolder, call: dict[str, Any]) -> Any:
    """Return the arguments of a call as JSON types; write their tensors to `call.safetensors`."""
    tensors: dict[str, Tensor] = {}

    def noted(value: Any) -> Any:
        about: dict[str, Any] = {"kind": type(value).__name__}
        if isinstance(value, Image.Image):
            about = {"kind": "image", "mode": value.mode, "size": list(value.size)}
            value = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        elif isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        elif not isinstance(value, Tensor):
            # As text, for JSON has no infinity.
            return repr(value)
        digest = tensors_sha256({"": value})
        # Cloned: safetensors refuses tensors that share memory.
        tensors[digest] = value.detach().clone()
        return about | {"sha256": digest}

    leaves, tree = pytree.tree_flatten_with_path(call)
    plain = [[pytree.keystr(path), noted(leaf)] for path, leaf in leaves]
    if tensors:
        run.write_safetensors(_FILE, tensors)
    return {"leaves": plain, "tree": pytree.treespec_dumps(tree)}


def write_settings(folder: Path, call: Mapping[str, Any]) -> None:
    """Write the arguments that are not of an image into a packed folder, for its samples."""
    store = RunFolder(folder)
    settings = {name: value for name, value in call.items() if not kind_of(name)}
    store.write_json("call.json", write_call(store, settings))


def read_settings(folder: str) -> dict[str, Any] | None:
    """Return what `write_settings` wrote; None where nothing was packed."""
    store = RunFolder(folder)
    if not folder or not store.has("call.json"):
        return None
    with reading(store / "call.json"):
        return dict(read_call(store, store.read_json("call.json")))


def read_call(run: RunFolder, plain: Any) -> dict[str, Any]:
    """Undo `write_call`; QuantempoError where the file of the tensors is another one now."""
    if "leaves" not in plain:
        # Of a version that kept numbers and text as they are.
        return plain
    tensors = run.read_safetensors(_FILE) if run.has(_FILE) else {}

    def read(about: Any) -> Any:
        if isinstance(about, str):
            return float(about) if about in ("inf", "-inf", "nan") else ast.literal_eval(about)
        found = tensors.get(about["sha256"])
        if found is None or tensors_sha256({"": found}) != about["sha256"]:
            raise QuantempoError(f"{run / _FILE} is damaged; start the run again with its call")
        if about["kind"] == "image":
            return Image.frombytes(about["mode"], tuple(about["size"]), found.numpy().tobytes())
        return found.numpy() if about["kind"] == "ndarray" else found

    leaves = [read(about) for _, about in plain["leaves"]]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(plain["tree"]))


def merged(traced: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a run's arguments with others over them; prompt and embeddings replace each other."""
    over, other = kept_arguments(given or {}), {"text": "rows", "rows": "text"}
    dropped = {other.get(kind_of(key) or "") for key in over if "prompt" in key} - {None}
    kept = {k: v for k, v in traced.items() if "prompt" not in k or kind_of(k) not in dropped}
    return {**kept, **over}
