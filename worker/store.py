"""The base: the caller's shared store, sent once per batch and kept by each worker."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.keys import GateKeys
from worker.codec import decode

KEPT = 16
"""Batches whose base a worker keeps, the latest it met."""


class Bases:
    """The bases of the batches a worker runs items of."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._kept: OrderedDict[tuple[str, str], asyncio.Task[bytes]] = OrderedDict()

    def known(self, limit: str, batch: str) -> bytes | None:
        """The batch's base if it has been fetched, without waiting."""
        asking = self._kept.get((limit, batch))
        return asking.result() if asking is not None and asking.done() else None

    async def base(self, limit: str, batch: str) -> bytes:
        """The batch's base, encoded; b'' if it has none. Asked of Redis once per batch."""
        key = (limit, batch)
        asking = self._kept.get(key)
        if asking is None:
            asking = self._kept[key] = asyncio.create_task(self._fetch(limit, batch))
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return await asyncio.shield(asking)

    async def _fetch(self, limit: str, batch: str) -> bytes:
        pause_s = 0.05
        while True:
            try:
                return await self._client.get(GateKeys(limit).base(batch)) or b""
            except (RedisError, OSError):
                await asyncio.sleep(pause_s)
                pause_s = min(1.0, pause_s * 2)


def fresh_store(base: bytes) -> dict[Any, Any]:
    """A store of a run's own, equal to the base."""
    return decode(base) if base else {}
