"""Table 1: which operations may be quantized."""

from __future__ import annotations

from typing import Any

from studies.ptq4dm.base import Paper, Plan, Study, study
from studies.ptq4dm.cells import Row, Sampler
from studies.ptq4dm.results import Found

__all__ = ["Operations"]

SITES = ("eps", "sigma", "x_prev")
ROWS = {
    "eps (mu)": ("eps",),
    "Sigma": ("sigma",),
    "x_{t-1}": ("x_prev",),
    "eps + Sigma + x_{t-1}": SITES,
}


def _samplers(plan: Plan) -> tuple[Sampler, ...]:
    return plan.sampler, Sampler("ddpm", plan.sampler.steps)


@study("T1")
class Operations(Study):
    """Only that tensor on an 8-bit grid, the network in float: DDIM and DDPM."""

    title = "Table 1: which operations may be quantized"
    question = (
        "Does the sampler bear 8 bits in the network's output (from which mu follows), in the "
        "variance Sigma, in x_{t-1}? DDIM at eta = 0 does not use Sigma."
    )
    paper = Paper(
        "only that operation at 8 bits, ImageNet 64, DDIM 250",
        ("operation", "IS", "FID", "sFID"),
        (
            ("float", "14.88", "21.63", "17.66"),
            ("mu", "15.51", "21.38", "17.41"),
            ("Sigma", "15.47", "21.96", "17.62"),
            ("x_{t-1}", "15.26", "21.94", "17.67"),
            ("mu + Sigma + x_{t-1}", "14.94", "21.99", "17.84"),
        ),
    )

    def rows(self, plan: Plan) -> list[Row]:
        """Return, for each sampler, float and every operation alone and together."""
        recipe, measured = plan.base(), dict[str, Any](measured=SITES)
        rows = []
        for sampler in _samplers(plan):
            group = str(sampler)
            floor = sampler == plan.sampler
            rows.append(Row("float", sampler, plan.few, group=group, floor=floor))
            rows += [
                Row(label, sampler, plan.few, recipe, None, "float", sites, group, **measured)
                for label, sites in ROWS.items()
            ]
        for label, sites in (("network W8A8", ()), ("network W8A8 + all three", SITES)):
            group = str(plan.sampler)
            how = (recipe, None, "input", sites, group)
            rows.append(Row(label, plan.sampler, plan.few, *how, **measured))
        return rows

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return that nothing is lost, per operation, and that Sigma is idle at eta = 0."""
        groups = list(dict.fromkeys(row.group for row in found.rows))
        claims = []
        printed = dict(zip(ROWS, ("21.38", "21.96", "21.94", "21.99"), strict=True))
        for group in groups:
            for label, fid in printed.items():
                claims.append(
                    found.judge(
                        f"8 bits in {label} cost nothing ({group})",
                        f"FID {fid} against 21.63",
                        (group, label),
                        (group, "float"),
                        ("fed_data",),
                    )
                )
                claims[-1]["detail"] += self._pairs(found, group, label)
        return [*claims, self._idle(found, groups[0])]

    def _pairs(self, found: Found, group: str, label: str) -> str:
        mean = found.mean(label, "psnr_db", group)
        equal = found.values(label, "identical", group).values()
        if equal and min(equal) == 1:
            return "; every image equal to the float one in every bit"
        return "" if mean is None else f"; PSNR to the float images {mean:.1f} dB"

    def _idle(self, found: Found, group: str) -> dict[str, Any]:
        values = list(found.values("Sigma", "identical", group).values())
        verdict = "not run" if not values else "confirmed" if min(values) == 1 else "refuted"
        return {
            "text": f"Sigma has no effect under {group} (eta = 0), so the paper's Sigma row shows "
            "its run-to-run noise",
            "paper": "IS 15.47, FID 21.96 against 14.88, 21.63 under DDIM",
            "verdict": verdict,
            "detail": f"share of images equal to float in every bit: {min(values):.0%}"
            if values
            else "",
        }
