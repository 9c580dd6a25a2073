"""From a spool into the queue: tell Redis of the batch, then send its items in chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import msgspec
from redis.asyncio import Redis

from limiter.keys import GateKeys
from limiter.script import script
from producer.announce import WEEK_S, announce
from producer.facts import forget_gone
from producer.journal import Journal, Retry
from producer.plan import JOB_BYTES
from producer.room import Room
from producer.spool import Spool
from worker.contract import ABORTED, LOST, encode_job

ENQUEUE = Path(__file__).with_name("enqueue.lua")
CHUNK = 500
CHUNK_BYTES = 262_144
"""A chunk is full with so many items, or once it has so many bytes."""
IN_FLIGHT = 4
SPACING = 1000
"""Places between two items of a batch of weight 1."""


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
    room: Room | None = None,
) -> Enqueued:
    """Put a spool's items into the queue, those that are not there yet. Safe to repeat.

    With a journal, items whose outcome it holds are left out, retries it asks for are put in, and
    those that ended lost or aborted, which never ran to their end, are retried.

    Args:
        client: one that may repeat a call; the script adds only what is missing.
        told: hears how many items have been dealt with: once Redis knows of the batch, and after each chunk.
        keep_s: seconds for which Redis keeps what it knows of the batch after its end.
        only_retries: leave out items that were never enqueued, or taken off the queue.
        however_old: also where Redis may have forgotten what is done.
        room: waits where Redis has no memory for more; default: one that speaks on standard error.

    Raises:
        RoomError: Redis is full, and nothing has made room for long.
    """
    room = room or Room(client, spool)
    if journal is not None:
        journal.grow(spool.count)
        journal.ask_again(list(journal.ended_with((LOST, ABORTED))))
    await room.take(0)
    tell = partial(announce, client, spool, journal, keep_s, however_old=however_old, whole=not only_retries)
    await room.through(tell)
    done = spool.count - journal.pending if journal is not None else 0
    told(done)
    async with _Sending(client, spool, room, told, done) as sending:
        for retry, before, items in _groups(spool, journal):
            if only_retries and not retry:
                continue
            for chunk in _chunks(spool.flow, items, retry):
                await sending.send(retry, before, chunk)
    if not sending.cancelled and not only_retries:
        told(spool.count)  # what ended meanwhile was left out
        mark = GateKeys(spool.limit).batch(spool.batch), "enqueued", "1"
        await room.through(lambda: client.hset(*mark))  # type: ignore[arg-type,return-value]
    await forget_gone(client)
    return Enqueued(sending.added, done + sending.done, sending.cancelled)


class _Sending:
    """Chunks on their way, a few at a time; at its end all have arrived, or, after a fault, none is on its way."""

    def __init__(
        self, client: Redis, spool: Spool, room: Room, told: Callable[[int], None], sent: int
    ) -> None:
        self._script: Any = script(client, ENQUEUE)
        self._keys = GateKeys(spool.limit).all
        self._about = (spool.batch, spool.flow, SPACING / spool.weight)
        self._room = room
        self._told = told
        self._sent = sent
        self._flying: dict[asyncio.Task[Any], int] = {}
        self.added = self.done = 0
        self.cancelled = False

    async def send(self, retry: int, before: str, chunk: list[Any]) -> None:
        if self.cancelled:
            return
        size = sum(map(len, chunk[1::2])) + JOB_BYTES * len(chunk) // 2
        if self._room.must_look(size):
            await self._arrived()
        await self._room.take(size)
        call = partial(self._script, keys=self._keys, args=["", "", *self._about, retry, before, *chunk])
        self._flying[asyncio.ensure_future(self._room.through(call))] = len(chunk) // 2
        if len(self._flying) < IN_FLIGHT:
            await asyncio.sleep(0)
        else:
            self._count(await asyncio.wait(self._flying, return_when=asyncio.FIRST_COMPLETED))

    async def _arrived(self) -> None:
        if self._flying:
            self._count(await asyncio.wait(self._flying))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None:
            await self._arrived()
            self._told(self._sent)
            return
        for task in self._flying:
            task.cancel()
        await asyncio.gather(*self._flying, return_exceptions=True)

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
    """`index, payload, index, payload, ...` of items that make up a chunk."""
    head, tail = _frame(flow, retry)
    chunk: list[Any] = []
    size = 0
    for index, params in items:
        chunk += (index, head + params + tail)
        size += len(params)
        if len(chunk) == 2 * CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
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
