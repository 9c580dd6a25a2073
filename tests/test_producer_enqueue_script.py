"""The enqueue script: only what is missing is added, in the right place, with the right word to the idle."""

from __future__ import annotations

from gate_model import T0, Gate, job_id

from limiter.limits import Limits
from limiter.sync import Call, Entry, read_answer

S = 1_000_000
LIMITS = Limits("L", 3)


def items(*indices: int) -> dict[int, bytes]:
    return {index: f"f {index}".encode() for index in indices}


def worker(name: str, seq: int, jobs: int, held: int = 0, *entries: Entry, flow: str = "f") -> Call:
    started = T0 if seq > 1 else 0
    limits = LIMITS.as_argument()
    return Call(
        name, seq, held=held, jobs=jobs, started=started, limits=limits, flows=(flow,), entries=[*entries]
    )


def places(gate: Gate, flow: str = "f") -> dict[str, int]:
    rows: list[tuple[bytes, float]] = gate.client.zrange(gate.keys.queue(flow), 0, -1, withscores=True)
    return {name.decode().partition(":")[2]: int(score) for name, score in rows}


def test_items_stand_one_spacing_apart_from_the_virtual_time_at_which_they_joined(gate: Gate) -> None:
    assert gate.enqueue(T0, "b", "f", items(0, 1, 2), 500) == [3, 0, 0]
    assert places(gate) == {"b:0": 1, "b:1": 501, "b:2": 1001}
    gate.sync(worker("A", 1, 2), T0 + 1)
    assert gate.enqueue(T0 + 2, "late", "f", items(0, 1), 1000) == [2, 0, 0]
    assert places(gate)["late:0"] == 501 and places(gate)["late:1"] == 1501


def test_a_chunk_goes_on_where_the_batch_ended_and_saves_up_no_credit(gate: Gate) -> None:
    gate.enqueue(T0, "slow", "f", items(0))
    gate.enqueue(T0, "fast", "f", items(*range(8)))
    gate.sync(worker("A", 1, 3), T0 + 1)
    entries = [
        Entry(job_id("L", *i), T0 + 2 + n, 1, "completed", b"")
        for n, i in enumerate((("fast", 0), ("slow", 0)))
    ]
    answer = read_answer(gate.sync(worker("A", 2, 3, 1, *entries), T0 + 2))
    assert answer.refused == [] and len(answer.jobs) == 2
    gate.enqueue(T0 + 3, "slow", "f", items(1, 2))
    taken = max(place for place in (int(v.split()[1]) for v in gate.client.hvals(gate.keys.jobs)))
    assert places(gate)["slow:1"] == max(taken, 1001)
    gate.enqueue(T0 + 4, "fast", "f", items(8))
    assert places(gate)["fast:8"] == 8001


def test_the_weight_is_the_spacing_and_may_be_a_fraction(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0, 1, 2, 3), 1000 / 3)
    assert list(places(gate).values()) == [1, 334, 668, 1001]


def test_doing_it_again_adds_only_what_is_missing(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0, 1, 2))
    gate.sync(worker("A", 1, 2), T0 + 1)
    gate.sync(worker("A", 2, 0, 1, Entry(job_id("L", "b", 0), T0 + 2, 1, "completed", b"")), T0 + 2)
    before = places(gate)
    assert gate.enqueue(T0 + 3, "b", "f", items(0, 1, 2)) == [0, 1, 0]
    assert places(gate) == before
    assert gate.enqueue(T0 + 4, "b", "f", items(0, 1, 2, 3, 4)) == [2, 1, 0]
    assert gate.client.hget(gate.keys.batch("b"), "left") == b"4"
    assert gate.client.get("arq:job:" + job_id("L", "b", 0)) is None


def test_a_payload_stays_as_it_was_first_written(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", {0: b"f first"})
    gate.enqueue(T0 + 1, "b", "f", {0: b"f second", 1: b"f other"})
    assert gate.client.get("arq:job:" + job_id("L", "b", 0)) == b"f first"
    assert gate.client.get("arq:job:" + job_id("L", "b", 1)) == b"f other"


def test_a_payload_that_redis_lost_is_put_back_in_its_place(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0, 1))
    gate.client.delete("arq:job:" + job_id("L", "b", 0))
    assert gate.enqueue(T0 + 1, "b", "f", items(0, 1)) == [0, 0, 0]
    answer = read_answer(gate.sync(worker("A", 1, 2), T0 + 2))
    assert [job.payload for job in answer.jobs] == [b"f 0", b"f 1"]


def test_an_item_that_ended_as_lost_may_be_enqueued_again(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0, 1))
    gate.client.delete("arq:job:" + job_id("L", "b", 0))
    gate.sync(worker("A", 1, 2), T0 + 1)
    assert gate.client.hget(gate.keys.batch("b"), "lost") == b"1"
    assert gate.enqueue(T0 + 2, "b", "f", items(0, 1)) == [1, 0, 0]
    answer = read_answer(gate.sync(worker("A", 2, 1, 1), T0 + 3))
    assert [job.id for job in answer.jobs] == [job_id("L", "b", 0)]
    assert gate.client.hget(gate.keys.batch("b"), "left") == b"2"


def test_as_many_idle_processes_are_woken_as_there_is_room_for(gate: Gate) -> None:
    for name in "ABCDE":
        gate.sync(worker(name, 1, 1), T0)
    gate.sync(worker("G", 1, 1, flow="g"), T0)
    gate.take_messages()
    gate.enqueue(T0 + 1, "b", "f", items(0, 1))
    assert gate.take_messages() == [("A", 0), ("B", 0)]
    gate.enqueue(T0 + 2, "b", "f", items(*range(2, 9)))
    assert gate.take_messages() == [("C", 0), ("D", 0), ("E", 0)]
    gate.enqueue(T0 + 3, "b", "f", items(9))
    assert gate.take_messages() == []


def test_nothing_new_wakes_nobody(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0))
    gate.sync(worker("A", 1, 1), T0 + 1)
    gate.sync(worker("A", 2, 1, 0, Entry(job_id("L", "b", 0), T0 + 2, 1, "completed", b"")), T0 + 2)
    gate.take_messages()
    assert gate.enqueue(T0 + 3, "b", "f", items(0)) == [0, 1, 0]
    assert gate.take_messages() == []


def test_an_enqueue_does_not_hide_a_freeze(gate: Gate) -> None:
    """It applies the stall rule before it notes the time; else the next call would reap the living."""
    gate.sync(worker("A", 1, 1), T0)
    gate.enqueue(T0 + 1, "b", "f", items(0))
    gate.sync(worker("A", 2, 1), T0 + 2)
    gate.sync(worker("B", 1, 0), T0 + 3)
    gate.enqueue(T0 + 60 * S, "b", "f", items(1))
    assert read_answer(gate.sync(worker("B", 2, 0), T0 + 60 * S + 1)).in_use == 1


def test_an_enqueue_alone_makes_no_gate(gate: Gate) -> None:
    gate.enqueue(T0, "b", "f", items(0))
    assert not gate.client.exists(gate.keys.gate)


def test_a_batch_lives_on_when_more_is_added_and_a_week_after_its_last_outcome(gate: Gate) -> None:
    keys = gate.keys
    gate.enqueue(T0, "b", "f", items(0))
    gate.client.set(keys.base("b"), b"shared")
    gate.sync(worker("A", 1, 1), T0 + 1)
    gate.sync(worker("A", 2, 0, 0, Entry(job_id("L", "b", 0), T0 + 2, 1, "failed", b"why")), T0 + 2)
    of_batch = [keys.batch("b"), keys.done("b"), keys.out("b"), keys.base("b")]
    assert all(0 < gate.client.pttl(key) <= 604_800_000 for key in of_batch)
    assert gate.client.hget(keys.batch("b"), "failed") == b"1"
    gate.enqueue(T0 + 3, "b", "f", items(0, 1))
    assert [gate.client.pttl(key) for key in of_batch] == [-1] * 4
    gate.sync(worker("A", 3, 1), T0 + 4)
    gate.sync(worker("A", 4, 0, 0, Entry(job_id("L", "b", 1), T0 + 3, 1, "completed", b"")), T0 + 5)
    assert all(gate.client.pttl(key) > 0 for key in of_batch)


def test_a_thousand_items_fit_in_one_chunk_and_come_out_in_order(gate: Gate) -> None:
    assert gate.enqueue(T0, "b", "f", items(*range(1000))) == [1000, 0, 0]
    assert gate.enqueue(T0 + 1, "b", "f", items(*range(1000))) == [0, 0, 0]
    assert [int(name[2:]) for name in places(gate)] == list(range(1000))
