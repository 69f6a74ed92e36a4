"""What one study of the paper says of itself: rows to run, claims to judge.

A study is one file in `items/`: a class with a title, the paper's own table, `rows` and `claims`.
Running the rows is the business of `runner`, statistics that of `results`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantempo.recipe import Recipe
from quantempo.registry import Registry
from studies.ptq4dm.cells import Row, Sampler
from studies.ptq4dm.results import Found

__all__ = ["STUDIES", "Paper", "Plan", "Study", "study"]


@dataclass(frozen=True)
class Paper:
    """What the paper printed: a caption, a head and rows of text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {"caption": self.caption, "head": list(self.head), "rows": [*map(list, self.rows)]}


@dataclass(frozen=True)
class Plan:
    """The scale of a study.

    recipe: the one every row varies by one thing; ours: the one beside it in item Ours, None for
    none; sampler: of all items but T5; samplers: of T5; images: of a row in T3, and in
    T5 under `sampler`; few: of any other row; samples: N of a calibration set; sizes: the N that
    T2 compares; seeds: repetitions of a row.
    """

    recipe: Recipe
    ours: Recipe | None
    sampler: Sampler
    samplers: tuple[Sampler, ...]
    images: int
    few: int
    samples: int
    sizes: tuple[int, ...]
    seeds: int = 3

    def base(self, recipe: Recipe | None = None, samples: int | None = None) -> Recipe:
        """Return a recipe (that of the study) with the study's N, one input of each chain."""
        recipe = recipe or self.recipe
        return recipe.override("trace", chains=samples or self.samples, picks=1)

    def law(self, name: str, **arguments: float) -> Recipe:
        """Return the base recipe with another distribution of time-steps."""
        return self.base().override("trace", time_sampler=name, time_sampler_args=arguments or {})

    def float_row(self) -> Row:
        """Return the line of the float model."""
        return Row("float", self.sampler, self.few, floor=True)


class Study:
    """One table or figure of the paper; subclasses give title, question, rows and claims."""

    name: str = ""
    title: str = ""
    question: str = ""
    paper: Paper | None = None

    def rows(self, plan: Plan) -> list[Row]:
        """Return the lines of the table."""
        raise NotImplementedError

    def claims(self, found: Found) -> list[dict[str, Any]]:
        """Return what the paper claims, judged by the results."""
        return []

    def extra(self, plan: Plan, tools: Any) -> dict[str, Any]:
        """Return what its figure needs besides the rows; `tools` is a `Tools` of `tools`."""
        return {}


STUDIES: Registry[Study] = Registry("study")


def study(name: str) -> Callable[[type[Study]], type[Study]]:
    """Register an instance of the class under the name of its table or figure."""

    def register(kind: type[Study]) -> type[Study]:
        kind.name = name
        STUDIES.register(name)(kind())
        return kind

    return register
