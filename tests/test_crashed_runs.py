"""Processes that die under their runs: real processes, kill -9, and the ledger of node executions as judge."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from limiter.sync import Entry
from tests import fleet
from tests.fleet import Site, until
from tests.stalls import slack_s
from worker.alone import LoneRun

LEASE_S = 2.0
QUICK = {"POCKETFLEET_LEASE_S": LEASE_S}

FLOW = """
import asyncio, os
from ledger import note, noted, times_started
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Paid(AsyncNode):
    async def exec_async(self, _):
        note("paid", self.params["n"])
        return self.params["n"]
    async def post_async(self, shared, prep_res, exec_res):
        shared["paid"] = {str(exec_res): os.getpid()}
        self.params["seen"] = {"by": "paid"}

class Slow(AsyncNode):
    async def exec_async(self, _):
        n = self.params["n"]
        assert self.params["seen"] == {"by": "paid"}
        lost = times_started(n)
        with noted(n):
            if self.params.get("poison"):
                await asyncio.sleep(0.1)
                os._exit(9)
            await asyncio.sleep(0.1 if lost >= self.params.get("loses", 99) else self.params["s"])
    async def post_async(self, shared, prep_res, exec_res):
        assert shared["paid"]
        shared["done"] = self.params["n"]

def flow_of(**values):
    paid = Paid()
    paid >> Slow()
    return Flow(start=paid, **values)

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 60

flow = flow_of()
twice = flow_of(quarantine_after=2)
rated = flow_of(max_flows_per_minute=1000)
"""


def killed_while(site: Site, target: str, running: int) -> None:
    """Start a worker and kill it once so many runs are in their second node."""
    before = site.ledger.count("start")
    worker = site.pocketfleet("worker", target, **QUICK)
    until(lambda: site.ledger.count("start") >= before + running, f"{running} runs: {worker.output()}")
    worker.kill()


def test_a_killed_run_goes_on_after_the_nodes_it_has_paid_for() -> None:
    with fleet.site({"crash.py": FLOW}) as site:
        site.enqueue("crash:flow", [{"n": n, "s": 300, "loses": 1} for n in range(5)])
        first = site.pocketfleet("worker", "crash:flow", **QUICK)
        until(lambda: site.ledger.count("start") == 5, "all are in their second node")
        second = site.pocketfleet("worker", "crash:flow", **QUICK)
        until(lambda: "worker serves" in second.output(), "the other worker serves")
        until(lambda: site.waiting("crash:flow") == 5)
        time.sleep(0.5)

        killed_at = first.kill()
        until(lambda: site.ledger.count("start") == 10, "the other worker took over")

        assert time.monotonic() - killed_at < LEASE_S + 1.5 + slack_s(killed_at)
        ended = site.ended("crash:flow", 5)
        assert Counter(each.outcome.status for each in ended) == {"completed": 5}
        assert all(each.outcome.attempts == {"tries": 1, "deaths": 1} for each in ended)
        assert set(site.ledger.items("paid").values()) == {1}, "the first node was paid for once"
        assert set(site.ledger.items("start").values()) == {2}
        # what a node left in the store and in its params came along
        assert {each.outcome.difference["="]["done"] for each in ended} == set(range(5))
        assert {pid for each in ended for pid in each.outcome.difference["="]["paid"].values()} == {first.pid}


def test_fifty_runs_that_lose_their_host_three_times_are_not_quarantined() -> None:
    with fleet.site({"crash.py": FLOW}) as site:
        site.enqueue("crash:rated", [{"n": n, "s": 1.5} for n in range(50)])
        killed_while(site, "crash:rated", 50)
        killed_while(site, "crash:rated", 50)
        killed_while(site, "crash:rated", 2)  # by now they run alone, two at a time
        for _ in range(2):
            site.pocketfleet("worker", "crash:rated", **QUICK)
        # the first in line are those that were alone when their host went
        ended = site.ended("crash:rated", 8)
        assert {each.outcome.status for each in ended} == {"completed"}
        assert set(site.ledger.items("paid").values()) == {1}
        deaths = Counter(each.outcome.attempts["deaths"] for each in ended)
        assert deaths[3] >= 1 and set(deaths) == {2, 3}
        assert all(each.outcome.attempts["tries"] == 1 for each in ended)


@pytest.mark.long
def test_fifty_runs_that_each_lose_their_host_three_times_all_complete() -> None:
    with fleet.site({"crash.py": FLOW}) as site:
        site.enqueue("crash:rated", [{"n": n, "s": 300, "loses": 3} for n in range(50)])
        killed_while(site, "crash:rated", 50)
        killed_while(site, "crash:rated", 50)

        def started_thrice() -> int:
            return sum(times >= 3 for times in site.ledger.items("start").values())

        while started_thrice() < 50:  # alone, two at a time and worker
            least = min(50, started_thrice() + 6)
            workers = [site.pocketfleet("worker", "crash:rated", **QUICK) for _ in range(3)]
            until(lambda least=least: started_thrice() >= least, f"{least} start again", timeout_s=180)  # type: ignore[misc]
            for worker in workers:
                worker.kill()
        for _ in range(2):
            site.pocketfleet("worker", "crash:rated", **QUICK)
        ended = site.ended("crash:rated", 50)
        assert Counter(each.index for each in ended) == Counter(range(50))
        assert {each.outcome.status for each in ended} == {"completed"}
        assert all(each.outcome.attempts["deaths"] >= 3 for each in ended)
        assert all(each.outcome.attempts["tries"] == 1 for each in ended)
        assert set(site.ledger.items("paid").values()) == {1}


def test_a_run_that_kills_its_process_is_quarantined_alone_and_its_neighbours_complete() -> None:
    with fleet.site({"crash.py": FLOW}) as site:
        healthy = [{"n": n, "s": 0.5} for n in range(8)]
        site.enqueue("crash:flow", [{"n": 99, "s": 0, "poison": True}, *healthy])
        workers = [site.pocketfleet("worker", "crash:flow", **QUICK) for _ in range(3)]
        ended = site.ended("crash:flow", 9)
        status = {each.index: each.outcome.status for each in ended}
        assert status == {0: "quarantined"} | dict.fromkeys(range(1, 9), "completed")
        outcome = next(each.outcome for each in ended if each.index == 0)
        assert outcome.attempts == {"tries": 1, "deaths": 3}
        assert outcome.failure is not None and outcome.failure.type == "ProcessDied"
        assert "exit code 9 while it ran alone (once)" in outcome.failure.message
        assert "2 processes that it shared" in outcome.failure.message
        assert outcome.failure.node == "Slow"
        assert site.ledger.items("start")["99"] == 3 and site.ledger.items("paid")["99"] == 1
        alive = [worker for worker in workers if fleet.lives(worker.pid)]
        assert len(alive) == 1, "alone it took nobody else with it"
        assert set(site.ledger.items("paid").values()) == {1}


def test_quarantine_waits_for_as_many_deaths_as_the_flow_says() -> None:
    with fleet.site({"crash.py": FLOW}) as site:
        site.enqueue("crash:twice", [{"n": 99, "s": 0, "poison": True}])
        for _ in range(2):
            site.pocketfleet("worker", "crash:twice", **QUICK).code()
        site.pocketfleet("worker", "crash:twice", **QUICK)
        (ended,) = site.ended("crash:twice", 1)
        assert ended.outcome.status == "quarantined"
        assert ended.outcome.attempts == {"tries": 2, "deaths": 4}
        assert ended.outcome.failure is not None and "(2 times)" in ended.outcome.failure.message


def test_a_lone_run_is_handed_back_when_its_worker_leaves() -> None:
    with fleet.site({"crash.py": FLOW}) as site:
        site.enqueue("crash:flow", [{"n": 0, "s": 30}])
        killed_while(site, "crash:flow", 1)
        killed_while(site, "crash:flow", 1)
        worker = site.pocketfleet("worker", "crash:flow", POCKETFLEET_DRAIN_S=0, **QUICK)
        until(lambda: site.ledger.count("start") == 3, "it runs alone")
        pid = site.ledger.notes("start")[-1].pid
        assert pid != worker.pid
        worker.tell(signal.SIGTERM)
        assert worker.code() == 0
        assert not fleet.lives(pid)
        assert site.ledger.count("left") == 1
        with site.client() as client:
            record = client.hget("pocketfleet:{crash.flow}:jobs", "{crash.flow}:b:0")
        assert record is not None and record.split()[2:5] == [b"2", b"0", b"1"], (
            "one hand-back, no death more"
        )


def test_a_lone_run_that_comes_too_late_takes_no_process_from_those_after_it() -> None:
    async def base(limit: str, batch: str) -> bytes:
        return b""

    taken: list[object] = []
    returned: list[tuple[Entry, bool]] = []
    crew: Any = SimpleNamespace(
        flows=["f"],
        bases=SimpleNamespace(base=base),
        children=SimpleNamespace(take=taken.append),
        pump=SimpleNamespace(name="L", return_job=lambda entry, stamp, late: returned.append((entry, late))),
        ended=lambda run: None,
    )
    served: Any = SimpleNamespace(name="f")
    for start_by, late in ((time.monotonic() - 1, True), (time.monotonic() + 60, False)):
        claimed: Any = SimpleNamespace(id="{L}:b:0", saved=b"", attempt=7)
        run = LoneRun(crew, claimed, start_by, 5, served)
        asyncio.run(run.execute())
        entry, told_late = returned.pop()
        assert (entry.what, told_late) == ("wait", late)
        assert len(taken) == (0 if late else 1)
