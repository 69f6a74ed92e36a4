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

_FRONT = re.compile(r"\A---\n.*?^---\n", re.S | re.M)
# Names of layers for each reason.
_SHOWN = 8
_SCORES = (
    ("PSNR to the float images, mean", "psnr_db_mean", "{:.2f} dB"),
    ("PSNR, worst 5 % of images", "psnr_db_p05", "{:.2f} dB"),
    ("SSIM, mean", "ssim_mean", "{:.4f}"),
    ("SQNR, mean", "sqnr_db_mean", "{:.2f} dB"),
    ("Fréchet distance to the float images (EfficientNet-Lite0, no FID)", "fed_lite0", "{:.3g}"),
)


def write_card(run: RunFolder, folder: Path, name: str = "path/to/this/folder") -> None:
    """Write README.md into a packed folder; its front matter, once there, stays as it is.

    name: what `from_pretrained` is to be given. Results are those of what is packed now.
    """
    card = folder / "README.md"
    with reading(f"a file of {run.path} for the model card"):
        model, manifest = run.read_json("model.json"), run.read_json("manifest.json")
        rows = run.read_json("layers.json")
        label = bits_label(rows)
        title, base, front = _of_source(model, label)
        if card.is_file() and (known := _FRONT.search(card.read_text())):
            front = known[0]
        lines = [
            f"{front}\n# {title}, {label}\n",
            f"`{model['class']}` of {model['parameters']:,} parameters, quantized by quantempo "
            f"{manifest['versions']['quantempo']}, recipe `{manifest['recipe']['name']}`.\n"
            f"Base model: {base or title}; its licence holds here too.\n",
            "```python\nimport quantempo  # first: it tells diffusers of the format\n"
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{name}")\n```\n',
            *("## Results\n", *_results(run, folder)),
            *("\n## Layers\n", *(f"- {kind}: {text}" for kind, text in bits_facts(rows, None))),
            *("\n## In float\n", *_in_float(rows)),
            f"\n## Recipe\n\n```toml\n{manifest['recipe_toml'].strip()}\n```\n",
        ]
    with atomic_path(card) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _of_source(model: dict[str, Any], label: str) -> tuple[str, str, str]:
    """Return title, name on the hub ("" for none) and front matter by the float model's folder."""
    path, base, licence = Path(model["path"]), model["path"], list[str]()
    with suppress(OSError, ValueError, AttributeError):
        base = json.loads((path / "model_index.json").read_text()).get("_name_or_path", "")
    with suppress(OSError, ValueError, TypeError):
        front: Any = _FRONT.search((path / "README.md").read_text())
        licence = re.findall(r"^license.*:.*$", front[0], re.M)
    base = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    known = [f"base_model: {base}", "base_model_relation: quantized"] if base else []
    tags = ["quantempo", "quantized", label.lower(), f"diffusers:{model['pipeline']}"]
    lines = [
        "---",
        "library_name: diffusers",
        *licence,
        *known,
        "tags:",
        *map("  - {}".format, tags),
    ]
    return base.rpartition("/")[2] or path.name, base, "\n".join([*lines, "---\n"])


def _results(run: RunFolder, folder: Path) -> list[str]:
    """Return the table with its conditions, and the pictures, which are written beside the card."""
    metrics = run.read_json("metrics.json") if run.has("metrics.json") else {}
    if metrics.get("packed_key") != run.stages().get("pack", {}).get("key", ""):
        return ["Not evaluated."]
    seeds, here, folders = (
        metrics["seeds"],
        metrics["machine"],
        (run / "samples/float", run / "samples/int8"),
    )
    where = here.get("gpu") or f"{here['cpu']} (threads: {here['threads']})"
    sizes = (metrics[key] / 1e6 for key in ("bytes_packed", "bytes_float32"))
    rows = [
        "| measured | |",
        "|---|---|",
        "| size, of float32 | {:.1f} of {:.1f} MB |".format(*sizes),
    ]
    for text, key, form in _SCORES:
        rows += [f"| {text} | {form.format(metrics[key])} |"] if key in metrics else []
    rows.append(
        f"\nSeeds {seeds[0]} to {seeds[-1]} for both models, {metrics['sampler']}, "
        f"{metrics['steps']} steps, engine `{metrics['engine']}`, on {where}."
    )
    if seeds_of(*folders):
        with atomic_path(folder / "pairs.png") as temporary:
            write_pairs(*folders, temporary)
        rows.append("\n![float above, quantized below, same seeds](pairs.png)")
    return rows


def _in_float(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what stays in float and why, layers of one reason in one line."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row["buckets"] is None:
            by_reason.setdefault(row["reason"] or "", []).append(f"`{row['name']}`")
    lines = ["| layers | why |", "|---|---|"]
    for reason, names in by_reason.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"| {', '.join(names[:_SHOWN])}{more} | {reason} |")
    return lines


def push(run_path: str | Path, name: str, *, private: bool = False) -> str:
    """Upload `packed/` of a run with a fresh card by the hub's own client; return its address.

    Raises QuantempoError: nothing is packed there, no token, no network, a name that is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    run = RunFolder(run_path)
    if not run.has("packed") or "pack" not in run.stages():
        raise QuantempoError(f"nothing is packed in {run.path}; run quantempo quantize first")
    try:
        made = HfApi().create_repo(name, private=private, exist_ok=True)
        write_card(run, run / "packed", made.repo_id)
        HfApi().upload_folder(repo_id=made.repo_id, folder_path=run / "packed")
    except QuantempoError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        text = f"cannot upload to '{name}' ({' '.join(str(error).split())[:300]}); check name"
        raise QuantempoError(f"{text} and network, log in with hf auth login") from error
    return str(made)
