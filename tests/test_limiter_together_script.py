"""The script of several gates, call by call: each gate's own ledger judges its half, and the halves must agree.

A schedule is drawn from a seed; POCKETFLEET_SEED=n starts at that seed, POCKETFLEET_SOAK=1 runs many more.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from gate_model import T0, Gate, Ledger, Pump, server_of
from msgspec.structs import replace
from servers import KINDS

from limiter.limits import Limits
from limiter.script import sync_script
from limiter.sync import TOGETHER, Answer, Call, together_argv

FIRST = int(os.environ.get("POCKETFLEET_SEED", "1"))
SCHEDULES = {"fakeredis": 2, "valkey": 15, "redis": 15}
MORE = 60 if os.environ.get("POCKETFLEET_SOAK") == "1" else 1
SHAPES = [
    (Limits("a", 1, lease_s=3), Limits("b", 1, lease_s=3)),
    (Limits("a", 3, lease_s=3), Limits("b", 2, 6, window_s=3, lease_s=3)),
    (Limits("a", 4, 10, even=True, window_s=5, lease_s=3), Limits("b", 2, lease_s=6)),
]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[redis.Redis, str]]:
    with server_of(request.param) as client:
        yield client, request.param


class Pair:
    """Two gates on one server, each with its ledger, and the script that asks both."""

    def __init__(self, client: redis.Redis, kind: str) -> None:
        client.flushall()
        self.gates = [Gate(client, name, fake=kind == "fakeredis") for name in ("a", "b")]
        self.ledgers = [Ledger(gate) for gate in self.gates]
        self.script = sync_script(client, TOGETHER)
        self.granted = self.waited = self.kept = 0

    def sync(self, which: int, call: Call, now: int) -> Answer:
        gate, ledger = self.gates[which], self.ledgers[which]
        return ledger.sync(call, now, gate.sync(call, now))

    def together(
        self, calls: list[Call], wanted: int, now: int, *, singles_first: bool = False, keep_us: int = 0
    ) -> list[Answer]:
        """The answers of both, after each ledger judged its own and what they say together was compared."""
        keys = [key for gate in self.gates for key in gate.keys.all]
        for gate, call in zip(self.gates, calls, strict=True):
            gate.listen(call.process)
        argv = together_argv(calls, wanted, singles_first=singles_first, keep_us=keep_us, now_us=now)
        new = all(ledger.is_new(call) for ledger, call in zip(self.ledgers, calls, strict=True))
        raws: list[Any] = self.script(keys=keys, args=argv)
        for gate in self.gates:
            gate.collect()
        answers = [
            ledger.sync(call, now, raw, together=wanted)
            for ledger, call, raw in zip(self.ledgers, calls, raws, strict=True)
        ]
        if new:
            self._agree(answers, wanted, keep_us)
        return answers

    def _agree(self, answers: list[Answer], wanted: int, keep_us: int) -> None:
        counts = {answer.together for answer in answers}
        assert len(counts) == 1, f"all or none: {[answer.together for answer in answers]}"
        count = counts.pop()
        assert count <= wanted
        known = all(answer.status == 0 for answer in answers)
        if known and count < wanted:
            assert any(answer.stands for answer in answers), "who waits stands in the line that refuses it"
        assert count == wanted or not known or any(a.reason not in ("-", "jobs") for a in answers)
        self.granted, self.waited = self.granted + count, self.waited + wanted - count
        self.kept += count < wanted and keep_us > 0

    def close(self) -> None:
        for gate in self.gates:
            gate.close()


@pytest.fixture
def pair(server: tuple[redis.Redis, str]) -> Iterator[Pair]:
    pair = Pair(*server)
    yield pair
    pair.close()


def ask(process: str, seq: int, limits: Limits, **values: Any) -> Call:
    values.setdefault("started", T0 if seq > 1 else 0)
    return Call(process, seq, limits=limits.as_argument(), **values)


A, B = SHAPES[0]


def test_neither_gate_gives_what_the_other_refuses(pair: Pair) -> None:
    pair.sync(1, ask("Q", 1, B, permits=1), T0)
    first, second = pair.together([ask("P", 1, A), ask("P", 1, B)], 1, T0 + 1)
    assert (first.permits, first.stands, first.in_use) == (0, False, 0)
    assert (second.permits, second.stands, second.reason) == (0, True, "level")

    pair.sync(1, ask("Q", 2, B), T0 + 2)
    answers = pair.together([ask("P", 2, A), ask("P", 2, B)], 1, T0 + 3)
    assert [(answer.permits, answer.together) for answer in answers] == [(1, 1), (1, 1)]


def test_the_same_numbers_get_both_answers_again(pair: Pair) -> None:
    calls = [ask("P", 1, A), ask("P", 1, B)]
    first = pair.together(calls, 1, T0)
    again = pair.together(calls, 1, T0 + 500)
    assert [answer.together for answer in again] == [1, 1] == [answer.together for answer in first]
    assert [ledger.in_use() for ledger in pair.ledgers] == [1, 1]


def test_a_gate_that_forgot_the_call_gives_nothing_when_the_other_repeats_its_answer(pair: Pair) -> None:
    calls = [ask("P", 1, A), ask("P", 1, B)]
    pair.together(calls, 1, T0)
    pair.gates[1].client.delete(*pair.gates[1].client.keys("pocketfleet:{b}:*"))
    pair.ledgers[1].flush()
    again = pair.together(calls, 1, T0 + 500)
    assert [answer.together for answer in again] == [1, 0]


def test_a_gate_without_values_notes_nothing_anywhere(pair: Pair) -> None:
    pair.sync(0, ask("Q", 1, A, permits=1), T0)
    before = pair.gates[0].client.hgetall(pair.gates[0].keys.gate)
    argv = together_argv(
        [ask("P", 1, A, permits=1), Call("P", 1)], 1, singles_first=False, keep_us=0, now_us=T0 + 1
    )
    with pytest.raises(redis.ResponseError, match="NOLIMITS b"):
        pair.script(keys=[key for gate in pair.gates for key in gate.keys.all], args=argv)
    assert pair.gates[0].client.hgetall(pair.gates[0].keys.gate) == before
    assert not pair.gates[1].client.exists(pair.gates[1].keys.gate)


def test_a_kept_place_is_given_to_nobody_else_until_its_time_is_over(pair: Pair) -> None:
    keep = 500_000
    pair.sync(1, ask("Q", 1, B, permits=1), T0)
    pair.together([ask("P", 1, A), ask("P", 1, B)], 1, T0 + 1, keep_us=keep)
    other = pair.sync(0, ask("Q", 1, A, permits=1), T0 + 2)
    assert (other.permits, other.in_use) == (0, 0)
    assert other.wait_s == pytest.approx((keep - 1) / 1e6), "the head of the line asks when that time is over"
    other = pair.sync(0, ask("Q", 2, A, permits=1), T0 + 1 + keep)
    assert other.permits == 1


def test_a_kept_place_is_taken_with_the_other_as_soon_as_that_is_free(pair: Pair) -> None:
    pair.sync(1, ask("Q", 1, B, permits=1), T0)
    pair.together([ask("P", 1, A), ask("P", 1, B)], 1, T0 + 1, keep_us=500_000)
    pair.sync(0, ask("Q", 1, A, permits=1), T0 + 2)
    pair.sync(1, ask("Q", 2, B), T0 + 3)
    woken = [name for name, _ in pair.gates[1].take_messages()]
    assert woken == ["P"], "the gate that refused it wakes it, and pushes nothing to one that wants both"
    answers = pair.together([ask("P", 2, A), ask("P", 2, B)], 1, T0 + 4)
    assert [answer.together for answer in answers] == [1, 1]


def test_one_that_dies_keeps_nothing(pair: Pair) -> None:
    pair.sync(1, ask("Q", 1, B, permits=1), T0)
    pair.together([ask("P", 1, A), ask("P", 1, B)], 1, T0 + 1, keep_us=60_000_000)
    late = T0 + 3_000_002
    pair.sync(0, ask("R", 1, A), T0 + 1_500_000)  # somebody calls, so nothing stood still
    assert pair.sync(0, ask("Q", 1, A, permits=1), late).permits == 1


def test_permits_of_one_gate_and_of_both_are_told_apart(pair: Pair) -> None:
    a, b = Limits("a", 3), Limits("b", 2)
    answers = pair.together([ask("P", 1, a, permits=2), ask("P", 1, b, permits=1)], 2, T0)
    assert [(x.permits, x.together) for x in answers] == [(3, 2), (2, 2)]
    answers = pair.together(
        [ask("P", 2, a, permits=1, held=0), ask("P", 2, b, permits=1, held=0)], 2, T0 + 1, singles_first=True
    )
    assert [(x.permits, x.together) for x in answers] == [(2, 1), (2, 1)]


def test_random_schedules_take_all_or_none(server: tuple[redis.Redis, str]) -> None:
    client, kind = server
    met = [0, 0, 0]
    for seed in range(FIRST, FIRST + SCHEDULES[kind] * MORE):
        pair = Pair(client, kind)
        try:
            play(pair, random.Random(seed))
        except AssertionError as fault:
            pytest.fail(f"seed {seed} on {kind}: {fault}")
        finally:
            pair.close()
        met = [met[0] + pair.granted, met[1] + pair.waited, met[2] + pair.kept]
    print(f"{kind}: granted, waited, kept: {met}")
    assert min(met) > 5, met


def play(pair: Pair, rng: random.Random) -> None:
    limits = rng.choice(SHAPES)
    now, born = T0, 0
    joint: list[int] = [0, 0, 0]

    def new(who: int) -> list[Pump]:
        nonlocal born
        born += 1
        joint[who] = 0
        return [Pump(f"p{who}.{born}", limits=each) for each in limits]

    processes = [new(who) for who in range(3)]
    both_held = [0, 0, 0]
    for step in range(250):
        now += 1 + int(rng.random() ** 3 * 400_000)
        who, what = rng.randrange(3), rng.random()
        pumps = processes[who]
        if what < 0.4:  # both gates are asked
            joint[who] = rng.choice([0, 0, 1, 2]) if joint[who] == 0 or rng.random() < 0.3 else joint[who]
            calls = [pump.call(now) for pump in pumps]
            if rng.random() < 0.1:
                calls = [replace(call, stand=True) for call in calls]
            how: Any = {"singles_first": rng.random() < 0.5, "keep_us": rng.choice([0, 0, 300_000])}
            answers = pair.together(calls, joint[who], now, **how)
            if rng.random() < 0.15:  # the reply is lost
                answers = pair.together(calls, joint[who], now + 100, **how)
            count = min(answer.together for answer in answers)
            for pump, call, answer in zip(pumps, calls, answers, strict=True):
                alone = answer.permits - answer.together
                pump.hear(call, answer)
                pump.wanted += answer.permits - alone  # those were not of the ones it wanted alone
                pump.permits -= answer.together - count
            joint[who] -= count
            both_held[who] += count
        elif what < 0.6:  # one gate is asked alone
            which = rng.randrange(2)
            pump = pumps[which]
            pump.wanted = rng.choice([0, 0, 1, 2])
            call = replace(pump.call(now), stand=joint[who] > 0 and rng.random() < 0.8)
            pump.hear(call, pair.sync(which, call, now))
        elif what < 0.93:  # everything it holds goes, or one permit
            for pump in pumps:
                pump.permits = 0 if what < 0.85 else max(pump.permits - 1, both_held[who])
            both_held[who] = 0 if what < 0.85 else both_held[who]
        elif what < 0.96:  # it dies
            processes[who] = new(who)
            both_held[who] = 0
        else:
            now += int(rng.random() * 4e6)
        for ledger, which in zip(pair.ledgers, (0, 1), strict=True):
            for name, grant in ledger.pushed:
                mine = [each[which] for each in processes if each[which].name == name]
                if mine:
                    mine[0].take(grant)
            ledger.pushed = []
            if step % 3 == 0 and ledger.birth:
                ledger.compare()
