"""`python -m studies.ablation`: from the paper's recipe to the shipped ones, one idea a rung."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

from quantempo.errors import QuantempoError
from quantempo.models.load import check_device
from quantempo.pipeline.arguments import read_arguments
from quantempo.recipe import Recipe
from studies.ablation.ladder import LadderSettings, ladder
from studies.command import at_least, call_of, command, names_of, parser, show

__all__ = ["main"]


def main() -> None:
    """Climb from the paper's recipe to ours on one protocol; the text is OUT/quality.md."""
    made = parser(
        "ablation",
        "Climb from the paper's recipe to ours, one idea a rung, on one protocol. A killed ladder "
        "resumes. The text is OUT/quality.md, the figures OUT/results.json.",
        "models/ddpm --data images --out runs/ladder --device cuda",
        "runs/ladder",
        "names of rungs",
    )
    add = made.add_argument
    add("--images", type=at_least(3), default=256, help="of each rung")
    add("--images-full", type=at_least(6), default=5120, help="of shipped recipes, with distances")
    add("--steps", type=at_least(2), default=100, help="of DDIM")
    add("--engine", default="auto", help="auto, openvino, onednn, triton (GPU) or simulated")
    add("--scheduler", default="ddim", help="sampler, or own for the pipeline's")
    add("--call", type=Path, help="TOML file of further arguments: prompt = [...]")
    add("--override", action="append", default=[], help="of all recipes: trace.chains=64")
    command(made, _run)


def _run(given: argparse.Namespace) -> int:
    check_device(given.device)
    try:
        override = tomllib.loads("\n".join(given.override))
    except tomllib.TOMLDecodeError as error:
        raise QuantempoError(f"got --override {given.override}: no TOML, {error}") from error
    Recipe.from_dict(override)
    same = ("source", "out", "data", "steps", "images", "device", "tf32", "engine")
    settings = LadderSettings(
        **{name: getattr(given, name) for name in same},
        images_full=max(given.images, given.images_full),
        batch_size=given.batch_size or 64,
        scheduler=None if given.scheduler == "own" else given.scheduler,
        call=read_arguments(given.call, ()) | call_of(given),
        override=override,
    )
    text = ladder(settings, names_of(given.only), given.minutes)
    failed = json.loads((given.out / "results.json").read_text())["failed"]
    show({"text": str(text), "failed": sorted(failed)}, given.json)
    return 1 if failed else 0


if __name__ == "__main__":
    main()
