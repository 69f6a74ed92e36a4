"""Share work over the processes of one `torchrun`; without it every function gives back its input.

A unit of work is done whole by one rank, and what they found is joined in an order that does not
depend on how many there are: no sum does. It passes through the host, whatever the devices.
"""

import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantempo.errors import QuantempoError

__all__ = [
    "alone", "everyone", "joined", "last_words", "merged", "mine", "part", "rank", "start", "told",
]  # fmt: skip

# How long others are waited for: packing is done by one.
_PATIENCE = timedelta(hours=1)
_AGAIN = "run the same command again, with any number of processes: what is finished is kept"
K = TypeVar("K")
V = TypeVar("V")


class _Job:
    """The processes that work together, what they are at, and (machine, process) of each."""

    rank, size, doing = 0, 1, "load"
    store: Any = None
    places: tuple[tuple[str, int], ...] = ()


_job = _Job()


def start() -> None:
    """Join the processes of the `torchrun` that started this one; each takes a GPU of its own."""
    given = os.environ
    if given["WORLD_SIZE"] == "1":
        return
    import torch.distributed as dist

    if given["LOCAL_WORLD_SIZE"] == given["WORLD_SIZE"]:
        # All on this machine, whose name need not have an address.
        given.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if count := torch.cuda.device_count():
        torch.cuda.set_device(int(given["LOCAL_RANK"]) % count)
    signal.signal(signal.SIGTERM, _stopped)
    _job.store, _job.rank, _job.size = next(iter(dist.rendezvous("env://")))
    how: dict[str, Any] = {"rank": _job.rank, "world_size": _job.size, "store": _job.store}
    dist.init_process_group("gloo", timeout=_PATIENCE, **how)
    _job.places = tuple(everyone((given["GROUP_RANK"], os.getpid())))


def _stopped(*_: Any) -> None:
    """Raise QuantempoError: which rank ended before the others, if it was on this machine."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # `torchrun` sees an end later than we do, and only then the number of the process is free.
    time.sleep(0.5)
    who = "another process ended, or the job was stopped,"
    for number, (machine, process) in enumerate(_job.places):
        if machine == os.environ["GROUP_RANK"]:
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                who = f"rank {number} of {_job.size} ended"
                break
    raise QuantempoError(f"{who} during {_job.doing}; {_AGAIN}")


def last_words(text: str) -> str:
    """Return the sentence with which this rank ends the job, "" if another one has said why."""
    if not alone():
        with suppress(RuntimeError):
            if _job.store.add("told", 1) > 1:
                return ""
        if _job.rank and _AGAIN not in text:
            return f"rank {_job.rank}: {text}"
    return text


def alone() -> bool:
    """Return whether this is the only process."""
    return _job.size == 1


def rank() -> int:
    """Return the number of this process, 0 where it is alone."""
    return _job.rank


def mine(items: Iterable[V], costs: Iterable[float] | None = None) -> list[V]:
    """Return the units of work that fall to this rank, about as much as to any other."""
    every = list(items)
    weights = [1.0] * len(every) if costs is None else list(costs)
    falling = sorted(range(len(every)), key=lambda i: -weights[i])
    return [every[i] for i in sorted(falling[_job.rank :: _job.size])]


def part(items: Sequence[V]) -> Sequence[V]:
    """Return the neighbours among units of work that fall to this rank; see `joined`."""
    first, last = (len(items) * i // _job.size for i in (_job.rank, _job.rank + 1))
    return items[first:last]


def everyone(value: V) -> list[V]:
    """Return what every rank gave, its tensors on the host; all wait for each other here."""
    if alone():
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * _job.size
    here = pytree.tree_map_only(Tensor, lambda v: v.detach().cpu(), value)
    try:
        dist.all_gather_object(found, here)
    except RuntimeError as error:
        if "imed out" in str(error):
            text = f"another process has been silent for {_PATIENCE} during {_job.doing}"
            raise QuantempoError(f"{text}; {_AGAIN}") from error
        if "gloo" not in str(error):
            raise
        _stopped()
    return found


def merged(found: Mapping[K, V]) -> dict[K, V]:
    """Return what all ranks found, by unit of work."""
    return {key: value for some in everyone(found) for key, value in some.items()}


def joined(found: Iterable[V]) -> list[V]:
    """Return what all ranks found for their `part`, in the order of the units."""
    return list(chain.from_iterable(everyone(list(found))))


def told(value: V, then: str = "") -> V:
    """Return the first rank's value to all of them; then: what they do next."""
    (first, *_) = everyone(value if _job.rank == 0 else None)
    _job.doing = then or _job.doing
    return first  # type: ignore[return-value]
