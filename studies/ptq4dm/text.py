"""The text of a study in Markdown, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantempo.run_folder import RunFolder

__all__ = ["study_text"]

COLUMNS = {"psnr_db": ("PSNR dB", 2), "ssim": ("SSIM", 4), "sqnr_db": ("SQNR dB", 2)}
COLUMNS |= {"fed_float": ("fed to float", 2), "fed_data": ("fed to data", 2), "is": ("is", 2)}


def study_text(folder: str | Path) -> str:
    """Return the claims of all items with their verdicts, then the table of each item."""
    run = RunFolder(folder)
    about = run.read_json("study.json")
    names = [name for name in about["items"] if run.has(f"items/{name}.json")]
    items = [run.read_json(f"items/{name}.json") for name in names]
    lines = [*_head(about), "", "## Claim by claim", "", *_claims(items)]
    for item in items:
        lines += ["", f"## {item['name']}. {item['title']}", "", item["question"], ""]
        if run.has(f"items/{item['name']}.svg"):
            lines += [f"![{item['title']}](items/{item['name']}.svg)", ""]
        lines += _table(item["rows"])
        if item["paper"]:
            lines += ["", f"The paper: {item['paper']['caption']}.", ""]
            lines += _grid(item["paper"]["head"], item["paper"]["rows"])
    lines += ["", "## Not run", ""]
    missing = [f"- {e['item']}: {e['row']} ({e['reason']})" for e in about["not_run"]]
    missing += [f"- {e['item']}: {e['row']} failed: {e['error']}" for e in about["failed"]]
    return "\n".join([*lines, *(missing or ["Everything ran."])]) + "\n"


def _head(about: dict[str, Any]) -> list[str]:
    settings, model = about["settings"], about["model"]
    return [
        f"# Study of {model['path']}",
        "",
        f"{model['class']}, {model['parameters']:,} parameters. Rows vary the recipe "
        f"`{settings['recipe']}` by one thing; main sampler {settings['sampler']}; "
        f"{settings['images']:,} images for T3 and for T5 under the main sampler, "
        f"{settings['images_other']:,} for every other row, divided among {settings['seeds']} "
        f"seeds; {settings['calibration_inputs']} calibration inputs unless said otherwise. "
        f"Extractor {settings['extractor']}: its distances are no FIDs. Reference: "
        f"{about['data']['images']:,} images ({about['data']['source']}).",
        "",
        "A verdict compares repetitions with equal seeds: *tie* means that the 95 % interval of "
        "their mean difference holds zero, *mixed* that the measures contradict each other. Equal "
        "rows are told apart by chance in 5 % of comparisons by one measure, in up to 10 % by two. "
        "Distances of fewer than 200 images a seed judge nothing.",
    ]


def _claims(items: list[dict[str, Any]]) -> list[str]:
    rows = [
        (item["name"], claim["text"], claim["paper"], f"**{claim['verdict']}**", claim["detail"])
        for item in items
        for claim in item["claims"]
    ]
    return _grid(("item", "claim", "the paper", "verdict", "numbers"), rows)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    shown = {k: v for k, v in COLUMNS.items() if any(row[k] for row in rows)}
    fixed = ("group", "label", "bits", "law", "metric", "samples", "float_layers")
    used = [key for key in fixed if any(row[key] not in (None, "") for row in rows)]
    head = [*(key.replace("_", " ") for key in used), *(name for name, _ in shown.values())]
    body = []
    for row in rows:
        cells = ["–" if row[key] in (None, "") else str(row[key]) for key in used]
        cells += [_value(row[key], digits) for key, (_, digits) in shown.items()]
        body.append([*cells, f"{row['images']} x {row['sampler']}"])
    return _grid([*head, "images"], body)


def _value(value: dict[str, Any] | None, digits: int) -> str:
    if not value:
        return "–"
    spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def _grid(head: Any, rows: Any) -> list[str]:
    clean = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    rule = "|" + "---|" * len(head)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in clean)]
