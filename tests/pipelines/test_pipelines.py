"""Every family of diffusers: what docs/pipelines.md says of it is what happens."""

import pytest

from tests.pipelines import page
from tests.pipelines.runner import FAMILIES, run

# Worse than this on a random network is an error, not rounding: the worst of the page has 19 dB.
FLOOR_DB = 15.0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_what_the_page_says(name: str) -> None:
    row = run(name)
    found, said = page.line(row), page.read()[name]
    again = f"{name}: rerun `python -m tests.pipelines --write` if this is right: {row}"
    assert found["result"].split(":")[0] == said["result"].split(":")[0], again
    assert (found["share"], found["float"]) == (said["share"], said["float"]), again
    assert all(value > FLOOR_DB for value in row.get("sqnr_db", {}).values()), row


def test_the_page_has_every_family() -> None:
    assert list(page.read()) == list(FAMILIES)
