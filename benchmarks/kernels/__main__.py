"""Check and time the kernels of a GPU one by one: rows of docs/gpu/results.json.

python -m benchmarks.kernels --out results.json
"""

import argparse
from pathlib import Path

import torch

from benchmarks.kernels.table import bench_ops
from quantempo.bench.results import Results, text_table
from quantempo.bench.run import describe_machine
from quantempo.run_folder import RunFolder

__all__ = ["main"]


def main() -> None:
    """Print the table; write it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device; kernels are timed on one")
    store = RunFolder(given.out.parent)
    head = {"device": "cuda", "engine": "triton", "machine": describe_machine()}
    results = Results(head, lambda record: store.write_json(given.out.name, record))
    bench_ops(results, device=given.device)
    for line in text_table(results.record()):
        print(line)


if __name__ == "__main__":
    main()
