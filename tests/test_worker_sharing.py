"""The places of a worker among the limits it serves: who may ask for how many, and who is told to ask again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter.process import Process
from limiter.pump import Pump
from limiter.sync import Claimed
from tests import fleet
from tests.fleet import Site
from worker.crew import Crew
from worker.fleet_worker import FleetWorker
from worker.run import Run


class Still(Crew):
    """A crew whose runs never start; it ends them when it is told to."""

    def _start(self, runs: list[Run]) -> None:
        """Nothing runs here."""

    def end(self) -> None:
        self.ended(next(iter(self.runs.values())))


class Gate:
    """One limit with its queue, as the pump of a crew meets it: who finds less than it asked for is told."""

    def __init__(self, name: str, worker: FleetWorker, most: int, waiting: int = 0) -> None:
        self.name, self.worker, self.most, self.waiting = name, worker, most, waiting
        self.kicked = True
        self.calls = self.given = 0
        self.asked: int | None = None  # in flight
        self.heard = True  # whether the gate wakes the crew when jobs come
        self.crew = Still(worker, cast(Pump, self), [], cast(Any, None))

    def kick(self) -> None:
        self.kicked = True

    def call(self) -> None:
        self.kicked = False
        self.calls += 1
        self.asked = self.crew.room()

    def answer(self) -> None:
        assert self.asked is not None
        asked, self.asked = self.asked, None
        count = min(asked, self.waiting, self.most - len(self.crew.runs))
        self.waiting -= count
        self.heard = count < asked
        jobs = [Claimed(f"{{x}}:b:{self.given + n}", 1, 0, 0, 0, b"", b"") for n in range(count)]
        self.given += count
        self.crew.take(jobs, 0.0, 0)

    def enqueue(self, count: int) -> None:
        self.waiting += count
        if self.heard:
            self.kick()


def gates(max_jobs: int, *limits: tuple[int, int]) -> list[Gate]:
    """A worker's gates: of each limit the most at a time, and how many wait."""
    worker = FleetWorker(cast(Process, None), [], max_jobs=max_jobs, drain_s=0)
    made = [Gate("abc"[n], worker, most, waiting) for n, (most, waiting) in enumerate(limits)]
    worker.crews.extend(gate.crew for gate in made)
    return made


def settle(all_gates: list[Gate]) -> None:
    """Make the calls that are due, in the order of the gates, all sent before the first is answered."""
    for _ in range(100):
        due = [gate for gate in all_gates if gate.kicked]
        if not due:
            return
        for gate in due:
            gate.call()
        for gate in due:
            gate.answer()
    raise AssertionError("they never come to rest")


def test_a_crew_that_found_no_room_asks_again_when_the_other_has_its_answer() -> None:
    a, b = gates(100, (5, 40), (5, 40))

    settle([a, b])

    assert (len(a.crew.runs), len(b.crew.runs)) == (5, 5)


def test_a_call_that_the_gate_did_not_note_gives_its_places_free() -> None:
    a, b = gates(10, (5, 40), (5, 40))
    a.call()
    b.call()
    b.answer()
    a.asked = None

    a.crew.unheard()

    assert b.kicked
    assert not a.kicked, "it would get the same answer"


def test_what_is_claimed_after_the_stop_is_given_back_before_it_starts() -> None:
    (a,) = gates(10, (5, 40))
    a.call()

    a.worker.stop()
    a.answer()

    assert [run.ending for run in a.crew.runs.values()] == ["hand"] * 5
    assert a.crew.room() == 0


def test_idle_crews_come_to_rest_and_each_is_known_to_its_gate() -> None:
    made = gates(100, (5, 0), (5, 0), (5, 0))
    settle(made)
    for gate in made:
        gate.calls, gate.kicked = 0, True  # the heartbeats, all at one moment

    settle(made)

    assert all(gate.heard for gate in made)
    assert sum(gate.calls for gate in made) <= 6


@pytest.mark.parametrize("max_jobs", [1, 2, 3, 4])
def test_the_crews_of_a_full_worker_take_turns(max_jobs: int) -> None:
    a, b = gates(max_jobs, (5, 1000), (5, 1000))
    settle([a, b])

    for turn in range(40):
        ending = [gate for gate in (a, b) if gate.crew.runs]
        ending[turn % len(ending)].crew.end()
        settle([a, b])

    assert len(a.crew.runs) + len(b.crew.runs) == max_jobs
    assert abs(a.given - b.given) <= max_jobs


def test_few_jobs_of_one_limit_do_not_stand_behind_the_many_of_another() -> None:
    a, c = gates(4, (5, 600), (5, 5))
    settle([a, c])

    for _ in range(12):
        (a if a.crew.runs else c).crew.end()
        settle([a, c])

    assert c.given >= 2
    assert a.given >= 6


def test_a_crew_that_wants_no_more_leaves_its_share_to_the_others() -> None:
    a, c = gates(4, (10, 600), (10, 1))
    settle([a, c])
    for _ in range(6):
        for gate in (a, c):
            if gate.crew.runs:
                gate.crew.end()
                settle([a, c])

    assert (len(a.crew.runs), len(c.crew.runs)) == (4, 0)


steps = st.lists(
    st.tuples(st.sampled_from(["call", "answer", "end", "enqueue"]), st.integers(0, 2)), max_size=60
)
limits = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=3)


@given(max_jobs=st.integers(1, 6), limits=limits, steps=steps)
def test_no_place_stays_free_that_a_waiting_job_could_have(
    max_jobs: int, limits: list[tuple[int, int]], steps: list[tuple[str, int]]
) -> None:
    made = gates(max_jobs, *limits)

    for what, which in steps:
        gate = made[which % len(made)]
        if what == "call" and gate.kicked and gate.asked is None:
            gate.call()
        elif what == "answer" and gate.asked is not None:
            gate.answer()
        elif what == "end" and gate.crew.runs:
            gate.crew.end()
            gate.kick()
        elif what == "enqueue":
            gate.enqueue(1)
        assert sum(len(each.crew.runs) + each.crew.asked for each in made) <= max_jobs
    for gate in made:
        if gate.asked is not None:
            gate.answer()
    settle(made)

    free = max_jobs - sum(len(gate.crew.runs) for gate in made)
    for gate in made:
        assert not free or not gate.waiting or len(gate.crew.runs) == gate.most
        assert gate.heard or not free, "it is woken by its gate, or the worker is full"


USERS = """
import asyncio
from ledger import noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Step(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["n"]):
            await asyncio.sleep(0.1)

class Users(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 5

a, c = Users(start=Step()), Users(start=Step())
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with fleet.site({"users.py": USERS}) as site:
        yield site


def starts(site: Site) -> list[str]:
    return [each.item[0] for each in site.ledger.notes("start")]


def enqueue_both(site: Site, count: int) -> None:
    for name in "ac":
        site.enqueue(f"users:{name}", [{"n": f"{name}{n}"} for n in range(count)], batch=name)


def test_a_worker_begins_with_all_its_limits_at_once_and_ends_after_the_last(site: Site) -> None:
    enqueue_both(site, 20)

    worker = site.pocketfleet("worker", "users:a", "users:c", "--burst")

    assert worker.code() == 0
    seen = starts(site)
    assert set(seen[:11]) == {"a", "c"}, seen
    assert (seen.count("a"), seen.count("c")) == (20, 20)


def test_two_limits_of_a_small_worker_go_on_by_turns(site: Site) -> None:
    enqueue_both(site, 10)

    worker = site.pocketfleet("worker", "users:a", "users:c", "--burst", "--max-jobs", "2")

    assert worker.code() == 0
    seen = starts(site)
    assert (seen.count("a"), seen.count("c")) == (10, 10)
    assert site.ledger.peak() <= 2
    ahead = 0
    for name in seen:
        ahead += 1 if name == "a" else -1
        assert abs(ahead) <= 4, seen
