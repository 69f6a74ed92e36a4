"""Run families by name, or all: `python -m tests.pipelines [--write] [NAME ...]`."""

import json
import logging
import sys
import time
import warnings

from tests.pipelines import page
from tests.pipelines.runner import FAMILIES, fresh, run

if __name__ == "__main__":
    import diffusers
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("quantempo").setLevel(logging.ERROR)
    names = [word for word in sys.argv[1:] if word != "--write"]
    for name in FAMILIES:
        if not names or any(word in name for word in names):
            start = time.perf_counter()
            row = run(name)
            seconds = f"{time.perf_counter() - start:.1f} s"
            print(json.dumps(page.line(row) | {"seconds": seconds}), flush=True)
            if "--write" in sys.argv:
                page.write([row], FAMILIES)
            if "error" in row:
                print("   ", {k: row[k] for k in ("where", "raised", "error")}, flush=True)
    fresh().shutdown()
