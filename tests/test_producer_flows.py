"""The flow classes in the calling process: drop-ins for the reference's, under the fleet-wide limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from pocketflow import AsyncNode

from limiter.errors import LimitsError
from pocketfleet import (
    AdaptiveThrottledBatchFlow,
    AdaptiveThrottledNode,
    FlowPresets,
    RateLimitHit,
    ThrottledAsyncParallelBatchFlow,
    ThrottledParallelBatchNode,
)
from producer.errors import ProducerError
from tests import servers


@pytest.fixture(autouse=True)
def redis_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with servers.running("valkey") as url:
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
        yield


class Work(AsyncNode):
    """Counts how many of it run at a time; refuses or fails the items it is told to."""

    def __init__(self, refuse: tuple[int, ...] = (), fail: tuple[int, ...] = (), **more: Any) -> None:
        super().__init__(**more)
        self.refuse, self.fail = refuse, fail
        self.seen: dict[str, int] = {"now": 0, "peak": 0, "calls": 0}

    async def exec_async(self, _: Any) -> str:
        seen, i = self.seen, self.params["i"]
        seen["calls"] += 1
        seen["now"] += 1
        seen["peak"] = max(seen["peak"], seen["now"])
        await asyncio.sleep(0.01)
        seen["now"] -= 1
        if i in self.refuse:
            raise RateLimitHit(f"item {i}")
        if i in self.fail:
            raise ValueError(f"item {i}")
        return f"did {i}"

    async def post_async(self, shared: Any, prep_res: Any, exec_res: Any) -> str:
        shared.setdefault("done", []).append(exec_res)
        return "finished"


class Items:
    async def prep_async(self, shared: Any) -> list[dict[str, int]]:
        return [{"i": i} for i in range(shared["n"])]

    async def post_async(self, shared: Any, prep_res: Any, results: Any) -> Any:
        return results


class Fixed(Items, ThrottledAsyncParallelBatchFlow):
    pass


class Adaptive(Items, AdaptiveThrottledBatchFlow):
    pass


def test_runs_share_the_store_and_give_results_in_input_order() -> None:
    work = Work(fail=(2,))
    flow = Fixed(start=work, max_concurrent_flows=3)
    shared: dict[str, Any] = {"n": 8}
    results = asyncio.run(flow.run_async(shared))
    assert [r if isinstance(r, str) else type(r) for r in results] == ["finished"] * 2 + [ValueError] + [
        "finished"
    ] * 5
    assert sorted(shared["done"]) == [f"did {i}" for i in range(8) if i != 2]
    assert work.seen["peak"] == 3
    assert flow.stats == {
        "max_concurrent_flows": 3,
        "max_flows_per_minute": None,
        "completed_flows": 7,
        "failed_flows": 1,
    }
    flow.reset_flow_limiter()
    assert flow.stats["completed_flows"] == 0


class Cancels(AsyncNode):
    async def exec_async(self, _: Any) -> None:
        if self.params["i"] == 1:
            raise asyncio.CancelledError


def test_a_run_whose_node_raises_a_cancellation_of_its_own_counts_as_failed() -> None:
    flow = Fixed(start=Cancels())
    results = asyncio.run(flow.run_async({"n": 3}))
    assert [type(each) for each in results] == [type(None), asyncio.CancelledError, type(None)]
    assert (flow.stats["completed_flows"], flow.stats["failed_flows"]) == (2, 1)


def test_a_refusal_ends_a_local_run_counts_once_and_lowers_the_level() -> None:
    work = Work(refuse=(0, 1, 2), max_retries=3)
    flow = Adaptive(start=work, initial_concurrent_flows=10, min_concurrent_flows=2)
    results = asyncio.run(flow.run_async({"n": 20}))
    assert [i for i, r in enumerate(results) if isinstance(r, RateLimitHit)] == [0, 1, 2]
    assert work.seen["calls"] == 20, "the node's own retries must not hammer on"
    assert flow.stats["total_rate_limits"] == 3 and flow.stats["failed_flows"] == 3
    assert flow.current_concurrent_flows < 10
    flow.reset_adaptive_state()
    assert flow.current_concurrent_flows == 10
    assert flow.stats["total_rate_limits"] == 0


def test_a_reset_asks_the_gate_for_the_initial_level() -> None:
    async def go() -> tuple[int, int]:
        flow = Adaptive(start=Work(refuse=(0,)), initial_concurrent_flows=8, recovery_threshold=1000)
        await flow.run_async({"n": 9})
        low = flow.current_concurrent_flows
        flow.reset_limiter()
        flow.start_node = Work()
        await flow.run_async({"n": 1})
        return low, flow.current_concurrent_flows

    assert asyncio.run(go()) == (4, 8)


def test_the_level_recovers_while_it_is_what_binds() -> None:
    flow = Adaptive(
        start=Work(),
        initial_concurrent_flows=2,
        max_concurrent_flows=8,
        recovery_threshold=3,
        recovery_factor=2.0,
    )
    asyncio.run(flow.run_async({"n": 60}))
    assert flow.current_concurrent_flows == 8


def test_with_retry_refused_a_local_run_waits_and_starts_over() -> None:
    class Once(Work):
        async def exec_async(self, _: Any) -> str:
            self.seen["calls"] += 1
            if self.seen["calls"] == 1:
                raise RateLimitHit("once", retry_after=0.2)
            return "did it"

    flow = Adaptive(start=Once(), retry_refused=True)
    assert asyncio.run(flow.run_async({"n": 3})) == ["finished"] * 3
    assert flow.stats["failed_flows"] == 0 and flow.stats["total_rate_limits"] == 1


def test_a_nodes_limit_holds_across_flows_and_copies() -> None:
    seen = {"now": 0, "peak": 0}

    class Calls(ThrottledParallelBatchNode):
        max_concurrent = 2

        async def prep_async(self, shared: Any) -> list[int]:
            return [0, 1, 2]

        async def exec_async(self, item: int) -> int:
            seen["now"] += 1
            seen["peak"] = max(seen["peak"], seen["now"])
            await asyncio.sleep(0.01)
            seen["now"] -= 1
            return item

        async def post_async(self, shared: Any, prep_res: Any, exec_res: Any) -> None:
            shared.setdefault("all", []).extend(exec_res)

    shared: dict[str, Any] = {"n": 5}
    asyncio.run(Fixed(start=Calls(), max_concurrent_flows=4).run_async(shared))
    assert sorted(shared["all"]) == sorted([0, 1, 2] * 5)
    assert seen["peak"] == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fixed(max_concurrent_flows=0), "max_concurrent_flows=0"),
        (lambda: Fixed(max_flows_per_minute=-1), "max_flows_per_minute=-1"),
        (lambda: Fixed(max_concurrent_flows=float("nan")), "max_concurrent_flows=nan"),
        (lambda: Fixed(name="a b"), "'a b'"),
        (lambda: Fixed(conflicts="ask"), "conflicts='ask'"),
        (lambda: Adaptive(min_concurrent_flows=9, initial_concurrent_flows=3), "min_concurrent_flows=9"),
        (lambda: Adaptive(backoff_factor=1.5), "backoff_factor=1.5"),
        (lambda: Adaptive(recovery_threshold=0), "recovery_threshold=0"),
        (lambda: Adaptive(recovery="fast"), "recovery='fast'"),
        (lambda: AdaptiveThrottledNode(min_concurrent=30), "min_concurrent=30"),
        (lambda: FlowPresets.get("quick"), "'quick'"),
    ],
)
def test_settings_that_cannot_hold_are_refused_at_use(make: Any, said: str) -> None:
    with pytest.raises(LimitsError) as caught:
        make()
    assert said in str(caught.value)


def test_presets_are_keywords_of_the_flow_classes() -> None:
    assert FlowPresets.get("moderate") == {"max_concurrent_flows": 10, "max_flows_per_minute": 60}
    assert Fixed(**FlowPresets.HEAVY_PROCESSING).max_flows_per_minute == 20
    flow = Adaptive(**FlowPresets.ADAPTIVE_AGGRESSIVE)
    assert (flow.initial_concurrent_flows, flow.min_concurrent_flows, flow.max_concurrent_flows) == (
        20,
        5,
        50,
    )
    assert list(FlowPresets.list_presets()) == [
        "CONSERVATIVE",
        "MODERATE",
        "AGGRESSIVE",
        "BATCH_PROCESSING",
        "DATA_PIPELINE",
        "REALTIME",
        "HEAVY_PROCESSING",
        "ADAPTIVE_CONSERVATIVE",
        "ADAPTIVE_MODERATE",
        "ADAPTIVE_AGGRESSIVE",
        "ADAPTIVE_GENTLE",
    ]
    assert Adaptive(**FlowPresets.ADAPTIVE_GENTLE).recovery == "additive"


def test_a_prep_that_forgot_its_return_is_told_so() -> None:
    class Forgetful(ThrottledAsyncParallelBatchFlow):
        async def prep_async(self, shared: Any) -> None:
            [{"i": i} for i in range(3)]

    flow = Forgetful(start=Work(), name="forgetful")
    for run in (flow.run_async, flow.run_on_fleet):
        with pytest.raises(ProducerError, match=r"^prep_async returned None: return the list of param dicts"):
            asyncio.run(run({}))  # type: ignore[arg-type]
