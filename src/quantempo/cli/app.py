"""The typer application, and the border where user mistakes become exit code 2."""

import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import typer

from quantempo import __version__
from quantempo.cli import export, measure, samples, stages, status
from quantempo.errors import MISTAKES, sentence

__all__ = ["app", "cpu_quota", "main"]

_DOC = "Quantize diffusion models to integers, time-step by time-step.\n\nStart by: quantempo demo"
app = typer.Typer(name="quantempo", help=_DOC, no_args_is_help=True, pretty_exceptions_enable=False)
for _verb in (
    stages.quantize, *stages.STAGES, samples.sample, samples.evaluate, status.report,
    status.inspect, status.status, status.engines, status.push, measure.sensitivity, measure.bench,
    measure.compare, export.export, export.import_, stages.demo,
):  # fmt: skip
    # Paragraphs as one line each: the terminal breaks them.
    _text = [" ".join(part.split()) for part in (_verb.__doc__ or "").split("\n\n")]
    app.command(_verb.__name__.rstrip("_"), help="\n\n".join(_text))(_verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantempo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    quiet: bool = typer.Option(False, "--quiet", help="Only results and errors."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Also what each block became."),
    debug: bool = typer.Option(False, "--debug", help="Where an error came from, before its line."),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_version, help="Print it."
    ),
) -> None:
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("quantempo").setLevel(level)
    if not verbose:
        # What the libraries below warn of while they load, before they are imported.
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the whole CPUs that the control group (version 2 or 1) grants, None for no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except OSError:
        names = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
        try:
            quota, period = ((root / name).read_text().strip() for name in names)
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return max(1, math.ceil(int(quota) / int(period)))


@contextmanager
def _joined() -> Iterator[None]:
    """Work with the other processes of a `torchrun`, if any; the first of them alone prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    from quantempo.core import ranks

    ranks.start()
    with open(os.devnull, "w") as no:
        out, err = (no, no) if ranks.rank() else (sys.stdout, sys.stderr)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield
        except SystemExit as error:
            if error.code == 2:
                # None ends before the first one has said which option is wrong.
                ranks.told(None)
            raise


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    # Of the program, but people give it after the verb.
    debug = "--debug" in sys.argv
    sys.argv[1:] = [text for text in sys.argv[1:] if text != "--debug"]
    # Before torch is imported: it counts the cores of the machine, not those of its container.
    quota = cpu_quota()
    if quota is not None and quota < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))
    try:
        try:
            with _joined():
                app()
        finally:
            # A full disk or a closed pipe is met here, not when the interpreter ends.
            sys.stdout.flush()
    except MISTAKES as error:
        if debug:
            traceback.print_exc()
        text = sentence(error)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from quantempo.core import ranks

            text = ranks.last_words(text)
        sys.stderr.write(f"error: {text}\n" if text else "")
        if isinstance(error, OSError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(2)
