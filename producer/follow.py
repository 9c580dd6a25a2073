"""Following a batch: its outcomes as they come, from the stream in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.keys import GateKeys
from worker.contract import FAILED, LOST, Failure, Outcome, decode_outcome

BLOCK_MS = 2000
READ = 1000
GATHER_S = 0.02
"""After a short read, that long for more to come, so that a busy batch costs few reads."""


class Ended(msgspec.Struct):
    """One item's outcome, with the stream position after it."""

    index: int
    attempt: int
    outcome: Outcome
    position: str


async def outcomes(
    client: Redis, limit: str, batch: str, position: str = "0-0"
) -> AsyncIterator[list[Ended]]:
    """Outcomes in the order in which they were recorded, in lists as they come; does not end by itself.

    An empty list comes at least every two seconds, so that the caller can look after other things.
    Redis being away delays it, nothing else.
    """
    keys = GateKeys(limit)
    stream = keys.out(batch)
    while True:
        try:
            found = await client.xread({stream: position}, count=READ, block=BLOCK_MS)
        except (RedisError, OSError):
            await asyncio.sleep(0.5)
            yield []
            continue
        entries = found[0][1] if found else []
        ended = [await _ended(client, keys, batch, stream_id, fields) for stream_id, fields in entries]
        if ended:
            position = ended[-1].position
        yield ended
        if 0 < len(ended) < READ:
            await asyncio.sleep(GATHER_S)


async def _ended(
    client: Redis, keys: GateKeys, batch: str, stream_id: bytes, fields: dict[bytes, bytes]
) -> Ended:
    index, attempt, status = int(fields[b"i"]), int(fields[b"t"]), fields[b"s"].decode()
    data = fields[b"o"]
    if not data and status != LOST:
        data = await client.get(keys.blob(batch, index, attempt)) or b""
    return Ended(index, attempt, _outcome(status, data), stream_id.decode())


def _outcome(status: str, data: bytes) -> Outcome:
    if not data:
        words = "its params were gone from Redis" if status == LOST else "its outcome was gone from Redis"
        return Outcome(status, failure=Failure("Lost", words))
    try:
        return decode_outcome(data)
    except msgspec.DecodeError:
        return Outcome(FAILED, failure=Failure("CorruptOutcome", "its outcome is not one of PocketFleet's"))


async def batch_counts(client: Redis, limit: str, batch: str) -> dict[str, Any]:
    """Counts of a batch as Redis has them: `count`, `left`, and one per status."""
    found = await client.hgetall(GateKeys(limit).batch(batch))  # type: ignore[misc]
    return {
        key.decode(): int(value) if value.isdigit() else float(value) if key == b"created" else value.decode()
        for key, value in found.items()
        if not key.startswith(b"digest:") and key != b"next"
    }
