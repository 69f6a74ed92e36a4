"""Command lines: options lost, repeated, unknown, or with values that nothing can serve."""

import shutil
import sys
from pathlib import Path
from random import Random
from unittest.mock import patch

from quantempo.cli import main
from tests.fuzz.recipes import BASE
from tests.packed import packed, saved

ODD = [
    *("", "-1", "0", "1", "nan", "inf", "1e9", "0.5", str(10**30), str(2**64), "x", "None", "True"),
    *("a=b", "[1]", "{", "--", "-", "/", "..", ".", "/dev/null", "/dev/full", "/proc/self/mem"),
    *("n" * 300, "a/" * 3000, "\udcff", "é\n", "auto", "cuda", "meta", "cpu:7", "openvino", "text"),
    *("recipe.toml", "run", "run/packed", "run/manifest.json", "run/packed/unet", "source"),
]
OPTIONS = [
    *("--force", "--json", "--quiet", "--verbose", "--debug", "--colour", "--seed", "--height"),
    *("--set", "--call", "--prompts", "--class-labels", "--device", "--engine", "--scheduler"),
    *("--data", "--dtype", "--variant", "--guidance-scale", "--batch-size", "--steps", "--only"),
]
COMMANDS = [
    "quantize source --run new --recipe recipe.toml",
    "trace source --run new --recipe recipe.toml",
    *(f"{verb} --run run" for verb in ("calibrate", "search", "round", "pack", "report")),
    "quantize source --run run --recipe recipe.toml",
    "sample run/packed --out out --images 2 --steps 2 --engine simulated",
    "sample source --out out --images 1 --steps 2",
    "evaluate --run run --images 2 --steps 2 --engine simulated",
    "inspect run/packed",
    "inspect run",
    "status run",
    "engines",
    "bench --run run --candidate none",
    "sensitivity run --options w9a9",
    "sensitivity --run run --options w8a8 --steps 2 --chains 1",
]


def case(rng: Random, place: Path) -> str:
    shutil.copytree(packed("unconditional").run, place / "run")
    shutil.copytree(saved("unconditional"), place / "source")
    (place / "recipe.toml").write_text(BASE.to_toml())
    (place / "text").write_text("a b\n")
    words = rng.choice(COMMANDS).split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, how = rng.randrange(1, len(words) + 1), rng.random()
        if how < 0.5 and at < len(words):
            words[at] = rng.choice(ODD)
        elif how < 0.6:
            del words[at:][:1]
        elif how < 0.8:
            words[at:at] = [rng.choice(OPTIONS), rng.choice(ODD)]
        else:
            words[at:at] = [rng.choice(OPTIONS)]
    try:
        with patch.object(sys, "argv", ["quantempo", *words]):
            main()
    except SystemExit as stop:
        if stop.code in (0, None):
            return "ran"
        return "refused" if stop.code == 2 else f"exit code {stop.code}: {words}"
    except Exception as error:
        raise AssertionError(words) from error
    return "ran"
