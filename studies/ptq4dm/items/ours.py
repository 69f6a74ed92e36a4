"""The shipped recipe beside the published one, each calibrated under the sampler it serves."""

from __future__ import annotations

from typing import Any

from studies.ptq4dm.base import Plan, Study, study
from studies.ptq4dm.cells import Row
from studies.ptq4dm.results import Found

__all__ = ["Ours"]


@study("Ours")
class Ours(Study):
    """Float, the published recipe and the shipped one under every sampler."""

    title = "Ours: the shipped recipe beside the published one"
    question = (
        "How much of the loss under each sampler is left with scales by time, the ends of the "
        "network in float and weights rounded by GPTQ, at equal N?"
    )

    def rows(self, plan: Plan) -> list[Row]:
        """Return, per sampler, float and both recipes with a calibration under it."""
        if plan.ours is None:
            return []
        rows = []
        for sampler in plan.samplers:
            group, floor = str(sampler), sampler == plan.sampler
            rows.append(Row("float", sampler, plan.few, group=group, floor=floor))
            for recipe in (plan.recipe, plan.ours):
                rows.append(Row(recipe.name, sampler, plan.few, plan.base(recipe), group=group))
        return rows

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return, per sampler, that the shipped recipe is better and that it costs nothing."""
        claims = []
        for group in dict.fromkeys(row.group for row in found.rows):
            floats, published, ours = (
                (group, row.label) for row in found.rows if row.group == group
            )
            claims += [
                found.judge(f"{ours[1]} is better than {published[1]} under {group}",
                            "not in the paper", ours, published),
                found.judge(f"{ours[1]} loses nothing under {group}",
                            "not in the paper", ours, floats, ("fed_data",)),
            ]  # fmt: skip
        return claims
