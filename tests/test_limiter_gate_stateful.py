"""Random schedules of the gate, each judged call by call by an independent ledger.

A schedule is a list of moves drawn from a seed; every list is legal, so a failing one is cut down by
leaving moves out. POCKETFLEET_SOAK=1 runs many more; POCKETFLEET_SEED=n starts at that seed.
"""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from gate_model import GRACE_US, T0, Fleet, Gate, Ledger, Pump, busiest_window, gate_on, server_of
from msgspec.structs import replace
from servers import KINDS

from limiter.limits import Limits
from limiter.sync import Call, Grant

SOAK = os.environ.get("POCKETFLEET_SOAK") == "1"
FIRST = int(os.environ.get("POCKETFLEET_SEED", "1"))
SCHEDULES = {"fakeredis": 2, "valkey": 25, "redis": 25}
FLEETS = {"fakeredis": 3, "valkey": 25, "redis": 25}
MORE = 60 if SOAK else 1
STEPS = 250

Move = tuple[str, int, float]
MOVES = {
    "call": 40, "finish": 26, "tick": 22, "want": 6, "release": 8, "refuse": 6, "back": 3, "hand": 3,
    "save": 8, "wait": 2, "died": 2,
    "late": 3, "again": 6, "lost": 5, "stale": 4, "enqueue": 8, "cancel": 2, "retry": 2, "renew": 4, "pause": 1,
    "freeze": 2, "die": 3, "leave": 2, "stall": 2, "edge": 6, "late_grant": 4,
}  # fmt: skip
UPHEAVALS = {"change": 2, "flush": 1, "control": 3}
SHAPES = [
    Limits("L", 5, 8, window_s=10, lease_s=3),
    Limits("L", 3, None, lease_s=3),
    Limits("L", 1, 4, window_s=2, lease_s=3),
    Limits("L", 6, 20, min_concurrent=1, initial_concurrent=2, recovery_threshold=2, window_s=5, lease_s=3),
    Limits("L", 8, None, min_concurrent=1, recovery_threshold=3, lease_s=6),
    Limits("L", 6, min_concurrent=3, initial_concurrent=3, backoff_factor=0.9, additive=True, lease_s=3),
    Limits("L", 4, 10, even=True, window_s=5, lease_s=3),
]

CROWDED = SHAPES + [
    Limits("L", 2, lease_s=6),
    Limits("L", 3, 3, window_s=1, lease_s=6),
    Limits("L", 2, lease_s=15),
    Limits("L", 5, 40, even=True, window_s=4, lease_s=6),
]


def drawn(seed: int, steps: int = STEPS) -> list[Move]:
    """The moves of a seed: name, who, and a number from 0 to 1 whose meaning is the move's."""
    rng = random.Random(seed)
    moves = MOVES | (UPHEAVALS if seed % 2 else {})
    names = rng.choices(list(moves), list(moves.values()), k=steps)
    return [(name, rng.randrange(6), rng.random()) for name in names]


class Episode:
    """One schedule on one gate. Processes 0-2 serve f, 3 serves f and g, 4 serves g, 5 is a limit() caller."""

    def __init__(self, gate: Gate, seed: int) -> None:
        self.gate, self.ledger, self.now, self.rng = gate, Ledger(gate), T0, random.Random(-seed)
        self.limits = self.rng.choice(SHAPES)
        self.settled = True
        self.born = 0
        self.pumps = [self.new_pump(i) for i in range(6)]
        self.sent: list[Call] = []
        self.frozen: dict[int, int] = {}
        self.next_index = {"b1": 0, "b2": 0, "b3": 0}
        self.began: list[tuple[int, int]] = []
        """Per grant: the latest moment it may start, and when it did."""
        self.on_the_way: list[tuple[str, Grant]] = []
        """Grants in wake messages that are late."""

    def new_pump(self, who: int) -> Pump:
        self.born += 1
        flows = [("f",), ("f",), ("f",), ("f", "g"), ("g",), ()][who]
        room = [1, 3, 10, 3, 2, 0][who]
        return Pump(f"p{who}.{self.born}", flows, room, self.limits)

    def play(self, moves: list[Move]) -> None:
        for step, (name, who, x) in enumerate(moves):
            self.now += 1 + int(x * 1000)
            getattr(self, name)(who, x)
            self.judge_held()
            if step % 4 == 0:
                self.ledger.compare()
        self.drain()

    # calls

    def send(self, who: int, *, heard: bool = True, leave: bool = False) -> None:
        pump = self.pumps[who]
        call = pump.call(self.now, leave=leave)
        raw = self.gate.sync(call, self.now)
        answer = self.ledger.sync(call, self.now, raw)
        self.sent = self.sent[-30:] + [call]
        pushed = self.ledger.pushed
        if not heard:
            raw = self.gate.sync(call, self.now + 500)
            answer = self.ledger.sync(call, self.now + 500, raw)
        for _ in range(answer.permits + len(answer.jobs)):
            latest = max(answer.stamp, answer.now)
            self.began.append((latest, self.rng.randint(answer.now, latest)))
        pump.hear(call, answer)
        for name, grant in pushed:
            luck = self.rng.random()
            if luck < 0.6:
                self.take(name, grant)
            elif luck < 0.8:  # else the message is lost
                self.on_the_way.append((name, grant))

    def take(self, name: str, grant: Grant) -> None:
        for pump in self.pumps:
            if pump.name == name and self.pumps.index(pump) not in self.frozen and pump.take(grant):
                latest = max(grant.stamp, grant.now)
                self.began += [(latest, self.rng.randint(grant.now, latest)) for _ in range(grant.count)]

    def late_grant(self, who: int, x: float) -> None:
        """A wake message arrives late, perhaps after another call of its process."""
        if self.on_the_way:
            self.take(*self.on_the_way.pop(int(x * len(self.on_the_way))))

    def judge_held(self) -> None:
        """What a process that the gate knows truly holds is counted: never less than that."""
        for pump in self.pumps:
            member = self.ledger.members.get(pump.name)
            if member and not pump.unknown:
                assert pump.held <= member.held, f"{pump.name} holds {pump.held}, counted {member.held}"

    def call(self, who: int, x: float) -> None:
        if who not in self.frozen:
            self.send(who)

    def lost(self, who: int, x: float) -> None:
        """The reply is lost and the call repeated."""
        if who not in self.frozen:
            self.send(who, heard=False)

    def stale(self, who: int, x: float) -> None:
        """A duplicate of an earlier call arrives late."""
        old = [c for c in self.sent if (m := self.ledger.members.get(c.process)) and c.seq <= m.seq]
        if old:
            call = old[int(x * len(old))]
            self.ledger.sync(call, self.now, self.gate.sync(call, self.now))

    def renew(self, who: int, x: float) -> None:
        name = self.pumps[who].name
        self.ledger.renew(name, self.now, self.gate.renew(name, self.now))

    # what happens in a process

    def ended(self, who: int, x: float, what: str, arg: Any) -> bool:
        pump = self.pumps[who]
        if not pump.runs:
            return False
        for job in list(pump.runs)[: 1 + int(x * 2)]:
            pump.end(job, what, arg)
        return True

    def finish(self, who: int, x: float) -> None:
        what = "failed" if x < 0.2 else "completed"
        if self.ended(who, x, what, b"out"):
            self.pumps[who].successes += 1
            self.call(who, x)

    def refuse(self, who: int, x: float) -> None:
        attempts = list(self.pumps[who].runs.values())[: 1 + int(x * 2)]
        if self.ended(who, x, "refuse", int(x * 2e6)):
            pump = self.pumps[who]
            pump.refused = max(pump.refused, *attempts)
            pump.pause_us = int(1e6 * x) if x > 0.7 else 0
            if x < 0.8:
                self.call(who, x)

    def back(self, who: int, x: float) -> None:
        """Granted runs that never started; if their grant is young, its stamps come back too."""
        pump = self.pumps[who]
        latest = self.began[-1][0] if self.began else 0
        if self.ended(who, 0, "back", "") and latest in self.ledger.stamps and x < 0.5:
            self.began.pop()
            pump.returned = f"{pump.returned} {latest} 1"

    def hand(self, who: int, x: float) -> None:
        self.ended(who, x, "hand", "")

    def wait(self, who: int, x: float) -> None:
        self.ended(who, x, "wait", int(x * 2e6))

    def died(self, who: int, x: float) -> None:
        self.ended(who, x, "died", "")

    def save(self, who: int, x: float) -> None:
        """A run goes on to its next node: its checkpoint rides on the call, or is stored beside it."""
        pump = self.pumps[who]
        jobs = list(pump.runs)[int(x * 3) :][:2]
        for job in jobs:
            if x < 0.7:
                pump.news.append(pump.entry(job, "save", f"{self.now}".encode()))
            else:
                _, batch, index = job.split(":")
                key = f"{self.gate.keys.kept(batch, int(index))}:{pump.runs[job]}"
                self.ledger.store(key, f"{self.now} large".encode())
                pump.news.append(pump.entry(job, "save-beside", key))
        if x < 0.5:
            self.call(who, x)

    def want(self, who: int, x: float) -> None:
        self.pumps[who].wanted += 1 + int(x * 2)
        self.call(who, x)

    def release(self, who: int, x: float) -> None:
        pump = self.pumps[who]
        if pump.permits:
            pump.permits -= 1
            self.call(who, x)

    def late(self, who: int, x: float) -> None:
        """A run of a dead attempt claims to have ended."""
        gone = [e for c in self.sent for e in c.entries if e.what in ("completed", "back", "refuse", "save")]
        pump = self.pumps[who]
        if gone and pump.flows and who not in self.frozen:
            entry = gone[int(x * len(gone))]
            flow = "g" if ":b3:" in entry.job else "f"
            mine = list(pump.runs) + [e.job for e in pump.news]
            if flow in pump.flows and entry.job not in mine:
                pump.news.append(replace(entry, flow=pump.flows.index(flow) + 1))

    # what happens to processes and to Redis

    def tick(self, who: int, x: float) -> None:
        self.now += int(x**3 * self.limits.lease_s * 1e6)

    def edge(self, who: int, x: float) -> None:
        """To the very microsecond at which a stamp leaves the window, a lease ends or a job is due."""
        ledger = self.ledger
        moments = [m.ends for m in ledger.members.values()] + [i.due for i in ledger.items.values()]
        if ledger.limits:
            moments += [stamp + ledger.window for stamp in ledger.stamps[:3]] + [ledger.opens()]
        ahead = sorted(m for m in moments if m > self.now)
        if ahead:
            self.now = ahead[0] + int(x * 3) - 1

    def stall(self, who: int, x: float) -> None:
        self.now += int((0.5 + 2 * x) * self.limits.lease_s * 1e6)

    def again(self, who: int, x: float) -> None:
        """Heartbeats of everybody."""
        for each in range(6):
            self.call(each, x)

    def freeze(self, who: int, x: float) -> None:
        """A process is cut off, or comes back, perhaps after it was reaped."""
        if self.frozen.pop(who, None) is None:
            self.frozen[who] = self.now
        else:
            self.send(who)

    def die(self, who: int, x: float) -> None:
        self.frozen.pop(who, None)
        self.pumps[who] = self.new_pump(who)

    def leave(self, who: int, x: float) -> None:
        if who in self.frozen:
            return
        pump = self.pumps[who]
        for job in list(pump.runs):
            pump.end(job, "hand", "")
        pump.permits = 0
        if not pump.unknown:
            self.send(who, heard=x < 0.7, leave=True)
            self.pumps[who] = self.new_pump(who)

    def change(self, who: int, x: float) -> None:
        """A process with other limits starts; the others go on sending theirs."""
        self.limits = SHAPES[int(x * len(SHAPES))]
        self.settled = False
        self.die(who, x)
        self.send(who)

    def pause(self, who: int, x: float) -> None:
        self.pumps[who].pause_us = int(x * 3e6)

    def control(self, who: int, x: float) -> None:
        """An operator sets other values, lifts the rate, pauses, or takes it back."""
        self.settled = False
        acts: list[tuple[str, Any, Any]] = [
            ("set", 1 + int(x * 100) % 9, ""),
            ("set", "", int(x * 1000) % 4 * 3),
            ("pause", int(x * 4e6), ""),
            ("pause", "", ""),
            ("clear", "", ""),
            ("resume", "", ""),
            ("reset", "", ""),
        ]
        self.ask(*acts[int(x * len(acts))])

    def ask(self, act: str, first: Any = "", second: Any = "") -> None:
        reply = self.gate.control(self.now, act, first, second)
        self.ledger.control(self.now, act, first, second, reply)

    def flush(self, who: int, x: float) -> None:
        """Redis loses its data; the next caller remembers it, or not."""
        self.gate.client.flushall()
        self.ledger.flush()
        self.now += 2_000_000
        self.settled = False
        for batch in self.next_index:
            if x < 0.5:
                self.put(batch, 0, self.next_index[batch])

    def enqueue(self, who: int, x: float) -> None:
        batch = ("b1", "b2", "b3")[who % 3]
        first = self.next_index[batch] - int(x * 3)
        count = 1 + int(x * 10) % 7
        self.next_index[batch] = max(self.next_index[batch], first + count)
        self.put(batch, max(0, first), first + count)

    def cancel(self, who: int, x: float) -> None:
        """All of a batch or what of it never began; then its producer may take it up again."""
        batch, first, count = ("b1", "b2", "b3")[who % 3], int(x * 20) % 7, 1 + int(x * 1000) % 60
        what = ("all", "all", "waiting", "fresh")[int(x * 4)]
        flow = "g" if batch == "b3" else "f"
        reply = self.gate.cancel(self.now, batch, flow, first, count, what)
        self.ledger.cancel(self.now, batch, first, count, what, reply)
        if int(x * 100) % 5:
            self.gate.client.hdel(self.gate.keys.batch(batch), "cancelled")
            self.ledger.batches[batch].cancelled = False

    def retry(self, who: int, x: float) -> None:
        """Some items of a batch that have ended run again, asked for once or twice."""
        batch = ("b1", "b2", "b3")[who % 3]
        record = self.ledger.batches.get(batch)
        ended = sorted(record.done)[: 1 + int(x * 100) % 4] if record else []
        if record is None or not ended:
            return
        number = max(1, max(record.retries.get(index, 0) for index in ended) + int(x * 2))
        flow = "g" if batch == "b3" else "f"
        items = {index: f"{flow} {index}".encode() for index in ended}
        reply = self.gate.enqueue(self.now, batch, flow, items, 1000, number, "completed")
        self.ledger.enqueue(self.now, batch, flow, items, 1000, reply, number)

    def put(self, batch: str, first: int, after: int) -> None:
        flow = "g" if batch == "b3" else "f"
        items = {i: f"{flow} {i}".encode() for i in range(first, after)}
        if items:
            spacing = {"b1": 1000.0, "b2": 500.0, "b3": 3000.0}[batch]
            reply = self.gate.enqueue(self.now, batch, flow, items, spacing)
            self.ledger.enqueue(self.now, batch, flow, items, spacing, reply)

    # the end

    def drain(self) -> None:
        """Everything left ends, everybody leaves, and only what keys.py keeps is left."""
        self.frozen.clear()
        for act in ("clear", "resume"):
            self.ask(act)
        for _ in range(400):
            for who, pump in enumerate(self.pumps):
                pump.wanted = pump.permits = 0
                for job in list(pump.runs):
                    pump.end(job)
                self.send(who)
            self.now += int(self.limits.lease_s * 4e5)
            busy = any(pump.held or pump.unknown for pump in self.pumps)
            if not self.ledger.items and not busy and len(self.ledger.members) == len(self.pumps):
                break
            if any(i.payload is None and i.state == "waiting" for i in self.ledger.items.values()):
                for batch, after in self.next_index.items():
                    self.put(batch, 0, after)
        assert not self.ledger.items, f"left over: {self.ledger.items}"
        for who in range(6):
            self.send(who, leave=True)
        self.ledger.compare()
        self.judge_end()

    def judge_end(self) -> None:
        if self.settled and self.limits.max_per_window:
            most = busiest_window([began for _, began in self.began], int(self.limits.window_s * 1e6))
            assert most <= self.limits.max_per_window, f"{most} starts in a window"
        names = {k.decode().split(":")[2].partition(":")[0] for k in self.gate.client.keys("*")}
        kept = {"gate", "starts", "flows", "batch", "done", "out", "retries", "events", "samples", "override"}
        assert names <= kept, names


# running and cutting down ----------------------------------------------------------------------


def fault_of(client: redis.Redis, kind: str, seed: int, moves: list[Move]) -> tuple[str, dict[str, int]]:
    """The first broken promise of a schedule, or '', and what the schedule met."""
    counts: dict[str, int] = {}
    try:
        with gate_on(client, kind) as gate:
            episode = Episode(gate, seed)
            counts = episode.ledger.counts
            episode.play(moves)
    except (AssertionError, redis.ResponseError) as fault:
        where = traceback.extract_tb(fault.__traceback__)[-1]
        return f"{type(fault).__name__} in {where.name}: {where.line} | {fault}", counts
    return "", counts


def cut_down(client: redis.Redis, kind: str, seed: int, moves: list[Move], until: float) -> list[Move]:
    """The same failing schedule without the moves it does not need."""
    size = len(moves) // 2
    while size and time.monotonic() < until:
        at = 0
        while at < len(moves) and time.monotonic() < until:
            shorter = moves[:at] + moves[at + size :]
            if fault_of(client, kind, seed, shorter)[0]:
                moves = shorter
            else:
                at += size
        size //= 2
    return moves


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[redis.Redis, str]]:
    with server_of(request.param) as client:
        yield client, request.param


def test_random_schedules_keep_every_promise(server: tuple[redis.Redis, str]) -> None:
    client, kind = server
    met: dict[str, int] = {}
    seeds = range(FIRST, FIRST + SCHEDULES[kind] * MORE)
    for seed in seeds:
        moves = drawn(seed)
        fault, counts = fault_of(client, kind, seed, moves)
        if fault:
            least = cut_down(client, kind, seed, moves, time.monotonic() + 20)
            fault, _ = fault_of(client, kind, seed, least)
            pytest.fail(f"seed {seed} on {kind}: {fault}\nmoves = {least}")
        met = {name: met.get(name, 0) + count for name, count in counts.items()}
    print(f"{kind}: seeds {seeds}: {met}")
    assert all(met.values()) or kind == "fakeredis", f"never met: {met}"


# liveness in virtual time ----------------------------------------------------------------------


def fleet_of(
    gate: Gate, seed: int, *, deaf: bool = False, deaths: bool = False, operator: bool = False
) -> Fleet:
    """A random fleet with random work; several flows, limit() callers, refusals, leaves, pauses."""
    rng = random.Random(seed)
    limits = rng.choice(CROWDED)
    flows = [("f",), ("f",), ("g",), ("f", "g"), ()]
    pumps = [
        Pump(f"p{i}", mine, rng.choice([1, 1, 2, 5]) if mine else 0, limits)
        for i, mine in enumerate(rng.choices(flows, k=rng.randint(1, 5)) + [("f", "g")])
    ]
    lengths = rng.choice([[20_000], [200_000], [1_500_000], [10_000, 4_000_000]])
    refusals = rng.choice([0.0, 0.0, 0.2])

    def plan(job: str, refused: int) -> tuple[int, str, int | str]:
        takes = rng.randint(1, rng.choice(lengths))
        if refused < 3 and rng.random() < refusals:
            return takes, "refuse", rng.randint(0, 1_500_000)
        return takes, "completed", "out"

    bound = GRACE_US + 2_000
    if deaf or deaths:
        bound += int(limits.lease_s * 1e6 / 3) + 5_000
    fleet = Fleet(gate, pumps, plan, permit_us=rng.choice(lengths), deaf=deaf, bound_us=bound)
    for _ in range(rng.randint(1, 6)):
        flow = rng.choice("fg")
        fleet.at(rng.randint(0, 5_000_000), "enqueue", f"b{flow}{rng.randint(0, 2)}", flow, rng.randint(1, 8))
    for who, pump in enumerate(pumps):
        if rng.random() < (0.3 if pump.room else 1.0):
            fleet.at(rng.randint(0, 5_000_000), "want", who, rng.randint(1, 4))
    if rng.random() < 0.3:
        fleet.at(rng.randint(0, 3_000_000), "pause", 0, rng.randint(0, 2_000_000))
    for who in rng.sample(range(len(pumps) - 1), rng.randint(0, (len(pumps) - 1) // 2)):
        fleet.at(rng.randint(5_000_001, 8_000_000), "die" if deaths else "leave", who)
    if operator:
        for _ in range(rng.randint(1, 5)):
            orders = [("set", rng.randint(1, 9)), ("pause", rng.randint(1, 900_000)), ("pause",), ("clear",)]
            fleet.at(rng.randint(0, 8_000_000), "control", *rng.choice([*orders, ("resume",), ("reset",)]))
        fleet.at(9_000_000, "control", "resume")
        fleet.at(9_500_000, "control", "clear")
    return fleet


def live(server: tuple[redis.Redis, str], first: int, **how: bool) -> None:
    client, kind = server
    seeds = range(first, first + FLEETS[kind] * MORE)
    for seed in seeds:
        with gate_on(client, kind) as gate:
            fleet = fleet_of(gate, seed, **how)
            try:
                fleet.run(600_000_000)
                fleet.ledger.compare()
            except (AssertionError, redis.ResponseError) as fault:
                pytest.fail(f"seed {seed} on {kind}, {how}: {fault}")
    print(f"{kind}, {how}: seeds {seeds}")


def test_nothing_stays_free_after_what_an_operator_did(server: tuple[redis.Redis, str]) -> None:
    live(server, FIRST + 6000, operator=True)


def test_nothing_stays_free_while_somebody_waits_for_it(server: tuple[redis.Redis, str]) -> None:
    live(server, FIRST)


def test_lost_wake_messages_cost_a_third_of_a_lease_and_nothing_else(server: tuple[redis.Redis, str]) -> None:
    live(server, FIRST, deaf=True)


def test_the_work_of_the_dead_is_done_by_the_living(server: tuple[redis.Redis, str]) -> None:
    live(server, FIRST, deaths=True)
