"""Tell how blocks are called from what the one before got and returned, and layers in a block."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.models.layers import hooked, input_of

__all__ = ["Link", "links", "steps"]


class Link(NamedTuple):
    """How a block is called: which leaves of (output, call) of the one before its own are.

    A call is (args, kwargs). tree: structure of the block's; before: of what the leaves are from.
    """

    last: str
    before: Any
    places: tuple[int, ...]
    tree: Any

    def follow(self, output: Any, call: Any) -> Any:
        """Return the call of the block, None where the one before was called otherwise."""
        leaves, tree = pytree.tree_flatten((output, call))
        own = [leaves[i] for i in self.places] if tree == self.before else None
        return own and pytree.tree_unflatten(own, self.tree)


def links(modules: Mapping[str, nn.Module], calls: Iterable[Callable[[], Any]]) -> dict[str, Link]:
    """Return the link of each of the modules that has one, the same in all calls of the network.

    Its tensors are, as objects, among those that the one before it got and returned, unchanged
    since and not transposed; other arguments equal those of the same name.
    """
    first, *others = (_links(modules, call) for call in calls)
    return {name: link for name, link in first.items() if all(o.get(name) == link for o in others)}


@torch.no_grad()
def _links(modules: Mapping[str, nn.Module], call: Callable[[], Any]) -> dict[str, Link]:
    found, seen = dict[str, Link](), [""]
    # (path, leaf, version) of what the module called last was given, behind what it returned.
    known, before = list[tuple[Any, Any, Any]](), None

    def note(leaves: Any) -> list[tuple[Any, Any, Any]]:
        return [(path, leaf, getattr(leaf, "_version", None)) for path, leaf in leaves]

    def see(name: str, _: nn.Module, *call: Any) -> None:
        nonlocal known, before
        if name not in seen:
            leaves, tree = pytree.tree_flatten_with_path(call)
            same = ([i for i, old in enumerate(known) if _same(*old, *leaf)] for leaf in leaves)
            places = [i for (i, *_) in filter(None, same)]
            if before and leaves and len(places) == len(leaves):
                found[name] = Link(seen[-1], before, tuple(places), tree)
            seen.append(name)
            known, before = note(leaves), None
        elif name == seen[-1] and before is None and len(call) > 2:
            before = pytree.tree_structure((call[2], call[:2]))
            known = note([(None, leaf) for leaf in pytree.tree_leaves(call[2])]) + known

    with hooked(modules, see, before=True), hooked(modules, see):
        call()
    return found


def _same(path: Any, old: Any, version: Any, place: Any, leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        steps = leaf.stride()
        return old is leaf and version == leaf._version and [*steps] == sorted(steps)[::-1]
    return path == place and type(old) is type(leaf) and old == leaf


@torch.no_grad()
def steps(layers: Mapping[str, nn.Module], call: Callable[[], Any]) -> list[list[str]]:
    """Return the layers in steps: what those of one receive does not depend on each other.

    It stays as it is in a call in which the outputs of this step and all later ones are noise.
    """
    chance, result, left = torch.Generator().manual_seed(0), list[list[str]](), dict(layers)

    def inputs(noisy: Mapping[str, nn.Module]) -> dict[str, list[float]]:
        found: dict[str, Tensor] = {}

        def see(name: str, _: nn.Module, *call: Any) -> None:
            x = input_of(*call).double()
            found.setdefault(name, torch.stack([x.sum(), x.norm()]))

        def disturb(*seen: Any) -> None:
            seen[4].copy_(torch.randn(seen[4].shape, generator=chance))

        noise = hooked(noisy, disturb)
        with hooked(layers, see, before=True), noise:
            call()
        # One wait for the device.
        return dict(zip(found, torch.stack([*found.values()]).cpu().tolist(), strict=True))

    exact = inputs({})
    while left:
        seen = inputs(left)
        # The first receives what none of them made.
        result.append([n for n in left if seen.get(n) == exact.get(n)] or [*left][:1])
        left = {name: layer for name, layer in left.items() if name not in result[-1]}
    return result
