"""Turns, counts and limits of timing, with timers and clocks that are handed in."""

import subprocess
import sys
import threading

import pytest
import torch

from quantempo.bench.forwards import _cuda_ms, reason_of, take_turns, time_limit, timer_for, wall_ms


class Scripted:
    """A timer whose calls cost what they say; notes the order and the repeats."""

    def __init__(self, cost: dict[str, float]) -> None:
        self.cost, self.seen = cost, []

    def __call__(self, call, count: int) -> float:
        name = call()
        self.seen.append((name, count))
        return self.cost[name]


def named(*names: str):
    return {name: (lambda name=name: name) for name in names}


def test_calls_take_turns_and_samples_last_alike() -> None:
    timer, after = Scripted({"a": 1.0, "b": 10.0, "c": 400.0}), []
    times = take_turns(
        named("a", "b", "c"), timer, rounds=3, seconds=0.2,
        after=lambda times: after.append(len(times["c"])),
    )  # fmt: skip
    assert times == {"a": [1.0] * 3, "b": [10.0] * 3, "c": [400.0] * 3}
    assert timer.seen[:6] == [(n, 2) for n in "aabbcc"]
    # 200 ms of each, at least one call.
    counts = {"a": 200, "b": 20, "c": 1}
    assert timer.seen[6:] == [(n, counts[n]) for n in "abccbaabc"]
    assert after == [1, 2, 3]


def test_the_wall_clock_is_in_milliseconds_per_call() -> None:
    clock = [0.0]

    def call() -> None:
        clock[0] += 0.25

    assert wall_ms(call, 3, lambda: clock[0]) == 250.0 and clock == [0.75]
    assert timer_for("cpu") is wall_ms and timer_for(torch.device("cuda:0")) is _cuda_ms


@pytest.mark.parametrize("at", [0, 5])
def test_a_call_that_fails_is_named_and_the_others_go_on(at: int) -> None:
    calls = [0]

    def bad() -> str:
        calls[0] += 1
        if calls[0] > at:
            raise RuntimeError("illegal\n memory access")
        return "bad"

    failed: dict[str, str] = {}
    timer = Scripted({"a": 1.0, "bad": 1.0})
    times = take_turns({"bad": bad, **named("a")}, timer, rounds=4, seconds=0.01, failed=failed)
    assert times == {"a": [1.0] * 4}
    assert failed == {"bad": "while timing: RuntimeError: illegal memory access"}
    calls[0] = 0
    with pytest.raises(RuntimeError):
        take_turns({"bad": bad}, timer, rounds=9)


LIMITED = """
import signal
from quantempo.bench.forwards import time_limit
try:
    with time_limit(0.01):
        signal.pause()
except TimeoutError as error:
    print(error)
with time_limit(1000):
    print("armed", signal.getitimer(signal.ITIMER_REAL)[0] > 0)
print("off", signal.getitimer(signal.ITIMER_REAL))
with time_limit(None):
    print("none", signal.getitimer(signal.ITIMER_REAL))
"""


def test_a_body_that_takes_too_long_is_stopped() -> None:
    # In a process of its own: an alarm interrupts whatever its process does, a test runner too.
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    first, *rest = run.stdout.splitlines()
    assert first.startswith("gave up after 0.01 s"), run.stderr
    assert rest == ["armed True", "off (0.0, 0.0)", "none (0.0, 0.0)"]


def test_another_thread_has_no_limit_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        with time_limit(1000):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "no time limit" in caplog.text


def test_reasons_are_one_short_line() -> None:
    assert reason_of(ValueError("a\n  b")) == "ValueError: a b"
    assert reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(reason_of(ValueError("x" * 1000))) == 300
