"""A batch as a command or a program meets it: by its id alone, with what Redis and this directory know."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from limiter.check import checked_connection
from limiter.client import open_retrying_client
from limiter.connect import Place, find_redis
from limiter.keys import GateKeys
from producer.batch_lock import BatchLock, InOtherHands
from producer.errors import SpoolError
from producer.facts import Facts, find_batch, read_facts
from producer.follower import catch_up, lost_items
from producer.journal import Journal
from producer.settings import ProducerSettings
from producer.spool import Spool
from worker.contract import checked_batch


@dataclass
class Known:
    """One batch.

    Attributes:
        client: for reads and for calls that may be repeated.
        spool: None where this data directory has none.
        facts: None where Redis knows nothing of it.
    """

    batch: str
    limit: str
    flow: str
    client: Redis
    place: Place
    settings: ProducerSettings
    spool: Spool | None
    facts: Facts | None

    @property
    def count(self) -> int:
        """Items of the batch."""
        known = (self.spool.count if self.spool else 0, self.facts.count if self.facts else 0)
        return max(known)

    @property
    def empty(self) -> bool:
        """Whether it is known to have no items."""
        return self.spool is not None and not self.count

    @property
    def own_spool(self) -> Spool:
        """The spool, for what cannot do without.

        Raises:
            SpoolError: this data directory has none.
        """
        if self.spool is not None:
            return self.spool
        return Spool.open(self.settings.data_dir, self.batch)

    def read_journal(self) -> Journal | None:
        """What was received here, to look at."""
        if self.spool is None:
            return None
        return Journal(self.spool.home, self.batch, self.spool.count, write=False)

    @contextlib.contextmanager
    def locked_journal(self) -> Iterator[Journal]:
        """The journal, to write; refused while another producer has it."""
        spool = self.own_spool
        with (
            BatchLock(self.settings.data_dir, self.batch),
            Journal(spool.home, self.batch, spool.count) as journal,
        ):
            yield journal

    async def lost(self) -> list[int] | None:
        """Items that Redis has lost just now, from the spool; None where nobody can name them.

        What processes run that have not yet said so again, within a lease of the loss, is among them.
        """
        if self.facts is not None and self.facts.epoch and not (self.facts.enqueued and self.facts.missing):
            return []
        journal = self.read_journal()
        if journal is None:
            return None if self.facts is None or not self.facts.epoch or self.facts.missing else []
        if self._not_lost(journal):
            return []
        found = lost_items(self.client, self.limit, self.flow, self.batch, journal.unended())
        return [index async for index in found]

    def _not_lost(self, journal: Journal) -> bool:
        """It was cancelled, or never enqueued."""
        if self.facts is not None and self.facts.cancelled:
            return True
        return not journal.epoch and (self.facts is None or not self.facts.left)

    async def caught_up(self) -> None:
        """Write down what came since somebody last followed, if nobody does so now."""
        with contextlib.suppress(InOtherHands, SpoolError), self.locked_journal() as journal:
            await catch_up(self.client, self.limit, self.batch, journal)


@contextlib.asynccontextmanager
async def redis_at(settings: ProducerSettings) -> AsyncIterator[tuple[Redis, Place]]:
    """A client for calls that may be repeated, and where it leads; the embedded server of a directory that
    has batches is started for it.

    Raises:
        RedisRefused: it cannot be reached or refuses us.
    """
    start = (settings.data_dir / "batches").is_dir()
    place = await asyncio.to_thread(find_redis, settings, start=start)
    hasty, client = open_retrying_client(place.url, retries=1), open_retrying_client(place.url)
    try:
        await checked_connection(hasty, place.shown)
        yield client, place
    finally:
        await hasty.aclose()
        await client.aclose()
        await asyncio.to_thread(place.close)


@contextlib.asynccontextmanager
async def known_batch(settings: ProducerSettings, batch: str) -> AsyncIterator[Known]:
    """The batch of that id.

    Raises:
        SpoolError: neither Redis nor this data directory knows it.
        RedisRefused: Redis cannot be reached or refuses us.
    """
    checked_batch(batch)
    async with redis_at(settings) as (client, place):
        limit, flow = await find_batch(client, batch, settings.data_dir)
        spool = Spool.open(settings.data_dir, batch) if Spool.exists(settings.data_dir, batch) else None
        facts = await read_facts(client, limit, batch)
        yield Known(batch, limit, flow, client, place, settings, spool, facts)


def state_of(facts: Facts | None, lost: list[int] | None, *, empty: bool = False) -> str:
    """In one word how a batch stands: running, over, cancelled, stopped (not all of it is enqueued) or lost."""
    if facts is None and empty:  # Redis was never told of it
        return "over"
    if lost is None or lost or facts is None:
        return "lost"
    if facts.cancelled:
        return "cancelled"
    if not facts.over:
        return "running"
    return "stopped" if facts.missing else "over"


async def bytes_in_redis(client: Redis, facts: Facts) -> int:
    """About how many bytes of Redis a batch takes: its own keys, and its jobs by a sample of them."""
    keys = GateKeys(facts.limit)
    async with client.pipeline(transaction=False) as pipe:
        for key in keys.of_batch(facts.batch):
            pipe.memory_usage(key)
        sizes = await pipe.execute(raise_on_error=False)
    own = sum(size for size in sizes if isinstance(size, int))
    return own + facts.left * await _bytes_of_job(client, keys, facts.flow)


async def _bytes_of_job(client: Redis, keys: GateKeys, flow: str) -> int:
    some: Any = await client.zrange(keys.queue(flow), 0, 19)
    if not some:
        return 0
    async with client.pipeline(transaction=False) as pipe:
        for job in some:
            pipe.memory_usage(b"arq:job:" + job)
        sizes = [size for size in await pipe.execute(raise_on_error=False) if isinstance(size, int)]
        queue = await client.memory_usage(keys.queue(flow)) or 0
    waiting = await client.zcard(keys.queue(flow)) or 1
    return (sum(sizes) // len(sizes) if sizes else 0) + queue // waiting
