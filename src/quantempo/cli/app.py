"""The typer application, and the border where user mistakes become exit code 2."""

from __future__ import annotations

import logging
import sys
import traceback

import typer

from quantempo.cli import (
    bench,
    demo,
    evaluate,
    inspect,
    quantize,
    report,
    sample,
    sensitivity,
    stages,
)
from quantempo.errors import QuantempoError

__all__ = ["app", "main"]

app = typer.Typer(
    name="quantempo",
    help=(
        "Quantize diffusion models to integers, time-step by time-step.\n\n"
        "Start with: quantempo demo"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _verb in (
    quantize.quantize,
    *stages.STAGES,
    sample.sample,
    evaluate.evaluate,
    report.report,
    inspect.inspect,
    sensitivity.sensitivity,
    bench.bench,
    demo.demo,
):
    app.command(_verb.__name__)(_verb)


@app.callback()
def _options(
    quiet: bool = typer.Option(False, "--quiet", help="Only results and errors."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Also what each block became."),
    debug: bool = typer.Option(False, "--debug", help="Where an error came from, before its line."),
) -> None:
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("quantempo").setLevel(level)


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    # Of the program, but people give it after the verb.
    debug = "--debug" in sys.argv
    sys.argv[1:] = [text for text in sys.argv[1:] if text != "--debug"]
    try:
        app()
    except QuantempoError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
