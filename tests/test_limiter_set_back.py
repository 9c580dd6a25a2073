"""A gate set back to an older state, as by a failover or a backup, while its processes live on.

The gate does not know what it was told since, and its processes do not know what it told them: what one of
them has ended stands as its claim again.
"""

from __future__ import annotations

import asyncio
from typing import Any

import fakeredis
import pytest
from gate_model import T0, Gate

from limiter.errors import LimitsError
from limiter.limits import Limits
from limiter.permit import acquire
from limiter.process import Process
from limiter.sync import UNKNOWN, Answer, Call, Entry, read_answer
from limiter.together import acquire_together

S = 1_000_000
VALUES = Limits("L", 5).as_argument()


def call(gate: Gate, after: int, process: str, seq: int, **values: Any) -> Answer:
    values.setdefault("started", T0 if seq > 1 else 0)
    values.setdefault("flows", ("f",))
    return read_answer(gate.sync(Call(process, seq, limits=VALUES, **values), T0 + after))


def copy_of(gate: Gate) -> dict[bytes, tuple[bytes, int]]:
    """Every key as it is now, with its lifetime."""
    client: Any = gate.client
    return {key: (client.dump(key), max(0, client.pttl(key))) for key in client.keys("*")}


def set_back(gate: Gate, copy: dict[bytes, tuple[bytes, int]]) -> None:
    client: Any = gate.client
    for key in client.keys("*"):
        client.delete(key)
    for key, (what, lives) in copy.items():
        client.restore(key, lives, what)


def test_a_run_whose_end_was_lost_with_the_last_calls_is_claimed_again(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", {0: b"zero"})
    (job,) = call(gate, 1, "A", 1, jobs=1).jobs
    before = copy_of(gate)
    call(gate, 2, "A", 2, entries=[Entry(job.id, job.attempt, 1, "completed", b"out")])
    set_back(gate, before)

    found = []
    for seq, second in enumerate(range(1, 30, 5), 1):  # both live on
        call(gate, second * S, "A", seq + 2)
        found += call(gate, second * S, "B", seq, jobs=1).jobs

    assert [(each.id, each.deaths) for each in found] == [(job.id, 0)]


def test_what_still_runs_is_kept_and_not_claimed_by_another(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", {0: b"zero", 1: b"one"})
    ended, runs = call(gate, 1, "A", 1, jobs=2).jobs
    before = copy_of(gate)
    call(gate, 2, "A", 2, held=1, entries=[Entry(ended.id, ended.attempt, 1, "completed", b"out")])
    set_back(gate, before)

    assert call(gate, 3, "A", 3, held=1).status == UNKNOWN
    assert not call(gate, 4, "B", 1, jobs=5).jobs
    keep = Entry(runs.id, runs.attempt, 1, "keep")
    assert call(gate, 5, "A", 4, held=1, entries=[keep]).refused == []
    found = []
    for seq, second in enumerate(range(1, 30, 5), 2):
        call(gate, second * S, "A", seq + 3, held=1)
        found += call(gate, second * S, "B", seq, jobs=5, held=len(found)).jobs
    assert [each.id for each in found] == [ended.id]
    last = call(gate, 31 * S, "A", seq + 4, entries=[Entry(runs.id, runs.attempt, 1, "completed", b"out")])
    assert last.refused == [] and last.in_use == 1


def test_a_run_whose_stored_outcome_is_lost_runs_again(gate: Gate) -> None:
    """Stored beside the call because it is large, and gone when the call comes."""
    gate.enqueue(T0, "b", "f", {0: b"zero"})
    (job,) = call(gate, 1, "A", 1, jobs=1).jobs
    before = copy_of(gate)
    gate.client.set(gate.keys.blob("b", 0, job.attempt), b"large")
    set_back(gate, before)
    end = Entry(job.id, job.attempt, 1, "blob:completed")
    assert call(gate, 2, "A", 2, entries=[end]).refused == []
    assert not gate.client.exists(gate.keys.out("b"))

    (again,) = call(gate, 3, "B", 1, jobs=1).jobs
    assert (again.id, again.payload, again.deaths) == (job.id, b"zero", 0)
    gate.client.set(gate.keys.blob("b", 0, again.attempt), b"large")
    end = Entry(again.id, again.attempt, 1, "blob:completed")
    call(gate, 4, "B", 2, entries=[end])
    assert gate.client.xlen(gate.keys.out("b")) == gate.client.hlen(gate.keys.blobs("b")) == 1


def test_no_number_is_given_twice(gate: Gate) -> None:
    call(gate, 1, "A", 1)
    before = copy_of(gate)
    given = call(gate, 2, "A", 2, permits=3).attempt
    set_back(gate, before)
    call(gate, S, "A", 3, held=3)
    assert call(gate, S + 1, "B", 1, permits=1).attempt > given


def test_a_call_that_was_noted_nowhere_leaves_no_gap() -> None:
    async def go() -> list[Any]:
        server = fakeredis.FakeServer(version=(7,))
        client = fakeredis.FakeAsyncRedis(server=server)
        giver, process = (
            Process(*(fakeredis.FakeAsyncRedis(server=server) for _ in range(2))) for _ in range(2)
        )
        (await acquire(giver.pump(Limits("M", 1)))).release()
        pump, without_values = process.pump(Limits("L", 2)), process.pump("M")
        permit = await acquire(pump)
        (await acquire(without_values)).release()
        await giver.close()
        await without_values.contact()
        await client.delete(*await client.keys("pocketfleet:{M}:*"))
        with pytest.raises(LimitsError, match="'M' has no values"):
            await acquire_together(process, [pump, without_values])
        (await acquire(pump)).release()
        permit.release()
        events = await client.xrange("pocketfleet:{L}:events")
        await process.close()
        await client.aclose()
        return events

    assert asyncio.run(go()) == []
