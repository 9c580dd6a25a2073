"""From a spool into the queue: tell Redis of the batch, then send its items in chunks."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis

from limiter.keys import BATCHES, GateKeys
from limiter.script import script
from producer.errors import SpoolError
from producer.facts import forget_gone, read_facts
from producer.journal import Journal, Retry
from producer.spool import Spool
from worker.contract import ABORTED, LOST, encode_job

ENQUEUE = Path(__file__).with_name("enqueue.lua")
WEEK_S = 604_800.0
CHUNK = 500
IN_FLIGHT = 4
SPACING = 1000
"""Places between two items of a batch of weight 1."""


async def announce(
    client: Redis,
    spool: Spool,
    journal: Journal | None = None,
    keep_s: float = WEEK_S,
    *,
    however_old: bool = False,
) -> None:
    """Tell Redis of a batch before its first job: where it belongs, how many items, its store.

    A Redis that has lost the batch hears from the journal which items have ended.

    Raises:
        SpoolError: the batch ended so long ago that nobody knows any more what is done of it.
    """
    keys = GateKeys(spool.limit)
    known = await read_facts(client, spool.limit, spool.batch)
    lost = journal is not None and bool(journal.epoch) and (known is None or known.epoch != journal.epoch)
    if lost and journal is not None:
        if known is None and not however_old:
            _checked_age(spool, journal, keep_s)
        await _restore(client, keys, spool.batch, journal)
    epoch = secrets.token_hex(8)
    async with client.pipeline(transaction=False) as pipe:
        pipe.hset(
            BATCHES, spool.batch, msgspec.json.encode({"limit": spool.limit, "flow": spool.flow}).decode()
        )
        pipe.hset(keys.batch(spool.batch), mapping=_told(spool, keep_s))
        pipe.hdel(keys.batch(spool.batch), "cancelled")
        pipe.hsetnx(keys.batch(spool.batch), "epoch", epoch)
        pipe.hget(keys.batch(spool.batch), "epoch")
        if base := spool.base():
            pipe.set(keys.base(spool.batch), base, keepttl=True)
        if known is None or known.over:  # the first item that is added lifts it
            for key in keys.of_batch(spool.batch):
                pipe.pexpire(key, round(keep_s * 1000))
        replies = await pipe.execute()
    if journal is not None and journal.epoch != (epoch := replies[4].decode()):
        journal.begin(epoch)
    await forget_gone(client)


def _told(spool: Spool, keep_s: float) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "flow": spool.flow,
        "count": spool.count,
        "created": spool.created,
        "keep": round(keep_s * 1000),
        "key": spool.key,
    }
    return facts | {f"digest:{number}": value for number, value in enumerate(spool.digests)}


def _checked_age(spool: Spool, journal: Journal, keep_s: float) -> None:
    age_s = time.time() - max(spool.created, journal.written_at)
    if journal.pending and age_s > keep_s:
        raise SpoolError(
            f"batch '{spool.batch}' was last heard of {age_s / 86400:.1f} days ago, and Redis keeps what is done of "
            f"a batch for {keep_s / 86400:g}: {journal.pending} items have no outcome here and may have run. To run "
            f"them: pocketfleet batch lost {spool.batch} --resubmit; else use another --batch",
            batch=spool.batch,
        )


async def _restore(client: Redis, keys: GateKeys, batch: str, journal: Journal) -> None:
    """Set the done bits and counts that a Redis without its data has no longer."""
    ours = keys.done(batch) + ":restored"
    async with client.pipeline(transaction=True) as pipe:
        pipe.set(ours, journal.bitmap(), px=60_000)
        pipe.bitop("OR", keys.done(batch), keys.done(batch), ours)
        pipe.delete(ours)
        if counts := journal.counts():
            pipe.hset(keys.batch(batch), mapping=counts)
        await pipe.execute()


@dataclass(frozen=True)
class Enqueued:
    """What an enqueue did: items added, items that were done before, whether the batch was cancelled."""

    added: int = 0
    done: int = 0
    cancelled: bool = False


async def enqueue(
    client: Redis,
    spool: Spool,
    told: Callable[[int], None] = lambda sent: None,
    *,
    journal: Journal | None = None,
    keep_s: float = WEEK_S,
    only_retries: bool = False,
    however_old: bool = False,
) -> Enqueued:
    """Put a spool's items into the queue, those that are not there yet. Safe to repeat.

    With a journal, items whose outcome it holds are left out, retries it asks for are put in, and
    those that ended lost or aborted, which never ran to their end, are retried.

    Args:
        client: one that may repeat a call; the script adds only what is missing.
        told: hears after each chunk how many items have been dealt with.
        keep_s: seconds for which Redis keeps what it knows of the batch after its end.
        only_retries: leave out items that were never enqueued, or taken off the queue.
        however_old: also where Redis may have forgotten what is done.
    """
    if journal is not None:
        journal.grow(spool.count)
        journal.ask_again(list(journal.ended_with((LOST, ABORTED))))
    await announce(client, spool, journal, keep_s, however_old=however_old)
    mark = GateKeys(spool.limit).batch(spool.batch), "enqueued"
    if not only_retries:
        await client.hdel(*mark)  # type: ignore[misc]
    done = spool.count - journal.pending if journal is not None else 0
    sending = _Sending(client, spool, told, done)
    for retry, before, items in _groups(spool, journal):
        if only_retries and not retry:
            continue
        for chunk in _chunks(spool.flow, items, retry):
            await sending.send(retry, before, chunk)
    await sending.finish()
    if not sending.cancelled and not only_retries:
        await client.hset(*mark, "1")  # type: ignore[misc]
    return Enqueued(sending.added, done + sending.done, sending.cancelled)


class _Sending:
    """Chunks on their way, a few at a time."""

    def __init__(self, client: Redis, spool: Spool, told: Callable[[int], None], sent: int) -> None:
        self._send = script(client, ENQUEUE)
        self._keys = GateKeys(spool.limit).all
        self._about = (spool.batch, spool.flow, SPACING / spool.weight)
        self._told = told
        self._sent = sent
        self._flying: dict[asyncio.Task[Any], int] = {}
        self.added = self.done = 0
        self.cancelled = False

    async def send(self, retry: int, before: str, chunk: list[Any]) -> None:
        if self.cancelled:
            return
        args = ["", "", *self._about, retry, before, *chunk]
        self._flying[asyncio.ensure_future(self._send(keys=self._keys, args=args))] = len(chunk) // 2
        if len(self._flying) < IN_FLIGHT:
            await asyncio.sleep(0)
        else:
            self._count(await asyncio.wait(self._flying, return_when=asyncio.FIRST_COMPLETED))

    async def finish(self) -> None:
        if self._flying:
            self._count(await asyncio.wait(self._flying))
        self._told(self._sent)

    def _count(self, waited: tuple[set[asyncio.Task[Any]], set[asyncio.Task[Any]]]) -> None:
        for task in waited[0]:
            self._sent += self._flying.pop(task)
            added, done, cancelled = task.result()
            self.added, self.done = self.added + added, self.done + done
            self.cancelled = self.cancelled or bool(cancelled)
        self._told(self._sent)


_Group = tuple[int, str, Iterable[tuple[int, bytes]]]


def _groups(spool: Spool, journal: Journal | None) -> Iterator[_Group]:
    """Items to be enqueued: those that were never retried first, then each kind of retry."""
    if journal is None:
        yield 0, "", spool.items()
        return
    yield (
        0,
        "",
        (item for item in spool.items() if not journal.status(item[0]) and not journal.retry(item[0])),
    )

    def kind(retry: Retry) -> tuple[int, str]:
        return retry.number, retry.before

    for (number, before), retries in groupby(sorted(journal.retries(), key=kind), key=kind):
        yield number, before, ((each.index, spool.encoded(each.index)) for each in retries)


def _chunks(flow: str, items: Iterable[tuple[int, bytes]], retry: int) -> Iterator[list[Any]]:
    """`index, payload, index, payload, ...` of up to `CHUNK` items."""
    head, tail = _frame(flow, retry)
    chunk: list[Any] = []
    for index, params in items:
        chunk += (index, head + params + tail)
        if len(chunk) == 2 * CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _frame(flow: str, retry: int = 0) -> tuple[bytes, bytes]:
    """What stands around the encoded params in a job's payload (`worker.contract.encode_job`).

    >>> from worker import codec
    >>> head, tail = _frame("users")
    >>> codec.decode(head + codec.encode({"a": 1}) + tail)["a"]
    [{'a': 1}]
    """
    mark = b"PARAMS-STAND-HERE"
    params: Any = msgspec.Raw(mark)
    head, _, tail = encode_job(flow, params, round(time.time() * 1000), retry).partition(mark)
    return head, tail
