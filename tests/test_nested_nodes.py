"""Limits inside nodes, on real worker processes: counted for the fleet, fed by their own refusals."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from limiter.keys import GateKeys
from tests import fleet
from tests.fleet import Site, until

NODES = """
import asyncio, os, time
from ledger import note, noted, times_started
from pocketflow import AsyncNode, Node
from pocketfleet import (
    HeldAlready, RateLimitHit, ThrottledAsyncParallelBatchFlow, ThrottledParallelBatchNode, limit,
)

class Calls(ThrottledParallelBatchNode):
    max_concurrent = 3
    async def prep_async(self, shared):
        return range(4)
    async def exec_async(self, number):
        with noted(f"{self.params['i']}.{number}"):
            await asyncio.sleep(0.03)
        return number

class Sync(Node):
    def exec(self, _):
        with limit("sync-api", max_concurrent=2):
            with noted(self.params["i"]):
                time.sleep(0.05)

class Refused(AsyncNode):
    async def exec_async(self, _):
        i = self.params["i"]
        async with limit("api", max_concurrent=4):
            first = not times_started(i)
            with noted(i):
                await asyncio.sleep(0.02)
                if first and i == 3:
                    raise RateLimitHit("slow down", retry_after=0.3)

class Waits(AsyncNode):
    async def exec_async(self, _):
        async with limit("slow", max_concurrent=1):
            with noted(self.params["i"]):
                await asyncio.sleep(1.5)

class Again(Node):
    def exec(self, _):
        try:
            with limit("nodes.again"):
                note("taken")
        except HeldAlready as error:
            note("refused", str(error).split(chr(39))[1])

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 8
    async def prep_async(self, shared):
        return [{"i": i} for i in range(shared.get("n", 10))]

one, two = Flow(start=Calls()), Flow(start=Calls())
sync, refused, waits, again = Flow(start=Sync()), Flow(start=Refused()), Flow(start=Waits()), Flow(start=Again())
"""


def state_of(site: Site, limit: str) -> dict[str, Any]:
    with site.client() as client:
        text: Any = client.hget(GateKeys(limit).gate, "state")
    return dict(json.loads(text))


def run(site: Site, flow: str, count: int, workers: int = 2, **env: Any) -> list[Any]:
    """The outcomes of `count` items on that many worker processes."""
    for _ in range(workers):
        site.pocketfleet("worker", f"nodes:{flow}", "--max-jobs", "4", **env)
    with site.client() as client:
        until(lambda: client.zcard(GateKeys(f"nodes.{flow}").leases) == workers, "all of them are there")
    site.enqueue(f"nodes:{flow}", [{"i": i} for i in range(count)])
    return site.ended(f"nodes:{flow}", count)


def test_a_node_class_holds_its_limit_across_copies_flows_and_processes() -> None:
    with fleet.site({"nodes.py": NODES}) as site:
        for flow in ("one", "two"):
            site.pocketfleet("worker", f"nodes:{flow}", "--max-jobs", "8")
        for flow in ("one", "two"):
            site.enqueue(f"nodes:{flow}", [{"i": i} for i in range(8)], batch=flow)
        for flow in ("one", "two"):
            ended = site.ended(f"nodes:{flow}", 8, batch=flow)
            assert Counter(each.outcome.status for each in ended) == {"completed": 8}
        assert site.ledger.count("end") == 2 * 8 * 4
        assert len({each.pid for each in site.ledger.notes("start")}) == 2
        assert site.ledger.peak() == 3, "two flows of up to 8 copies with 4 items each: 3 calls at a time"


def test_sync_nodes_share_a_limit_between_two_processes() -> None:
    with fleet.site({"nodes.py": NODES}) as site:
        ended = run(site, "sync", 20)
        assert Counter(each.outcome.status for each in ended) == {"completed": 20}
        assert len({each.pid for each in site.ledger.notes("start")}) == 2
        assert site.ledger.peak() == 2


def test_a_refusal_inside_a_gate_is_that_gates_and_the_run_goes_back_as_ever() -> None:
    with fleet.site({"nodes.py": NODES}) as site:
        ended = run(site, "refused", 10)
        assert Counter(each.outcome.status for each in ended) == {"completed": 10}
        refusals = {each.index: each.outcome.attempts.get("refusals", 0) for each in ended}
        assert refusals == {i: int(i == 3) for i in range(10)}
        until(lambda: state_of(site, "api")["cut"] > 0, "the gate has learnt of it", timeout_s=10)
        assert state_of(site, "api")["pause"] > 0
        flow = state_of(site, "nodes.refused")
        assert (flow["cut"], flow["pause"]) == (0, 0), "the flow's own limit has not"


def test_a_node_that_waits_for_a_gate_for_longer_than_a_lease_keeps_its_run() -> None:
    with fleet.site({"nodes.py": NODES}) as site:
        ended = run(site, "waits", 4, POCKETFLEET_LEASE_S=4)
        assert Counter(each.outcome.status for each in ended) == {"completed": 4}
        assert not any(each.outcome.attempts.get("deaths") for each in ended), (
            "no run was taken from a living process"
        )
        assert site.ledger.items("start") == Counter({str(i): 1 for i in range(4)})
        assert site.ledger.peak() == 1


def test_the_flows_own_limit_is_refused_inside_its_runs_threads_included() -> None:
    with fleet.site({"nodes.py": NODES}) as site:
        ended = run(site, "again", 2, workers=1)
        assert Counter(each.outcome.status for each in ended) == {"completed": 2}
        assert site.ledger.items("refused") == Counter({"nodes.again": 2})
        assert site.ledger.count("taken") == 0


def test_a_run_that_is_handed_back_leaves_the_wait_of_its_thread() -> None:
    with fleet.site({"nodes.py": NODES, "holder.py": HOLDER}) as site:
        site.python("holder.py")
        until(lambda: site.ledger.count("held"))
        site.enqueue("nodes:sync", [{"i": 0}])
        worker = site.pocketfleet("worker", "nodes:sync", POCKETFLEET_DRAIN_S=0)
        with site.client() as client:
            until(lambda: client.zcard(GateKeys("sync-api").tickets), "its thread waits")
        import signal

        told = worker.tell(signal.SIGTERM)
        assert worker.code(timeout_s=20) == 0
        assert until(lambda: True) - told < 10
        assert site.waiting("nodes:sync") == 1 and site.ledger.count("start") == 0


HOLDER = """
import time
from ledger import note
from pocketfleet import limit
with limit(limit("sync-api", max_concurrent=2)):
    import threading
    def other():
        with limit("sync-api"):
            note("held")
            time.sleep(60)
    threading.Thread(target=other, daemon=True).start()
    time.sleep(60)
"""

LOCAL = """
import asyncio
from pocketflow import AsyncNode
from pocketfleet import HeldAlready, RateLimitHit, ThrottledAsyncParallelBatchFlow, limit

class Inner(AsyncNode):
    async def exec_async(self, _):
        async with limit("api", max_concurrent=2):
            raise RateLimitHit("no", retry_after=0.1)

class Flow(ThrottledAsyncParallelBatchFlow):
    name = "outer"
    async def prep_async(self, shared):
        return [{}, {}]

class Nested(AsyncNode):
    async def exec_async(self, _):
        try:
            await Flow(start=Inner()).run_async({})
        except HeldAlready as error:
            print("refused:", error.limit)

async def main():
    print(await Flow(start=Inner()).run_async({}))
    await Flow(start=Nested()).run_async({})

asyncio.run(main())
"""


def test_run_async_feeds_the_inner_gate_and_knows_what_its_runs_hold() -> None:
    with fleet.site({"local.py": LOCAL}) as site:
        program = site.python("local.py")
        assert program.code() == 0, program.output()
        assert program.output().count("refused: outer") == 2
        assert state_of(site, "outer")["cut"] == 0
        assert state_of(site, "api")["cut"] > 0
