"""What the released program did, beside what the paper says."""

from __future__ import annotations

from typing import Any

from studies.ptq4dm.base import Plan, Study, study
from studies.ptq4dm.cells import Row
from studies.ptq4dm.results import Found

__all__ = ["Legacy"]

GRAPHS = {"input": "quantizers on inputs", "output": "quantizers on outputs"}
PAIRS = {False: "correct pairs", True: "legacy pairs"}


def _label(graph: str, pairs: bool) -> str:
    return f"{GRAPHS[graph]}, {PAIRS[pairs]}"


@study("Legacy")
class Legacy(Study):
    """Correct against legacy (x, t) pairs, and input-side against output-side quantizers."""

    title = "Legacy: the released program's pairs and graph"
    question = (
        "The released program calibrates on flipped and unmapped (x, t) pairs and quantizes the "
        "outputs of layers. What did each of the two do to its results?"
    )

    def rows(self, plan: Plan) -> list[Row]:
        """Return float and the two times two."""
        rows = [plan.float_row()]
        for graph in GRAPHS:
            for pairs in PAIRS:
                how: dict[str, Any] = {"graph": graph, "released": pairs}
                label = _label(graph, pairs)
                rows.append(Row(label, plan.sampler, plan.few, plan.base(), **how))
        return rows

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return the effect of the pairs in both graphs, and of the graph."""
        claims = [
            found.judge(
                f"the legacy pairs do no harm ({GRAPHS[graph]})",
                "not known to the authors; unanswered in their issue 6",
                ("", _label(graph, True)),
                ("", _label(graph, False)),
            )
            for graph in GRAPHS
        ]
        return [
            *claims,
            found.judge(
                "quantizers on inputs, which integers need, are no worse than on outputs",
                "outputs, with attention in float",
                ("", _label("input", False)),
                ("", _label("output", False)),
            ),
        ]
