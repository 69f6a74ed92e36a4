"""Table 5: the main results, and whether a calibration carries over to other samplers."""

from __future__ import annotations

from typing import Any

from studies.ptq4dm.base import Paper, Plan, Study, study
from studies.ptq4dm.cells import Row, Sampler
from studies.ptq4dm.results import Found

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
        """Return, per sampler, float, its own calibration, and the transfers."""
        rows = []
        for sampler in plan.samplers:
            main = sampler == plan.sampler
            images = plan.images if main else plan.few
            group = str(sampler)
            rows.append(Row("float", sampler, images, group=group, floor=main))
            if main and plan.few < plan.images:
                # As many images as the transfers have, to be compared with them.
                rows.append(self._transfer(plan, sampler, sampler, f", {plan.few} images"))
            label = f"{plan.recipe.name}, {_under(sampler)}"
            rows.append(Row(label, sampler, images, plan.base(), group=group))
            others = plan.samplers if main else (plan.sampler,)
            rows += [self._transfer(plan, sampler, o) for o in others if o != sampler]
        return rows

    def _transfer(self, plan: Plan, sampler: Sampler, other: Sampler, more: str = "") -> Row:
        label = f"{plan.recipe.name}, {_under(other)}{more}"
        return Row(label, sampler, plan.few, plan.base(), other, group=str(sampler))

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return, per sampler, that W8A8 costs nothing, and that calibrations carry over."""
        claims = []
        for group in dict.fromkeys(row.group for row in found.rows):
            quantized = [row for row in found.rows if row.group == group and row.recipe]
            own = next(row for row in quantized if not row.calibrated)
            few = next((row for row in quantized if str(row.calibrated) == group), own)
            assert own.recipe is not None
            claims.append(
                found.judge(
                    f"{own.recipe.name}: W8A8 loses nothing under {group}",
                    "FID 10.05 -> 14.18 (CIFAR-10, DDIM 100), 7.14 -> 7.10 (DDPM 4000)",
                    (group, own.label),
                    (group, "float"),
                    ("fed_data",),
                )
            )
            others = [row for row in quantized if row.calibrated and str(row.calibrated) != group]
            claims += [self._carries(found, row, few) for row in others]
        return claims

    def _carries(self, found: Found, row: Row, own: Row) -> dict[str, Any]:
        name = row.recipe.name if row.recipe else ""
        return found.judge(
            f"{name}: the calibration of {row.calibrated} serves {row.group} as well as its own",
            '"plug-and-play", not tested',
            (row.group, row.label),
            (row.group, own.label),
        )
