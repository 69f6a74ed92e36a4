"""quantempo report."""

from __future__ import annotations

from quantempo.cli.common import Json, Run, show

__all__ = ["report"]


def report(run: Run, as_json: Json = False) -> None:
    """Write RUN/report.html, one self-contained page, from the files of the run folder.

    Example: quantempo report --run runs/cifar
    """
    from quantempo.report import render

    show({"report": str(render(run))}, as_json)
