"""The cancel script: waiting items leave the queue, runs are ended once, and doing it again changes nothing."""

from __future__ import annotations

from gate_model import T0, Gate, job_id

from limiter.limits import Limits
from limiter.sync import Call, Entry, read_answer

LIMITS = Limits("L", 3)


def items(*indices: int) -> dict[int, bytes]:
    return {index: f"f {index}".encode() for index in indices}


def worker(name: str, seq: int, jobs: int, held: int = 0, *entries: Entry) -> Call:
    started = T0 if seq > 1 else 0
    return Call(
        name,
        seq,
        held=held,
        jobs=jobs,
        started=started,
        limits=LIMITS.as_argument(),
        flows=("f",),
        entries=[*entries],
    )


def outcomes(gate: Gate, batch: str = "b") -> list[tuple[int, str]]:
    return [(int(row[b"i"]), row[b"s"].decode()) for _, row in gate.client.xrange(gate.keys.out(batch))]  # type: ignore[union-attr]


def test_what_waits_goes_and_what_runs_is_ended_once_and_its_process_told(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(*range(6)))
    claimed = read_answer(gate.sync(worker("A", 1, 2), T0 + 1)).jobs
    assert gate.cancel(T0 + 2, "b", "f", 0, 6, "all") == [4, 2, 0]
    assert gate.aborts == [("A", job.attempt, job.id) for job in claimed]
    assert outcomes(gate) == [(0, "aborted"), (1, "aborted")]
    assert gate.cancel(T0 + 3, "b", "f", 0, 6, "all") == [0, 0, 0]
    assert len(outcomes(gate)) == 2
    assert gate.client.hget(gate.keys.batch("b"), "aborted") == b"2"
    late = [Entry(claimed[0].id, claimed[0].attempt, 1, "completed", b"late")]
    answer = read_answer(gate.sync(worker("A", 2, 2, 1, *late), T0 + 4))
    assert (answer.refused, answer.in_use, answer.jobs) == ([claimed[0].id], 1, [])
    assert len(outcomes(gate)) == 2


def test_what_waits_can_go_before_what_runs(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(*range(6)))
    gate.sync(worker("A", 1, 2), T0 + 1)
    assert gate.cancel(T0 + 2, "b", "f", 0, 6, "waiting") == [4, 0, 2]
    assert gate.enqueue(T0 + 3, "b", "f", items(*range(6))) == [0, 0, 1]
    assert gate.cancel(T0 + 4, "b", "f", 0, 6, "all") == [0, 2, 0]


def test_a_slot_stays_taken_until_the_run_has_really_ended(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0, 1, 2))
    gate.enqueue(T0, "other", "f", items(0, 1, 2))
    gate.sync(worker("A", 1, 3), T0 + 1)
    gate.cancel(T0 + 2, "b", "f", 0, 3, "all")
    answer = read_answer(gate.sync(worker("B", 1, 3), T0 + 3))
    assert (answer.in_use, answer.jobs) == (3, [])


def test_a_withdrawal_leaves_what_began_with_its_checkpoint(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(*range(5)))
    run, back = read_answer(gate.sync(worker("A", 1, 2), T0 + 1)).jobs
    entries = [Entry(back.id, back.attempt, 1, "save", b"so far"), Entry(back.id, back.attempt, 1, "hand")]
    gate.sync(worker("A", 2, 0, 1, *entries), T0 + 2)
    assert gate.cancel(T0 + 3, "b", "f", 0, 5, "fresh") == [3, 0, 2]
    assert gate.aborts == []
    rows: list[bytes] = gate.client.zrange(gate.keys.queue("f"), 0, -1)  # type: ignore[assignment]
    assert {row.decode() for row in rows} == {run.id, back.id}
    again = read_answer(gate.sync(worker("B", 1, 2), T0 + 4))
    assert [(job.id, job.saved) for job in again.jobs] == [(back.id, b"so far")]
    assert gate.enqueue(T0 + 5, "b", "f", items(*range(5))) == [3, 0, 0]


def test_a_delayed_run_is_not_left_behind(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0))
    (job,) = read_answer(gate.sync(worker("A", 1, 1), T0 + 1)).jobs
    entries = [
        Entry(job.id, job.attempt, 1, "save", b"so far"),
        Entry(job.id, job.attempt, 1, "refuse", 5_000_000),
    ]
    gate.sync(worker("A", 2, 0, 0, *entries), T0 + 2)
    assert gate.cancel(T0 + 3, "b", "f", 0, 1, "all") == [1, 0, 0]
    keys = gate.keys
    assert not gate.client.exists(
        keys.later, keys.jobs, keys.root + "saved", "arq:job:" + job_id("L", "b", 0)
    )


def test_nobody_goes_on_enqueueing_a_cancelled_batch_until_it_is_taken_up_again(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(*range(3)))
    gate.cancel(T0 + 1, "b", "f", 0, 3, "all")
    assert gate.enqueue(T0 + 2, "b", "f", items(3, 4)) == [0, 0, 1]
    gate.client.hdel(gate.keys.batch("b"), "cancelled")
    assert gate.enqueue(T0 + 3, "b", "f", items(*range(5))) == [5, 0, 0]


def test_other_batches_and_other_chunks_stay(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(*range(10)))
    gate.enqueue(T0, "c", "f", items(*range(3)))
    assert gate.cancel(T0 + 1, "b", "f", 4, 3, "all") == [3, 0, 7]
    assert gate.client.zcard(gate.keys.queue("f")) == 10
    assert gate.client.hget(gate.keys.batch("c"), "left") == b"3"


def test_a_batch_nobody_knows_leaves_no_key(gate: Gate) -> None:
    assert gate.cancel(T0, "nothing", "f", 0, 1000, "all") == [0, 0, 0]
    assert gate.client.keys("*") == []


def test_a_retry_is_added_once_however_often_it_is_asked_for(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0, 1))
    first, second = read_answer(gate.sync(worker("A", 1, 2), T0 + 1)).jobs
    entries = [
        Entry(first.id, first.attempt, 1, "failed", b"why"),
        Entry(second.id, second.attempt, 1, "completed", b"out"),
    ]
    gate.sync(worker("A", 2, 0, 0, *entries), T0 + 2)
    assert gate.enqueue(T0 + 3, "b", "f", items(0), 1000, 1, "failed") == [1, 0, 0]
    assert gate.enqueue(T0 + 4, "b", "f", items(0), 1000, 1, "failed") == [0, 1, 0]
    counts = gate.client.hmget(gate.keys.batch("b"), "left", "failed", "completed")
    assert counts == [b"1", b"0", b"1"]
    (job,) = read_answer(gate.sync(worker("A", 3, 1), T0 + 5)).jobs
    gate.sync(worker("A", 4, 0, 0, Entry(job.id, job.attempt, 1, "completed", b"out")), T0 + 6)
    assert gate.enqueue(T0 + 7, "b", "f", items(0), 1000, 1, "failed") == [0, 1, 0]
    assert gate.client.hget(gate.keys.batch("b"), "completed") == b"2"
    assert gate.enqueue(T0 + 8, "b", "f", items(0), 1000, 2, "completed") == [1, 0, 0]


def test_a_retry_that_a_cancel_took_off_is_brought_again(gate: Gate) -> None:
    """Neither in the queue nor done, it would belong to nobody."""
    gate.enqueue(T0, "b", "f", items(0))
    (job,) = read_answer(gate.sync(worker("A", 1, 1), T0 + 1)).jobs
    gate.sync(worker("A", 2, 0, 0, Entry(job.id, job.attempt, 1, "failed", b"why")), T0 + 2)
    assert gate.enqueue(T0 + 3, "b", "f", items(0), 1000, 1, "failed") == [1, 0, 0]
    assert gate.cancel(T0 + 4, "b", "f", 0, 1, "waiting") == [1, 0, 0]
    gate.client.hdel(gate.keys.batch("b"), "cancelled")
    assert gate.enqueue(T0 + 5, "b", "f", items(0), 1000, 1, "failed") == [1, 0, 0]
    assert gate.enqueue(T0 + 6, "b", "f", items(0), 1000, 1, "failed") == [0, 1, 0]
    assert gate.client.hmget(gate.keys.batch("b"), "left", "failed") == [b"1", b"0"]
