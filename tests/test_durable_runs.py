"""Runs that are stopped between or inside nodes, and what they resume with; the ledger counts executions."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest

from tests import fleet
from tests.fleet import until
from tests.stalls import slack_s

LEASE_S = 2.0
QUICK = {"POCKETFLEET_LEASE_S": LEASE_S}
AT_ONCE = QUICK | {"POCKETFLEET_DRAIN_S": 0}

FLOW = """
import asyncio, os, time
from ledger import note, noted
from pocketflow import AsyncFlow, AsyncNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Paid(AsyncNode):
    async def exec_async(self, _):
        note("paid", self.params["n"])
    async def post_async(self, shared, prep_res, exec_res):
        shared["paid"] = {self.params["n"]: [1, 2]}

class Slow(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["n"]):
            await asyncio.sleep(self.params.get("s", 1.0))

class After(AsyncNode):
    async def exec_async(self, _):
        note("after", self.params["n"])
    async def post_async(self, shared, prep_res, exec_res):
        shared["after"] = self.params["n"]

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 20

def line(*nodes):
    for one, other in zip(nodes, nodes[1:]):
        one >> other
    return nodes[0]

flow = Flow(start=line(Paid(), Slow(), After()))
off = Flow(start=line(Paid(), Slow(), After()), checkpoint=False)
cancels = Flow(start=line(Paid(), Slow(), After()), on_lost_lease="cancel")

# --- entries that cannot travel
class Photo:
    def __init__(self, data): self.data = data

class Shoots(Paid):
    async def post_async(self, shared, prep_res, exec_res):
        await super().post_async(shared, prep_res, exec_res)
        shared["photo"] = Photo(b"cheese")

class Looks(Slow):
    async def prep_async(self, shared):
        if "photo" not in shared:
            note("made", self.params["n"])
            shared["photo"] = Photo(b"cheese")
        assert shared["photo"].data == b"cheese"

class Packs(Flow):
    def save_entry(self, key, value):
        return value.data if key == "photo" else NotImplemented
    def load_entry(self, key, saved):
        return Photo(saved)

photo = Flow(start=line(Shoots(), Looks()))
local = Flow(start=line(Shoots(), Looks()), local_keys=["photo"])
packed = Packs(start=line(Shoots(), Looks()))

# --- a large store
class Writes(Paid):
    async def post_async(self, shared, prep_res, exec_res):
        shared["text"] = os.urandom(500_000).hex()
class Reads(Slow):
    async def prep_async(self, shared):
        assert len(shared["text"]) == 1_000_000
large = Flow(start=line(Writes(), Reads(), After()))

# --- nested flows
class Inner(AsyncFlow):
    async def prep_async(self, shared):
        note("prep", self.params["n"])
        self.set_params({**self.params, "tag": "t"})
        return {"inner": self.params["n"]}
    async def post_async(self, shared, prep_res, exec_res):
        assert prep_res == {"inner": self.params["n"]}, prep_res
        with noted(f"post{self.params['n']}"):
            await asyncio.sleep(self.params.get("s", 1.0))
        return "default"
class Marks(Paid):
    async def post_async(self, shared, prep_res, exec_res):
        self.params["mark"] = True
class Checks(Slow):
    async def prep_async(self, shared):
        assert self.params["mark"]
nested = Flow(start=line(Inner(start=line(Marks(), Checks())), After()))

# --- time
class Blocks(Node):
    def exec(self, _):
        time.sleep(0.6)
late = Flow(start=line(Paid(), Slow(), After()), flow_timeout_s=2.5, max_concurrent_flows=1)
blocks = Flow(start=line(Blocks(), Blocks(), Blocks()), flow_timeout_s=1.0)
"""


@pytest.mark.parametrize("name", ["flow", "off", "large", "packed", "local"])
def test_a_run_that_is_handed_back_resumes_at_its_node(name: str) -> None:
    target = f"durable:{name}"
    with fleet.site({"durable.py": FLOW}) as site:
        site.enqueue(target, [{"n": n} for n in range(3)])
        first = site.pocketfleet("worker", target, **AT_ONCE)
        until(lambda: site.ledger.count("start") == 3, f"all are in their second node: {first.output()}")
        first.tell(signal.SIGTERM)
        assert first.code() == 0, first.output()
        site.pocketfleet("worker", target, **QUICK)
        ended = site.ended(target, 3)
        assert Counter(each.outcome.status for each in ended) == {"completed": 3}, ended
        assert all(each.outcome.attempts == {"tries": 1, "hand_backs": 1} for each in ended)
        assert set(site.ledger.items("paid").values()) == {1}
        assert set(site.ledger.items("start").values()) == {2}
        assert site.ledger.count("made") == (3 if name == "local" else 0)
        with site.client() as client:
            assert not client.keys("pocketfleet:*saved") and not client.keys("pocketfleet:*kept*")


def test_what_cannot_travel_fails_nothing_and_is_named_once() -> None:
    with fleet.site({"durable.py": FLOW}) as site:
        site.enqueue("durable:photo", [{"n": n, "s": 0.5} for n in range(5)])
        worker = site.pocketfleet("worker", "durable:photo", **QUICK)
        ended = site.ended("durable:photo", 5)
        assert Counter(each.outcome.status for each in ended) == {"completed": 5}
        warnings = [line for line in worker.output().splitlines() if "checkpoint.not_written" in line]
        assert len(warnings) == 1
        assert "'photo' in the shared store cannot travel (a Photo)" in warnings[0]
        assert "local_keys=" in warnings[0] and "save_entry" in warnings[0]


def test_a_nested_flow_is_gone_on_with_in_the_middle_and_before_its_post() -> None:
    with fleet.site({"durable.py": FLOW}) as site:
        site.enqueue("durable:nested", [{"n": 0}])
        for word in ("0", "post0"):
            worker = site.pocketfleet("worker", "durable:nested", **AT_ONCE)
            until(lambda word=word: site.ledger.items("start")[word] == 1, f"{word}: {worker.output()}")
            worker.tell(signal.SIGTERM)
            assert worker.code() == 0
        site.pocketfleet("worker", "durable:nested", **QUICK)
        (ended,) = site.ended("durable:nested", 1)
        assert ended.outcome.status == "completed", ended.outcome
        assert ended.outcome.attempts == {"tries": 1, "hand_backs": 2}
        assert site.ledger.count("paid") == site.ledger.count("prep") == site.ledger.count("after") == 1
        assert site.ledger.items("start") == {"0": 2, "post0": 2}


def test_a_changed_graph_is_noticed_and_the_run_starts_over_and_says_so() -> None:
    changed = FLOW.replace(
        "flow = Flow(start=line(Paid(), Slow(), After()))",
        "flow = Flow(start=line(Paid(), Paid(), Slow(), After()))",
    )
    assert changed != FLOW
    with fleet.site({"durable.py": FLOW}) as site:
        site.enqueue("durable:flow", [{"n": 0}])
        first = site.pocketfleet("worker", "durable:flow", **AT_ONCE)
        until(lambda: site.ledger.count("start") == 1, "it is in its second node")
        first.tell(signal.SIGTERM)
        assert first.code() == 0
        site.write("durable.py", changed)
        second = site.pocketfleet("worker", "durable:flow", **QUICK)
        (ended,) = site.ended("durable:flow", 1)
        assert ended.outcome.status == "completed"
        assert ended.outcome.notes == ["started over: its checkpoint was made with another graph of the flow"]
        assert "run.starts_over" in second.output()
        assert site.ledger.items("paid") == {"0": 3}, "once before, and both nodes of the new graph"


def test_a_frozen_worker_starts_no_next_node_and_writes_nothing() -> None:
    with fleet.site({"durable.py": FLOW}) as site:
        site.enqueue("durable:flow", [{"n": n, "s": 1.0} for n in range(4)])
        frozen = site.pocketfleet("worker", "durable:flow", **QUICK)
        until(lambda: site.ledger.count("start") == 4, "all are in their second node")
        frozen.tell(signal.SIGSTOP)
        time.sleep(LEASE_S)
        site.pocketfleet("worker", "durable:flow", **QUICK)
        until(lambda: site.ledger.count("start") == 8, "the other has taken over")
        frozen.tell(signal.SIGCONT)
        ended = site.ended("durable:flow", 4)
        time.sleep(1.5)
        assert Counter(each.outcome.status for each in ended) == {"completed": 4}
        assert all(each.outcome.attempts == {"tries": 1, "deaths": 1} for each in ended)
        assert all(note.pid != frozen.pid for note in site.ledger.notes("after")), "no next node there"
        assert set(site.ledger.items("after").values()) == {1}
        assert set(site.ledger.items("paid").values()) == {1}
        with site.client() as client:
            assert client.xlen("pocketfleet:{durable.flow}:out:b") == 4, "one outcome each"


@pytest.mark.parametrize(("name", "ends"), [("flow", "end"), ("cancels", "left")])
def test_a_worker_that_lost_redis_ends_or_cancels_its_node_as_the_flow_says(name: str, ends: str) -> None:
    target = f"durable:{name}"
    with fleet.site({"durable.py": FLOW}) as site:
        site.enqueue(target, [{"n": 0, "s": LEASE_S + 1.5}])
        worker = site.pocketfleet("worker", target, **QUICK)
        until(lambda: site.ledger.count("start") == 1, "it is in its second node")
        with site.client() as client:
            pid = int(client.info("server")["process_id"])  # type: ignore[index]
        import os

        os.kill(pid, signal.SIGSTOP)
        try:
            frozen_at = time.monotonic()
            until(lambda: site.ledger.count(ends) == 1, f"{ends}: {worker.output()}")
            took_s = time.monotonic() - frozen_at
            time.sleep(0.5)
            assert site.ledger.count("after") == 0, "no next node while Redis is away"
        finally:
            os.kill(pid, signal.SIGCONT)
        if ends == "left":  # before its time; else the node ran to its end
            assert took_s < LEASE_S + 0.5 + slack_s(frozen_at)
        else:
            assert took_s > LEASE_S + 0.5
        (ended,) = site.ended(target, 1)
        assert ended.outcome.status == "completed"
        assert site.ledger.count("paid") == 1
        assert site.ledger.count("start") == (1 if ends == "end" else 2)
        assert "run.fault" not in worker.output() and "Traceback" not in worker.output()


def test_the_time_limit_counts_running_and_never_waiting() -> None:
    with fleet.site({"durable.py": FLOW}) as site:
        # one at a time: the last one waits for longer than its limit, and its nodes do not run that long
        site.enqueue("durable:late", [{"n": n, "s": 1.0} for n in range(4)] + [{"n": 9, "s": 30}])
        site.pocketfleet("worker", "durable:late", **QUICK)
        ended = site.ended("durable:late", 5)
        assert [each.outcome.status for each in ended] == ["completed"] * 4 + ["failed"]
        failure = ended[-1].outcome.failure
        assert failure is not None and (failure.type, failure.node) == ("FlowTimeout", "Slow")
        assert "flow_timeout_s=2.5" in failure.message and "waiting" in failure.message


def test_a_sync_node_past_the_time_limit_keeps_its_slot_until_it_ends() -> None:
    with fleet.site({"durable.py": FLOW}) as site:
        site.enqueue("durable:blocks", [{"n": 0}])
        site.pocketfleet("worker", "durable:blocks", **QUICK)
        (ended,) = site.ended("durable:blocks", 1)
        assert ended.outcome.failure is not None and ended.outcome.failure.type == "FlowTimeout"
        assert 1.1 < ended.outcome.ended - ended.outcome.started < 3, "its second node ran to its end"
