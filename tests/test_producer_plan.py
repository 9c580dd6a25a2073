"""A plan says how long, which limit binds and what it costs, before the first item."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from limiter.limits import Limits
from producer.plan import Plan, plan_for
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


def test_the_concurrency_that_would_suffice_is_named() -> None:
    sentences = plan(600, 1, 60, 2.0).sentences()
    assert (
        sentences[0]
        == "600 items at 1 at a time and 60 per 60 s: about 20 min with runs of 2 s, 1 at a time binds"
    )
    assert sentences[1] == "from 2 at a time on, the limit per minute would be what binds"


def test_the_plan_of_a_level_that_adapts_is_one_for_its_best() -> None:
    limits = Limits("users", 20, None, min_concurrent=1, initial_concurrent=4)
    most = "20 at a time binds (the level's most; it starts at 4)"
    assert plan_for(400, 0, limits, 2.0).line().startswith(f"plan: at least 40 s with runs of 2 s, {most}; ")
    said = "as one run takes, which plan --seconds can say, 20 at a time (the level's most; it starts at 4); "
    assert said in plan_for(400, 0, limits, None).line()


def test_a_batch_that_does_not_fit_into_redis_is_told_so() -> None:
    fits = plan(1_000, 5, None, 1.0, room_in_redis=10_000_000)
    assert "waiting, they take about 310.0 kB of Redis of 10.0 MB free" in fits.sentences()
    assert not any("does not fit" in each for each in fits.sentences())
    assert any(
        "does not fit" in each for each in plan(1_000, 5, None, 1.0, room_in_redis=300_000).sentences()
    )


def test_results_that_expire_before_the_last_item_are_named() -> None:
    assert "nothing expires while it waits or runs" in plan(100, 1, None, 60.0).expires
    assert "keep_result_s=60) of the first items expire" in plan(100, 1, None, 60.0, keep_result_s=60).expires


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
    assert "with runs of 0.2" in again.output()
    assert "as in batch b, 5 at a time binds" in again.output()
    told = place.pocketfleet("plan", "users:flow", "--set", "n=50", "--seconds", "1", "--json")
    assert told.code() == 0
    assert '"lasts_s": 10.0' in told.output()
