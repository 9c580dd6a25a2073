"""A spool is whole or not there, whatever kills its writer, and gives back what was put in."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import fakeredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limiter.errors import LimitsError
from producer import disk
from producer.announce import announce
from producer.batch_lock import BatchLock, InOtherHands
from producer.errors import ParamsError, SpoolError
from producer.facts import Facts
from producer.item_keys import key_of
from producer.journal import Journal
from producer.line_file import LineFile
from producer.manifest import continued, same_as_announced
from producer.params import checked_params
from producer.prune import sweep
from producer.settings import ProducerSettings
from producer.spool import Spool, digest
from producer.spool_writer import SpoolGrowth, SpoolWriter
from worker import codec

BASE = b"\x80"

# Writes 30,000 items; argv: data directory, at which fsync or rename it kills itself (0: never).
WRITER = """
import os, signal, sys
from producer.spool_writer import SpoolGrowth, SpoolWriter
from worker import codec
calls = 0
def dying(real):
    def call(*args):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call
os.fsync, os.rename = dying(os.fsync), dying(os.rename)
writer = SpoolWriter(sys.argv[1], "b1", "users:flow", "users")
print("ready", flush=True)
for n in range(30_000):
    writer.add(b"%08d" % n * 20)
writer.finish(b"base")
print("finished", calls, flush=True)
"""


def _written(data_dir: Path, items: list[bytes], batch: str = "b1", key: str = "") -> Spool:
    with SpoolWriter(data_dir, batch, "users:flow", "users", key) as writer:
        for number, item in enumerate(items):
            writer.add(item, f"key {number}")
        return writer.finish(BASE)


def _grow(spool: Spool, items: Iterable[bytes]) -> None:
    with SpoolGrowth(spool) as growth:
        for item in items:
            growth.add(item)
        growth.finish()


def _names(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "batches").iterdir()}


def _start_writer(data_dir: Path, die_at: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(data_dir), str(die_at)], stdout=subprocess.PIPE, text=True
    )


def _assert_nothing_or_whole(data_dir: Path) -> None:
    if Spool.exists(data_dir, "b1"):
        spool = Spool.open(data_dir, "b1")
        assert spool.base() == b"base"
        assert [item for _, item in spool.items()] == [b"%08d" % n * 20 for n in range(30_000)]
    else:
        assert _names(data_dir) <= {name for name in _names(data_dir) if name.startswith("+writing.")}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 7), st.integers(2, 60))
def test_items_come_back_whatever_their_sizes_and_blocks(items: list[bytes], block: int, flush: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("producer.spool_writer.BLOCK", block)
        patch.setattr("producer.spool_writer._FLUSH_BYTES", flush)
        _written(Path(folder), items)
        spool = Spool.open(folder, "b1")
        assert list(spool.items()) == list(enumerate(items))
        for start in range(len(items) + 2):
            assert [item for _, item in spool.items(start)] == items[start:]
        blocks = [b"".join(items[n : n + block]) for n in range(0, len(items), block)]
        assert spool.digests == [digest(data) for data in blocks]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=20), st.lists(st.binary(max_size=20), max_size=20))
def test_a_grown_spool_equals_one_written_at_once(first: list[bytes], more: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("producer.spool_writer.BLOCK", 4)
        grown = _written(Path(folder), first, "grown")
        _grow(grown, more)
        once = _written(Path(folder), first + more, "once")
        assert list(grown.items()) == list(once.items()) == list(Spool.open(folder, "grown").items())
        assert (grown.count, grown.digests) == (once.count, once.digests)


def test_a_spool_knows_its_batch_and_each_item(tmp_path: Path) -> None:
    dicts = [{"user_id": n, "tags": ["a"] * n} for n in range(20)]
    _written(tmp_path, [checked_params(n, params) for n, params in enumerate(dicts)])
    spool = Spool.open(tmp_path, "b1")
    assert (spool.batch, spool.flow, spool.limit, spool.count) == ("b1", "users:flow", "users", 20)
    assert abs(spool.created - time.time()) < 60
    assert (spool.base(), spool.base_digest) == (BASE, digest(BASE))
    assert [spool.params(n) for n in range(20)] == dicts
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match="has no item"):
            spool.params(wrong)


def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    with (
        BatchLock(tmp_path / "data", "b1"),
        _written(tmp_path / "data", [b"x"], key="id") as spool,
        Journal(spool.home, "b1", 1) as journal,
    ):
        LineFile(tmp_path / "out.jsonl", spool, journal).close()
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").rglob("*")}
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())
    assert len(modes) == 10


def test_an_abandoned_or_raising_writer_leaves_nothing(tmp_path: Path) -> None:
    def items() -> Iterator[bytes]:
        yield b"one"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), SpoolWriter(tmp_path, "b1", "f", "l") as writer:
        for item in items():
            writer.add(item)
    assert _names(tmp_path) == set()
    assert not Spool.exists(tmp_path, "b1")


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_killed_at_any_byte_leaves_nothing_or_all(tmp_path: Path, seed: int) -> None:
    goal = random.Random(seed).randrange(30_000 * 160)
    with _start_writer(tmp_path) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        while writer.poll() is None and _bytes_written(tmp_path) < goal:
            pass
        writer.kill()
    _assert_nothing_or_whole(tmp_path)


def _bytes_written(data_dir: Path) -> int:
    try:
        return sum(path.stat().st_size for path in data_dir.glob("batches/*/spool"))
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("call", range(1, 8))
def test_a_writer_killed_at_any_step_of_finish_leaves_nothing_or_all(tmp_path: Path, call: int) -> None:
    # fsync of spool, ends, base, meta.json and the directory; the rename; fsync of the parent
    with _start_writer(tmp_path, call) as writer:
        writer.wait()
    assert writer.returncode == -signal.SIGKILL
    assert Spool.exists(tmp_path, "b1") == (call == 7)
    _assert_nothing_or_whole(tmp_path)


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    with _start_writer(tmp_path, 1) as writer:
        writer.wait()
    assert writer.returncode == -signal.SIGKILL
    assert len(_names(tmp_path)) == 1
    with SpoolWriter(tmp_path, "b2", "f", "l") as living:
        assert len(_names(tmp_path)) == 1
        living.add(b"x")
        _written(tmp_path, [b"y"], "b3")
        living.finish(BASE)
    assert _names(tmp_path) == {"b2", "b3"}


def test_of_two_writers_of_one_batch_the_first_to_finish_wins(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path, "b1", "f", "l") as first, SpoolWriter(tmp_path, "b1", "f", "l") as second:
        first.add(b"1")
        second.add(b"2")
        first.finish(BASE)
        with pytest.raises(SpoolError, match=r"^batch 'b1' already has a spool in .*; use another batch id$"):
            second.finish(BASE)
    with pytest.raises(SpoolError, match="already has a spool"):
        SpoolWriter(tmp_path, "b1", "f", "l")
    assert list(Spool.open(tmp_path, "b1").items()) == [(0, b"1")]
    assert _names(tmp_path) == {"b1"}


def test_a_full_disk_is_said_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    writer = SpoolWriter(tmp_path, "b1", "f", "l")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SpoolError, match=r"^the spool of batch 'b1' cannot be used: no space left on device"):
        for _ in range(1_000):
            writer.add(b"x")
    assert _names(tmp_path) == set()


def test_a_growth_that_raises_changes_nothing(tmp_path: Path) -> None:
    def more() -> Iterator[bytes]:
        yield from [b"new"] * 5_000
        raise ZeroDivisionError

    spool = _written(tmp_path, [b"old"] * 1_500)
    digests = list(spool.digests)
    with pytest.raises(ZeroDivisionError):
        _grow(spool, more())
    for seen in (spool, Spool.open(tmp_path, "b1")):
        assert (seen.count, seen.digests) == (1_500, digests)
        assert [item for _, item in seen.items()] == [b"old"] * 1_500
    _grow(spool, [b"x"])
    assert [item for _, item in Spool.open(tmp_path, "b1").items()] == [b"old"] * 1_500 + [b"x"]


@pytest.mark.parametrize("call", range(1, 6))
def test_a_growth_cut_short_at_any_step_leaves_the_old_spool_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    steps = iter(
        range(1, 6)
    )  # fsync of spool, ends and the new meta.json; its rename; fsync of the directory

    def cut_short(real: Callable[..., None]) -> Callable[..., None]:
        def step(*args: object) -> None:
            if next(steps) == call:
                raise KeyboardInterrupt
            real(*args)

        return step

    old, more = [b"old"] * 1_500, [b"new"] * 3
    spool = _written(tmp_path, old)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut_short(os.fsync))
        patch.setattr(os, "replace", cut_short(os.replace))
        with pytest.raises(KeyboardInterrupt):
            _grow(spool, more)
    found = [item for _, item in Spool.open(tmp_path, "b1").items()]
    assert found == (old + more if call == 5 else old)


async def _source(items: Iterable[bytes], keys: Iterable[str] = ()) -> AsyncIterator[tuple[bytes, str]]:
    for item, key in zip_longest(items, keys, fillvalue=""):
        yield item or b"", str(key)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([b"a", b"b", b"c"], ""),
        ([b"a", b"b", b"c", b"d", b"e"], ""),
        ([b"a", b"x", b"c"], "other params: item 1 differs"),
        ([b"a", b"b"], "3 items, and these are only 2"),
        ([], "3 items, and these are only 0"),
    ],
)
def test_a_new_input_is_the_same_or_longer_or_refused_at_the_first_difference(
    tmp_path: Path, items: list[bytes], said: str
) -> None:
    spool = _written(tmp_path, [b"a", b"b", b"c"])
    if said:
        with pytest.raises(SpoolError, match=f"^batch 'b1' was enqueued with {said}; use another --batch"):
            asyncio.run(continued(spool, _source(items)))
    else:
        asyncio.run(continued(spool, _source(items)))
    found = [item for _, item in Spool.open(tmp_path, "b1").items()]
    assert found == ([b"a", b"b", b"c"] if said else items)


def test_with_a_key_an_item_is_found_wherever_it_stands_now(tmp_path: Path) -> None:
    spool = _written(tmp_path, [b"a", b"b", b"c"], key="id")
    asyncio.run(continued(spool, _source([b"c", b"new", b"a", b"b"], ["key 2", "key 9", "key 0", "key 1"])))
    again = Spool.open(tmp_path, "b1")
    assert [item for _, item in again.items()] == [b"a", b"b", b"c", b"new"]
    asyncio.run(continued(again, _source([b"new", b"c", b"b", b"a"], ["key 9", "key 2", "key 1", "key 0"])))
    assert Spool.open(tmp_path, "b1").count == 4


@pytest.mark.parametrize(
    ("items", "keys", "said"),
    [
        ([b"b", b"a", b"X"], ["key 1", "key 0", "key 2"], r"other params: item 2 \(id 'key 2'\) differs"),
        ([b"b", b"a"], ["key 1", "key 0"], "an item that is missing now: id None, item 2"),
    ],
)
def test_with_a_key_another_input_is_refused_at_the_item(
    tmp_path: Path, items: list[bytes], keys: list[str], said: str
) -> None:
    spool = _written(tmp_path, [b"a", b"b", codec.encode({})], key="id")
    with pytest.raises(SpoolError, match=said):
        asyncio.run(continued(spool, _source(items, keys)))
    assert Spool.open(tmp_path, "b1").count == 3


def test_a_repeated_key_is_refused_with_both_items(tmp_path: Path) -> None:
    with (
        pytest.raises(ParamsError, match=r"^items 0 and 1200 have the same id \('u'\), which --key says is"),
        SpoolWriter(tmp_path, "b1", "f", "l", "id") as writer,
    ):
        for number in range(1_201):
            writer.add(b"x", "u" if number in (0, 1_200) else f"{number}")
    assert _names(tmp_path) == set()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"b": 1},
            r"^item 3 of prep_async: 'id', the entry that --key names, is not there; give every item one",
        ),
        ({"id": 1.5}, "is of type float; use text or a whole number"),
        ({"id": True}, "is of type bool"),
    ],
)
def test_a_key_is_text_or_a_whole_number(params: dict[str, object], said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        key_of(params, "id", 3, "prep_async")


def test_a_host_without_the_spool_compares_by_the_thousand(tmp_path: Path) -> None:
    items = [b"%d" % n for n in range(2_500)]
    there = _written(tmp_path / "there", items)
    facts = Facts("b1", "users", "users:flow", 2_500, 0, 0, 0.0, "e", False, True, {}, there.digests)

    def compare(new: list[bytes]) -> None:
        with SpoolWriter(tmp_path / "here", "b1", "users:flow", "users") as writer:
            writer.watch(facts.count)
            for item in new:
                writer.add(item)
            same_as_announced(facts, writer)

    compare(items)
    compare([*items, b"more"] * 1)
    compare([*items, *[b"more"] * 3_000])
    for wrong, said in ((1_700, "one of the items 1000 to 1999"), (2_499, "one of the items 2000 to 2499")):
        other = list(items)
        other[wrong] = b"other"
        with pytest.raises(SpoolError, match=said):
            compare([*other, b"more"])
    with pytest.raises(SpoolError, match="2500 items, and these are only 2400"):
        compare(items[:2_400])


def test_two_producers_of_one_batch_refuse_each_other(tmp_path: Path) -> None:
    with BatchLock(tmp_path, "b1"):
        sentence = f"batch 'b1' is in the hands of another producer (pid {os.getpid()}); wait until it ends or stop it"
        with pytest.raises(SpoolError) as refusal:
            BatchLock(tmp_path, "b1")
        assert str(refusal.value) == sentence
        BatchLock(tmp_path, "b2").release()
    BatchLock(tmp_path, "b1").release()


def test_a_lock_that_was_deleted_with_its_batch_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = iter([True])

    def flock(fd: int) -> bool:
        if next(pruned, False):  # between the opening of the file and its lock
            (tmp_path / "batches" / "b1+lock").unlink()
        return disk.flock(fd)

    monkeypatch.setattr("producer.batch_lock.flock", flock)
    with BatchLock(tmp_path, "b1"), pytest.raises(InOtherHands):
        BatchLock(tmp_path, "b1")


def test_a_sweep_looks_once_at_each_batch_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        home = tmp_path / "batches" / f"b{number}"
        home.mkdir(parents=True)
        for name in ("meta.json", "journal"):
            (home / name).touch()
    looked: list[object] = []
    look = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: (looked.append(path), look(path, **more))[1])
    asyncio.run(sweep(fakeredis.FakeAsyncRedis(), ProducerSettings(data_dir=tmp_path)))
    monkeypatch.undo()
    assert len([path for path in looked if str(path).startswith(str(tmp_path / "batches" / "b"))]) == 5


def test_producers_that_sweep_at_the_same_time_leave_each_other_in_peace(tmp_path: Path) -> None:
    here = ProducerSettings(data_dir=tmp_path)
    for number in range(5):
        with SpoolWriter(tmp_path, f"b{number}", "f", "l") as writer:
            os.utime(writer.finish(b"").home / "meta.json", (1, 1))

    async def go() -> None:
        clients = [fakeredis.FakeAsyncRedis(version=7) for _ in range(4)]
        await asyncio.gather(*(sweep(client, here) for client in clients))
        for client in clients:
            await client.aclose()

    asyncio.run(go())
    assert list((tmp_path / "batches").iterdir()) == []


@pytest.mark.parametrize("batch", ["", "..", ".", "a/b", "../a", "a\n", "ä", "a" * 129, "a+lock"])
def test_a_batch_id_is_never_a_way_out_of_the_directory(tmp_path: Path, batch: str) -> None:
    for use in (
        lambda: Spool.open(tmp_path, batch),
        lambda: Spool.exists(tmp_path, batch),
        lambda: BatchLock(tmp_path, batch),
        lambda: SpoolWriter(tmp_path, batch, "f", "l"),
    ):
        with pytest.raises((SpoolError, LimitsError), match="cannot be used"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_spool_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        SpoolError, match=r"^batch 'b1' has no spool in .*; check the id and the data directory$"
    ):
        Spool.open(tmp_path, "b1")
    home = _written(tmp_path, [b"x" * 10] * 10).home
    os.truncate(home / "spool", 99)
    with pytest.raises(SpoolError, match=r"^the spool of batch 'b1' is damaged: .*; delete that directory"):
        Spool.open(tmp_path, "b1")
    os.truncate(home / "spool", 100)
    os.truncate(home / "ends", 79)
    with pytest.raises(SpoolError, match="is damaged"):
        Spool.open(tmp_path, "b1")
    (home / "meta.json").write_text("{}")
    with pytest.raises(SpoolError, match="is damaged"):
        Spool.open(tmp_path, "b1")
    (home / "meta.json").unlink()
    with pytest.raises(SpoolError, match="cannot be used: no such file or directory"):
        Spool.open(tmp_path, "b1")


def test_a_spool_of_another_user_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", theirs)
    with pytest.raises(
        SpoolError, match=r"^the spool of batch 'b1' cannot be used: permission denied \(.*b1\)"
    ):
        Spool.exists(tmp_path, "b1")


@pytest.mark.parametrize("size", [0, 100, 4_196, 30_000])
def test_keys_that_are_not_whole_are_said_in_a_sentence(tmp_path: Path, size: int) -> None:
    items = [b"x"] * 2_000
    spool = _written(tmp_path, items, key="id")
    assert (spool.home / "keys").stat().st_size > 30_000
    os.truncate(spool.home / "keys", size)
    source = _source(items, [f"key {number}" for number in range(2_000)])
    with pytest.raises(SpoolError, match=r"^the spool of batch 'b1' is damaged: .*; delete that directory"):
        asyncio.run(continued(spool, source))


def test_a_disk_that_is_full_of_keys_is_said_in_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    said = r"^the spool of batch 'b1' cannot be used: database or disk is full \(.*/keys\); mend that"
    with pytest.raises(SpoolError, match=said), SpoolWriter(tmp_path, "b1", "f", "l", "id") as writer:
        assert writer._keys is not None
        writer._keys._base.execute("PRAGMA max_page_count = 5")
        for number in range(10_000):
            writer.add(b"x", f"{number}")
    assert _names(tmp_path) == set()


def test_a_store_that_is_not_whole_is_told_to_nobody(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path, "b1", "f", "l") as writer:
        spool = writer.finish(codec.encode({"model": "a" * 100}))
    os.truncate(spool.home / "base", 50)

    async def go() -> bool:
        client = fakeredis.FakeAsyncRedis(version=7)
        with pytest.raises(SpoolError, match=r"^the spool of batch 'b1' is damaged"):
            await announce(client, spool)
        return bool(await client.keys())

    assert not asyncio.run(go())


def test_writing_and_reading_take_flat_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with SpoolWriter(tmp_path, "b1", "f", "l") as writer:
            for n in range(50_000):
                writer.add(b"%0200d" % n)
            spool = writer.finish(BASE)
        assert sum(1 for _ in spool.items()) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
