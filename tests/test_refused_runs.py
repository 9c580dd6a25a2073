"""Runs that the protected API refuses: back to their place, resumed where they stopped, on any worker."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from tests import fleet
from tests.fleet import until

FLOW = """
import asyncio, os
from ledger import note, noted, times_started
from pocketflow import AsyncNode, AsyncBatchNode, Node
from pocketfleet import AdaptiveThrottledBatchFlow, RateLimitHit

class Paid(Node):
    def exec(self, _):
        note("paid", self.params["i"])
        return self.params["i"]
    def post(self, shared, prep_res, exec_res):
        shared.setdefault("paid", {})[exec_res] = True
        self.params["seen"] = True

class Asked(AsyncNode):
    async def exec_async(self, _):
        i = self.params["i"]
        assert self.params["seen"]
        first = not times_started(i)
        with noted(i):
            await asyncio.sleep(0.05)
            if first and i in (3, 4):
                raise RateLimitHit("slow down", retry_after=0.5)
    async def exec_fallback_async(self, prep_res, error):
        note("swallowed", self.params["i"])
    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("done", []).append(self.params["i"])

class Listed(AsyncBatchNode):
    async def prep_async(self, shared):
        return [0, 1, 2]
    async def exec_async(self, number):
        note("listed", f"{self.params['i']}.{number}")
        if self.params["i"] == 7 and number == 2 and not os.path.exists("refused"):
            open("refused", "w").close()
            raise RateLimitHit("once", retry_after=0.2)
        return number * 10
    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("lists", {})[self.params["i"]] = exec_res

paid, asked, listed = Paid(), Asked(max_retries=3), Listed(max_retries=3)
paid >> asked >> listed

class Flow(AdaptiveThrottledBatchFlow):
    initial_concurrent_flows = 4
    max_concurrent_flows = 8
    async def prep_async(self, shared):
        return [{"i": i} for i in range(12)]

flow = Flow(start=paid)
"""


def test_a_refused_run_resumes_where_it_stopped_and_is_no_failure() -> None:
    with fleet.site({"calls.py": FLOW}, embedded=True) as site:
        run = site.pocketfleet("run", "calls:flow", "--workers", "2", "--output", "out.jsonl")
        assert run.code() == 0, run.output()
        lines = [json.loads(line) for line in (site.directory / "out.jsonl").read_text().splitlines()]
        assert {line["status"] for line in lines} == {"completed"} and len(lines) == 12
        # given: items 3 and 4 were refused once, item 7 inside its batch node
        refused = {line["index"]: line["attempts"] for line in lines if line["attempts"]}
        assert refused == {n: {"tries": 1, "refusals": 1} for n in (3, 4, 7)}
        # then: no node before the refused one ran twice, and neither retries nor the fallback saw a refusal
        assert set(site.ledger.items("paid").values()) == {1}
        assert site.ledger.items("start") == Counter({str(i): 1 + (i in (3, 4)) for i in range(12)})
        assert site.ledger.count("swallowed") == 0
        # then: of the refused batch node only the refused item was called again
        listed = site.ledger.items("listed")
        assert listed["7.0"] == listed["7.1"] == 1 and listed["7.2"] == 2
        changed = {line["index"]: line["changed"] for line in lines}
        assert changed[3]["paid"] == {"3": True} and changed[3]["done"] == [3]
        assert changed[7]["lists"] == {"7": [0, 10, 20]}


def test_retry_after_pauses_every_worker_and_the_level_is_cut_once() -> None:
    with fleet.site({"calls.py": FLOW}) as site:
        site.enqueue("calls:flow", [{"i": i} for i in range(12)])
        workers = [site.pocketfleet("worker", "calls:flow", "--max-jobs", "2") for _ in range(2)]
        ended = site.ended("calls:flow", 12)
        assert Counter(each.outcome.status for each in ended) == {"completed": 12}
        first_refusal = next(each.at for each in site.ledger.notes("left"))
        starts = [each.at for each in site.ledger.notes("start")]
        quiet = [at for at in starts if first_refusal + 0.15 < at < first_refusal + 0.45]
        assert not quiet, "a run started although the fleet was asked to pause"
        with site.client() as client:
            state: Any = client.hget("pocketfleet:{calls.flow}:gate", "state")
        gate = json.loads(state)
        assert gate["level"] <= 8
        assert gate["cut"] != 0
        assert all(worker.pid for worker in workers)


NEVER = """
from pocketflow import AsyncNode
from pocketfleet import RateLimitHit, ThrottledAsyncParallelBatchFlow

class Refused(AsyncNode):
    async def exec_async(self, _):
        raise RateLimitHit("never")

class Flow(ThrottledAsyncParallelBatchFlow):
    refusal_patience_s = 1
    async def prep_async(self, shared):
        return [{"i": 0}]

flow = Flow(start=Refused())
"""


def test_a_run_that_is_refused_for_too_long_fails_with_that_reason() -> None:
    with fleet.site({"never.py": NEVER}, embedded=True) as site:
        began = time.monotonic()
        run = site.pocketfleet("run", "never:flow", "--workers", "1", "--output", "out.jsonl")
        assert run.code() == 1, run.output()
        assert time.monotonic() - began > 1.0
        line = json.loads((site.directory / "out.jsonl").read_text())
        assert line["status"] == "failed"
        assert "refusal_patience_s=1" in line["error"]["message"]


HANDED = """
import time
from ledger import note
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow
import asyncio

class Paid(AsyncNode):
    async def exec_async(self, _):
        note("paid", self.params["i"])
    async def post_async(self, shared, prep_res, exec_res):
        shared["paid"] = self.params["i"]

class Slow(AsyncNode):
    async def exec_async(self, _):
        note("slow", self.params["i"])
        await asyncio.sleep(1.0)

paid, slow = Paid(), Slow()
paid >> slow

class Flow(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{"i": i} for i in range(3)]

flow = Flow(start=paid)
"""


def test_a_run_that_is_handed_back_resumes_at_its_node_elsewhere() -> None:
    with fleet.site({"handed.py": HANDED}) as site:
        site.enqueue("handed:flow", [{"i": i} for i in range(3)])
        first = site.pocketfleet("worker", "handed:flow", POCKETFLEET_DRAIN_S=0)
        until(lambda: site.ledger.count("slow") == 3, "all three are in their second node")
        import signal

        first.tell(signal.SIGTERM)
        assert first.code() == 0
        site.pocketfleet("worker", "handed:flow")
        ended = site.ended("handed:flow", 3)
        assert {each.outcome.status for each in ended} == {"completed"}
        assert {each.outcome.attempts.get("hand_backs") for each in ended} == {1}
        assert set(site.ledger.items("paid").values()) == {1}
        assert set(site.ledger.items("slow").values()) == {2}
