"""A batch whose producer and workers are killed with -9 at random moments until it is done.

    KILL_ITEMS=20000 FAULT_SEED=7 pytest -m long -s tests/test_killed_batch.py

What was written is compared with the input, and the ledger of the nodes is the judge of both limits.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limiter.keys import GateKeys
from tests.faults import seed
from tests.fleet import Ledger, Note, Site, children_of, lives, processes_in, site, until
from tests.stalls import frozen

CONCURRENT, STARTS, WINDOW_S, LEASE_S = 20, 600, 2.0, 2.0
WORKERS = 2
"""Beside the one that the producer starts."""
MANY = int(os.environ.get("KILL_ITEMS", "20000"))
SETTLED = 0.7
"""Most kills wait until all that were started anew are at work; the others meet them on their way there."""
LATE_S = 0.2
"""A run may write that it starts so long after it has, while two cores start other processes. A break of the
limit is no matter of tenths: the runs come in bursts, as fast as the window lets them."""
UNTOLD_S = 1.0
"""What ended that shortly before a kill may not have been told of, and runs again."""

FLOW = f"""
import asyncio
from ledger import noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Step(AsyncNode):
    async def exec_async(self, _):
        with noted(f"{{self.letter}}.{{self.params['n']}}"):
            await asyncio.sleep(self.params["s"])
        return self.params["n"]

    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault(str(exec_res), []).append(self.letter)

class A(Step):
    letter = "a"

class B(Step):
    letter = "b"

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = {CONCURRENT}
    max_flows_per_minute = {STARTS}
    window_s = {WINDOW_S}

first = A()
first >> B()
flow = Flow(start=first)
"""


class Night:
    """A producer, workers beside it, and who was killed when.

    Attributes:
        killed: process -> second at which it was dead.
        told: process -> second at which it was told to leave at once, because its producer is gone.
        began: second at which all began.
    """

    def __init__(self, place: Site, words: tuple[str, ...], dice: random.Random) -> None:
        self.place, self.words, self.dice = place, words, dice
        self.began = time.monotonic()
        self.producer = place.pocketfleet(*words)
        self.workers = [place.pocketfleet("worker", "killed:flow") for _ in range(WORKERS)]
        self.killed: dict[int, float] = {}
        self.told: dict[int, float] = {}
        self.kills: Counter[str] = Counter()

    def kill(self, every_s: tuple[float, float], most: int) -> None:
        """Until the batch is done, or so many are dead."""
        while self.producer.lives() and self.kills.total() < most:
            if self.dice.random() < SETTLED:
                until(lambda: self.at_work() or not self.producer.lives(), "all are at work", timeout_s=300)
            time.sleep(self.dice.uniform(*every_s))
            lot = self.dice.choice([self.kill_the_producer, self.kill_its_worker, self.kill_a_worker])
            if self.producer.lives():
                lot()

    def at_work(self) -> bool:
        """Whether the producer follows, which it does once it has started its worker, and all workers serve."""
        serve = all("worker serves" in each.output() for each in self.workers)
        return serve and bool(children_of(self.producer.pid))

    def kill_the_producer(self) -> None:
        self.told |= dict.fromkeys(children_of(self.producer.pid), time.monotonic())
        self.producer.end()
        self.kills["producer"] += 1
        self.producer = self.place.pocketfleet(*self.words)

    def kill_its_worker(self) -> None:
        """The one that the producer has started; until it has, another."""
        theirs = children_of(self.producer.pid)
        if not theirs:
            self.kill_a_worker()
            return
        alone = children_of(theirs[0])
        os.kill(theirs[0], signal.SIGKILL)
        until(lambda: not lives(theirs[0]), "it is dead")
        self._bury("its worker", [theirs[0], *alone])

    def kill_a_worker(self) -> None:
        worker = self.workers.pop(self.dice.randrange(len(self.workers)))
        alone = children_of(worker.pid)
        worker.end()
        self._bury("worker", [worker.pid, *alone])
        self.workers.append(self.place.pocketfleet("worker", "killed:flow"))

    def _bury(self, what: str, dead: list[int]) -> None:
        """A worker is dead, and with it the processes in which it had suspects run alone."""
        self.killed |= dict.fromkeys(dead, time.monotonic())
        self.kills[what] += 1

    def excused(self) -> set[str]:
        """What ran in a process that was killed or told to leave, or had ended but was not told of yet."""
        gone = self.told | self.killed
        theirs = [each for each in self.place.ledger.notes() if each.pid in gone]
        ended = {
            (each.pid, each.item)
            for each in theirs
            if each.word == "end" and each.at < gone[each.pid] - UNTOLD_S
        }
        return {each.item for each in theirs if (each.pid, each.item) not in ended}


@pytest.fixture
def place() -> Iterator[Site]:
    with site({"killed.py": FLOW}) as place:
        place.env["POCKETFLEET_LEASE_S"] = str(LEASE_S)
        yield place


@pytest.mark.parametrize(
    ("count", "s", "output", "every_s", "most"),
    [
        pytest.param(600, 0.1, "out.csv", (0.2, 1.2), 6, id="some"),
        pytest.param(MANY, 0.01, "out.jsonl", (0.2, 3.0), 10**6, id="many", marks=pytest.mark.long),
    ],
)
def test_producer_and_workers_are_killed_at_random_and_every_item_has_one_line(
    place: Site, count: int, s: float, output: str, every_s: tuple[float, float], most: int
) -> None:
    place.write("in.jsonl", "".join(f'{{"n": {n}, "s": {s}}}\n' for n in range(count)))
    words = (
        "run",
        "killed:flow",
        "--params",
        "in.jsonl",
        "--workers",
        "1",
        "--batch",
        "b",
        "--output",
        output,
    )
    night = Night(place, words, random.Random(seed()))
    night.kill(every_s, most)
    assert night.producer.code() == 0, night.producer.output()
    assert f"{count} completed" in night.producer.output()
    took_s = time.monotonic() - night.began

    rows = rows_of(place.directory / output)
    assert Counter(row["index"] for row in rows) == Counter(range(count)), "every item once"
    assert all(row["params"] == {"n": row["index"], "s": s} for row in rows)
    assert {row["status"] for row in rows} == {"completed"}
    assert all(row["changed"] == {str(row["index"]): ["a", "b"]} for row in rows), "both nodes count once"
    twice = judge(night, count)
    print(
        f"{count} items in {took_s:.0f} s, killed {dict(night.kills)}, nodes run again {twice}, "
        f"at most {place.ledger.peak(night.killed)} of {CONCURRENT} at a time "
        f"and {Runs(place.ledger).busiest(WINDOW_S - LATE_S)} of {STARTS} starts in {WINDOW_S - LATE_S:g} s"
    )
    again = place.pocketfleet(*words)
    assert again.code() == 0 and "the batch was over, nothing ran" in again.output(), again.output()
    for worker in night.workers:
        worker.end()
    until(lambda: not processes_in(place.directory), "nobody is left", timeout_s=15)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of an output, each of them whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n"), "the last line is whole"
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in data.splitlines()]
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    cells = ("index", "params", "changed")
    return [row | {name: json.loads(row[name]) for name in cells} for row in rows]


def judge(night: Night, count: int) -> int:
    """Both limits held and nothing is in use; returns how many nodes ran again, all of killed processes."""
    ledger = night.place.ledger
    starts = ledger.items("start")
    assert set(starts) == {f"{letter}.{n}" for letter in "ab" for n in range(count)}
    again = {item for item, times in starts.items() if times > 1}
    unexcused = sorted(again - night.excused())
    over = CONCURRENT * frozen(night.began, LEASE_S / 3)  # a machine that stood still has frozen its workers
    assert len(unexcused) <= over, f"run again though nobody was killed: {unexcused[:10]}"
    assert ledger.peak(night.killed) <= CONCURRENT + over
    assert Runs(ledger).busiest(WINDOW_S - LATE_S) <= STARTS
    with night.place.client() as client:
        until(
            lambda: b'"in_use":0,' in (client.hget(GateKeys("killed.flow").gate, "state") or b""), "all free"
        )
    assert night.place.waiting("killed:flow") == 0
    return len(again)


class Runs(Ledger):
    """The starts of whole runs: the first node of each attempt, wherever it resumed."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger.path)

    def notes(self, word: str = "") -> list[Note]:
        found, goes_on = [], set[tuple[int, str]]()
        for note in super().notes():
            letter, _, item = note.item.partition(".")
            if note.word == "end" and letter == "a":
                goes_on.add((note.pid, item))
            elif note.word == "start" and (letter == "a" or (note.pid, item) not in goes_on):
                found.append(note)
        return found
