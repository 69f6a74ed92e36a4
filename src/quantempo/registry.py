"""One explicit name -> object table per kind of plug-in."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Generic, TypeVar

from quantempo.errors import QuantempoError

__all__ = ["Registry", "check_known", "nearest"]

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    match = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def check_known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise QuantempoError for the first name that is not known: `what`, the name, the known."""
    known = list(known)
    if (name := next((name for name in names if name not in known), None)) is not None:
        listed = ", ".join(known) or "none"
        raise QuantempoError(f"{what} '{name}'{nearest(name, known)} (expected one of: {listed})")


class Registry(Generic[T]):
    """Map names that a recipe may use to what they stand for; kind: for messages, "metric" say."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under `name` (each name once)."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry called `name`; QuantempoError lists the known ones and the nearest."""
        check_known([name], self._entries, f"unknown {self.kind}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the registered names in the order of registration."""
        return list(self._entries)
