"""Faults of workers and their hosts: killed, told to stop, frozen, cut off, with a wrong clock, of another version."""

from __future__ import annotations

import ctypes.util
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import faults, proxy
from tests.faults import Rig
from tests.fleet import Child, until
from tests.stalls import slack_s


@pytest.fixture(scope="module")
def fleet() -> Iterator[Rig]:
    """One fleet of four; the cases replace what they take away."""
    with faults.rig(workers=4) as here:
        yield here


def busy(fleet: Rig, least: int = 1) -> Child:
    """A worker that has ended a run of this batch and is in the middle of at least so many."""

    def found() -> list[Child]:
        finished = {each.pid for each in fleet.notes.notes("end")}
        return [
            worker
            for worker in fleet.workers
            if worker.pid in finished and len(fleet.notes.running(worker.pid)) >= least
        ]

    until(found, f"a busy worker: {fleet.last_words()}")
    return (found() or fleet.workers)[0]


def test_workers_killed_one_after_the_other_lose_nothing(fleet: Rig) -> None:
    dice = random.Random(faults.seed())
    fleet.begin(150, s=0.25)
    kills = 3
    for kill in range(kills):
        fleet.reach(20 * kill + 20)
        fleet.kill(busy(fleet) if dice.random() < 0.7 else dice.choice(fleet.workers))
        fleet.hire(1)
    ended = fleet.judge(again=kills * fleet.concurrent)
    again = {n for n, starts in fleet.notes.items("start").items() if starts > 1}
    died = {each.index for each in ended if each.outcome.attempts.get("deaths")}
    assert {int(item.partition(".")[2]) for item in again} <= died
    assert all(starts <= 1 + kills for starts in fleet.notes.items("start").values())


@pytest.mark.long
def test_slots_of_a_killed_worker_come_back_within_a_lease_and_a_second(fleet: Rig) -> None:
    fleet.begin(150, s=0.3)
    fleet.reach(10)
    doomed = busy(fleet)
    fleet.kill(doomed)
    dead_at, lost = fleet.killed[doomed.pid], fleet.notes.running(doomed.pid)
    assert lost
    fleet.hire(1)
    fleet.judge(again=len(lost))
    for item in lost:
        runs = [each for each in fleet.notes.notes("start") if each.item == item]
        promised = fleet.lease_s + 1 + 1 + slack_s(dead_at)
        assert runs[-1].at - dead_at < promised, "a lease and a second, and a turn to start"


@pytest.mark.long
def test_rolling_restart_of_all_workers_fails_nothing_and_runs_nothing_twice(fleet: Rig) -> None:
    fleet.begin(400)
    for old in list(fleet.workers):
        fleet.hire(1)
        fleet.dismiss(old)
    fleet.judge(again=0, trouble=False)


def test_frozen_worker_overlaps_by_no_more_than_it_held_and_its_late_outcome_counts_nothing(
    fleet: Rig,
) -> None:
    fleet.begin(120, s=0.3)
    fleet.reach(10)
    frozen = busy(fleet)
    frozen.tell(signal.SIGSTOP)
    held = len(fleet.notes.running(frozen.pid))
    time.sleep(fleet.lease_s + 3)
    frozen.tell(signal.SIGCONT)
    fleet.judge(again=held, over=held)


@pytest.mark.long
def test_worker_that_is_cut_off_starts_nothing_new_and_goes_on_by_itself(fleet: Rig) -> None:
    with proxy.before(fleet.server.socket) as door:
        (alone,) = fleet.hire(1, POCKETFLEET_REDIS_URL=door.url)
        fleet.begin(200, s=0.2)
        until(lambda: fleet.notes.running(alone.pid), "it runs some")
        door.close_door()
        time.sleep(0.25)  # what it runs ends
        starts = len([each for each in fleet.notes.notes("start") if each.pid == alone.pid])
        held = starts - len([each for each in fleet.notes.notes("end") if each.pid == alone.pid]) + 5
        time.sleep(fleet.lease_s + 1.5)
        assert len([each for each in fleet.notes.notes("start") if each.pid == alone.pid]) == starts
        door.open_door()
        until(
            lambda: len([each for each in fleet.notes.notes("start") if each.pid == alone.pid]) > starts,
            "it goes on",
        )
        fleet.judge(again=held, over=0)
        assert "redis.back" in fleet.said(alone)
        fleet.dismiss(alone)


CLOCK = """
import os, time
_real, _began = time.time, time.time()
_off, _pace = float(os.environ.get("CLOCK_OFF_S", 0)), float(os.environ.get("CLOCK_PACE", 1))
time.time = lambda: _began + _off + (_real() - _began) * _pace
time.time_ns = lambda: int(time.time() * 1e9)
"""


def faketime() -> str:
    """Path of libfaketime, '' where the platform has none."""
    found = ctypes.util.find_library("faketime")
    paths = [Path(found)] if found else []
    paths += Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return str(paths[0]) if paths and shutil.which("faketime") else ""


OFF = """
import sys, threading, time
wall, steady = time.time(), time.monotonic()
threading.Event().wait(0.5)
pace = (time.time() - wall) / (time.monotonic() - steady)
print(f"{wall - float(sys.argv[1]):.1f} {pace:.2f} {steady - float(sys.argv[2]):.1f}")
"""


def is_off(fleet: Rig, env: dict[str, str], off_s: float, pace: float) -> None:
    """That clock is off by so much, and the one of the ledger is not."""
    asked = fleet.site.python("-c", OFF, repr(time.time()), repr(time.monotonic()), **env)
    assert asked.code() == 0, asked.output()
    found_s, found_pace, steady_s = map(float, asked.output().split())
    assert abs(found_s - off_s) < 60 and abs(found_pace - pace) < 0.05, asked.output()
    assert 0 <= steady_s < 60, asked.output()


@pytest.mark.parametrize("by", ["python", "libfaketime"])
def test_hosts_with_a_wrong_clock_get_work_and_break_no_limit(by: str) -> None:
    if by == "libfaketime" and not faketime():
        pytest.skip("libfaketime is not installed here; the same clocks are faked in Python above")
    clocks = [(3600, 1.0), (-3600, 1.0), (0, 1.1)]
    with faults.rig(workers=0) as fleet:
        fleet.site.write("sitecustomize.py", CLOCK)
        for off_s, pace in clocks:
            if by == "python":
                env = {"CLOCK_OFF_S": str(off_s), "CLOCK_PACE": str(pace)}
                env["PYTHONPATH"] = f"{fleet.site.directory}:{fleet.site.env['PYTHONPATH']}"
            else:
                env = {"LD_PRELOAD": faketime(), "FAKETIME": f"{off_s:+d} x{pace}"}
                env |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
            is_off(fleet, env, off_s, pace)
            fleet.hire(1, **env)
        fleet.begin(200)
        fleet.judge(trouble=False)
        assert {each.pid for each in fleet.notes.notes("start")} == {worker.pid for worker in fleet.workers}


@pytest.mark.long
def test_one_at_a_time_and_one_start_a_window() -> None:
    with faults.rig(workers=3, concurrent=1, starts=1, window_s=0.5) as fleet:
        fleet.begin(10, s=0.05)
        fleet.judge(trouble=False)


TWO_VERSIONS = """
import asyncio
from ledger import noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Work(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["item"]):
            await asyncio.sleep(self.params["s"])

class Limited(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 3
    limit = "shared"

old, new = Limited(start=Work()), Limited(start=Work())
"""


@pytest.mark.long
def test_job_of_a_flow_that_a_worker_does_not_know_waits_for_one_that_does() -> None:
    with faults.rig(workers=0) as fleet:
        site = fleet.site
        site.write("versions.py", TWO_VERSIONS)
        older = site.pocketfleet("worker", "versions:old")
        until(lambda: "worker serves" in older.output(), "it serves")
        site.write("p.jsonl", "".join(f'{{"item": "i{n}", "s": 0}}\n' for n in range(20)))
        sent = site.pocketfleet("enqueue", "versions:new", "--params", "p.jsonl", "--batch", "new")
        assert sent.code() == 0, sent.output()
        time.sleep(1.0)
        assert site.ledger.count("start") == 0
        newer = site.pocketfleet("worker", "versions:new")
        until(lambda: site.ledger.count("end") == 20, newer.output())
        assert {each.pid for each in site.ledger.notes("start")} == {newer.pid}
        assert "Traceback" not in older.output() and older.lives()


@pytest.mark.long
def test_idle_and_blocked_workers_call_at_most_once_a_second() -> None:
    for_s, count = 20.0, 8
    with faults.rig(workers=count, lease_s=15.0, starts=None) as fleet:

        def calls() -> int:
            stats = fleet.server.ask("INFO", "commandstats")
            sent = ("evalsha", "ping", "set", "hello", "auth")
            return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in sent)

        def rate() -> float:
            before = calls()
            time.sleep(for_s)
            return (calls() - before) / for_s / count

        idle = rate()
        fleet.begin(200, s=lambda n: 2 * for_s if n < 5 else 0.01)
        until(lambda: len(fleet.notes.running()) == 5, "the limit is full")
        time.sleep(1.0)
        blocked = rate()
        print(f"calls a second and worker: idle {idle:.2f}, blocked {blocked:.2f}")
        assert idle <= 1 and blocked <= 1
        fleet.judge()
