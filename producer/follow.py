"""The stream of a batch's outcomes in Redis, read as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.keys import GateKeys
from worker.contract import FAILED, LOST, STATUSES, Failure, Outcome, decode_outcome
from worker.difference import is_tree

BLOCK_MS = 2000
READ = 1000
LAST_GATHER_S, GATHER_S, LONGEST_GATHER_S = 0.005, 0.02, 0.5
FEW = 20
"""With so many items left each outcome is read as it comes."""
MOST_RETRIES = 2**16 - 1
TOGETHER = 200
"""So many outcomes are worth a read: that is what the time between two reads is for."""


class Ended(msgspec.Struct):
    """How one attempt of one item ended.

    Attributes:
        retry: how often the item had been retried when it was enqueued, -1 where that is not known.
        attempt: the gate's number of the claim.
        data: the outcome as the worker encoded it; b'' where it is gone.
        position: of the stream, after it.
    """

    index: int
    retry: int
    attempt: int
    status: str
    data: bytes
    position: str

    @property
    def outcome(self) -> Outcome:
        """The outcome itself; one that is gone or not ours says so."""
        if not self.data:
            words = (
                "its params were gone from Redis"
                if self.status == LOST
                else "its outcome was gone from Redis"
            )
            return Outcome(self.status, failure=Failure("Lost", words))
        try:
            outcome = decode_outcome(self.data)
        except (msgspec.DecodeError, RecursionError):
            outcome = None
        if outcome is None or not is_tree(outcome.difference):
            words = "its outcome is not one of PocketFleet's"
            return Outcome(FAILED, failure=Failure("CorruptOutcome", words))
        return outcome


class _RetryOnly(msgspec.Struct):
    retry: int | None = None


_retries = msgspec.msgpack.Decoder(_RetryOnly)


def gather_s(found: int, took_s: float, pending: int) -> float:
    """Seconds to let outcomes gather after a read that brought `found` of them.

    At the pace of that read, until `TOGETHER` have come: a busy batch costs few reads, a slow one two a
    second. The last ones of a batch hardly wait or not at all, so that its end is not seen late.

    >>> gather_s(1000, 0.1, 50_000), gather_s(50, 0.05, 50_000), gather_s(1, 0.1, 50_000)
    (0.0, 0.2, 0.5)
    >>> gather_s(5, 0.1, 100), gather_s(5, 0.1, 4)
    (0.005, 0.0)
    """
    if not 0 < found < READ or pending <= FEW:
        return 0.0
    if pending <= TOGETHER:
        return LAST_GATHER_S
    return min(LONGEST_GATHER_S, max(GATHER_S, TOGETHER * took_s / found))


async def outcomes(
    client: Redis, limit: str, batch: str, position: str = "0-0"
) -> AsyncIterator[list[Ended]]:
    """Outcomes in the order in which they were recorded, in lists as they come; does not end by itself.

    An empty list comes at least every two seconds, so that the caller can look after other things.
    Redis being away delays it, nothing else.
    """
    while True:
        try:
            ended = await read(client, limit, batch, position)
        except (RedisError, OSError):
            await asyncio.sleep(0.5)
            yield []
            continue
        if ended:
            position = ended[-1].position
        yield ended
        if 0 < len(ended) < READ:
            await asyncio.sleep(GATHER_S)


async def read(
    client: Redis, limit: str, batch: str, position: str, block_ms: int | None = BLOCK_MS
) -> list[Ended]:
    """The next outcomes after `position`, at most 1,000; waits up to `block_ms` for one (None: not).

    Entries that no worker of ours has written are left out.
    """
    keys = GateKeys(limit)
    while True:
        reply = await client.xread({keys.out(batch): position}, count=READ, block=block_ms)
        entries = reply[0][1] if reply else []
        found = [await _ended(client, keys, batch, place, fields) for place, fields in entries]
        if (ours := [each for each in found if each is not None]) or not entries:
            return ours
        position = entries[-1][0]


async def _ended(
    client: Redis, keys: GateKeys, batch: str, stream_id: bytes, fields: dict[bytes, bytes]
) -> Ended | None:
    try:
        index, attempt = int(fields[b"i"]), int(fields[b"t"])
        status, data = fields[b"s"].decode(), fields[b"o"]
    except (KeyError, ValueError):
        return None
    if status not in STATUSES or not (0 <= index < 2**63 and 0 <= attempt < 2**63):
        return None
    if not data and status != LOST:
        data = await client.hget(keys.blobs(batch), f"{index}:{attempt}") or b""  # type: ignore[misc]
    return Ended(index, _retry_of(data), attempt, status, data, stream_id.decode())


def _retry_of(data: bytes) -> int:
    try:
        found = _retries.decode(data).retry if data else None
    except (msgspec.DecodeError, RecursionError):
        found = None
    return found if found is not None and 0 <= found <= MOST_RETRIES else -1
