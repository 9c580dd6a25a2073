"""The whole fleet as users start it: real workers, an API that keeps its own account, and kills in the middle."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limiter.keys import GateKeys
from tests import fleet
from tests.fleet import Child, Site, lives, until
from tests.stalls import slack_s

LEASE_S, WINDOW_S = 2.0, 2.0
JITTER_S = 0.05
"""Between a run's start and its first line in the ledger."""
CONNECTING_S = 0.25
"""Between a run's start and the arrival of its first request, over a new connection."""

API_USERS = """
import os
import httpx
from ledger import note, noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

client = None

async def get(path):
    answer = await client.get(path)
    answer.raise_for_status()
    return answer.json()

class FetchProfile(AsyncNode):
    async def exec_async(self, _):
        note("start", self.params["user_id"])
        return await get(f"/users/{self.params['user_id']}/profile")
    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("profiles", {})[self.params["user_id"]] = exec_res
        return "fetch_orders"

class FetchOrders(AsyncNode):
    async def exec_async(self, _):
        return await get(f"/users/{self.params['user_id']}/orders")
    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("orders", {})[self.params["user_id"]] = exec_res
        note("end", self.params["user_id"])
        return "done"

profile, orders = FetchProfile(), FetchOrders()
profile - "fetch_orders" >> orders

class UserFlow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 5
    max_flows_per_minute = 60
    window_s = 2.0
    async def on_worker_start(self):
        global client
        client = httpx.AsyncClient(base_url=os.environ["USERS_API_URL"], timeout=30)
    async def on_worker_stop(self):
        await client.aclose()
    async def prep_async(self, shared):
        return [{"user_id": user_id} for user_id in range(shared["count"])]

flow = UserFlow(start=profile)
"""

USERS = """
import asyncio, threading, time
from ledger import note, noted
from pocketflow import AsyncNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class First(AsyncNode):
    async def exec_async(self, _):
        note("start", self.params["n"])
        await asyncio.sleep(self.params.get("s", 0.02))
    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("first", {})[self.params["n"]] = shared["greeting"]
        return "second"

class Second(Node):
    def exec(self, _):
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(self.params.get("s", 0.02))
        if self.params["n"] in (3, 7) and self.params.get("unlucky"):
            note("end", self.params["n"])
            raise ValueError("unlucky " + str(self.params["n"]))
    def post(self, shared, prep_res, exec_res):
        shared.setdefault("second", []).append(self.params["n"])
        note("end", self.params["n"])
        return "done"

first, second = First(), Second()
first - "second" >> second

class Users(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 5
    async def on_worker_start(self):
        note("open")
    async def on_worker_stop(self):
        note("close")
    async def prep_async(self, shared):
        return [{"n": n, **shared.get("more", {})} for n in range(shared["count"])]
    async def post_async(self, shared, prep_res, results):
        return {
            "of": len(prep_res),
            "results": [str(result) for result in results],
            "kinds": sorted({type(result).__name__ for result in results}),
        }

flow = Users(start=first)
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with fleet.site({"users.py": USERS}) as site:
        yield site


@pytest.fixture
def embedded() -> Iterator[Site]:
    """A user without Redis."""
    with fleet.site({"users.py": USERS}, embedded=True) as site:
        yield site


@contextlib.contextmanager
def api(site: Site, *options: str) -> Iterator[str]:
    """URL of the example API."""
    server = site.python("-m", "examples.api.server", "--quiet", *options)
    until(lambda: "http://" in server.output())
    yield server.output().strip()
    server.tell(signal.SIGTERM)
    assert server.code() == 0


def account(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/account") as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(site: Site) -> Path:
    """The output file of the one batch that ran."""
    (path,) = (site.directory / ".pocketfleet" / "output").glob("*.jsonl")
    return path


def frozen_at_work(site: Site, workers: list[Child]) -> Child:
    """One of the workers, stopped while it runs something."""
    found: list[Child] = []

    def caught() -> bool:
        for worker in workers:
            if worker.pid in busy(site):
                worker.tell(signal.SIGSTOP)
                if worker.pid in busy(site):
                    found.append(worker)
                    return True
                worker.tell(signal.SIGCONT)
        return False

    until(caught, "one is at work")
    return found[0]


def test_a_worker_of_four_is_killed_and_the_fleet_completes_within_both_limits() -> None:
    account_window_s = WINDOW_S - CONNECTING_S
    with (
        fleet.site({"users.py": API_USERS}) as site,
        api(site, "--delay", "0.05", "--concurrent", "5", "--window", str(account_window_s)) as url,
    ):
        site.env |= {
            "USERS_API_URL": url,
            "POCKETFLEET_LEASE_S": str(LEASE_S),
            "POCKETFLEET_LOG_LEVEL": "WARNING",
        }
        workers = [site.pocketfleet("worker", "users:flow") for _ in range(4)]
        until(lambda: all("worker serves" in worker.output() for worker in workers), "all serve")
        enqueue = site.pocketfleet("enqueue", "users:flow", "--set", "count=200", "--batch", "b")
        until(lambda: site.ledger.count("end") > 60, "the middle")
        doomed = frozen_at_work(site, workers)

        killed_at = doomed.kill()

        ended = site.ended("users:flow", 200)
        assert enqueue.code() == 0, enqueue.output()
        found = account(url)
        status = site.pocketfleet("batch", "status", "b", "--json")
        assert status.code() == 0, status.output()
        others = [worker for worker in workers if worker is not doomed]
        for worker in others:
            worker.tell(signal.SIGTERM)
        assert [worker.code() for worker in others] == [0, 0, 0]

        # every item completes, and only what the dead worker had not yet told of runs again
        assert sorted(each.index for each in ended) == list(range(200))
        assert {each.outcome.status for each in ended} == {"completed"}
        again = {str(each.index) for each in ended if each.outcome.attempts}
        assert all(each.outcome.attempts in ({}, {"tries": 1, "deaths": 1}) for each in ended)
        assert site.ledger.running(doomed.pid) <= again and 1 <= len(again) <= 5
        assert set(found["flows"]) == {str(n) for n in range(200)}
        assert max(found["flows"].values()) <= 2
        assert {user for user, runs in found["flows"].items() if runs > 1} <= again
        # both limits, by the API's account and by the runs' own ledger
        assert (found["refused"], found["peak_users"], found["peak_running"]) == (0, 5, 5)
        assert found["most_flow_starts"] <= 60
        assert site.ledger.busiest(WINDOW_S - JITTER_S) <= 60
        assert site.ledger.peak({doomed.pid: killed_at}) == 5
        counts = json.loads(status.output())
        assert (counts["count"], counts["left"], counts["completed"]) == (200, 0, 200)
        with site.client() as client:
            state: Any = client.hget(GateKeys("users.flow").gate, "state")
        assert json.loads(state)["in_use"] == 0


def busy(site: Site) -> set[int]:
    """Workers that have finished a run and are in the middle of another."""
    return {pid for pid in {each.pid for each in site.ledger.notes("end")} if site.ledger.running(pid)}


def test_run_does_it_all_in_one_command_without_any_redis(embedded: Site) -> None:
    words = ("--set", "count=12", "--set", 'greeting="hi"', "--workers", "2")
    run = embedded.pocketfleet("run", "users:flow", *words, "--output", "out.jsonl")

    assert run.code() == 0, run.output()
    found = sorted(lines(embedded.directory / "out.jsonl"), key=lambda line: line["index"])
    assert [line["index"] for line in found] == list(range(12))
    assert {(line["status"], line["action"], line["error"]) for line in found} == {
        ("completed", "done", None)
    }
    assert found[5]["params"] == {"n": 5}
    assert found[5]["changed"] == {"first": {"5": "hi"}, "second": [5]}
    assert [name for name, _ in found[5]["nodes"]] == ["First", "Second"]
    assert embedded.ledger.items("start") == {str(n): 1 for n in range(12)}
    assert embedded.ledger.peak() <= 5
    opened, closed = embedded.ledger.notes("open"), embedded.ledger.notes("close")
    # once per process; the second one may come too late to be needed
    assert sorted(each.pid for each in opened) == sorted({each.pid for each in closed})
    assert 1 <= len(opened) <= 2 and len(opened) == len(closed)
    assert "12 completed" in run.output() and "out.jsonl" in run.output()


def test_run_says_which_items_failed(site: Site) -> None:
    words = ("--set", "count=12", "--set", 'greeting="hi"', "--set", 'more={"unlucky": true}')
    run = site.pocketfleet("run", "users:flow", *words, "--workers", "2")

    assert run.code() == 1, run.output()
    found = {line["index"]: line for line in lines(written(site))}
    assert sorted(found) == list(range(12))
    assert [index for index in sorted(found) if found[index]["status"] != "completed"] == [3, 7]
    error = found[3]["error"]
    assert (error["type"], error["message"], error["node"]) == ("ValueError", "unlucky 3", "Second")
    assert "10 completed, 2 failed" in run.output()
    assert site.ledger.items("start") == {str(n): 1 for n in range(12)}, "a run that raises has failed"


def started(site: Site, *words: str) -> Child:
    """A run of twelve slow items, once some have ended and some are running."""
    run = site.pocketfleet(
        "run", "users:flow", "--set", "count=12", "--set", 'greeting="hi"', "--set", 'more={"s": 0.3}', *words
    )
    until(lambda: site.ledger.count("end") >= 3 and site.ledger.running(), f"the middle: {run.output()}")
    return run


def test_workers_of_a_killed_run_leave_and_the_same_command_continues_it(embedded: Site) -> None:
    run = started(embedded, "--workers", "2", "--batch", "b")
    pids = {each.pid for each in embedded.ledger.notes("open")}

    killed_at = run.kill()

    gone_at = until(lambda: not any(map(lives, pids)), "its workers have left")
    assert gone_at - killed_at < 2.0 + slack_s(killed_at)
    ended = embedded.ledger.items("end")
    before = embedded.ledger.items("start")
    again = embedded.pocketfleet(
        *("run", "users:flow", "--set", "count=12", "--set", 'greeting="hi"', "--set", 'more={"s": 0.3}'),
        *("--workers", "2", "--batch", "b"),
    )
    assert again.code() == 0, again.output()
    after = embedded.ledger.items("start") - before
    assert set(after) >= {str(n) for n in range(12)} - set(ended), "what is missing runs"
    assert max(after.values()) == 1, "once"
    # a run that ended just before the kill may not have told anybody
    assert len(set(after) & set(ended)) <= 5
    assert sorted(line["index"] for line in lines(written(embedded))) == list(range(12))
    assert {line["status"] for line in lines(written(embedded))} == {"completed"}


def test_an_interrupted_run_prints_the_command_that_continues_it(embedded: Site) -> None:
    run = started(embedded, "--workers", "2")
    pids = {each.pid for each in embedded.ledger.notes("open")}

    interrupted_at = run.tell(signal.SIGINT)

    assert run.code() == 130, run.output()
    assert not any(map(lives, pids)), "it does not leave its workers behind"
    assert "Traceback" not in run.output()
    told = re.search(r"^stopped.*; go on with: (.*)$", run.output(), re.MULTILINE)
    assert told, run.output()
    again = embedded.typed(told[1])
    assert again.code() == 0, again.output()
    assert set(embedded.ledger.items("end")) == {str(n) for n in range(12)}
    # cut short once; once more by the other worker, if the machine stood still before it heard of the end
    stood_still = slack_s(interrupted_at) > 0
    assert max(embedded.ledger.items("start").values()) <= (3 if stood_still else 2)
    assert len(lines(written(embedded))) == 12


SCRIPT = """
import asyncio, json, sys
from users import Users, first
from pocketfleet import FlowFailed

flow = Users(start=first)

async def main():
    shared = {"count": 12, "greeting": "hi", "more": {"unlucky": True}, "client": None}
    workers = None if sys.argv[1] == "None" else int(sys.argv[1])
    answer = await flow.run_on_fleet(shared, workers=workers, output="out.jsonl")
    print(json.dumps({"answer": answer, "shared": shared, "stats": flow.stats}))

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("workers", ["2", "0", "None"])
def test_run_on_fleet_merges_and_tells_what_failed(site: Site, workers: str) -> None:
    site.write("script.py", SCRIPT)
    if workers == "None":
        there = site.pocketfleet("worker", "script:flow")
        until(lambda: "worker serves" in there.output())

    script = site.python("script.py", workers)

    assert script.code() == 0, script.output()
    told = json.loads(script.output().splitlines()[-1])
    unlucky = {3: "unlucky 3", 7: "unlucky 7"}
    results = [
        f"item {n} failed in Second: ValueError: {unlucky[n]}" if n in unlucky else "done" for n in range(12)
    ]
    assert told["answer"] == {"of": 12, "results": results, "kinds": ["FlowFailed", "str"]}
    assert told["shared"]["first"].items() >= {str(n): "hi" for n in range(12) if n not in unlucky}.items()
    assert told["shared"]["second"] == [n for n in range(12) if n not in unlucky], "in input order"
    assert told["stats"] == {
        "max_concurrent_flows": 5,
        "max_flows_per_minute": None,
        "completed_flows": 10,
        "failed_flows": 2,
    }
    assert len(lines(site.directory / "out.jsonl")) == 12
    assert site.ledger.peak() <= 5


PAIR = """
import asyncio, time
from ledger import noted
from pocketflow import AsyncNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Awaits(AsyncNode):
    async def exec_async(self, _):
        with noted(f"awaits{self.params['n']}"):
            await asyncio.sleep(0.03)

class Blocks(Node):
    def exec(self, _):
        with noted(f"blocks{self.params['n']}"):
            time.sleep(0.03)

class Limited(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 3
    limit = "both"

one, two = Limited(start=Awaits()), Limited(start=Blocks())
"""

HOLDER = """
import asyncio
from ledger import noted
from pocketfleet import limit

async def visit(n):
    async with limit("both", max_concurrent=3):
        with noted(f"holds{n}"):
            await asyncio.sleep(0.03)

async def main():
    await asyncio.gather(*(visit(n) for n in range(30)))

asyncio.run(main())
"""


def test_flows_of_different_workers_and_other_code_share_one_limit() -> None:
    with fleet.site({"pair.py": PAIR, "holder.py": HOLDER}) as site:
        params = site.write("params.csv", "n\n" + "".join(f"{n}\n" for n in range(30)))
        workers = [site.pocketfleet("worker", f"pair:{name}") for name in ("one", "two")]
        for name in ("one", "two"):
            site.pocketfleet("enqueue", f"pair:{name}", "--params", str(params), "--batch", name)
        holder = site.python("holder.py")

        assert holder.code() == 0, holder.output()
        until(lambda: site.ledger.count("end") == 90)
        assert site.ledger.peak() == 3
        for name in ("awaits", "blocks", "holds"):
            pids = [each.pid for each in site.ledger.notes("end") if name in each.item]
            assert (len(pids), len(set(pids))) == (30, 1), "each by its own process"
        for worker in workers:
            worker.tell(signal.SIGTERM)
        assert [worker.code() for worker in workers] == [0, 0]
