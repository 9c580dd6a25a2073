"""What else counts as a refusal, by a flow's own word, and what its statistics say after a fleet run."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pocketflow import AsyncNode

from limiter.errors import LimitsError
from limiter.refusal import RateLimitHit
from pocketfleet import AdaptiveThrottledBatchFlow
from tests import fleet, servers

FLOW = """
import asyncio, json
from ledger import note, times_started
from pocketflow import AsyncNode
from pocketfleet import AdaptiveThrottledBatchFlow, RateLimitHit

class ApiError(Exception):
    def __init__(self, status, code=""):
        super().__init__(f"status {status} {code}")
        self.status_code, self.code = status, code

ERRORS = {1: ApiError(529), 2: ApiError(503), 3: ApiError(400, "busy"), 4: ApiError(429, "never again")}

class Call(AsyncNode):
    async def exec_async(self, _):
        i = self.params["i"]
        first = not times_started(i)
        note("start", i)
        if i in ERRORS and (first or i == 4):
            raise ERRORS[i]
    async def exec_fallback_async(self, prep_res, error):
        note("fell", self.params["i"])
        raise error

class Flow(AdaptiveThrottledBatchFlow):
    initial_concurrent_flows = 4
    max_concurrent_flows = 8
    overloaded = True

    def is_refusal(self, error):
        code = getattr(error, "code", "")
        if code == "never again":
            return False
        return RateLimitHit("busy", retry_after=0.1) if code == "busy" else None

    async def prep_async(self, shared):
        return [{"i": i} for i in range(8)]

    async def post_async(self, shared, prep_res, results):
        print("SAID", json.dumps({"failed": [n for n, r in enumerate(results) if isinstance(r, Exception)], **self.stats}))

flow = Flow(start=Call(max_retries=2))

if __name__ == "__main__":
    from calls import flow

    async def main():
        await flow.run_on_fleet({}, workers=1)
        print("STATS", json.dumps(flow.stats))

    asyncio.run(main())
"""


def test_a_flow_says_what_else_is_a_refusal_and_its_stats_tell_of_the_fleet_run() -> None:
    with fleet.site({"calls.py": FLOW}, embedded=True) as site:
        run = site.python("calls.py")
        assert run.code() == 0, run.output()
        said = {
            line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in run.output().splitlines() if " {" in line
        }
        # then: 529, 503 and the flow's own error went back; the 429 it will not have failed at once
        assert json.loads(said["SAID"])["failed"] == [4]
        starts = site.ledger.items("start")
        assert {i: starts[str(i)] for i in range(5)} == {0: 1, 1: 2, 2: 2, 3: 2, 4: 2}
        assert set(site.ledger.items("fell")) == {"4"}
        # then: the statistics are the whole batch's
        stats = json.loads(said["STATS"])
        assert (stats["completed_flows"], stats["failed_flows"], stats["total_rate_limits"]) == (7, 1, 3)
        assert 1 <= stats["current_concurrent_flows"] <= 8
        assert 0 <= stats["consecutive_successes"] <= 7


class Busy(Exception):
    """An error of the user's own, without a status."""


class Call(AsyncNode):  # type: ignore[type-arg]
    async def exec_async(self, prep_res: Any) -> None:
        raise Busy


def test_run_async_asks_the_flow_too(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = AdaptiveThrottledBatchFlow(
        start=Call(), name="asked", is_refusal=lambda error: True if isinstance(error, Busy) else None
    )

    async def two(shared: Any) -> list[dict[str, int]]:
        return [{"i": 0}, {"i": 1}]

    flow.prep_async = two  # type: ignore[method-assign]
    found: list[Any] = []

    async def keep(shared: Any, prep_res: Any, results: Any) -> None:
        found.extend(results)

    flow.post_async = keep  # type: ignore[method-assign]
    with servers.running("valkey") as url:
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
        asyncio.run(flow.run_async({}))
    assert [type(each) for each in found] == [RateLimitHit, RateLimitHit]
    assert flow.stats["total_rate_limits"] == 2


@pytest.mark.parametrize(("key", "value"), [("overloaded", "yes"), ("is_refusal", "429")])
def test_options_that_cannot_hold_are_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(LimitsError, match=f"{key}='{value}' cannot hold"):
        AdaptiveThrottledBatchFlow(**{key: value})
