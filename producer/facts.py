"""What Redis knows of a batch: where it belongs, how many of its items are left, how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis

from limiter.errors import LimitsError
from limiter.keys import BATCHES, GateKeys
from producer.errors import SpoolError
from producer.spool import Spool
from worker.contract import FOUND_NAME, LOST, STATUSES, checked_batch


@dataclass(frozen=True)
class Facts:
    """One batch at one moment.

    Attributes:
        count: its items; `left`: those that wait or run; `done`: those that have ended for good.
        epoch: made up anew when the batch is first told to a Redis; '' = what told it is lost.
        enqueued: whether the producer has put all of it into the queue.
        statuses: how many ended, by status.
        digests: per 1,000 items, as the producer of the spool made them; `base`: the store it was enqueued
            with, None where that is not known.
    """

    batch: str
    limit: str
    flow: str
    count: int
    left: int
    done: int
    created: float
    epoch: str
    cancelled: bool
    enqueued: bool
    statuses: dict[str, int] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    key: str = ""
    base: bytes | None = None

    @property
    def missing(self) -> int:
        """Items that neither wait nor run nor have ended: never enqueued, cancelled, or lost."""
        return max(0, self.count - self.left - self.done - self.statuses.get(LOST, 0))

    @property
    def over(self) -> bool:
        """Whether nothing of it waits or runs."""
        return self.left <= 0

    @property
    def failed(self) -> int:
        """Items that ended without completing."""
        return sum(self.statuses.get(status, 0) for status in STATUSES[1:])


_READ = ("flow", "count", "left", "created", "epoch", "cancelled", "enqueued", "key", *STATUSES)


async def read_facts(client: Redis, limit: str, batch: str, *, digests: bool = False) -> Facts | None:
    """The facts of a batch, or None where Redis has none; `digests` and `base` only where asked for."""
    async with client.pipeline(transaction=False) as pipe:
        _ask(pipe, limit, batch)
        return await _facts(client, limit, batch, *await pipe.execute(), digests=digests)


def _ask(pipe: Any, limit: str, batch: str) -> None:
    keys = GateKeys(limit)
    pipe.hmget(keys.batch(batch), list(_READ))
    pipe.bitcount(keys.done(batch))


async def _facts(
    client: Redis, limit: str, batch: str, values: list[bytes | None], done: int, *, digests: bool
) -> Facts | None:
    """What the answers to `_ask` say."""
    keys = GateKeys(limit)
    if all(value is None for value in values):
        return None
    text = {name: (value or b"").decode(errors="replace") for name, value in zip(_READ, values, strict=True)}
    counts = {name: count_of(value) for name, value in zip(_READ, values, strict=True)}
    count = counts["count"]
    blocks: list[bytes | None] = []
    base = None
    if digests and text["epoch"]:
        base = await client.get(keys.base(batch)) or b""
    if digests and count:
        names = [f"digest:{n}" for n in range((count + 999) // 1000)]
        blocks = await client.hmget(keys.batch(batch), names)  # type: ignore[misc]
    return Facts(
        batch=batch,
        limit=limit,
        flow=text["flow"] if FOUND_NAME.fullmatch(text["flow"]) else "",
        count=count,
        left=counts["left"],
        done=done,
        created=_time(text["created"]),
        epoch=text["epoch"],
        cancelled=bool(text["cancelled"]),
        enqueued=bool(text["enqueued"]),
        statuses={status: counts[status] for status in STATUSES if counts[status]},
        digests=[block.decode() for block in blocks if block],
        key=text["key"],
        base=base,
    )


def count_of(value: bytes | None) -> int:
    """A count as it stands in Redis; what is none counts as 0.

    >>> count_of(b"12"), count_of(b"-1"), count_of(b"many"), count_of(None)
    (12, 0, 0, 0)
    """
    return int(value) if value is not None and value.isdigit() and len(value) <= 10 else 0


def _time(text: str) -> float:
    """Seconds since 1970 that a calendar has; what is none counts as 0."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < 2**37 else 0.0


async def facts_by_id(client: Redis, batch: str, limit: str, *, digests: bool = False) -> Facts | None:
    """The facts of a batch under `limit`, or, as an id is one batch's alone, under the limit that has it already."""
    async with client.pipeline(transaction=False) as pipe:
        pipe.hget(BATCHES, batch)
        _ask(pipe, limit, batch)
        about, *answers = await pipe.execute()
    found = _where(about)
    if found is not None and found.limit != limit:
        facts = await read_facts(client, found.limit, batch)
        if facts is not None:
            return facts
    return await _facts(client, limit, batch, *answers, digests=digests)


async def find_batch(client: Redis, batch: str, data_dir: Path | None = None) -> tuple[str, str]:
    """Limit and flow of a batch: as Redis knows them, else as its spool in `data_dir` does.

    Raises:
        SpoolError: nobody knows it.
    """
    found = _where(await client.hget(BATCHES, batch))  # type: ignore[misc]
    if found is not None:
        return found.limit, found.flow
    if data_dir is not None and Spool.exists(data_dir, batch):
        spool = Spool.open(data_dir, batch)
        return spool.limit, spool.flow
    known = [name.decode(errors="replace") for name in await client.hkeys(BATCHES)]  # type: ignore[misc]
    latest = f" (known: {', '.join(sorted(known)[-5:])})" if known else ""
    raise SpoolError(f"batch '{batch}' is not known here{latest}", batch=batch)


async def known_batches(client: Redis) -> list[Facts]:
    """Every batch that Redis knows, oldest first."""
    found = [await read_facts(client, limit, batch) for batch, limit in (await forget_gone(client)).items()]
    return sorted((facts for facts in found if facts is not None), key=lambda facts: facts.created)


async def forget_gone(client: Redis) -> dict[str, str]:
    """Drop the names of batches whose keys are gone, and what is no such name; returns the others with their limits."""
    names = await client.hgetall(BATCHES)  # type: ignore[misc]
    limits = {name: where.limit for name, about in names.items() if (where := _where(about)) and _is_id(name)}
    async with client.pipeline(transaction=False) as pipe:
        for batch, limit in limits.items():
            pipe.exists(GateKeys(limit).batch(batch.decode()))
        there = await pipe.execute() if limits else []
    known = {
        batch.decode(): limit for (batch, limit), exists in zip(limits.items(), there, strict=True) if exists
    }
    gone = [name for name in names if name not in limits or name.decode() not in known]
    if gone:
        await client.hdel(BATCHES, *gone)  # type: ignore[misc]
    return known


class _Where(msgspec.Struct):
    limit: str
    flow: str


def _where(about: bytes | None) -> _Where | None:
    """Where a batch belongs, None where that is not known."""
    try:
        where = msgspec.json.decode(about, type=_Where) if about is not None else None
    except msgspec.DecodeError:
        return None
    whole = where is not None and FOUND_NAME.fullmatch(where.flow) and FOUND_NAME.fullmatch(where.limit)
    return where if whole else None


def _is_id(name: bytes) -> bool:
    try:
        checked_batch(name.decode())
    except (LimitsError, UnicodeDecodeError):
        return False
    return True
