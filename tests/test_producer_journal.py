"""The journal and the output file that follows it: each outcome once, whatever byte a kill falls on."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limiter.client import open_retrying_client
from limiter.keys import BATCHES, GateKeys
from producer.enqueue import enqueue
from producer.errors import InputError, ProducerError
from producer.facts import Facts, known_batches, read_facts
from producer.follow import Ended
from producer.follower import Follower, catch_up
from producer.journal import Journal
from producer.line_file import LineFile, check_output, own_output
from producer.lines import csv_line, json_line, record_of
from producer.spool import Spool
from producer.spool_writer import SpoolWriter
from tests import servers
from worker import codec
from worker.contract import Failure, Outcome, encode_outcome

COUNT = 6


def spool_in(data_dir: Path, count: int = COUNT) -> Spool:
    with SpoolWriter(data_dir, "b", "users:flow", "users") as writer:
        for number in range(count):
            writer.add(codec.encode({"user": number}))
        return writer.finish(b"")


def ended(index: int, retry: int = 0, status: str = "completed", place: int = 0, **more: object) -> Ended:
    if status != "completed":
        more = {"failure": Failure("ValueError", "un\nlucky"), **more}
    outcome = Outcome(status, retry=retry, action="done", **more)  # type: ignore[arg-type]
    return Ended(index, retry, 1000 + place, status, encode_outcome(outcome), f"17-{place}")


def test_the_first_outcome_of_each_item_and_retry_counts(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    with Journal(spool.home, "b", COUNT) as journal:
        first, again = ended(0, place=1), ended(0, place=2)
        assert journal.take([first, again, ended(99, place=3)]) == [first]
        assert journal.take([again]) == []
        assert journal.take([ended(1, status="failed", place=4)]) != []
        (asked,) = journal.ask_again([1])
        assert (asked.index, asked.number, asked.before) == (1, 1, "failed")
        assert journal.take([ended(1, retry=0, place=5)]) == [], "the run of before the retry came late"
        assert journal.retries() == [asked]
        assert list(journal.unended()) == [1, 2, 3, 4, 5]
        assert journal.take([ended(1, retry=1, place=6)]) != []
        assert (journal.counts(), journal.retries()) == ({"completed": 2}, [])
    with Journal(spool.home, "b", COUNT, write=False) as journal:
        assert (journal.counts(), journal.pending, journal.position) == ({"completed": 2}, 4, "17-6")
        assert [each.retry for each in journal.latest()] == [0, 1]
        assert [each.retry for each, _ in journal.outcomes()] == [0, 0, 1]


def test_a_retry_that_another_host_asked_for_is_written_down_with_its_outcome(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    outcomes = [ended(3, status="failed", place=1), ended(3, retry=2, place=2), ended(3, retry=1, place=3)]
    with Journal(spool.home, "b", COUNT) as journal:
        assert [each.retry for each in journal.take(outcomes)] == [0, 2], "the third one came late"
    follow(spool, tmp_path / "out.jsonl", [])
    with Journal(spool.home, "b", COUNT) as journal:
        assert (journal.counts(), journal.retry(3), journal.retries()) == ({"completed": 1}, 2, [])
        assert [each.retry for each in journal.latest()] == [2]
        journal.learn([(3, 2), (4, 1), (COUNT, 1)])
        assert (journal.status(3), [each.index for each in journal.retries()]) == ("completed", [4])
    lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [(line["retry"], line["status"]) for line in lines] == [(0, "failed"), (2, "completed")]


def test_an_outcome_without_data_is_of_the_retry_that_was_asked_for(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    with Journal(spool.home, "b", COUNT) as journal:
        journal.take([ended(3, status="failed")])
        journal.ask_again([3])
        (lost,) = journal.take([Ended(3, -1, 9, "lost", b"", "18-0")])
        assert (lost.retry, journal.status(3)) == (1, "lost")
        assert lost.outcome.failure is not None
        assert lost.outcome.failure.message == "its params were gone from Redis"


def test_an_older_outcome_moves_no_position_back(tmp_path: Path) -> None:
    with Journal(tmp_path, "b", 3) as journal:
        journal.begin("e")
        journal.take([ended(0, place=9), ended(1, place=10)])
        assert [each.index for each in journal.take([ended(2, place=2)])] == [2]
        assert journal.position == "17-10"
    assert Journal(tmp_path, "b", 3, write=False).position == "17-10"


def test_another_epoch_reads_the_stream_from_its_start(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    with Journal(spool.home, "b", COUNT) as journal:
        journal.begin("first")
        journal.take([ended(0, place=7)])
        assert (journal.epoch, journal.position) == ("first", "17-7")
        journal.begin("second")
    with Journal(spool.home, "b", COUNT) as journal:
        assert (journal.epoch, journal.position, journal.status(0)) == ("second", "0-0", "completed")


def test_the_done_bits_are_numbered_as_redis_numbers_them(tmp_path: Path) -> None:
    spool = spool_in(tmp_path, 10)
    with Journal(spool.home, "b", 10) as journal:
        journal.take([ended(0), ended(9)])
        assert journal.bitmap() == b"\x80\x40"
        assert Journal(spool.home, "b", 3, write=False).bitmap() == b"\x80"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000))
def test_a_journal_cut_short_at_any_byte_has_every_whole_record(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    spool = spool_in(tmp_path_factory.mktemp("cut"))
    ends = []
    with Journal(spool.home, "b", COUNT) as journal:
        for index in range(COUNT):
            journal.take([ended(index, place=index)])
            ends.append(journal.end)
    place = cut % (ends[-1] + 1)
    os.truncate(spool.home / "journal", place)
    whole = sum(end <= place for end in ends)
    with Journal(spool.home, "b", COUNT) as journal:
        assert list(journal.unended()) == list(range(whole, COUNT))
        journal.take([ended(index, place=index) for index in range(COUNT)])
        assert journal.pending == 0
    assert [each.index for each, _ in Journal(spool.home, "b", COUNT, write=False).outcomes()] == [
        *range(COUNT)
    ]


def test_zeros_that_a_power_cut_left_are_no_record(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    with Journal(spool.home, "b", COUNT) as journal:
        journal.take([ended(0)])
        end = journal.end
    os.truncate(spool.home / "journal", end + 4096)
    with Journal(spool.home, "b", COUNT) as journal:
        assert (journal.pending, journal.end) == (COUNT - 1, end)


# --- the output file ------------------------------------------------------------------------------------


def follow(spool: Spool, path: Path, outcomes: list[Ended]) -> None:
    """One producer's life: it takes outcomes one by one and writes their lines."""
    with Journal(spool.home, "b", COUNT) as journal:
        lines = LineFile(path, spool, journal)
        try:
            lines.catch_up()
            for each in outcomes:
                journal.take([each])
                lines.catch_up()
        finally:
            lines.close()


OUTCOMES = [
    ended(index, place=index, status="failed" if index == 2 else "completed") for index in range(COUNT)
]


def killed_at(byte: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the process die once that many bytes were written in all, in the middle of a write."""
    room = byte

    def dying(real: Callable[..., int], *, place: bool) -> Callable[..., int]:
        def write(fd: int, data: bytes, *more: int) -> int:
            nonlocal room
            if room < 0:
                raise KeyboardInterrupt
            room -= len(data)
            if room < 0:
                if not place:  # a note is one small write: all of it or none
                    real(fd, bytes(data)[: room + len(data)], *more)
                raise KeyboardInterrupt
            return real(fd, data, *more)

        return write

    monkeypatch.setattr(os, "write", dying(os.write, place=False))
    monkeypatch.setattr(os, "pwrite", dying(os.pwrite, place=True))
    return monkeypatch.undo


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_a_kill_at_any_byte_leaves_neither_a_half_nor_a_second_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    follow(spool_in(whole), whole / name, OUTCOMES)
    expected = (whole / name).read_bytes()
    for byte in range(0, 4_000, 37):
        home = tmp_path / f"{byte}"
        spool, path = spool_in(home), home / name
        live = killed_at(byte, monkeypatch)
        try:
            follow(spool, path, OUTCOMES)
        except KeyboardInterrupt:
            pass
        finally:
            live()
        follow(spool, path, OUTCOMES)
        assert path.read_bytes() == expected, f"killed at byte {byte}"


def test_a_line_tells_what_became_of_the_item(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    more = {
        "difference": {},
        "attempts": {"deaths": 1},
        "nodes": [("Fetch", 0.5)],
        "host": "h",
        "started": 1.0,
    }
    last = ended(4, status="failed", ended=3.5, **more)
    follow(spool, tmp_path / "out.jsonl", [last])
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "index": 4,
        "params": {"user": 4},
        "status": "failed",
        "retry": 0,
        "action": "done",
        "changed": {},
        "error": {"type": "ValueError", "message": "un\nlucky"},
        "left_behind": [],
        "notes": [],
        "attempts": {"deaths": 1},
        "nodes": [["Fetch", 0.5]],
        "host": "h",
        "seconds": 2.5,
    }


def test_a_csv_row_is_one_line_also_of_text_with_breaks(tmp_path: Path) -> None:
    follow(spool_in(tmp_path), tmp_path / "out.csv", [ended(1, status="failed")])
    with (tmp_path / "out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2
    assert (row["index"], row["params"], row["error_message"]) == ("1", '{"user":1}', "un\\nlucky")


def test_a_retried_item_gets_a_second_line(tmp_path: Path) -> None:
    spool, path = spool_in(tmp_path), tmp_path / "out.jsonl"
    follow(spool, path, [ended(1, status="failed", place=1)])
    with Journal(spool.home, "b", COUNT) as journal:
        journal.ask_again([1])
    follow(spool, path, [ended(1, status="failed", place=1), ended(1, retry=1, place=2)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["retry"], line["status"]) for line in lines] == [(0, "failed"), (1, "completed")]


def test_another_file_gets_every_line_and_one_that_was_changed_is_written_anew(tmp_path: Path) -> None:
    spool, path = spool_in(tmp_path), tmp_path / "out.jsonl"
    follow(spool, path, OUTCOMES)
    expected = path.read_bytes()
    follow(spool, tmp_path / "other.jsonl", [])
    assert (tmp_path / "other.jsonl").read_bytes() == expected
    follow(spool, path, [])
    path.write_bytes(b"x" * (len(expected) + 10))
    follow(spool, path, [])
    assert path.read_bytes() == expected
    path.unlink()
    follow(spool, path, [])
    assert path.read_bytes() == expected


def test_a_batch_goes_on_with_each_file_that_it_has_written(tmp_path: Path) -> None:
    spool, path, other = spool_in(tmp_path), tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    follow(spool, path, OUTCOMES[:2])
    begun = path.stat().st_ino
    follow(spool, other, OUTCOMES[2:4])
    check_output(path, tmp_path, "b")
    follow(spool, path, OUTCOMES[4:])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [*range(COUNT)]
    assert path.stat().st_ino == begun
    assert len(other.read_text().splitlines()) == 4
    (tmp_path / "strange.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="batch b did not write it"):
        check_output(tmp_path / "strange.jsonl", tmp_path, "b")


ODD = {None: 1, True: {False: [{None: b"x"}]}, 7: float("nan"), b"ab": "\n", 1.5: 2}


def test_keys_that_json_has_not_are_spelled_in_a_line(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    odd = ended(0, difference={"=": {"odd": ODD}}, place=1)
    for name in ("out.jsonl", "out.csv"):
        follow(spool, tmp_path / name, [odd, ended(1, place=2)])
    spelled = {"null": 1, "true": {"false": [{"null": "eA=="}]}, "7": None, "YWI=": "\n", "1.5": 2}
    assert (tmp_path / "out.jsonl").read_text().startswith('{"index":0,"params":{"user":0},'), "as any other"
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (first["changed"], second["index"]) == ({"odd": spelled}, 1)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (json.loads(rows[0]["changed"]), rows[1]["index"]) == ({"odd": spelled}, "1")


@pytest.mark.parametrize("line", [json_line, csv_line])
def test_a_line_that_cannot_be_written_says_so(line: Callable[[dict[str, Any]], bytes]) -> None:
    deep: dict[str, Any] = {}
    deep["again"] = deep
    record = record_of(ended(3, difference={}), {"user": 3})
    said = line({**record, "changed": deep}).decode()
    assert "params, action and changed cannot be written here: RecursionError" in said
    assert said.startswith(('{"index":3,', "3,completed,")) and said.count("\n") == 1


# --- following ------------------------------------------------------------------------------------------


async def told_to_redis(client: Any, outcomes: list[Ended]) -> None:
    """A Redis in which all items of the batch are done."""
    keys = GateKeys("users")
    await client.hset(
        keys.batch("b"), mapping={"flow": "f", "count": COUNT, "left": 0, "epoch": "e", "enqueued": "1"}
    )
    for index in range(COUNT):
        await client.setbit(keys.done("b"), index, 1)
    for each in outcomes:
        fields = {"i": each.index, "t": each.attempt, "s": each.status, "o": each.data}
        await client.xadd(keys.out("b"), fields, id=each.position)


def test_what_waits_for_a_retry_when_redis_loses_its_data_lowers_no_other_count(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)

    async def go(url: str) -> Facts | None:
        client = open_retrying_client(url)
        with Journal(spool.home, "b", COUNT) as journal:
            journal.begin("of a redis that has lost its data")
            journal.take(
                ended(n, status="failed" if n in (2, 4) else "completed", place=n) for n in range(COUNT)
            )
            journal.ask_again([2, 4])
            journal.take([ended(2, retry=1, status="failed", place=COUNT)])
            assert (await enqueue(client, spool, journal=journal)).added == 1
        facts = await read_facts(client, spool.limit, "b")
        await client.aclose()
        return facts

    with servers.running("valkey") as url:
        facts = asyncio.run(go(url))
    assert facts is not None
    assert (facts.statuses, facts.left, facts.done) == ({"completed": COUNT - 2, "failed": 1}, 1, COUNT - 1)


async def plant(client: Any) -> None:
    """What is not ours among what is, in every key that a batch is read from."""
    keys = GateKeys("users")
    for number, bad in enumerate(
        (
            {"i": "x", "t": 1, "s": "completed", "o": ""},
            {"i": -1, "t": 1, "s": "completed", "o": ""},
            {"i": 2**64, "t": 1, "s": "completed", "o": ""},
            {"i": 1, "t": -4, "s": "failed", "o": ""},
            {"i": 1, "t": 1, "s": "odd", "o": ""},
            {"i": 1, "t": 1, "s": b"\xff", "o": ""},
            {"not": "ours"},
        )
    ):
        await client.xadd(keys.out("b"), bad, id=f"16-{number + 1}")
    await client.hset(keys.retries("b"), mapping={"1": "many", "2": 70_000, "-1": 1, "odd": 1})
    await client.hset(keys.batch("b"), mapping={"failed": "many", "aborted": "-7", "created": "1e300"})
    await client.hset(
        BATCHES, mapping={"b": '{"limit":"users","flow":"f"}', b"\xff": "{}", "odd": "odd", "../x": "{}"}
    )


def test_what_is_not_ours_in_the_keys_of_a_batch_is_passed_over(tmp_path: Path) -> None:
    spool = spool_in(tmp_path)
    deep = Ended(3, -1, 1003, "failed", b"\x82\xa6status\xa6failed\xa6action" + b"\x91" * 100_000, "18-0")
    too_often = ended(2, retry=70_000, place=2)
    odd = ended(4, place=4, difference={"=": 5})

    async def go() -> None:
        client = fakeredis.FakeAsyncRedis(version=7)
        await plant(client)
        await told_to_redis(client, [ended(0, place=1), too_often, odd, deep])
        (facts,) = await known_batches(client)
        assert (facts.statuses, facts.count, facts.created) == ({}, COUNT, 0.0)
        assert await client.hkeys(BATCHES) == [b"b"], "the others are dropped"
        with Journal(spool.home, "b", COUNT) as journal:
            await catch_up(client, "users", "b", journal)
            kept = {each.index: each.outcome for each, _ in journal.outcomes()}
            assert sorted(kept) == [0, 2, 3, 4]
            assert all(getattr(kept[n].failure, "type", "") == "CorruptOutcome" for n in (3, 4))
            assert journal.retries() == []
        await client.aclose()

    asyncio.run(go())


@pytest.mark.parametrize("enqueued_here", [True, False])
def test_what_a_rolled_back_redis_lacks_is_lost_for_whoever_enqueued_it(
    enqueued_here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.follower.LOOK_IDLE_S", 0.01)
    monkeypatch.setattr("producer.follower.LOOK_BUSY_S", 0.01)
    monkeypatch.setattr("producer.follower.BLOCK_MS", 10)
    spool = spool_in(tmp_path)

    async def go() -> Follower:
        client = fakeredis.FakeAsyncRedis(version=7)
        await told_to_redis(client, [ended(0, place=1)])
        await client.hdel(GateKeys("users").batch("b"), "enqueued")
        await client.delete(GateKeys("users").done("b"))
        await client.setbit(GateKeys("users").done("b"), 0, 1)
        with Journal(spool.home, "b", COUNT) as journal:
            await catch_up(client, "users", "b", journal)
            grows = (lambda: False) if enqueued_here else None
            follower = Follower(client, "users", "f", "b", journal=journal, lease_s=0.0, grows=grows)
            async with asyncio.timeout(30):
                assert [each.index async for some in follower.news() for each in some] == [0]
        await client.aclose()
        return follower

    follower = asyncio.run(go())
    rest = list(range(1, COUNT))
    assert (follower.end, follower.lost) == (("lost", rest) if enqueued_here else ("stopped", []))


@pytest.mark.parametrize("last_one_is_there", [True, False])
def test_an_outcome_that_had_no_use_when_it_came_is_found_again_or_named_as_lost(
    last_one_is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.follower.LOOK_IDLE_S", 0.01)
    monkeypatch.setattr("producer.follower.LOOK_BUSY_S", 0.01)
    monkeypatch.setattr("producer.follower.BLOCK_MS", 10)
    spool = spool_in(tmp_path)
    outcomes = [ended(index, place=COUNT - index) for index in reversed(range(COUNT))]

    async def go() -> Follower:
        client = fakeredis.FakeAsyncRedis(version=7)
        await told_to_redis(client, outcomes[0 if last_one_is_there else 1 :])
        with Journal(spool.home, "b", COUNT - 1) as journal:  # the last item was appended elsewhere
            await catch_up(client, "users", "b", journal)
        with Journal(spool.home, "b", COUNT) as journal:
            follower = Follower(client, "users", "f", "b", journal=journal, lease_s=0.0)
            async with asyncio.timeout(30):
                found = [each.index async for some in follower.news() for each in some]
        assert sorted(found) == list(range(COUNT if last_one_is_there else COUNT - 1))
        await client.aclose()
        return follower

    follower = asyncio.run(go())
    assert (follower.end, follower.lost) == (("ended", []) if last_one_is_there else ("lost", [COUNT - 1]))


@pytest.mark.parametrize("step", range(3))
def test_a_disk_that_cannot_note_how_far_the_file_has_come_is_said_in_a_sentence(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, path, left = spool_in(tmp_path), tmp_path / "out.jsonl", step

    def full(real: Callable[..., int]) -> Callable[..., int]:
        def write(*asked: object) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            return real(*asked)

        return write

    with Journal(spool.home, "b", COUNT) as journal:
        journal.take(OUTCOMES)
        with monkeypatch.context() as patched:
            for name in ("write", "pwrite", "fsync"):
                patched.setattr(os, name, full(getattr(os, name)))
            with pytest.raises(ProducerError, match=r"(?i)no space left on device"):
                follow_to_its_end(LineFile(path, spool, journal))
        follow_to_its_end(LineFile(path, spool, journal))
    assert len(path.read_text().splitlines()) == COUNT


def test_a_data_directory_that_cannot_be_is_named_where_no_file_was(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data_dir = tmp_path / "file" / "data"
    with pytest.raises(
        InputError, match=r"^POCKETFLEET_DATA_DIR='.*data' cannot be used \(Not a directory\)"
    ):
        check_output(own_output(data_dir, "b"), data_dir, "b")


def test_a_data_directory_that_is_deleted_meanwhile_costs_no_line(tmp_path: Path) -> None:
    path, spool = tmp_path / "out.jsonl", spool_in(tmp_path / "data")
    with Journal(spool.home, "b", COUNT) as journal:
        lines = LineFile(path, spool, journal)
        journal.take(OUTCOMES[:2])
        lines.catch_up()
        shutil.rmtree(tmp_path / "data")
        journal.take(OUTCOMES[2:])
        follow_to_its_end(lines)
        assert len(list(journal.latest())) == COUNT
    assert len(path.read_text().splitlines()) == COUNT


def follow_to_its_end(lines: LineFile) -> None:
    try:
        lines.catch_up()
    finally:
        lines.close()


def test_a_file_that_another_run_writes_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path, other = tmp_path / "out.jsonl", spool_in(tmp_path / "other")
    spool = spool_in(tmp_path)
    with Journal(spool.home, "b", COUNT) as journal, Journal(other.home, "b", COUNT) as theirs:
        journal.take(OUTCOMES)
        lines = LineFile(path, spool, journal)
        lines.catch_up()
        before = path.read_bytes()
        with pytest.raises(
            InputError, match=r"out\.jsonl is being written by another run: name another file$"
        ):
            LineFile(path, other, theirs)
        assert path.read_bytes() == before
        lines.close()
        follow_to_its_end(LineFile(path, other, theirs))
