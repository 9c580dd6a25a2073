"""A storm: a fleet under load, a fault every 20 s, and an account at the end.

    SOAK_MINUTES=20 FAULT_SEED=7 python -m tests.soak

Faults follow a seed. What a killed or frozen worker ran may run again or overlap; everything else counts as
broken and ends with exit code 1.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests import faults
from tests.faults import JITTER_S, TARGET, Rig
from tests.fleet import Child
from tests.proxy import Every

EVERY_S = 20.0
WORKERS = 4
RUN_S = 0.2
QUEUE = 400
"""Items enqueued at a time, whenever fewer than half of them wait."""


class Storm:
    """What was done to a fleet, and what may therefore have run twice."""

    def __init__(self, fleet: Rig, seed: int) -> None:
        self.fleet = fleet
        self.dice = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.excused: set[str] = set()  # items that were running in a worker that was killed or frozen
        self.sent = 0
        self.batches: dict[str, int] = {}
        self.faults: dict[str, Callable[[], None]] = {
            "kill -9": self.kill,
            "SIGSTOP": self.freeze_worker,
            "SIGTERM": self.restart_worker,
            "cut": lambda: self.several(fleet.door.cut),
            "half-open": lambda: self.several(fleet.door.half_open),
            "closed door": self.close_door,
            "frozen Redis": lambda: fleet.server.freeze(self.dice.uniform(1, 12)),
            "Redis killed": self.restart_redis,
            "SCRIPT FLUSH": lambda: self.several(lambda: fleet.server.ask("SCRIPT", "FLUSH")),
            "lost replies": self.lose,
            "slow": self.slow,
            "full Redis": self.fill,
        }

    # --- load ----------------------------------------------------------------------------------------

    def feed(self) -> None:
        if self.fleet.site.waiting(TARGET) > QUEUE // 2:
            return
        batch = f"s{len(self.batches)}"
        items = [{"item": f"{batch}.{n}", "s": self.dice.uniform(0.5, 1.5) * RUN_S} for n in range(QUEUE)]
        self.fleet.site.enqueue(TARGET, items, batch)
        self.batches[batch] = QUEUE
        self.sent += QUEUE

    # --- faults --------------------------------------------------------------------------------------

    def any_worker(self) -> Child:
        return self.dice.choice(self.fleet.workers)

    def excuse(self, worker: Child) -> None:
        """What it runs, and what had ended but was not told of yet."""
        told = time.monotonic() - 1.0
        ends = self.fleet.notes.notes("end")
        self.excused |= {each.item for each in ends if each.pid == worker.pid and each.at > told}
        self.excused |= self.fleet.notes.running(worker.pid)

    def kill(self) -> None:
        for _ in range(self.dice.randint(1, 3)):
            worker = self.any_worker()
            self.fleet.kill(worker)
            self.excuse(worker)
            self.fleet.hire(1)

    def freeze_worker(self) -> None:
        worker = self.any_worker()
        worker.tell(signal.SIGSTOP)
        self.excuse(worker)
        time.sleep(self.dice.uniform(0.5, 3) * self.fleet.lease_s)
        worker.tell(signal.SIGCONT)

    def restart_worker(self) -> None:
        self.fleet.dismiss(self.any_worker())
        self.fleet.hire(1)

    def several(self, act: Callable[[], object]) -> None:
        for _ in range(self.dice.randint(1, 30)):
            act()
            time.sleep(self.dice.uniform(0, 0.2))

    def close_door(self) -> None:
        self.fleet.door.close_door()
        time.sleep(self.dice.uniform(0.1, 2.5) * self.fleet.lease_s)
        self.fleet.door.open_door()

    def restart_redis(self) -> None:
        self.fleet.server.kill()
        time.sleep(self.dice.uniform(0, 4))
        self.fleet.server.restart()

    def lose(self) -> None:
        self.fleet.door.rule = Every(
            fates=("reply", "request"), share=self.dice.uniform(0, 0.3), seed=self.dice.randrange(2**31)
        )
        time.sleep(5)
        self.fleet.door.rule = None

    def slow(self) -> None:
        self.fleet.door.delay_s, self.fleet.door.loss = self.dice.uniform(0, 0.1), 0.05
        time.sleep(8)
        self.fleet.door.delay_s = self.fleet.door.loss = 0.0

    def fill(self) -> None:
        self.fleet.server.ask("CONFIG", "SET", "maxmemory", "1mb")
        time.sleep(self.dice.uniform(0.5, 5))
        self.fleet.server.ask("CONFIG", "SET", "maxmemory", "0")

    # --- the course of it ----------------------------------------------------------------------------

    def blow(self, minutes: float) -> None:
        end = time.monotonic() + minutes * 60
        names = list(self.faults)
        self.dice.shuffle(names)
        while time.monotonic() < end:
            name = names[sum(self.done.values()) % len(names)]  # each in turn, in an order of the seed
            began = time.monotonic()
            self.feed()
            print(f"{self.done.total() * EVERY_S:5.0f} s  {name}", flush=True)
            self.done[name] += 1
            self.faults[name]()
            while time.monotonic() < min(end, began + EVERY_S):
                self.feed()
                time.sleep(0.5)
            self.fleet.all_live()

    def account(self) -> list[str]:
        """Waits for everything to end; what is broken, in sentences."""
        broken: list[str] = []
        statuses: Counter[str] = Counter()
        for batch, count in self.batches.items():
            ended = self.fleet.site.ended(TARGET, count, batch)
            statuses.update(each.outcome.status for each in ended)
            if Counter(each.index for each in ended) != Counter(range(count)):
                broken.append(f"batch {batch}: {len(ended)} outcomes of {count} items")
        notes = self.fleet.notes
        starts = notes.items("start")
        twice = {item: count for item, count in starts.items() if count > 1}
        unexcused = sorted(set(twice) - self.excused)
        most, busiest = self._most(), notes.busiest(self.fleet.window_s - JITTER_S)
        print(f"faults:      {dict(self.done)}")
        print(f"items in:    {self.sent}")
        print(f"outcomes:    {dict(statuses)}")
        print(f"executions:  {sum(starts.values())}, per item {dict(Counter(starts.values()))}")
        print(f"at a time:   at most {most} of {self.fleet.concurrent} (frozen ones left out)")
        print(f"in {self.fleet.window_s:g} s:      at most {busiest} of {self.fleet.starts} starts")
        print(f"in use now:  {self.fleet.state()['in_use']}")
        if set(statuses) != {"completed"}:
            broken.append(f"outcomes: {dict(statuses)}")
        if unexcused:
            broken.append(f"executed again though no process died or froze under them: {unexcused[:10]}")
        if most > self.fleet.concurrent:
            broken.append(f"{most} ran at a time")
        if self.fleet.starts and busiest > self.fleet.starts:
            broken.append(f"{busiest} starts in a window")
        for worker in self.fleet.workers:
            if "Traceback" in worker.output():
                broken.append(f"a traceback: {worker.output()[-2000:]}")
        return broken

    def _most(self) -> int:
        """Most runs at a time, without those of killed and frozen workers, which may overlap."""
        open_: set[tuple[int, str]] = set()
        most = 0
        for note in self.fleet.notes.notes():
            if note.item in self.excused:
                continue
            if note.word == "start":
                open_.add((note.pid, note.item))
            else:
                open_.discard((note.pid, note.item))
            most = max(most, len(open_))
        return most


def main() -> int:
    minutes = float(os.environ.get("SOAK_MINUTES", "20"))
    seed = faults.seed()
    print(f"a fault every {EVERY_S:g} s for {minutes:g} minutes; repeat it with FAULT_SEED={seed}")
    with faults.rig(workers=WORKERS, starts=60, lease_s=float(os.environ.get("SOAK_LEASE_S", "2"))) as fleet:
        storm = Storm(fleet, seed)
        storm.blow(minutes)
        broken = storm.account()
    for each in broken:
        print(f"BROKEN: {each}")
    print("broken" if broken else "nothing broke")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
