"""A poisoned state (no number, text, a key of another type) is mended once, told once, and the fleet goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import redis
from gate_model import PARKED, T0, Gate, job_id
from servers import running

import limiter
from limiter.keys import GateKeys
from limiter.limit import limit
from limiter.limits import Limits
from limiter.sync import Answer, Call, Entry, read_answer
from tests.test_limiter_permit import held_elsewhere, pump_of

S = 1_000_000
LIMITS = Limits("L", 8, 100, min_concurrent=1, initial_concurrent=4, window_s=10)
SOURCE = (Path(limiter.__path__[0]) / "gate.lua").read_text()
FIELDS = re.findall(r'"(\w+)":%', SOURCE)
POISON = ("NaN", "Infinity", "-Infinity", "-3", '"text"', "[]")
POISON_OF_FAKE = ("NaN", "-3")  # 20 times as slow as the servers, which meet all of them


def call(gate: Gate, after: int, process: str, seq: int, **values: Any) -> Answer:
    values.setdefault("started", T0 if seq > 1 else 0)
    values.setdefault("birth", T0 if values.get("held") else 0)
    values.setdefault("flows", ("f",))
    made = Call(process, seq, limits=LIMITS.as_argument(), **values)
    return read_answer(gate.sync(made, T0 + after))


def state_of(gate: Gate) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gate.client.hget(gate.keys.gate, "state") or "{}")
    return found


def spoil(gate: Gate, field: str, poison: str) -> None:
    """Write `poison`, JSON or almost, where the state has a number."""
    text = (gate.client.hget(gate.keys.gate, "state") or b"").decode()
    spoiled = re.sub(rf'"{field}":[^,}}]+', f'"{field}":{poison}', text)
    assert spoiled != text
    gate.client.hset(gate.keys.gate, "state", spoiled)


def repaired(gate: Gate) -> list[str]:
    return [what for kind, what, _ in gate.events() if kind == "repaired"]


def busy(gate: Gate) -> None:
    """A holds two permits and a job, B stands in line, a run waits for its time."""
    gate.enqueue(T0, "b", "f", dict.fromkeys(range(4), b"f"))
    jobs = call(gate, 0, "A", 1, jobs=2, permits=2).jobs
    refused = Entry(jobs[1].id, jobs[1].attempt, 1, "refuse", 3 * S)
    assert call(gate, 2, "A", 2, held=3, entries=[refused]).in_use == 3
    assert call(gate, 3, "B", 1, permits=9).permits == 1
    assert call(gate, 4, "B", 2, permits=8, held=1).reason in ("level", "turn")


def test_the_fields_were_found() -> None:
    assert {"level", "in_use", "attempt", "max", "additive"} <= set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_poisoned_field_heals_in_one_call_and_no_promise_breaks(gate: Gate, field: str) -> None:
    for poison in POISON_OF_FAKE if gate.fake else POISON:
        gate.client.flushall()
        busy(gate)
        known = state_of(gate)["attempt"]
        spoil(gate, field, poison)
        answer = call(gate, S, "A", 3, held=3)
        # a server whose JSON knows no NaN cannot read the state at all
        named = repaired(gate)
        assert named in ([field], ["state"]) and answer.note == f"repaired={named[0]}", (poison, answer)
        assert (answer.status, answer.in_use) == (0, 4)
        assert 1 <= answer.level <= 8
        healed = state_of(gate)
        assert 0 <= healed[field] < 2**63, (poison, healed[field])
        assert [healed[name] for name in NAMES] == [8, 1, 4, 100, 10 * S, 15 * S, 0.5, 10, 1.2, 0]
        call(gate, 12 * S, "B", 3, held=1)
        after = call(gate, 12 * S, "A", 4, held=0, jobs=9, permits=1)
        assert after.note == "" and len(after.jobs) >= 2, (poison, after)
        assert all(job.attempt > known for job in after.jobs)
        assert repaired(gate) == named


NAMES = ["max", "min", "initial", "rate", "window", "lease", "backoff", "threshold", "factor", "additive"]


@pytest.mark.parametrize("text", ["text", "[]", "{", "7", ""])
def test_a_state_that_is_none_is_made_anew_from_what_else_is_known(gate: Gate, text: str) -> None:
    busy(gate)
    gate.client.hset(gate.keys.gate, "state", text)
    answer = call(gate, S, "A", 3, held=3)
    assert (answer.status, answer.in_use, answer.level) == (0, 4, 4)
    call(gate, 12 * S, "B", 3, held=1)
    after = call(gate, 12 * S, "A", 4, held=0, jobs=9, permits=1)
    assert after.permits == 1 and after.attempt > T0 + S
    assert len(after.jobs) == 2
    assert len(repaired(gate)) == 1


@pytest.mark.parametrize("script", ["renew", "enqueue", "control"])
def test_no_other_script_hides_what_is_poisoned(gate: Gate, script: str) -> None:
    busy(gate)
    spoil(gate, "in_use", "NaN")
    if script == "renew":
        gate.renew("A", T0 + S)
    elif script == "enqueue":
        gate.enqueue(T0 + S, "b", "f", {9: b"f"})
    else:
        gate.control(T0 + S, "set", 6)
    assert call(gate, 2 * S, "A", 3, held=3).in_use == 4
    assert repaired(gate) in (["in_use"], ["state"])


@pytest.mark.parametrize("poison", ["nan", "inf", "1e30", "5.5", "0x10", "007", "text", "-3"])
def test_a_batch_whose_count_is_poisoned_is_counted_anew_as_more_is_added(gate: Gate, poison: str) -> None:
    key = gate.keys.batch("b")
    gate.client.hset(key, "left", poison)
    assert gate.enqueue(T0, "b", "f", dict.fromkeys(range(2), b"f")) == [2, 0, 0]
    assert gate.client.hget(key, "left") == b"2"
    gate.client.hset(key, "left", poison)
    jobs = call(gate, 1, "A", 1, jobs=2).jobs
    ended = [Entry(job.id, job.attempt, 1, "completed", b"x") for job in jobs]
    assert call(gate, 2, "A", 2, entries=ended).status == 0
    assert gate.client.ttl(key) > 0


@pytest.mark.parametrize("poison", ["nan", "5.5", "text"])
def test_the_statuses_of_a_batch_are_counted_anew_where_they_are_poisoned(gate: Gate, poison: str) -> None:
    key = gate.keys.batch("b")
    gate.enqueue(T0, "b", "f", dict.fromkeys(range(3), b"f"))
    gate.client.hset(key, mapping=dict.fromkeys(("completed", "failed", "aborted"), poison))
    first, second, _ = call(gate, 1, "A", 1, jobs=3).jobs
    ended = [
        Entry(job.id, job.attempt, 1, what, b"x") for job, what in ((first, "completed"), (second, "failed"))
    ]
    assert call(gate, 2, "A", 2, held=1, entries=ended).refused == []
    assert gate.client.hmget(key, "left", "completed", "failed") == [b"1", b"1", b"1"]
    assert gate.cancel(T0 + 3, "b", "f", 0, 3, "all") == [0, 1, 0]
    assert gate.client.hget(key, "aborted") == b"1"
    gate.client.hset(key, "failed", poison)
    gate.client.hdel(key, "cancelled")
    assert gate.enqueue(T0 + 4, "b", "f", {1: b"f"}, 1000, 1, "failed") == [1, 0, 0]


@pytest.mark.parametrize("poison", ["nan", "5.5", "text"])
def test_a_batch_whose_count_is_poisoned_can_be_cancelled(gate: Gate, poison: str) -> None:
    gate.enqueue(T0, "b", "f", dict.fromkeys(range(2), b"f"))
    gate.client.hset(gate.keys.batch("b"), "left", poison)
    assert gate.cancel(T0 + 1, "b", "f", 0, 2, "all") == [2, 0, 0]
    assert gate.client.hget(gate.keys.batch("b"), "left") == b"0"
    assert gate.client.ttl(gate.keys.batch("b")) > 0


def test_a_process_whose_record_is_poisoned_says_again_what_it_holds(gate: Gate) -> None:
    busy(gate)
    gate.client.hset(gate.keys.gate, "p:A", "nonsense")
    answer = call(gate, S, "A", 3, held=3, permits=1)
    assert (answer.status, answer.permits, answer.in_use) == (1, 0, 4)
    kept = [Entry(job_id("L", "b", 0), T0 + 3, 1, "keep")]
    again = call(gate, S + 1, "A", 4, held=3, entries=kept)
    assert (again.status, again.in_use, again.refused) == (0, 4, [])
    score = gate.client.zscore(gate.keys.queue("f"), job_id("L", "b", 0))
    assert score is not None and score > PARKED


def test_jobs_of_a_dead_process_with_a_poisoned_record_come_back(gate: Gate) -> None:
    busy(gate)
    gate.client.hset(gate.keys.gate, "p:A", "nonsense")
    for seq, after in enumerate((5, 10, 15), 3):
        call(gate, after * S, "B", seq, held=1)
    answer = call(gate, 16 * S, "B", 6, held=1, jobs=9)
    assert job_id("L", "b", 0) in [job.id for job in answer.jobs]
    assert answer.in_use == 1 + len(answer.jobs)


def test_an_override_that_cannot_be_read_is_dropped(gate: Gate) -> None:
    for poison in ("7", "x y z 1 -", "nan - - 1 -", "-4 - - 1 -", "- - 1e99 1 -"):
        gate.client.flushall()
        gate.client.set(gate.keys.override, poison)
        answer = call(gate, 0, "A", 1, permits=1)
        assert (answer.permits, answer.override) == (1, ""), poison
        assert repaired(gate) == ["override"]


@pytest.mark.parametrize("poison", ["text", "inf", "9e18", "nan"])
def test_a_start_that_is_no_time_counts_from_now(gate: Gate, poison: str) -> None:
    call(gate, 0, "A", 1, permits=3)
    gate.client.lset(gate.keys.starts, 1, poison)
    gate.control(T0 + S, "repair", "queue:f", "zset")
    stamps = [float(each) for each in gate.client.lrange(gate.keys.starts, 0, -1)]
    assert len(stamps) == 3 and stamps == sorted(stamps) and stamps[-1] == T0 + S
    assert call(gate, 2 * S, "A", 2, held=3).used == 3


@pytest.mark.parametrize("poison", ["inf", "-inf", "-5", "9e15"])
@pytest.mark.parametrize("due_known", [True, False])
def test_a_run_that_waits_for_what_is_no_time_is_due(gate: Gate, poison: str, due_known: bool) -> None:
    busy(gate)
    delayed = job_id("L", "b", 1)
    gate.client.zadd(gate.keys.later, {delayed: float(poison)})
    another = Entry(job_id("L", "b", 0), T0 + 3, 1, "refuse", 60 * S)  # its time is one
    call(gate, S, "A", 3, held=2, entries=[another])
    if not due_known:
        spoil(gate, "due", "-3")
    call(gate, 2 * S, "B", 3, held=1)
    claimed = call(gate, 4 * S, "A", 4, held=0, jobs=9).jobs
    assert delayed in [job.id for job in claimed]
    assert gate.client.zrange(gate.keys.later, 0, -1) == [another.job.encode()]
    assert state_of(gate)["due"] == T0 + 61 * S and repaired(gate) in ([], ["due"], ["state"])


KEYS = [
    "gate",
    "leases",
    "starts",
    "tickets",
    "later",
    "jobs",
    "flows",
    "override",
    "events",
    "samples",
    "saved",
]


@pytest.mark.parametrize("key", [*KEYS, "queue:f", "idle:f"])
def test_a_key_of_another_type_is_mended_and_what_is_held_is_said_again(gate: Gate, key: str) -> None:
    busy(gate)
    name = gate.keys.root + key
    gate.client.delete(name)
    if key == "override":
        gate.client.rpush(name, "text")
    else:
        gate.client.set(name, "text")
    reply = gate.control(T0 + S, "repair", "queue:f", "zset")
    if key == "idle:f":
        reply = gate._control(keys=gate.keys.all, args=["", T0 + S, "repair", "A", "r", "idle:f", "zset"])
    assert key in reply[9].decode().split(",") or key == "idle:f"
    kept = [Entry(job_id("L", "b", 0), T0 + 3, 1, "keep")]
    first = call(gate, S + 1, "A", 3, held=3, entries=kept)
    call(gate, S + 2, "A", 4, held=3, entries=kept if first.status == 1 else [])
    call(gate, S + 3, "B", 3, held=1)
    for after in (5, 10, 14):
        call(gate, after * S, "B", after, held=1)
        assert call(gate, after * S, "A", after, held=3).in_use == 4
    done = [Entry(job_id("L", "b", 0), T0 + 3, 1, "completed", b"out")]
    last = call(gate, 17 * S, "A", 20, held=2, entries=done)
    assert (last.in_use, last.refused) == (3, []), key
    claimed = call(gate, 18 * S, "A", 21, held=0, jobs=9)
    waiting = {job_id("L", "b", i) for i in ((1,) if key == "queue:f" else (1, 2, 3))}
    assert waiting == {job.id for job in claimed.jobs}, key
    assert gate.control(T0 + 19 * S, "repair", "queue:f", "zset")[9] == b""


def test_a_sound_state_is_left_alone_by_a_repair(gate: Gate) -> None:
    busy(gate)
    before = state_of(gate)
    assert gate.control(T0 + 4, "repair", "queue:f", "zset")[9] == b""
    after = state_of(gate)
    assert {name for name in before if before[name] != after[name]} <= {"woken_due", "last"}
    assert repaired(gate) == []


# the pump, on a real server --------------------------------------------------------------------


@pytest.mark.parametrize(("key", "poison"), [("leases", "text"), ("gate", "text"), ("gate", "nan level")])
def test_a_poisoned_gate_is_mended_by_whoever_meets_it_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: str, poison: str
) -> None:
    async def go(client: redis.Redis) -> int:
        name = f"{GateKeys('x').root}{key}"
        async with held_elsewhere("x", max_concurrent=2):
            if poison == "text":
                client.delete(name)
                client.set(name, "text")
            else:
                state = (client.hget(name, "state") or b"").decode()  # type: ignore[union-attr]
                client.hset(name, "state", state.replace('"level":2', '"level":NaN'))
            await asyncio.sleep(1.5)  # a heartbeat meets it
            async with asyncio.timeout(20), limit("x", max_concurrent=2):
                state = json.loads(client.hget(GateKeys("x").gate, "state") or "{}")  # type: ignore[arg-type]
                return int(state["in_use"])

    with running("valkey") as url:
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
        monkeypatch.setenv("POCKETFLEET_LEASE_S", "4")
        client = redis.Redis.from_url(url)
        with caplog.at_level(logging.WARNING):
            assert asyncio.run(go(client)) == 2
        client.close()
    said = [each.message for each in caplog.records if each.name.startswith("pocketfleet")]
    assert len(said) == 1 and said[0].startswith("gate.repaired "), caplog.text
    assert ("level" if poison != "text" else key) in said[0]


def test_a_text_of_other_bytes_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def go(client: redis.Redis) -> None:
        async with held_elsewhere("x", max_concurrent=2):
            client.hset(GateKeys("x").gate, "override", b"- - - 5 x - \xff\xfe - - - - -")
            async with asyncio.timeout(20), limit("x", max_concurrent=2):
                pump = await pump_of("x")
                assert pump.answer is not None and "\ufffd" in pump.answer.override

    with running("valkey") as url:
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
        with redis.Redis.from_url(url) as client:
            asyncio.run(go(client))
    assert not caplog.records
