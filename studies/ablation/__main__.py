"""`python -m studies.ablation`: from the paper's recipe to the shipped ones, one idea a rung."""

from __future__ import annotations

import argparse
import json

from quantempo.models.load import check_device
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
    command(made, _run)


def _run(given: argparse.Namespace) -> int:
    check_device(given.device)
    settings = LadderSettings(
        source=given.source,
        out=given.out,
        data=given.data,
        steps=given.steps,
        images=given.images,
        images_full=max(given.images, given.images_full),
        device=given.device,
        batch_size=given.batch_size or 64,
        tf32=given.tf32,
        engine=given.engine,
        call=call_of(given),
    )
    text = ladder(settings, names_of(given.only), given.minutes)
    failed = json.loads((given.out / "results.json").read_text())["failed"]
    show({"text": str(text), "failed": sorted(failed)}, given.json)
    return 1 if failed else 0


if __name__ == "__main__":
    main()
