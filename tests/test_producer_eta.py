"""The time left is about right and falls, whatever binds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limiter.view import GateView
from producer.eta import seconds_left
from producer.progress import Progress

GATE = GateView(
    name="users",
    max_concurrent=5,
    min_concurrent=5,
    max_per_window=60,
    window_s=60.0,
    lease_s=15.0,
    level=5.0,
    in_use=0,
    used=0,
    waiting_processes=0,
    processes=1,
    waiting_jobs={},
    paused_for_s=0.0,
    closed_for_s=0.0,
    next_start_s=0.0,
    served=True,
)


def window_at(now: float, starts: list[float]) -> GateView:
    """The gate at a second, from when runs started: the other way round than the code has it."""
    inside = [at + 60.0 - now for at in starts if at > now - 60.0 and at <= now]
    return replace(
        GATE, used=len(inside), first_freed_s=min(inside, default=0.0), last_freed_s=max(inside, default=0.0)
    )


BURSTS = [60.0 * (number // 60) for number in range(240)]
STEADY = [float(number) for number in range(240)]


@pytest.mark.parametrize("starts", [BURSTS, STEADY], ids=["in bursts", "one a second"])
@pytest.mark.parametrize("now", [60.0, 75.0, 90.0, 119.0, 121.0, 150.0, 179.0])
def test_a_batch_that_the_window_holds_back_ends_when_its_last_start_is_allowed(
    starts: list[float], now: float
) -> None:
    done = sum(at <= now for at in starts)
    left = seconds_left(240 - done, done / now, window_at(now, starts))
    assert left == pytest.approx(starts[-1] - now, abs=2.0)


def test_after_the_first_burst_it_is_minutes_and_counts_down() -> None:
    seen = [seconds_left(180, 60 / now, window_at(now, BURSTS)) for now in (1.0, 10.0, 30.0, 59.0)]
    assert seen == [pytest.approx(180 - now, abs=0.1) for now in (1.0, 10.0, 30.0, 59.0)]


def test_runs_that_have_started_need_no_place_in_the_window() -> None:
    full = replace(GATE, used=60, first_freed_s=30.0, last_freed_s=30.0, in_use=40)
    assert seconds_left(40, 1.0, full) == 0.0
    assert seconds_left(41, 1.0, full) == 30.0


def test_where_places_bind_the_rate_tells_and_without_an_end_nobody_knows() -> None:
    assert seconds_left(100, 2.0, None) == 50.0
    assert seconds_left(100, 0.0, None) is None
    assert seconds_left(100, 2.0, replace(GATE, max_per_window=None)) == 50.0
    slow = replace(GATE, used=30, first_freed_s=10.0, last_freed_s=40.0)
    assert seconds_left(100, 0.1, slow) == 1000.0


def test_items_that_had_ended_before_tell_nothing_of_the_rate() -> None:
    progress = Progress("users:flow", "users", 1000)
    progress.workers, progress.before = 1, 500
    for _ in range(500):
        progress.count(True)
    assert "/s" not in progress.line() and "left" not in progress.line()
    progress._working_since = (progress._working_since or 0) - 10.0
    for _ in range(100):
        progress.count(True)
    assert "10.0/s" in progress.line() and "40 s left" in progress.line()
