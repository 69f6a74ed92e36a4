"""Write `study.html`: one page on a whole study, everything inlined, no script, nothing fetched.

Here: what the page says, from `study.json`, `items/NAME.json` and `pictures/`. Not here: the
figures (`study_plots`), how it looks (`study.html.j2`), any computation of scores. Reads
nothing but the study's folder.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantempo.report import load_template
from quantempo.run_folder import RunFolder, atomic_path
from studies.ptq4dm.plots import (
    Plot,
    grouped,
    is_float,
    item_plots,
    mean_of,
    read_items,
    score_names,
    spread_of,
)

__all__ = ["render_study"]

VERDICTS = ("confirmed", "tie", "mixed", "refuted", "not run")
STRIPS_SHOWN, STRIP_WIDTH = 10, 1600
NONE = "–"
FORMS = {"ssim": "{:.4f}", "kid_data": "{:.3f}"}
FACTORS = {"kid_data": 1e3}


@dataclass(frozen=True)
class ScoreTable:
    """Hold the rows of an item as text.

    head: headings after the first; groups: (name, rows) with a row as (label, settings, warning,
    cells) and a cell as (mean, spread, pooled); note: what was not measured.
    """

    head: list[str]
    groups: list[tuple[str, list[tuple[str, str, str, list[tuple[str, str, str]]]]]]
    note: str


@dataclass(frozen=True)
class Section:
    """Hold what the page says of one item; `absent` says why there is nothing."""

    id: str
    title: str
    question: str = ""
    reading: str = ""
    absent: str = ""
    figures: Sequence[Plot] = ()
    table: ScoreTable | None = None
    paper: Mapping[str, Any] | None = None
    strips: Sequence[tuple[str, str]] = ()
    strips_note: str = ""


def render_study(folder: str | Path) -> Path:
    """Write `study.html` into the folder of a study and return its path.

    Items without a file, failed cells and cells that were not run are listed as such.

    folder: of the study, with `study.json`, `items/` and `pictures/`.

    Raises QuantempoError: no study there, a damaged file in it, matplotlib or jinja2 missing.
    """
    run = RunFolder(folder)
    items = read_items(run)
    study = run.read_json("study.json")
    extractor = (study.get("settings") or {}).get("extractor")
    page = load_template("page.html.j2", "studies.ptq4dm")
    sections = [
        Section(name, name, absent=_why_absent(study, name))
        if item is None
        else _section(run, name, item, extractor)
        for name, item in items.items()
    ]
    words = ("text", "paper", "verdict", "detail")
    claims = [
        (name, {word: str(claim.get(word) or NONE) for word in words})
        for name, item in items.items()
        for claim in (item or {}).get("claims") or []
    ]
    text = page.render(
        name=study.get("name") or run.path.resolve().name,
        lead=_lead(study, items),
        tiles=_tiles(claims),
        claims=claims,
        sections=sections,
        lost=[("Failed cells", "error", study.get("failed") or []),
              ("Not run", "reason", _not_run(study, items))],
        facts=_facts(study),
    )  # fmt: skip
    target = run / "study.html"
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def _section(run: RunFolder, name: str, item: Mapping[str, Any], extractor: str | None) -> Section:
    strips, note = _strips(run, item)
    return Section(
        id=name,
        title=f"{name} · {item['title']}" if item.get("title") else name,
        question=item.get("question") or "",
        reading=item.get("reading") or "",
        figures=item_plots(item, extractor),
        table=_table(item, extractor),
        paper=_paper(item.get("paper")),
        strips=strips,
        strips_note=note,
    )


def _why_absent(study: Mapping[str, Any], name: str) -> str:
    rows = [row for row in study.get("not_run") or [] if row["item"] == name]
    reasons = list(dict.fromkeys(str(row["reason"]) for row in rows))
    return (
        "; ".join(reasons)
        or f"items/{name}.json is missing: python -m studies.ptq4dm --only {name}"
    )


def _not_run(
    study: Mapping[str, Any], items: Mapping[str, Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """Return what the study lists as not run, and the items that left no file at all."""
    rows = list(study.get("not_run") or [])
    listed = {row["item"] for row in rows}
    absent = [name for name, item in items.items() if item is None and name not in listed]
    return rows + [
        {"item": name, "row": "all", "reason": _why_absent(study, name)} for name in absent
    ]


def _lead(study: Mapping[str, Any], items: Mapping[str, Mapping[str, Any] | None]) -> str:
    rows = [row for item in items.values() if item is not None for row in item.get("rows") or []]
    parts = [f"{len(rows)} rows in {sum(item is not None for item in items.values())} items"]
    if lost := len(study.get("failed") or []):
        parts.append(f"{lost} failed")
    if study.get("seconds") is not None:
        parts.append(_duration(float(study["seconds"])))
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _tiles(claims: Sequence[tuple[str, Mapping[str, str]]]) -> list[tuple[str, str, int]]:
    """Return (CSS class, verdict, count) of each verdict."""
    found = [claim["verdict"] for _, claim in claims]
    return [(name.replace(" ", "-"), name, found.count(name)) for name in VERDICTS]


def _number(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return a score and its spread as text; a dash for what is missing or not finite."""
    mean, spread = mean_of(row, key), spread_of(row, key)
    if mean is None:
        return ("identical" if key == "psnr_db" and row.get("identical") else NONE), ""
    form, factor = FORMS.get(key, "{:.2f}"), FACTORS.get(key, 1.0)
    return form.format(mean * factor), "" if spread is None else form.format(spread * factor)


def _settings(row: Mapping[str, Any]) -> str:
    """Return what a row is made of as one line: sampler, law, source, metric, N, bits, layers."""
    images, seeds, kept = row.get("images"), row.get("seeds"), row.get("float_layers")
    parts: list[str | None] = [
        row.get("sampler"),
        *(row.get(key) for key in ("bits", "law", "source", "metric")),
        f"N {row['samples']:,}" if row.get("samples") is not None else None,
        f"{kept} float layer{'' if kept == 1 else 's'}" if kept is not None else None,
    ]
    if images is not None and seeds:
        even = seeds > 1 and images % seeds == 0
        parts.append(f"{seeds} × {images // seeds:,} images" if even else f"{images:,} images")
    return " · ".join(str(part) for part in parts if part not in (None, ""))


def _lost(row: Mapping[str, Any]) -> str:
    """Say how many repetitions of a row failed and how many were not run."""
    failed = row.get("failed") or 0
    parts = ((failed, "failed"), ((row.get("missing") or 0) - failed, "not run"))
    return ", ".join(f"{count} {word}" for count, word in parts if count > 0)


def _table(item: Mapping[str, Any], extractor: str | None) -> ScoreTable | None:
    groups, names = grouped(item), score_names(extractor)
    rows = [row for part in groups.values() for row in part]
    if not rows:
        return None
    # A column stays if one row has a number, or a reason for having none.
    keys = [key for key in names if any(_number(row, key)[0] != NONE for row in rows)]
    keys = [key for key in names if key in keys or any(_pooled(row, key) for row in rows)]
    absent = [
        names[key].rstrip("↑↓").replace("\N{NO-BREAK SPACE}", " ").strip()
        for key in names
        if key not in keys
    ]
    table = [
        (
            name,
            [
                (
                    str(row.get("label", "")),
                    _settings(row),
                    _lost(row),
                    [(*_number(row, key), _pooled(row, key)) for key in keys],
                )
                for row in part
            ],
        )
        for name, part in groups.items()
    ]
    notes = ["± one standard deviation over seeds; images are seeds × images of each."]
    if any(_pooled(row, key) for row in rows for key in keys):
        notes.append("Pooled: one score of the images of all seeds together (so many).")
    if any(is_float(row) and mean_of(row, "fed_float") is not None for row in rows):
        notes.append("To float, the float row shows what other seeds alone make.")
    if absent:
        notes.append(f"Not measured here: {', '.join(absent)}.")
    return ScoreTable([names[key] for key in keys], table, " ".join(notes))


def _pooled(row: Mapping[str, Any], key: str) -> str:
    pooled = row.get("pooled") or {}
    # Only the two distances are pooled; "images" counts.
    known = key in ("fed_float", "fed_data")
    value = mean_of({key: {"mean": pooled.get(key)}}, key) if known else None
    return "" if value is None else f"pooled {value:.2f} ({pooled['images']:,})"


def _paper(paper: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if not paper:
        return None
    rows = [[NONE if cell is None else str(cell) for cell in row] for row in paper["rows"]]
    return {"caption": paper.get("caption") or "", "head": paper["head"], "rows": rows}


def _strips(run: RunFolder, item: Mapping[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """Return (label, data address) of the pictures of an item, the float model's first."""
    groups = grouped(item)
    rows = [(name, row) for name, part in groups.items() for row in part if row.get("picture")]
    rows.sort(key=lambda entry: not is_float(entry[1]))
    strips, lost = [], 0
    for name, row in rows[:STRIPS_SHOWN]:
        path = run / row["picture"]
        if not path.is_file():
            lost += 1
            continue
        label = str(row.get("label", ""))
        several = len(groups) > 1 and name
        strips.append((f"{label}, {name}" if several else label, _address(path)))
    note = "Uncurated: the first seeds, the same ones in every row."
    if len(rows) > STRIPS_SHOWN:
        note += f" {STRIPS_SHOWN} of {len(rows)} rows."
    if lost:
        note += f" Files of {lost} more are missing."
    return strips, note if rows else ""


def _address(path: Path) -> str:
    """Return a picture as a data address, reduced if it is wider than any page shows it."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    if image.width > STRIP_WIDTH:
        height = max(1, round(image.height * STRIP_WIDTH / image.width))
        image = image.resize((STRIP_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _facts(study: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    keys = ("model", "data", "settings", "machine", "versions")
    return [(key.capitalize(), _lines(study.get(key)) or [("", "none")]) for key in keys]


def _lines(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return a JSON value as (name, text), nested names joined by a space."""
    if isinstance(value, Mapping):
        return [
            line for key, inner in value.items() for line in _lines(inner, f"{name} {key}".strip())
        ]
    if value is None:
        return [(name, NONE)] if name else []
    if isinstance(value, list | tuple):
        return [(name, ", ".join(_phrase(name, inner) for inner in value) or NONE)]
    return [(name, _phrase(name, value))]


def _phrase(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if "seed" not in name else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    # Where a folder lay on the machine of the study says nothing to a reader.
    last = name.rpartition(" ")[2]
    return Path(value).name if last in ("path", "folder", "out", "data") else str(value)
