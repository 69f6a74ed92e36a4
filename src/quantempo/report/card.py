"""The model card in `packed/`, as the hub shows it, from the files of a run folder."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantempo.errors import QuantempoError
from quantempo.report.bits import bits_facts, bits_label
from quantempo.report.pictures import seeds_of, write_pairs
from quantempo.run_folder import RunFolder, atomic_path, reading

__all__ = ["push", "write_card"]

# Where a card does not know its own name on the hub.
_PLACE = "path/to/this/folder"
_FRONT = re.compile(r"\A---\n.*?^---\n", re.S | re.M)
_NAMES_SHOWN = 8
_SCORES = (
    ("PSNR to the float images, mean", "psnr_db_mean", "{:.2f} dB"),
    ("PSNR, worst 5 % of images", "psnr_db_p05", "{:.2f} dB"),
    ("SSIM, mean", "ssim_mean", "{:.4f}"),
    ("SQNR, mean", "sqnr_db_mean", "{:.2f} dB"),
    ("Fréchet distance to the float images (EfficientNet-Lite0, no FID)", "fed_lite0", "{:.3g}"),
)


def write_card(run: RunFolder, folder: Path, name: str = _PLACE) -> None:
    """Write README.md into a packed folder; its front matter, once there, stays as it is.

    name: what `from_pretrained` is to be given. Results are those of what is packed now.
    """
    card = folder / "README.md"
    with reading(f"a file of {run.path} for the model card"):
        model, manifest = run.read_json("model.json"), run.read_json("manifest.json")
        rows = run.read_json("layers.json")
        about = _of_source(model)
        front = _FRONT.search(card.read_text()) if card.is_file() else None
        head = front[0] if front else _front(model, about, bits_label(rows))
        metrics = run.read_json("metrics.json") if run.has("metrics.json") else {}
        packed_by = run.stages().get("pack", {}).get("key")
        if not packed_by or metrics.get("packed_key") != packed_by:
            metrics = {}
        parts = [
            f"# {about['title']}, {bits_label(rows)}\n",
            f"`{model['class']}` of {model['parameters']:,} parameters, quantized by quantempo "
            f"{manifest['versions']['quantempo']}, recipe `{manifest['recipe']['name']}`.\n"
            f"Base model: {about['base'] or about['title']}; its licence holds here too.\n",
            "```python\nimport quantempo  # first: it tells diffusers of the format\n"
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{name}")\n```\n',
            *_results(run, metrics, folder),
            "## Layers\n", *(f"- {kind}: {text}" for kind, text in bits_facts(rows, None)), "",
            *_in_float(rows),
            f"## Recipe\n\n```toml\n{manifest['recipe_toml'].strip()}\n```",
        ]  # fmt: skip
    with atomic_path(card) as temporary:
        temporary.write_text(head + "\n" + "\n".join(parts) + "\n", encoding="utf-8")


def _of_source(model: dict[str, Any]) -> dict[str, str]:
    """Return title, hub name ("" for none) and lines on the licence of the float model."""
    path, base, licence = Path(model["path"]), "", ""
    if not path.is_dir():
        base = model["path"]
    with suppress(OSError, ValueError, AttributeError):
        base = base or json.loads((path / "model_index.json").read_text()).get("_name_or_path", "")
    with suppress(OSError, ValueError):
        front = _FRONT.search((path / "README.md").read_text())
        licence = "\n".join(re.findall(r"^license.*:.*$", front[0], re.M)) if front else ""
    base = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    return {"title": base.rpartition("/")[2] or path.name, "base": base, "licence": licence}


def _front(model: dict[str, Any], about: dict[str, str], label: str) -> str:
    tags = ["quantempo", "quantized", label.lower(), f"diffusers:{model['pipeline']}"]
    lines = ["library_name: diffusers", about["licence"]]
    if about["base"]:
        lines += [f"base_model: {about['base']}", "base_model_relation: quantized"]
    lines += ["tags:", *(f"  - {tag}" for tag in tags)]
    return "\n".join(["---", *filter(None, lines), "---", ""])


def _results(run: RunFolder, metrics: dict[str, Any], folder: Path) -> list[str]:
    """Return the table with its conditions, and the pictures, which are written beside the card."""
    if not metrics:
        return ["## Results\n\nNot evaluated.\n"]
    sizes = metrics["bytes_packed"], metrics["bytes_float32"]
    rows = [("size, of float32", "{:.1f} of {:.1f} MB".format(*(size / 1e6 for size in sizes)))]
    rows += [(text, form.format(metrics[k])) for text, k, form in _SCORES if k in metrics]
    seeds, shown, here = metrics["seeds"], [], metrics["machine"]
    where = here.get("gpu") or f"{here['cpu']} (threads: {here['threads']})"
    folders = run / "samples/float", run / "samples/int8"
    if seeds_of(*folders):
        with atomic_path(folder / "pairs.png") as temporary:
            write_pairs(*folders, temporary)
        shown = ["![float above, quantized below, same seeds](pairs.png)\n"]
    return [
        "## Results\n",
        "| measured | |\n|---|---|",
        *(f"| {text} | {value} |" for text, value in rows),
        f"\nSeeds {seeds[0]} to {seeds[-1]} for both models, {metrics['sampler']}, "
        f"{metrics['steps']} steps, engine `{metrics['engine']}`, on {where}.\n",
        *shown,
    ]


def _in_float(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what stays in float and why, layers of one reason in one line."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row["buckets"] is None:
            by_reason.setdefault(row["reason"] or "", []).append(f"`{row['name']}`")
    lines = ["## In float\n", "| layers | why |", "|---|---|"]
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        lines.append(f"| {', '.join(names[:_NAMES_SHOWN])}{more} | {reason} |")
    return [*lines, ""]


def push(run_path: str | Path, name: str, *, private: bool = False) -> str:
    """Upload `packed/` of a run with a fresh card by the hub's own client; return its address.

    Raises QuantempoError: nothing is packed there, no token, no network, a name that is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    run = RunFolder(run_path)
    if not run.has("packed") or "pack" not in run.stages():
        raise QuantempoError(f"nothing is packed in {run.path}; run quantempo quantize first")
    hub = HfApi()
    try:
        made = hub.create_repo(name, private=private, exist_ok=True)
        write_card(run, run / "packed", made.repo_id)
        hub.upload_folder(repo_id=made.repo_id, folder_path=run / "packed")
    except QuantempoError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        text = f"cannot upload to '{name}' ({reason})"
        raise QuantempoError(
            f"{text}; check name and network, log in with hf auth login"
        ) from error
    return str(made)
