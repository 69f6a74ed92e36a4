"""Table 2: what the calibration inputs are."""

from __future__ import annotations

from typing import Any

from studies.ptq4dm.base import Paper, Plan, Study, study
from studies.ptq4dm.cells import Row
from studies.ptq4dm.results import Found

__all__ = ["Inputs"]

SOURCES = ("trajectory", "mimic", "raw", "noise")
LAWS = ("uniform", "ndtc_repo")


def _label(source: str, law: str, size: int) -> str:
    return f"{source}, {law}, N {size}"


@study("T2")
class Inputs(Study):
    """The fair grid: source x law x N, where the paper's rows differ in all three at once."""

    title = "Table 2: calibration inputs"
    question = (
        "Which inputs calibrate best: those of the denoising process, images, noise, or images "
        "noised as in training, at equal laws of time-steps and equal N?"
    )
    paper = Paper(
        "ImageNet 64; scripts used N = 128 for noise and images, 1024 for the others",
        ("inputs", "IS", "FID", "sFID"),
        (
            ("noise samples (denoising)", "13.92", "33.15", "20.38"),
            ("image samples (diffusion)", "6.90", "128.63", "90.04"),
            ("training-mimic (eq. 4)", "12.91", "34.55", "25.18"),
        ),
    )

    def rows(self, plan: Plan) -> list[Row]:
        """Return float and the grid."""
        rows = [plan.float_row()]
        for size in plan.sizes:
            for law in LAWS:
                for source in SOURCES:
                    recipe = plan.base(samples=size).override(
                        "trace", source=source, time_sampler=law
                    )
                    label = _label(source, law, size)
                    rows.append(Row(label, plan.sampler, plan.few, recipe))
        return rows

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return the paper's order, at equal law and N."""
        sizes = sorted({int(row.label.split()[-1]) for row in found.rows if row.recipe})
        law, size = LAWS[0], sizes[-1]
        where = f"({law}, N {size})"

        def at(source: str, n: int = size) -> tuple[str, str]:
            return "", _label(source, law, n)

        return [
            found.judge(
                f"pure noise calibrates better than clean images {where}",
                "FID 33.15 against 128.63",
                at("noise"),
                at("raw"),
            ),
            found.judge(
                f"the training formula calibrates worse than pure noise {where}",
                "FID 34.55 against 33.15",
                at("noise"),
                at("mimic"),
            ),
            found.judge(
                f"inputs of the denoising process calibrate better than the training formula "
                f"{where}",
                "24.26 (Table 3) against 34.55, at other N and laws",
                at("trajectory"),
                at("mimic"),
            ),
            found.judge(
                f"more inputs calibrate better: N {sizes[-1]} against {sizes[0]} ({law})",
                "not separated from the source of the inputs",
                at("trajectory"),
                at("trajectory", sizes[0]),
            ),
        ]
