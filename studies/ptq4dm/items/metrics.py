"""Table 4: which metric chooses the scales."""

from __future__ import annotations

from typing import Any

from studies.ptq4dm.base import Paper, Plan, Study, study
from studies.ptq4dm.cells import Row
from studies.ptq4dm.results import Found

__all__ = ["Metrics"]

METRICS = {
    "lp 2.4": ("lp", 2.4),
    "MSE": ("mse", 2.4),
    "L1": ("l1", 2.4),
    "cosine": ("cosine", 2.4),
    "KL": ("kl", 2.4),
}


@study("T4")
class Metrics(Study):
    """The same metric for activations and weights; everything else as in the published recipe."""

    title = "Table 4: the metric of the scale search"
    question = (
        "Does the metric that chooses a scale matter, and is the 2.4-th power (called MSE in the "
        "paper) the best?"
    )
    paper = Paper(
        "8 bits, ImageNet 64, calibration set not stated",
        ("metric", "IS", "FID", "sFID"),
        (
            ("L1", "7.38", "100.52", "63.01"),
            ("cosine", "12.85", "34.81", "23.75"),
            ("KL", "11.74", "47.27", "45.08"),
            ('"MSE" (p = 2.4)', "13.76", "30.46", "19.42"),
        ),
    )

    def rows(self, plan: Plan) -> list[Row]:
        """Return float and one row a metric."""
        rows = [plan.float_row()]
        for label, (name, p) in METRICS.items():
            recipe = plan.base().override("activations", metric=name, p=p)
            rows.append(
                Row(label, plan.sampler, plan.few, recipe.override("weights", metric=name, p=p))
            )
        return rows

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return p = 2.4 against each of the others."""
        printed = {"L1": "100.52", "cosine": "34.81", "KL": "47.27"}
        return [
            found.judge(
                f"p = 2.4 gives better images than {other}",
                f"FID 30.46 against {fid}",
                ("", "lp 2.4"),
                ("", other),
            )
            for other, fid in printed.items()
        ] + [
            found.judge(
                "p = 2.4 gives better images than the mean squared error itself",
                "not separated (p = 2.4 is called MSE)",
                ("", "lp 2.4"),
                ("", "MSE"),
            )
        ]
