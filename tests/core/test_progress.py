"""One bar for a run: it shows the loop, the share of the time and what is left of it."""

import io
from types import SimpleNamespace
from typing import Any

import pytest

from quantempo.core import progress as module
from quantempo.core.progress import Progress, listening, tell, whole


def test_the_time_left_follows_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now, shown = [100.0], {}
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with whole({"trace": 10.0, "search": 30.0, "round": 60.0}):
        for name, each in (("trace", 2.0), ("search", 20.0)):
            with Progress(total=5, desc=name, disable=False, file=io.StringIO()) as bar:
                bar._time, bar.start_t = lambda: now[0], now[0]
                for number in range(5):
                    now[0] += each
                    bar.update(1)
                    shown[name, number] = bar.format_dict
                text = str(bar)
    # A second a unit of the trace: 90 units are left. With 100 for 30 more, 110 for 40: 60 units.
    first, last = shown["trace", 4], shown["search", 4]
    assert first["n"] == 10 and first["total"] == pytest.approx(100)
    assert last["n"] == 110 and last["total"] == pytest.approx(110 + 165)
    assert text.startswith("search  40%|") and text.endswith("01:50, 02:45 left")
    with Progress(total=2, desc="search", disable=False, file=io.StringIO()) as alone:
        assert alone.run is None and alone.format_dict["total"] == 2


def test_listeners_hear_every_step_where_no_bar_is_shown_and_none_after_the_block() -> None:
    heard: list[dict[str, Any]] = []
    with listening(heard.append):
        assert list(Progress("abc", desc="search", initial=1, total=4, disable=True)) == [*"abc"]
        with Progress(total=8, desc="sample", disable=True) as bar:
            bar.update(8)
        tell("stage", name="search", seconds=1.5)
    list(Progress("abc", desc="search", disable=True))
    steps = [(row["loop"], row["done"], row["total"]) for row in heard[:-1]]
    assert steps == [("search", 2, 4), ("search", 3, 4), ("search", 4, 4), ("sample", 8, 8)]
    assert heard[-1] == {"event": "stage", "name": "search", "seconds": 1.5}
