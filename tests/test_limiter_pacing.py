"""Even pacing: who may ask for it, and what it does to real starts on several processes."""

from __future__ import annotations

from typing import Any

import pytest
from pocketflow import AsyncNode

from limiter.errors import LimitsError
from producer.adaptive import AdaptiveThrottledBatchFlow
from producer.flows import ThrottledAsyncParallelBatchFlow
from tests import fleet
from tests.stalls import slack_s


@pytest.mark.parametrize("flow", [ThrottledAsyncParallelBatchFlow, AdaptiveThrottledBatchFlow])
def test_a_flow_is_paced_by_attribute_or_keyword(flow: Any) -> None:
    class Paced(flow):  # type: ignore[misc]
        max_flows_per_minute = 60
        pacing = "even"

    assert Paced(start=AsyncNode()).fleet_limits("f", 15).even
    assert flow(start=AsyncNode(), max_flows_per_minute=60, pacing="even").fleet_limits("f", 15).even
    assert not flow(start=AsyncNode(), max_flows_per_minute=60).fleet_limits("f", 15).even


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"pacing": "smooth", "max_flows_per_minute": 60}, "pacing='smooth' cannot hold: use 'burst'"),
        ({"pacing": True, "max_flows_per_minute": 60}, "pacing=True cannot hold"),
        ({"pacing": "even"}, "max_flows_per_minute=None sets none: set max_flows_per_minute too"),
    ],
)
def test_a_pacing_that_cannot_hold_is_refused_as_it_was_typed(values: Any, sentence: str) -> None:
    with pytest.raises(LimitsError, match=sentence):
        ThrottledAsyncParallelBatchFlow(start=AsyncNode(), **values)


FLOW = """
from ledger import noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Call(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["i"]):
            pass

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 50
    max_flows_per_minute = 40
    window_s = 4.0
    pacing = "even"
    async def prep_async(self, shared):
        return [{"i": i} for i in range(30)]

flow = Flow(start=Call())
"""


def test_two_workers_start_at_an_even_pace() -> None:
    with fleet.site({"paced.py": FLOW}) as site:
        run = site.pocketfleet("run", "paced:flow", "--workers", "2")
        assert run.code() == 0, run.output()
        starts = site.ledger.notes("start")
        took = starts[-1].at - starts[0].at
        # 30 starts, 0.1 s apart: the last one 2.9 s after the first, however fast the flows are
        assert 2.8 < took < 6 + slack_s(starts[0].at), took
        assert site.ledger.busiest(0.5) <= 8, "in a burst all 30 would start at once"
        assert len({each.pid for each in starts}) == 2
