"""A part of `python -m tests.fuzz`: every tenth damage or so, other numbers than its first ones."""

import pytest

from tests.fuzz.__main__ import GOOD, KINDS, run

SHARE = {"folders": 8, "recipes": 40, "commands": 8}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_changes_nothing(kind: str) -> None:
    ends = {number: run(kind, number) for number in range(3, KINDS[kind][0], SHARE[kind])}
    assert not {number: end for number, end in ends.items() if end not in GOOD}
    assert "refused" in ends.values()
