"""An operator at work: the commands and `limits` of Python against real workers on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from limiter.commands import _table as limits_table
from limiter.doctor import Diagnosis, Pace, pace_of, shown, verdict
from limiter.errors import LimitsError
from limiter.events import Event
from limiter.holders import Holder
from limiter.table import print_table
from limiter.view import GateView, OverrideView
from pocketfleet import limit, limits
from producer.batch_views import table_of as batches_table
from tests import fleet, servers
from tests.fleet import Site, until
from tests.stalls import slack_s
from tests.test_limiter_permit import held_elsewhere

FLOW = """
import asyncio
from ledger import noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Work(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["i"]):
            await asyncio.sleep(0.1)

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 4

flow = Flow(start=Work())
"""
ITEMS = [{"i": i} for i in range(4000)]


@pytest.fixture
def site() -> Iterator[Site]:
    with fleet.site({"users.py": FLOW}) as site:
        yield site


@pytest.fixture
def redis_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with servers.running("valkey") as url:
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
        monkeypatch.setenv("POCKETFLEET_LEASE_S", "1")
        yield url


def told(site: Site, line: str) -> str:
    child = site.pocketfleet("limits", *line.split())
    assert child.code() == 0, child.output()
    return child.output()


def starts_after(site: Site, at: float) -> list[float]:
    return [note.at for note in site.ledger.notes("start") if note.at > at]


# the commands on a fleet -----------------------------------------------------------------------


def test_a_pause_stops_every_worker_within_one_call_and_resume_starts_them_again(site: Site) -> None:
    workers = [site.pocketfleet("worker", "users:flow") for _ in range(2)]
    site.enqueue("users:flow", ITEMS)
    until(lambda: len({note.pid for note in site.ledger.notes("end")}) == 2)
    said = told(site, "pause users:flow --by ana")
    paused_at = time.monotonic()
    assert said.startswith("users.flow: paused by ana until resumed; ")
    time.sleep(1.5)
    assert starts_after(site, paused_at) == [], "a run started after the command had ended"
    assert not site.ledger.running()
    (view,) = json.loads(told(site, "show users:flow --json"))
    assert (view["paused_by"], view["paused_for_s"], view["in_use"]) == ("ana", None, 0)
    assert "paused by ana until resumed" in told(site, "doctor users:flow").splitlines()[0]
    resumed_at = time.monotonic()
    assert told(site, "resume users:flow") == "users.flow: admits again\n"
    until(lambda: len(starts_after(site, resumed_at)) >= 8)
    assert {note.pid for note in site.ledger.notes("start") if note.at > resumed_at} == {
        worker.pid for worker in workers
    }


def test_a_lowered_limit_drains_and_a_raised_one_fills_at_once(site: Site) -> None:
    site.pocketfleet("worker", "users:flow")
    site.enqueue("users:flow", ITEMS)
    until(lambda: len(site.ledger.running()) == 4)
    assert "users.flow: 2 at a time (was 4)" in told(site, "set users:flow --max-concurrent 2")
    time.sleep(0.5)
    before = time.monotonic()
    time.sleep(1.0)
    assert 1 <= most_at_a_time(site, before) <= 2
    told(site, "set users:flow --max-concurrent 9")
    until(lambda: len(site.ledger.running()) == 9)
    assert "override  9 at a time (was 2)" in told(site, "doctor users:flow")
    assert "4 at a time (was 9)" in told(site, "clear users:flow")
    time.sleep(0.5)
    before = time.monotonic()
    time.sleep(1.0)
    assert 3 <= most_at_a_time(site, before) <= 4
    assert not site.ledger.notes("left"), "a run was interrupted"
    trail = told(site, "show users:flow")
    assert len(re.findall(r"override by \S+: max", trail)) == 2 and "override cleared by" in trail


def most_at_a_time(site: Site, since: float) -> int:
    now = most = 0
    for note in site.ledger.notes():
        now += {"start": 1, "end": -1}.get(note.word, 0)
        if note.at >= since:
            most = max(most, now)
    return most


def test_holders_names_the_process_that_holds_and_doctor_the_one_that_died(site: Site) -> None:
    worker = site.pocketfleet("worker", "users:flow")
    site.enqueue("users:flow", [{"i": 1}])
    site.write("users.py", FLOW.replace("0.1", "30"))
    worker.end()
    worker = site.pocketfleet("worker", "users:flow")
    site.enqueue("users:flow", [{"i": 2}], "c")
    until(lambda: site.ledger.running(worker.pid))
    found = [each for each in json.loads(told(site, "holders users:flow --json")) if each["held"]]
    assert [(each["pid"], each["held"]) for each in found] == [
        (worker.pid, len(site.ledger.running(worker.pid)))
    ]
    assert found[0]["host"] and 0 < found[0]["lease_left_s"] <= 15 and found[0]["since_s"] < 30
    assert str(worker.pid) in told(site, "holders users:flow")
    worker.tell(signal.SIGKILL)


def test_a_pause_of_a_limit_that_nobody_uses_waits_for_the_first_process(site: Site) -> None:
    assert "it is kept and holds when one comes" in told(site, "pause users:flow")
    assert "users.flow" in told(site, "show")
    site.pocketfleet("worker", "users:flow")
    site.enqueue("users:flow", ITEMS[:10])
    time.sleep(2)
    assert site.ledger.count("start") == 0
    told(site, "resume users:flow")
    until(lambda: site.ledger.count("end") == 10)


def test_an_idle_worker_says_the_pause_again_after_redis_lost_its_data(site: Site) -> None:
    site.env["POCKETFLEET_LEASE_S"] = "1"
    site.pocketfleet("worker", "users:flow")
    until(lambda: "users.flow" in told(site, "show"))
    told(site, "pause users:flow --by ana")
    time.sleep(1)
    with site.client() as client:
        client.flushall()
        until(lambda: client.exists("pocketfleet:{users.flow}:override"), timeout_s=10)
    site.enqueue("users:flow", ITEMS[:3])
    time.sleep(2)
    assert site.ledger.count("start") == 0
    assert "paused by ana until resumed" in told(site, "doctor users:flow")
    told(site, "resume users:flow")
    until(lambda: site.ledger.count("end") == 3)


def test_two_versions_warn_once_each_and_do_not_flap(site: Site) -> None:
    old = site.pocketfleet("worker", "users:flow")
    until(lambda: "users.flow" in told(site, "show"))
    site.write("users.py", FLOW.replace("max_concurrent_flows = 4", "max_concurrent_flows = 7"))
    new = site.pocketfleet("worker", "users:flow")
    until(lambda: json.loads(told(site, "show users:flow --json"))[0]["max_concurrent"] == 7)
    site.enqueue("users:flow", ITEMS)
    until(lambda: all("two_values" in worker.output() for worker in (old, new)))
    time.sleep(1)
    for worker in (old, new):
        assert (
            len(
                re.findall(
                    r"two_values .*max_concurrent=4.*max_concurrent=7|two_values .*=7.*=4", worker.output()
                )
            )
            == 1
        )
    (view,) = json.loads(told(site, "show users:flow --json"))
    assert view["max_concurrent"] == 7
    assert [event["what"] for event in view["events"]] == ["values"]


# from Python -----------------------------------------------------------------------------------


def test_python_changes_a_limit_that_this_very_loop_uses(redis_url: str) -> None:
    async def main() -> None:
        async with held_elsewhere("api", max_concurrent=1):
            waiting = asyncio.create_task(hold())
            await asyncio.sleep(0.2)
            change = await limits.set("api", max_concurrent=2, by="ana")
            assert (change.max_before, change.max_concurrent, change.override.set_by) == (1, 2, "ana")
            set_at = time.monotonic()
            await asyncio.wait_for(waiting, 20)
            assert time.monotonic() - set_at < 0.5 + slack_s(set_at)
            (view,) = await limits.show("api")
            assert view.override == OverrideView(2, None, "ana", view.override.at, 1, None)  # type: ignore[union-attr]
            (holder,) = await limits.holders("api")
            assert (holder.pid, holder.held) == (os.getpid(), 1)
            await limits.pause("api", for_s=0.5, by="ana")
            began = time.monotonic()
            await hold()
            assert 0.4 < time.monotonic() - began < 3 + slack_s(began)
            await limits.clear("api")
            await limits.reset("api")
        assert [event.what for event in await limits.events("api")] == ["override", "pause", "clear", "reset"]
        assert (await limits.doctor("api")).verdict == "nothing: no run waits here"

    async def hold() -> None:
        async with limit("api", max_concurrent=1):
            pass

    asyncio.run(main())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: limits.set("api"), "^nothing to set: give max_concurrent"),
        (lambda: limits.set("api", max_concurrent=0), "^max_concurrent=0 cannot hold: use a whole number"),
        (lambda: limits.set("api", max_concurrent=None), "^max_concurrent=None cannot hold"),
        (lambda: limits.set("api", max_per_minute=0.5), "^max_per_minute=0.5 cannot hold"),
        (lambda: limits.set("a b", max_concurrent=1), "^limit name 'a b' cannot be used"),
        (lambda: limits.pause("api", 0), "^for_s=0 cannot hold"),
        (lambda: limits.pause("api", float("nan")), "^for_s=nan cannot hold"),
        (
            lambda: limits.pause("api", by=""),
            "^by='' cannot be used: name who asks in 1 to 100 printable characters",
        ),
        (lambda: limits.resume("nobody"), r"^limit 'nobody' is not known here \(known: none\)$"),
        (lambda: limits.clear("nobody"), "^limit 'nobody' is not known here"),
        (lambda: limits.reset("nobody"), "^limit 'nobody' is not known here"),
        (lambda: limits.holders("nobody"), "^limit 'nobody' is not known here"),
        (lambda: limits.doctor("nobody"), "^limit 'nobody' is not known here"),
    ],
)
def test_what_cannot_hold_is_refused_in_a_sentence(redis_url: str, call: Any, says: str) -> None:
    with pytest.raises(LimitsError, match=says):
        asyncio.run(call())


def test_who_asks_may_be_named_with_any_characters(redis_url: str) -> None:
    async def main() -> str | None:
        await limits.pause("api", by="Ana O'Neil, on call é 100%")
        return (await limits.show("api"))[0].paused_by

    assert asyncio.run(main()) == "Ana O'Neil, on call é 100%"


# the doctor's reasoning ------------------------------------------------------------------------

GATE = GateView(
    name="api",
    max_concurrent=8,
    min_concurrent=1,
    max_per_window=60,
    window_s=60.0,
    lease_s=15.0,
    level=8.0,
    in_use=3,
    used=10,
    waiting_processes=0,
    processes=2,
    waiting_jobs={"f": 5},
    paused_for_s=0.0,
    closed_for_s=0.0,
    next_start_s=0.0,
    served=True,
)
CUT = Event(at=900.0, what="cut", why="refused", before="8", after="4", who="h:1:x")
STUCK = Holder("h:7:x", "h", 7, 2, 1500.0, 9.0, False)
DEAD = Holder("h:8:x", "h", 8, 3, 60.0, -4.0, False)
BY_ANA = OverrideView(2, None, "ana", 0.0, 8, 60)


@pytest.mark.parametrize(
    ("gate", "stale", "cuts", "says"),
    [
        ({}, [], [], "^nothing at this limit: the workers have no room"),
        ({"waiting_jobs": {}}, [], [], "^nothing: no run waits here$"),
        ({"waiting_processes": 1}, [], [], "^nothing: the next start is due now$"),
        ({"in_use": 8}, [], [], "^level: 8 of 8 at a time, the most this limit allows$"),
        ({"in_use": 4, "level": 4.5}, [], [CUT], r"4 of 4 at a time \(at most 8\): the provider refused a run 100 s ago \(level 8 -> 4\)"),
        ({"in_use": 4, "level": 4.0}, [], [], r"\(at most 8\): the level has not grown yet$"),
        (
            {"in_use": 2, "level": 2.0, "max_concurrent": 2, "override": BY_ANA}, [], [],
            r"^level: 2 of 2 at a time, set by ana \(was 8\)$",
        ),
        ({"in_use": 8}, [STUCK], [], "; 2 of the slots are stale, such as 2 of process 7 on h, unchanged for 25 min$"),
        ({"in_use": 3}, [DEAD], [], "^no process lives: 3 slots stand with dead ones"),
        ({"used": 60, "next_start_s": 3.2}, [], [], "^window: 60 of 60 starts in 60 s, next in 3.2 s$"),
        ({"paused_for_s": float("inf"), "paused_by": "ana"}, [], [], "^paused by ana until resumed$"),
        ({"paused_for_s": 9.0}, [], [], "^pause asked for by the provider, 9 s more, until "),
        ({"closed_for_s": 9.0}, [], [], "^cold start: admits again in 9 s$"),
        ({"served": False}, [], [], "^no worker lives$"),
        ({"alive": False}, [], [], "^nobody uses this limit now"),
    ],
)  # fmt: skip
def test_the_verdict_names_what_holds_the_fleet_back(
    gate: dict[str, Any], stale: list[Holder], cuts: list[Event], says: str
) -> None:
    assert re.search(says, verdict(replace(GATE, **gate), stale, cuts, 1000.0))


def test_the_pace_is_counted_from_samples_and_not_over_a_new_counter() -> None:
    samples = [(0.0, 50.0, 1), (100.0, 60.0, 2), (105.0, 90.0, 7), (110.0, 1e15, 3)]
    assert pace_of(samples, 120.0, 1e15 + 5, 4) == Pace(120.0, 45, 39, 7)
    assert pace_of(samples, 1000.0, 1e15, 4) == Pace(0.0, 0, 0, 4)


@pytest.mark.parametrize(
    ("rate", "pace", "says"),
    [
        (30, Pace(13.0, 0, 0, 4), "30 of 30 in 60 s"),
        (30, Pace(0.0, 0, 0, 4), "30 of 30 in 60 s"),
        (30, Pace(120.0, 50, 28, 4), "25.0 a minute over 2 min, busiest minute 28 of 30 in 60 s"),
        (None, Pace(0.0, 0, 0, 4), "not sampled yet, no limit per minute"),
        (None, Pace(30.0, 5, 5, 4), "5 in the last 30 s, no limit per minute"),
        (None, Pace(90.0, 15, 12, 4), "10.0 a minute over 2 min, busiest minute 12, no limit per minute"),
    ],
)
def test_no_rate_stands_beside_a_window_that_it_does_not_cover(
    rate: int | None, pace: Pace, says: str
) -> None:
    gate = replace(GATE, max_per_window=rate, used=30 if rate else 0)
    found = Diagnosis(gate, pace, [], [], 0.0, [], [], "window: 30 of 30 starts in 60 s")
    assert shown(found)[2] == f"  starts    {says}"


@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_table_is_neither_cut_nor_wrapped(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    held = replace(GATE, name="n" * 90, used=60, next_start_s=3.2)
    print_table(limits_table([held]))
    row = {"batch": "users-flow-20261122-101500-3fa9" * 3, "flow": "users:flow", "state": "only on disk"}
    counts = {"count": 1_000_000, "bytes_in_redis": 0, "bytes_on_disk": 10**9, "created": 0.0}
    print_table(batches_table([row | counts]))
    title, limit, other, batch = capsys.readouterr().out.splitlines()
    assert held.name in limit
    assert held.holds_back() in limit
    assert (title.split()[0], other.split()[-1]) == ("limit", "enqueued")
    assert batch.split()[0] == row["batch"]
    assert "only on disk" in batch
