"""Damage packed folders, recipes and command lines, seeded: `python -m tests.fuzz [SCALE]`.

Every case ends in one sentence (`refused`), in the undamaged image (`same`) or, where nothing was
damaged that decides one, as asked (`ran`). Anything else is a failure, named by its number: an
exception that is not ours, another image without a word, or `LIMIT` seconds without an end.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from quantempo.errors import QuantempoError
from tests.fuzz import commands, folders, recipes

# Name -> (cases, what runs one).
KINDS: dict[str, tuple[int, Callable[[Random, Path], str]]] = {
    "folders": (300, folders.case),
    "recipes": (300, recipes.case),
    "commands": (150, commands.case),
}
GOOD = ("refused", "same", "ran", "valid, too large to run")
LIMIT = 120


@contextlib.contextmanager
def alone(seconds: int) -> Iterator[Path]:
    """Yield an empty working folder; raise TimeoutError in it after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end in {seconds} s")

    here, before = Path.cwd(), signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory(prefix="quantempo-fuzz-") as folder:
        place = Path(folder, "a", "b", "c")
        place.mkdir(parents=True)
        os.chdir(place)
        signal.alarm(seconds)
        try:
            yield place
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            os.chdir(here)


def run(kind: str, number: int) -> str:
    """Return how a case ends: one of GOOD, or what went wrong."""
    case = KINDS[kind][1]
    quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    with alone(LIMIT) as place, quiet[0], quiet[1]:
        try:
            return case(Random(f"{kind} {number}"), place)
        except QuantempoError as error:
            return "refused" if "\n" not in str(error) else f"several lines: {error}"
        except Exception:
            return traceback.format_exc()


def main() -> int:
    """Run all cases, or every n-th for the scale n, and print how they ended."""
    logging.disable(logging.WARNING)
    step, failed = int(sys.argv[1]) if len(sys.argv) > 1 else 1, 0
    for kind, (count, _) in KINDS.items():
        ends: Counter[str] = Counter()
        for number in range(0, count, step):
            end = run(kind, number)
            ends[end if end in GOOD else "failed"] += 1
            if end not in GOOD:
                failed += 1
                print(f"{kind} {number}: {end}", flush=True)
        print(kind, dict(ends), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
