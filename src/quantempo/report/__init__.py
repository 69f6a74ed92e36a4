"""Turn the files of a run folder, and nothing else, into one page to be read, printed and sent.

`answers`: the first screen; `sections`: the rest; `*.j2`: how it looks, everything inlined. Its
script sorts tables; without it the page shows the same.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantempo.errors import QuantempoError
from quantempo.report.answers import optional
from quantempo.report.bits import bits_cell
from quantempo.report.card import write_card
from quantempo.report.pictures import seeds_of, write_pairs
from quantempo.report.sections import SECTIONS, NotRunError
from quantempo.run_folder import RunFolder, atomic_path, reading

__all__ = ["load_template", "render"]


def load_template(name: str, package: str = "quantempo.report") -> Any:
    """Return a template of a package, which may include those of this one; text is escaped."""
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise QuantempoError("the report needs jinja2; pip install 'quantempo[report]'") from error
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(p, ".") for p in (package, "quantempo.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(run_path: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path; `pairs.png` if there are samples.

    Sections without files say "not run" and by which command.
    Raises QuantempoError: no such folder, a damaged file in it, matplotlib or jinja2 missing.
    """
    run = RunFolder(run_path)
    alone = not run.is_run and not run.has("samples/float")
    if not run.path.is_dir() or (alone and run.foreign()):
        raise QuantempoError(f"no run folder {run.path}; pass the folder of a run (--run)")
    page, body = load_template("report.html.j2"), load_template("section.html.j2")
    from jinja2 import UndefinedError

    sections = []
    for name, title, build in SECTIONS:
        try:
            with reading(f"a file of {run.path} for the section '{title}'"):
                try:
                    shown = body.render(blocks=build(run), bits_cell=bits_cell)
                except UndefinedError as error:
                    raise LookupError(error) from error
            sections.append({"id": name, "title": title, "body": shown, "absent": ""})
        except NotRunError as reason:
            sections.append({"id": name, "title": title, "body": "", "absent": reason.args})
    with reading(f"a file of {run.path}"):
        title, about = _head(run)
    text = page.render(title=title, about=about, sections=sections)
    target = run / "report.html"
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    samples = (run / "samples/float", run / "samples/int8")
    if seeds_of(*samples):
        with atomic_path(run / "pairs.png") as temporary:
            write_pairs(*samples, temporary)
    if "pack" in run.stages() and os.access(run / "packed", os.W_OK):
        write_card(run, run / "packed")
    return target


def _head(run: RunFolder) -> tuple[str, list[str]]:
    """Return "model · recipe", and the folder with the date and machine of its last measurement."""
    model, manifest = optional(run, "model.json"), optional(run, "manifest.json")
    # Resolved, so that a run given as "." still has a name.
    folder, named = run.path.resolve().name, manifest.get("recipe", {}).get("name")
    title = " · ".join(filter(None, (model and Path(model["path"]).name, named))) or folder
    written = [(run / f).stat().st_mtime for f in ("metrics.json", "manifest.json") if run.has(f)]
    dates = [f"{datetime.fromtimestamp(time, UTC):%d %B %Y}" for time in sorted(written)[-1:]]
    here = optional(run, "metrics.json").get("machine") or manifest.get("machine") or {}
    keys = ("", "gpu"), ("", "cpu"), ("threads: ", "threads")
    where = [f"{text}{here[key]}" for text, key in keys if here.get(key)]
    return title, [f"run folder {folder}", *dates, *where]
