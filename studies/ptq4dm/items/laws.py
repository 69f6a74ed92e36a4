"""Table 3, figures 5 and 6: the law of time-steps."""

from __future__ import annotations

from typing import Any

import torch

from quantempo.calibration.timesteps import Single, make_time_sampler
from studies.ptq4dm.base import Paper, Plan, Study, study
from studies.ptq4dm.cells import Row
from studies.ptq4dm.results import Found

__all__ = ["Laws"]

LAWS = ("single", "uniform", "linspace", "ndtc", "ndtc_paper", "ndtc_repo", "skew_normal")


@study("T3")
class Laws(Study):
    """Every distribution of time-steps under the published recipe."""

    title = "Table 3, figures 5 and 6: the law of time-steps (NDTC)"
    question = (
        "Do normally distributed time-steps calibrate better than uniform ones, and which of the "
        "laws that go by the name of NDTC?"
    )
    paper = Paper(
        "ImageNet 64, DDIM 250, W8A8, 10,000 images, no seeds stated",
        ("law", "IS", "FID", "sFID"),
        (
            ("float", "14.88", "21.63", "17.66"),
            ("single t", "11.92", "49.37", "41.33"),
            ("uniform t", "14.99", "26.19", "19.51"),
            ("NDTC", "15.68", "24.26", "17.28"),
        ),
    )

    def rows(self, plan: Plan) -> list[Row]:
        """Return float and one row a distribution."""
        group = f"recipe {plan.recipe.name}"
        rows = [Row("float", plan.sampler, plan.images, group=group, floor=True)]
        return rows + [
            Row(law, plan.sampler, plan.images, plan.law(law), group=group) for law in LAWS
        ]

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return NDTC in its forms against uniform, and uniform against one step."""
        group = found.rows[0].group
        claims = [
            found.judge(
                f"{law} calibrates better than uniform time-steps ({group})",
                "FID 24.26 against 26.19",
                (group, law),
                (group, "uniform"),
            )
            for law in ("ndtc_repo", "ndtc_paper", "ndtc", "skew_normal")
        ]
        fraction = Single().fraction
        return [
            *claims,
            found.judge(
                f"uniform time-steps calibrate better than a single one, {fraction} T ({group})",
                "FID 26.19 against 49.37",
                (group, "uniform"),
                (group, "single"),
            ),
        ]

    def extra(self, plan: Plan, tools: Any) -> dict[str, Any]:
        """Return the density of each law and one draw of N steps, for figure 5."""
        steps, laws = plan.sampler.steps, {}
        for name in LAWS:
            law = make_time_sampler(name)
            drawn = law.sample(plan.samples, steps, torch.Generator().manual_seed(0))
            laws[name] = {
                "density": law.density(steps).tolist(),
                "drawn": torch.bincount(drawn, minlength=steps).tolist(),
            }
        return {"laws": laws, "steps": steps}
