"""The adaptive rules as properties, under random schedules of three processes; time is passed in.

Every answer is judged twice: by the ledger, which predicts it, and by the promises below, which hold
whatever the rule of growth is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis
from gate_model import T0, Gate, Ledger, Pump, gate_on, server_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from servers import KINDS

from limiter.limits import Limits
from limiter.sync import Answer

S = 1_000_000
QUIET = 30 * S
NAMES = ("A", "B", "C")
EXAMPLES = {"fakeredis": 15, "valkey": 20, "redis": 20}

names = st.sampled_from(NAMES)
counts = st.integers(1, 12)
limits_of = st.builds(
    lambda low, start, high, **how: Limits(
        "L",
        max(low, start, high),
        min_concurrent=low,
        initial_concurrent=max(low, start),
        lease_s=300,
        **how,
    ),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 40),
    backoff_factor=st.sampled_from([0.1, 0.5, 0.7, 0.9, 0.95, 1.0]),
    recovery_threshold=st.integers(1, 8),
    recovery_factor=st.sampled_from([1.0, 1.2, 3.0]),
    additive=st.booleans(),
)


class Adaptive(RuleBasedStateMachine):
    """Processes take permits, end them well or refused, ask for pauses and resets, in any order."""

    client: redis.Redis
    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.gate: Gate = self.stack.enter_context(gate_on(self.client, self.kind))
        self.ledger = Ledger(self.gate)
        self.now = T0
        self.held: dict[str, list[int]] = {name: [] for name in NAMES}
        """Attempts of the permits of each process, oldest first."""
        self.level = 0.0
        self.cut = self.quiet = self.paused_until = 0

    @initialize(limits=limits_of)
    def begin(self, limits: Limits) -> None:
        self.limits = limits
        self.level = float(limits.start)
        self.pumps = {name: Pump(name, limits=limits) for name in NAMES}
        self.send("A")

    # what happens

    @rule(name=names, count=counts)
    def want(self, name: str, count: int) -> None:
        self.pumps[name].wanted += count
        self.send(name)

    @rule(name=names, count=counts, heard=st.booleans())
    def end_well(self, name: str, count: int, heard: bool) -> None:
        """Successes; perhaps not yet told, so that they are sent under a later cut or none."""
        pump = self.pumps[name]
        for attempt in self.release(name, count):
            pump.successes += attempt > pump.cut
        if heard:
            self.send(name)

    @rule(name=names, count=counts, pause_us=st.sampled_from([0, 0, 0, S // 2, 20 * S]), newest=st.booleans())
    def refuse(self, name: str, count: int, pause_us: int, newest: bool) -> None:
        """Several refusals at once, of the oldest or the newest that run."""
        attempts = self.release(name, count, newest=newest)
        if attempts:
            pump = self.pumps[name]
            pump.refused, pump.pause_us = max(attempts), pause_us
            self.send(name)

    @rule(name=names)
    def reset(self, name: str) -> None:
        others = sum(member.held for who, member in self.ledger.members.items() if who != name)
        held = len(self.held[name])
        answer = self.send(name, reset=True)
        assert answer.level == max(self.limits.floor, min(self.limits.start, self.limits.max_concurrent))
        given = answer.permits + sum(grant.count for _, grant in self.pushed)
        assert answer.in_use - given == others + held, "a reset forgot a slot"

    @rule(name=names)
    def heartbeat(self, name: str) -> None:
        self.send(name)

    @rule(us=st.sampled_from([1, 1000, S, 5 * S, 20 * S, QUIET + 1]))
    def tick(self, us: int) -> None:
        self.now += us
        for name in NAMES:  # so that nobody is taken for dead, nor the server for frozen
            self.send(name)

    @precondition(lambda self: self.level > 0)
    @rule()
    def come_back(self) -> None:
        """Never stuck: with work, successes and time the level reaches its ceiling, from wherever it is."""
        top = self.limits.max_concurrent
        for _ in range(1000):
            if self.level >= top:
                return
            self.now = max(self.now, self.paused_until) + 1000
            pump = self.pumps["A"]
            for name in NAMES[1:]:
                self.release(name, len(self.held[name]))
                self.pumps[name].wanted = 0
                self.send(name)
            ended = self.release("A", len(self.held["A"])) if self.ledger.in_use() >= int(self.level) else []
            pump.successes = sum(attempt > pump.cut for attempt in ended)
            pump.wanted = top
            self.send("A")
        raise AssertionError(f"level {self.level} after 1000 rounds of successes")

    # one call, and what must hold of it

    def release(self, name: str, count: int, *, newest: bool = False) -> list[int]:
        held = self.held[name]
        ended = held[-count:] if newest else held[:count]
        self.held[name] = held[: len(held) - len(ended)] if newest else held[len(ended) :]
        self.pumps[name].permits -= len(ended)
        return ended

    def send(self, name: str, *, reset: bool = False) -> Answer:
        self.now += 1
        pump, in_use = self.pumps[name], self.ledger.in_use()
        call = pump.call(self.now)
        call.reset = reset
        raw: Any = self.gate.sync(call, self.now)
        answer = self.ledger.sync(call, self.now, raw)
        self.pushed, self.ledger.pushed = self.ledger.pushed, []
        self.judge_level(call, answer, in_use)
        self.judge_pause(call, answer)
        pump.hear(call, answer)
        self.held[name] += range(answer.attempt - answer.permits + 1, answer.attempt + 1)
        for other, grant in self.pushed:
            if self.pumps[other].take(grant):
                self.held[other] += range(grant.attempt - grant.count + 1, grant.attempt + 1)
        assert answer.in_use == sum(member.held for member in self.ledger.members.values())
        return answer

    def judge_level(self, call: Any, answer: Answer, in_use: int) -> None:
        limits, before = self.limits, self.level
        assert limits.floor <= answer.level <= limits.max_concurrent
        new_episode = call.refused > self.cut or self.now - self.quiet > QUIET
        if answer.cut != self.cut:
            assert call.refused and new_episode, "cut twice in one episode"
            if not call.reset:
                deepest = before * min(0.5, limits.backoff_factor)
                most = before * limits.backoff_factor
                assert answer.level >= max(limits.floor, deepest) - 1e-9, "cut by more than the deepest"
                assert answer.level <= max(limits.floor, most) + 1e-9, "cut by less than asked"
            self.cut, self.quiet = answer.cut, self.now
        elif call.refused and new_episode:
            # a cut under the number of the last one: nothing was admitted between the two
            assert answer.level <= before or call.reset
            self.quiet = self.now
        elif not call.reset:
            assert answer.level >= before, "the level fell and nobody was refused"
            if answer.level > before:
                assert call.successes, "growth without a success"
                assert call.counted_under == self.cut, "grown by runs admitted before the last cut"
                assert in_use >= math.floor(before), "grown while something else held the fleet back"
        if call.successes and call.counted_under == self.cut and not call.refused:
            self.quiet = self.now
        self.level = answer.level

    def judge_pause(self, call: Any, answer: Answer) -> None:
        if call.pause_us:
            self.paused_until = max(self.paused_until, self.now + call.pause_us)
        if self.now < self.paused_until:
            assert answer.permits == 0 and not self.pushed, "admitted during a pause"
        halted = self.ledger.pause
        assert halted - self.now <= 20 * S, "a pause nobody asked for, longer than the longest"
        self.paused_until = max(self.paused_until, halted)

    def teardown(self) -> None:
        self.stack.close()


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[redis.Redis, str]]:
    with server_of(request.param) as client:
        yield client, request.param


def test_the_adaptive_rules_hold_under_any_schedule(server: tuple[redis.Redis, str]) -> None:
    client, kind = server
    machine = type("Machine", (Adaptive,), {"client": client, "kind": kind})
    how = settings(
        max_examples=EXAMPLES[kind],
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=how)
