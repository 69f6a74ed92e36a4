"""Where the rows of a batch are in the arguments of a call, measured on calls of two sizes.

What grows with the rows (a dimension of a tensor, a list, a number) holds them; all else is shared.
Values are nested tuples, lists and dicts and keep their types.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.errors import QuantempoError
from quantempo.models.layers import hooked
from quantempo.run_folder import tensors_sha256

__all__ = ["LISTED", "Law", "Place", "alike", "by_row", "dump", "join", "laws", "load", "mapped"]
__all__ += ["kind_of", "measure", "take"]


class UnmeasuredError(QuantempoError):
    """An argument that is not as in the measured calls."""


class Place(NamedTuple):
    """The rows of a tensor (along `dim`), list or number, with `each` entries a row.

    tiled: entry k of row r of n is number k n + r, not r `each` + k.
    """

    dim: int
    each: int
    tiled: bool = False

    def split(self, value: Any) -> Any:
        """Return the rows of a tensor, (n, ...), or those of a list."""
        if not isinstance(value, Tensor):
            return [value[i : i + self.each] for i in range(0, len(value), self.each)]
        sizes = (self.each, -1) if self.tiled else (-1, self.each)
        return value.unflatten(self.dim, sizes).movedim(self.dim + self.tiled, 0)

    def merged(self, rows: Sequence[Any], like: Any) -> Any:
        """Return what `split` was given, a value like another one."""
        if isinstance(rows, Tensor):
            return rows.movedim(0, self.dim + self.tiled).flatten(self.dim, self.dim + 1)
        return _like(like, [item for row in rows for item in row])


# By path (`[0]['added'][1]`); None for a tensor that all rows share.
Law = dict[str, Place | None]
# In the law of a `TraceBatch` whose x_t the network takes as a list of its rows.
LISTED = "x_t[]"


def _like(sequence: Any, items: list[Any]) -> Any:
    return sequence._make(items) if hasattr(sequence, "_make") else type(sequence)(items)


def _places(value: Any) -> Any:
    return value if isinstance(value, dict) else range(len(value))


def mapped(law: Law, leaf: Callable[..., Any], path: str, first: Any, *others: Any) -> Any:
    """Return `first` with leaf(path, value, *others' values) for its leaves; rows are leaves."""
    if path in law or not isinstance(first, dict | list | tuple):
        return leaf(path, first, *others)
    items = {
        i: mapped(law, leaf, f"{path}[{i!r}]", first[i], *(other[i] for other in others))
        for i in _places(first)
    }
    return items if isinstance(first, dict) else _like(first, list(items.values()))


def _sizes(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return list(value.shape)
    return [len(value)] if isinstance(value, list | tuple) else [value] * (type(value) is int)


def measure(small: Any, large: Any, index: Tensor, rows: int, path: str = "") -> Law:
    """Return where the rows are, from a call of `rows` rows and one of `index` (n,) of them.

    Raises QuantempoError: a value that changes otherwise than by whole rows.
    """
    few, many = _sizes(small), _sizes(large)
    same = type(small) is type(large) and len(few) == len(many)
    changed = [i for i, (a, b) in enumerate(zip(few, many, strict=False)) if a != b]
    sizes = [(few[i], many[i]) for i in changed]
    each = sizes[0][0] // len(index) if sizes else 0
    if same and each > 0 and sizes == [(each * len(index), each * rows)]:
        place = Place(changed[0], each)
        if each > 1 and isinstance(small, Tensor) and not small.is_meta:
            both = (place, place._replace(tiled=True))
            near, far = ((take({"": p}, large, index).double() - small).nan_to_num() for p in both)
            place = both[int(far.abs().sum() < near.abs().sum())]
        return {path: place}
    if not isinstance(small, Tensor | dict | list | tuple):
        return {}
    if same and not changed and isinstance(small, Tensor):
        return {path: None}
    if same and not changed and list(_places(small)) == list(_places(large)):
        pairs = ((i, small[i], large[i]) for i in _places(small))
        parts = [measure(a, b, index, rows, f"{path}[{i!r}]") for i, a, b in pairs]
        return {key: place for part in parts for key, place in part.items()}
    raise UnmeasuredError(
        f"the argument {path} of a network is a {type(small).__name__} of {few} for {len(index)} "
        f"rows and a {type(large).__name__} of {many} for {rows}; expected one that grows with the "
        "rows or stays as it is"
    )


def take(law: Law, value: Any, index: Tensor) -> Any:
    """Return the value of a call of the rows `index` (k,) int64 alone, repeats allowed."""

    def leaf(path: str, value: Any) -> Any:
        place = law.get(path)
        if place is None or value is None:
            return value
        if isinstance(value, int):
            return place.each * len(index)
        rows = place.split(value)
        if isinstance(value, Tensor):
            # Waits for the device where rows lie on the host: read while it is on its way, the
            # index would be garbage.
            return place.merged(rows.index_select(0, index.to(value.device)), value)
        return place.merged([rows[i] for i in index.tolist()], value)

    return mapped(law, leaf, "", value)


def join(law: Law, values: Sequence[Any]) -> Any:
    """Return the value of one call of all rows of some calls of equal key, see `alike`."""

    def leaf(path: str, *values: Any) -> Any:
        place = law.get(path)
        if place is None or values[0] is None:
            return values[0]
        if isinstance(values[0], int):
            return sum(values)
        if isinstance(values[0], Tensor):
            return place.merged(torch.cat([place.split(value) for value in values]), values[0])
        return place.merged(values, values[0])

    return mapped(law, leaf, "", *values)


def alike(law: Law, value: Any, rows: int) -> list[tuple[str, Tensor]]:
    """Return the rows (k,) of a call by a hash of all else, their shapes too: equal, they join.

    Raises UnmeasuredError: a tensor that was not measured, or whose rows are elsewhere.
    """
    found: list[Any] = []
    shapes: list[list[Any]] = [[] for _ in range(rows)]

    def see(path: str, value: Any) -> None:
        place, sizes = law.get(path), _sizes(value)
        if place is not None and sizes[place.dim :][:1] == [place.each * rows]:
            del sizes[place.dim]
            found.append([path, str(getattr(value, "dtype", "")), sizes])
            if isinstance(value, list | tuple):
                for own, entries in zip(shapes, place.split(value), strict=True):
                    own.extend(list(entry.shape) for entry in entries if isinstance(entry, Tensor))
        elif value is not None and (place or (isinstance(value, Tensor) and path not in law)):
            raise UnmeasuredError(
                f"the argument {path} of a network, {sizes} for {rows} rows, was not measured like "
                "this: it changes between calls in a way that cannot be recorded"
            )
        elif isinstance(value, Tensor):
            found.append([path, tensors_sha256({"": value})])
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            found.append([path, type(value).__name__, value if plain else None])

    mapped(law, see, "", value)
    groups: dict[str, list[int]] = {}
    for row, own in enumerate(shapes):
        key = hashlib.sha256(json.dumps(found + own).encode()).hexdigest()
        groups.setdefault(key, []).append(row)
    if len(groups) > 1 and any(0 in shape for own in shapes for shape in own):
        raise QuantempoError("got an empty text for some images; give each one, also a negative")
    return [(key, torch.tensor(index)) for key, index in groups.items()]


def kind_of(laws: Sequence[Law], call: Any, rows: int) -> tuple[int, str]:
    """Return the number of the law of a call, and its key under that."""
    for number, law in enumerate(laws[:-1]):
        with suppress(UnmeasuredError):
            return number, alike(law, call, rows)[0][0]
    return len(laws) - 1, alike(laws[-1], call, rows)[0][0]


def by_row(law: Law, value: Any, rows: int, path: str) -> list[Tensor]:
    """Return the floating tensors in the value at a path, in order, (rows, n) each."""
    found: list[Tensor] = []

    def see(path: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            place = law[path]
            split = value.expand(rows, *value.shape) if place is None else place.split(value)
            found.append(split.reshape(rows, -1))

    mapped(law, see, path, value)
    return found


@torch.no_grad()
def laws(
    modules: Mapping[str, nn.Module], run: Callable[[Tensor], Any], rows: Tensor
) -> dict[str, Law]:
    """Return where the rows are in what each module is first called with, and in its output.

    Paths start with [0] for positional arguments, [1] for the others, [2] for the output. run: call
    the network on rows of these numbers; rows: (n,) of a call, which is compared with one of n + 1
    rows, the first of them twice.
    """
    found: dict[str, Law] = {}

    def calls(index: Tensor, how: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def see(name: str, module: nn.Module, *call: Any) -> None:
            if name not in seen:
                seen[name] = pytree.tree_map_only(Tensor, how, call)

        with hooked(chosen, see):
            run(index)
        return seen

    chosen, more = dict(modules), torch.cat([rows, rows[:1]])
    # Shapes take no memory; values are needed where a row has several entries.
    for how in (lambda value: value.to("meta"), Tensor.clone):
        small, large = calls(rows, how), calls(more, how)
        for name, call in small.items():
            found[name] = measure(call, large[name], torch.arange(len(rows)), len(more))
        several = {n for n, law in found.items() if any(p and p.each > 1 for p in law.values())}
        if not several:
            break
        chosen = {name: modules[name] for name in several}
    return found


def dump(value: Any, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Return a nested value in JSON types (or QuantempoError), its tensors put into `tensors`."""
    leaves, tree = pytree.tree_flatten_with_path(value)
    found = []
    for path, leaf in leaves:
        place = name + pytree.keystr(path)
        if isinstance(leaf, Tensor):
            tensors[place] = leaf.contiguous()
        elif not (leaf is None or isinstance(leaf, bool | int | float | str)):
            raise QuantempoError(
                f"the denoiser's argument {place} is a {type(leaf).__name__}, which cannot be "
                "recorded; expected tensors, numbers, text, or containers of them"
            )
        found.append([place] if isinstance(leaf, Tensor) else leaf)
    return {"leaves": found, "tree": pytree.treespec_dumps(tree)}


def load(value: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Return what `dump` was given."""
    leaves = [tensors[v[0]] if isinstance(v, list) else v for v in value["leaves"]]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(value["tree"]))
