"""What the studies' commands share: options, messages, and the border for user mistakes.

Not `quantempo.cli`, so that a study needs no package that the library itself does not need.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from quantempo.errors import MISTAKES, sentence

__all__ = ["at_least", "call_of", "command", "names_of", "parser", "process_state", "show"]

BUNDLED = Path(str(files("quantempo"))) / "data" / "ddpm-cifar10-9m"


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of integers that refuses smaller ones."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"got {value}; expected at least {least}")
        return value

    read.__name__ = "integer"
    return read


def parser(name: str, about: str, example: str, out: str, part: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every study has; `part` is what --only names."""
    made = argparse.ArgumentParser(
        prog=f"python -m studies.{name}",
        description=about,
        epilog=f"Example: python -m studies.{name} {example}",
    )
    add = made.add_argument
    add("source", nargs="?", default=str(BUNDLED), help="float diffusers pipeline; the bundled one")
    add("--out", type=Path, default=Path(out), help="folder of the study")
    add("--data", help="folder of real images")
    add("--only", help=f"{part}, comma-separated, in this order")
    add("--prompts", type=Path, help="text file, one prompt a line, for text models")
    add("--class-labels", help="comma-separated labels, for class models")
    add("--device", default="cpu", help="torch device, cpu or cuda")
    add("--batch-size", type=at_least(1), help="images a call")
    add("--tf32", action="store_true", help="float products in TF32, of both models")
    add("--minutes", type=float, help="start nothing after that")
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--quiet", action="store_true", help="only results and errors")
    return made


def names_of(only: str | None) -> tuple[str, ...]:
    """Return the names in --only."""
    return tuple(name.strip() for name in only.split(",")) if only else ()


def call_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the further arguments of the pipeline's call."""
    if given.prompts is None and given.class_labels is None:
        return {}
    from quantempo.cli.common import call_arguments

    return call_arguments(given.prompts, given.class_labels)


def show(values: dict[str, Any], as_json: bool) -> None:
    """Print results on stdout, as JSON or one line each."""
    lines = [f"{key}  {value}" for key, value in values.items()]
    print(json.dumps(values) if as_json else "\n".join(lines))


def command(parse: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Run a study; a user's mistake is one sentence on stderr and exit code 2."""
    given = parse.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    level = logging.ERROR if given.quiet else logging.INFO
    logging.getLogger("quantempo").setLevel(level)
    try:
        code = run(given)
    except MISTAKES as error:
        sys.stderr.write(f"error: {sentence(error)}\n")
        code = 2
    sys.exit(code)


@contextmanager
def process_state(tf32: bool) -> Iterator[None]:
    """Set for a while what holds for the whole process: TF32, and room for all compiled networks.

    tf32: let float32 products run in TF32.
    """
    matmul, cudnn, dynamo = torch.backends.cuda.matmul, torch.backends.cudnn, torch._dynamo.config
    before = (matmul.allow_tf32, cudnn.allow_tf32, dynamo.recompile_limit)
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    # One code object for all: float, and a copy of every structure.
    dynamo.recompile_limit = 64
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, dynamo.recompile_limit = before
