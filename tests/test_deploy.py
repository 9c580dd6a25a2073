"""A new version is rolled out under load: nothing is lost, nothing fails, nothing is paid for twice."""

from __future__ import annotations

import signal
import time
from collections import Counter

from tests import fleet
from tests.fleet import until

QUICK = {"POCKETFLEET_LEASE_S": 4.0}

FLOW = """
import asyncio, time
from ledger import note, noted
from pocketflow import AsyncNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Paid(AsyncNode):
    async def exec_async(self, _):
        await asyncio.sleep(0.05)
        note("paid", self.params["n"])
    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("steps", []).append("paid")

class Slow(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["n"]):
            await asyncio.sleep(self.params["s"])

class Sync(Node):
    def exec(self, _):
        time.sleep(0.02)
        note("sync", self.params["n"])
    def post(self, shared, prep_res, exec_res):
        shared["steps"].append("sync")

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 12
    limit = "shared"

paid, slow, sync = Paid(), Slow(), Sync()
paid >> slow >> sync
flow = Flow(start=paid, name="old")
new = Flow(start=Sync(), name="new")
"""


PARAMS = "".join(f'{{"n": {n}, "s": 0}}\n' for n in range(3))


def test_a_rolling_restart_under_load_loses_and_fails_nothing() -> None:
    with fleet.site(
        {"deploy.py": FLOW.replace('name="old"', "name=None").replace('limit = "shared"', "")}
    ) as site:
        count = 90
        site.enqueue("deploy:flow", [{"n": n, "s": 0.2 + (n % 5) * 0.4} for n in range(count)])
        given = QUICK | {"POCKETFLEET_DRAIN_S": 0.3}
        workers = [site.pocketfleet("worker", "deploy:flow", **given) for _ in range(3)]
        until(lambda: site.ledger.count("start") >= 12, "work has begun")
        for _ in range(2):
            for place in range(3):
                old = workers[place]
                workers[place] = site.pocketfleet("worker", "deploy:flow", **given)
                until(lambda new=workers[place]: "worker serves" in new.output(), "the new one serves")
                old.tell(signal.SIGTERM)
                assert old.code() == 0, old.output()
                assert "Traceback" not in old.output() and "run.fault" not in old.output()
        ended = site.ended("deploy:flow", count)
        assert Counter(each.outcome.status for each in ended) == {"completed": count}
        assert all(each.outcome.difference["="]["steps"] == ["paid", "sync"] for each in ended)
        handed = [each.outcome.attempts for each in ended if each.outcome.attempts]
        assert handed, "the restarts met runs that had to be handed back"
        assert all(set(attempts) == {"tries", "hand_backs"} and attempts["tries"] == 1 for attempts in handed)
        # a node is run again only where it was cut short; a sync one is waited for
        cut = site.ledger.count("left")
        assert site.ledger.count("start") == count + cut
        assert set(site.ledger.items("sync").values()) == {1}
        assert (
            sum(site.ledger.items("paid").values())
            <= count + sum(each["hand_backs"] for each in handed) - cut
        )
        assert site.ledger.peak() <= 12
        assert site.waiting("deploy:flow") == 0


def test_a_worker_leaves_the_jobs_of_a_flow_it_does_not_know() -> None:
    with fleet.site({"deploy.py": FLOW, "params.jsonl": PARAMS}) as site:
        old = site.pocketfleet("worker", "deploy:flow", **QUICK)
        until(lambda: "worker serves" in old.output())
        for target in ("deploy:new", "deploy:flow"):
            typed = site.pocketfleet("enqueue", target, "--params", "params.jsonl", "--batch", target[7:])
            assert typed.code() == 0, typed.output()
        # given: both flows wait under one limit, the new one in front, and only the old one is known
        until(lambda: site.ledger.count("end") == 3, "its own ran", timeout_s=15)
        time.sleep(0.5)
        with site.client() as client:
            assert client.zcard("pocketfleet:{shared}:queue:new") == 3, "they wait"
            assert client.xlen("pocketfleet:{shared}:out:new") == 0, "nothing was recorded of them"
            new = site.pocketfleet("worker", "deploy:new", **QUICK)
            until(lambda: client.xlen("pocketfleet:{shared}:out:new") == 3, f"they ran: {new.output()}")
        assert {each.pid for each in site.ledger.notes("end")} == {old.pid}
