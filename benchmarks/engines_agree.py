"""Say how far the images of the engines are from the float model's and from each other's.

python benchmarks/engines_agree.py --run runs/demo --images 16
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations

import numpy as np

from quantempo.backends.engine import ENGINES
from quantempo.evaluate import psnr_db
from quantempo.models.sampling import run_pipeline
from quantempo.quality import open_model
from quantempo.session import reopen

__all__ = ["main"]


def main() -> None:
    """Sample the same seeds on every engine that can run here; print mean PSNR in dB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run folder with a packed model")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    session = reopen(given.run)
    names = [name for name in ENGINES.names() if ENGINES.get(name).missing() is None]
    pipes = {name: open_model(session.run / "packed", engine=name) for name in names}
    pipes["float"] = session.pipe
    options = {"steps": given.steps, "batch_size": 8, **session.call}
    images = {
        name: run_pipeline(pipe, range(given.images), **options) for name, pipe in pipes.items()
    }
    rows = {
        f"{a} / {b}": round(float(np.mean(psnr_db(images[a], images[b]))), 2)
        for a, b in combinations(images, 2)
    }
    print(
        json.dumps({"images": given.images, "steps": given.steps, "psnr_db_mean": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
