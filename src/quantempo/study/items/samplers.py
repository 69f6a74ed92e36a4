"""Table 5: the main results, and whether a calibration carries over to other samplers (L5)."""

from __future__ import annotations

from typing import Any

from quantempo.recipe import Recipe
from quantempo.study.base import Paper, Plan, Study, study
from quantempo.study.cells import Row, Sampler
from quantempo.study.results import Found

__all__ = ["Samplers"]


def _under(sampler: Sampler) -> str:
    return f"calibrated under {sampler}"


@study("T5")
class Samplers(Study):
    """Each sampler calibrated under itself, and with the calibration of another one."""

    title = "Table 5: W8A8 under fast samplers, and transfer of calibrations"
    question = (
        "How much does W8A8 lose under each sampler, and does a calibration made under one serve "
        "another (plug-and-play)?"
    )
    paper = Paper(
        "W8A8 (float -> quantized), 10,000 images",
        ("task", "IS", "FID", "sFID"),
        (
            ("ImageNet 64, DDIM 100", "15.38 -> 15.52", "21.70 -> 24.92", "17.93 -> 17.36"),
            ("ImageNet 64, DDIM 250", "14.88 -> 15.88", "21.63 -> 23.96", "17.66 -> 17.67"),
            ("ImageNet 64, DDPM 4000", "15.93 -> 15.28", "20.82 -> 23.64", "17.42 -> 17.29"),
            ("CIFAR-10, DDIM 100", "9.18 -> 9.31", "10.05 -> 14.18", "19.71 -> 22.59"),
            ("CIFAR-10, DDIM 250", "9.19 -> 9.70", "8.91 -> 11.66", "18.43 -> 19.71"),
            ("CIFAR-10, DDPM 4000", "9.28 -> 9.55", "7.14 -> 7.10", "17.09 -> 17.02"),
        ),
    )

    def rows(self, plan: Plan) -> list[Row]:
        """Return, per sampler, float, both recipes under themselves, and the transfers."""
        rows = []
        for sampler in plan.samplers:
            main = sampler == plan.sampler
            images = plan.images if main else plan.few
            group = str(sampler)
            rows.append(Row("float", sampler, images, group=group, floor=main))
            others = plan.samplers if main else (plan.sampler,)
            if main and plan.few < plan.images:
                rows += self._transfers(plan, sampler, sampler)
            for recipe in plan.recipes:
                label = f"{recipe.name}, {_under(sampler)}"
                rows.append(Row(label, sampler, images, self._recipe(plan, recipe), group=group))
            for other in others:
                if other != sampler:
                    rows += self._transfers(plan, sampler, other)
        return rows

    def _recipe(self, plan: Plan, recipe: Recipe) -> Recipe:
        # Equal to the rows of T3, so that those are not computed twice.
        args = recipe.trace.time_sampler_args
        return plan.law(recipe.trace.time_sampler, recipe, **args)

    def _transfers(self, plan: Plan, sampler: Sampler, other: Sampler) -> list[Row]:
        rows = []
        for recipe in plan.recipes:
            few = f", {plan.few} images" if other == sampler else ""
            label = f"{recipe.name}, {_under(other)}{few}"
            how = self._recipe(plan, recipe)
            rows.append(Row(label, sampler, plan.few, how, other, group=str(sampler)))
        return rows

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return, per sampler, that W8A8 costs nothing, and that calibrations carry over."""
        claims = []
        for group in dict.fromkeys(row.group for row in found.rows):
            quantized = [row for row in found.rows if row.group == group and row.recipe]
            own = {row.recipe.name: row for row in quantized if row.recipe and not row.calibrated}
            few = {
                row.recipe.name: row
                for row in quantized
                if row.recipe and str(row.calibrated) == group
            }
            for name, row in own.items():
                claims.append(
                    found.judge(
                        f"{name}: W8A8 loses nothing under {group}",
                        "FID 10.05 -> 14.18 (CIFAR-10, DDIM 100), 7.14 -> 7.10 (DDPM 4000)",
                        (group, row.label),
                        (group, "float"),
                        ("fed_data",),
                    )
                )
            for row in quantized:
                if row.calibrated and row.recipe and str(row.calibrated) != group:
                    name = row.recipe.name
                    claims.append(self._carries(found, row, few.get(name, own[name])))
        return claims

    def _carries(self, found: Found, row: Row, own: Row) -> dict[str, Any]:
        name = row.recipe.name if row.recipe else ""
        return found.judge(
            f"{name}: the calibration of {row.calibrated} serves {row.group} as well as its own",
            '"plug-and-play", not tested',
            (row.group, row.label),
            (row.group, own.label),
        )
