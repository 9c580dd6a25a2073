"""Taking a batch off the queue: all of it, or what has never begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from limiter.keys import GateKeys
from limiter.script import script
from worker.contract import ABORTED, Failure, Outcome, encode_outcome

CANCEL = Path(__file__).with_name("cancel.lua")
CHUNK = 400
"""Items of one call: it holds Redis for a millisecond or two."""
IN_FLIGHT = 2


@dataclass(frozen=True)
class Cancelled:
    """What a cancel did: items taken off the queue, runs that were ended, items the batch still has left.

    `over`: the batch had ended before, and nothing was changed.
    """

    waiting: int = 0
    running: int = 0
    left: int = 0
    over: bool = False


async def cancel(
    client: Redis,
    limit: str,
    flow: str,
    batch: str,
    count: int,
    told: Callable[[int], None] = lambda done: None,
) -> Cancelled:
    """End a batch: waiting items leave the queue at once, runs are recorded as aborted and told to stop.

    A run ends at its next await, or with its sync node; until then it holds its slot. In chunks, and safe
    to repeat: a cancel that was killed is finished by the next one. Enqueueing the batch again goes on with
    what has not completed.

    Args:
        count: items of the batch.
        told: hears after each chunk how many items have been dealt with.
    """
    # a place that a run leaves must not go to the next item of the batch: what waits goes first
    first = await _in_chunks(client, limit, flow, batch, count, "waiting", told)
    if not first.left:
        return first
    rest = await _in_chunks(client, limit, flow, batch, count, "all")
    return Cancelled(first.waiting + rest.waiting, rest.running, rest.left)


async def withdraw(client: Redis, limit: str, flow: str, batch: str, count: int) -> Cancelled:
    """Take off the queue what has never begun; what began goes on, or waits with its checkpoint."""
    return await _in_chunks(client, limit, flow, batch, count, "fresh")


async def _in_chunks(
    client: Redis,
    limit: str,
    flow: str,
    batch: str,
    count: int,
    what: str,
    told: Callable[[int], None] = lambda done: None,
) -> Cancelled:
    send: Any = script(client, CANCEL)
    failure = Failure("Cancelled", "its batch was cancelled while it ran")
    outcome = encode_outcome(Outcome(ABORTED, failure=failure))
    keys = GateKeys(limit).all

    async def take(first: int) -> tuple[int, int, int]:
        args = ["", "", batch, flow, first, min(CHUNK, count - first), what, outcome]
        taken, ended, left = await send(keys=keys, args=args)
        return taken, ended, left

    waiting, running, left = 0, 0, 0
    for first in range(0, count, IN_FLIGHT * CHUNK):
        behind = min(count, first + IN_FLIGHT * CHUNK)
        replies = await asyncio.gather(*map(take, range(first, behind, CHUNK)))
        waiting += sum(taken for taken, _, _ in replies)
        running += sum(ended for _, ended, _ in replies)
        left = min(rest for _, _, rest in replies)
        told(behind)
    return Cancelled(waiting, running, left)
