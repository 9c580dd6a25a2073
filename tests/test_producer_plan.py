"""A plan says how long, which limit binds and what it costs, before the first item."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from limiter.limits import Limits
from limiter.view import GateView, OverrideView
from producer.plan import Plan, in_force, plan_for
from tests.fleet import Site, site


def plan(items: int, at_a_time: int, per_minute: int | None, run_s: float | None, **more: float) -> Plan:
    limits = Limits("users", at_a_time, per_minute)
    return plan_for(items, 100 * items, limits, run_s, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "at_a_time", "per_minute", "run_s", "lasts_s", "binds", "enough"),
    [
        (100, 5, None, 1.0, 20.0, "concurrency", None),
        (101, 5, None, 1.0, 21.0, "concurrency", None),
        (100, 5, None, None, None, "concurrency", None),
        (600, 50, 60, 2.0, 542.0, "window", 2),
        (600, 1, 60, 2.0, 1200.0, "concurrency", 2),
        (600, 5, 60, None, 540.0, "window", None),
        (60, 100, 60, 3.0, 3.0, "concurrency", 3),
        (0, 5, 60, 1.0, 0.0, "concurrency", 1),
    ],
)
def test_the_slower_of_both_limits_binds(
    items: int,
    at_a_time: int,
    per_minute: int | None,
    run_s: float | None,
    lasts_s: float | None,
    binds: str,
    enough: int | None,
) -> None:
    found = plan(items, at_a_time, per_minute, run_s)
    if items:
        assert (found.lasts_s, found.binds, found.enough) == (lasts_s, binds, enough)
    else:
        assert "nothing to do" in found.line()


def test_a_batch_that_the_minute_does_not_hold_back_takes_as_long_as_its_runs() -> None:
    plan = plan_for(3, 300, Limits("users", 5, 600), None)

    assert (plan.lasts_s, plan.binds) == (None, "concurrency")
    assert plan.line().startswith("plan: as long as one run takes, which plan --seconds can say, 5 at a time")


def test_the_concurrency_that_would_suffice_is_named() -> None:
    sentences = plan(600, 1, 60, 2.0).sentences()
    assert (
        sentences[0]
        == "600 items at 1 at a time and 60 per 60 s: about 20 min with runs of 2 s, 1 at a time binds"
    )
    assert sentences[1] == "from 2 at a time on, the limit per minute would be what binds"


def test_a_batch_that_does_not_fit_into_redis_is_told_so() -> None:
    fits = plan(1_000, 5, None, 1.0, room_in_redis=10_000_000)
    assert "waiting, they take about 450.0 kB of Redis of 10.0 MB free" in fits.sentences()
    assert not any("does not fit" in each for each in fits.sentences())
    assert any(
        "does not fit" in each for each in plan(1_000, 5, None, 1.0, room_in_redis=300_000).sentences()
    )


def test_results_that_expire_before_the_last_item_are_named() -> None:
    assert "nothing expires while it waits or runs" in plan(100, 1, None, 60.0).expires
    assert "keep_result_s=60) of the first items expire" in plan(100, 1, None, 60.0, keep_result_s=60).expires


def view(**values: Any) -> GateView:
    given: dict[str, Any] = {
        "name": "users",
        "max_concurrent": 20,
        "min_concurrent": 1,
        "max_per_window": None,
        "window_s": 60.0,
        "lease_s": 15.0,
        "level": 4.7,
        "in_use": 0,
        "used": 0,
        "waiting_processes": 0,
        "processes": 1,
        "waiting_jobs": {},
        "paused_for_s": 0.0,
        "closed_for_s": 0.0,
        "next_start_s": 0.0,
        "served": True,
    }
    return GateView(**(given | values))


ADAPTIVE = Limits("users", 20, None, min_concurrent=1, initial_concurrent=5)
SET = OverrideView(
    max_concurrent=3,
    max_per_window=30,
    by="ann@host",
    at=0.0,
    old_max_concurrent=20,
    old_max_per_window=None,
)


@pytest.mark.parametrize(
    ("limits", "gate", "at_a_time", "rate", "because"),
    [
        (Limits("users", 20, 60), view(level=4.0), 20, 60, ""),
        (ADAPTIVE, view(), 4, None, "the level in Redis now; the ceiling is 20"),
        (ADAPTIVE, view(level=20.0), 20, None, ""),
        (ADAPTIVE, None, 5, None, "the level it begins with; the ceiling is 20"),
        (ADAPTIVE, view(alive=False, level=0.0), 5, None, "the level it begins with; the ceiling is 20"),
        (ADAPTIVE, view(level=3.0, override=SET), 3, 30, "set by ann@host"),
        (Limits("users", 20, 60), view(override=SET), 3, 30, "set by ann@host"),
        (Limits("users", 20, 60), view(override=replace(SET, max_per_window=0)), 3, None, "set by ann@host"),
    ],
)
def test_a_plan_counts_with_the_level_that_stands_in_redis_and_with_an_operators_values(
    limits: Limits, gate: GateView | None, at_a_time: int, rate: int | None, because: str
) -> None:
    now, why = in_force(limits, gate)
    assert (now.max_concurrent, now.max_per_window, why) == (at_a_time, rate, because)


def test_a_plan_says_that_it_counts_with_the_level() -> None:
    now, because = in_force(ADAPTIVE, view())
    found = plan_for(100, 10_000, now, 1.0, ceiling=20, because=because)
    assert found.lasts_s == 25.0 and found.max_concurrent == 20 and found.at_a_time == 4
    assert "4 at a time (the level in Redis now; the ceiling is 20) binds" in found.line()


def test_even_pacing_spreads_the_starts_of_the_first_minute_too() -> None:
    limits = Limits("users", 50, 60, even=True)
    assert plan_for(61, 0, limits, 1.0).lasts_s == 61.0


USERS = """
import asyncio
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow


class Fetch(AsyncNode):
    async def exec_async(self, _):
        await asyncio.sleep(0.2)


class Users(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{"user_id": number} for number in range(shared["n"])]


flow = Users(start=Fetch(), max_concurrent_flows=5)
"""


@pytest.fixture
def place() -> Iterator[Site]:
    with site({"users.py": USERS}) as place:
        yield place


def test_a_plan_enqueues_nothing_and_knows_how_long_runs_took(place: Site) -> None:
    asked = place.pocketfleet("plan", "users:flow", "--set", "n=50")
    assert asked.code() == 0, asked.output()
    assert "50 items at 5 at a time: 10 times as long as one run takes" in asked.output()
    assert not (place.directory / ".pocketfleet/batches").exists()
    ran = place.pocketfleet("run", "users:flow", "--set", "n=5", "--workers", "1", "--batch", "b")
    assert ran.code() == 0, ran.output()
    assert "plan: as long as one run takes" in ran.output()
    again = place.pocketfleet("plan", "users:flow", "--set", "n=50")
    assert again.code() == 0
    seconds = re.search(r"with runs of ([0-9.]+) s", again.output())
    assert seconds is not None and 0.2 <= float(seconds[1]) < 1  # what the runs took, on a busy machine too
    assert "as in batch b, 5 at a time binds" in again.output()
    told = place.pocketfleet("plan", "users:flow", "--set", "n=50", "--seconds", "1", "--json")
    assert told.code() == 0
    assert '"lasts_s": 10.0' in told.output()


ADAPTIVE_FLOW = """
import asyncio
from pocketflow import AsyncNode
from pocketfleet import AdaptiveThrottledBatchFlow, RateLimitHit

refused = []


class Fetch(AsyncNode):
    async def exec_async(self, _):
        if self.params["n"] < 2 and len(refused) < 1:
            refused.append(1)
            await asyncio.sleep(0.1)
            raise RateLimitHit()


flow = AdaptiveThrottledBatchFlow(
    start=Fetch(), initial_concurrent_flows=8, max_concurrent_flows=16, recovery_threshold=1000
)
"""


def test_after_a_refusal_the_plan_counts_with_the_cut_level(place: Site) -> None:
    place.write("api.py", ADAPTIVE_FLOW)
    place.write("p.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(40)))
    words = ("api:flow", "--params", "p.jsonl")
    before = place.pocketfleet("plan", *words, "--seconds", "1")
    assert before.code() == 0, before.output()
    assert "8 at a time (the level it begins with; the ceiling is 16) binds" in before.output()
    ran = place.pocketfleet("run", *words, "--workers", "1")
    assert ran.code() == 0, ran.output()
    after = place.pocketfleet("plan", *words, "--seconds", "1")
    assert after.code() == 0, after.output()
    assert "4 at a time (the level in Redis now; the ceiling is 16) binds" in after.output()
