"""What Redis is told of a batch before its first item, and again after it has lost its data."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import Any

import msgspec
from redis.asyncio import Redis

from limiter.keys import BATCHES, GateKeys
from producer.errors import SpoolError
from producer.facts import read_facts
from producer.journal import Journal
from producer.spool import Spool

WEEK_S = 604_800.0


async def announce(
    client: Redis,
    spool: Spool,
    journal: Journal | None = None,
    keep_s: float = WEEK_S,
    *,
    however_old: bool = False,
    whole: bool = True,
) -> None:
    """Tell Redis of a batch before its first job: where it belongs, how many items, its store.

    A Redis that has lost the batch hears from the journal which items have ended. `whole`: all of it is
    about to be enqueued, and does not count as enqueued until it is.

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
        pipe.hdel(keys.batch(spool.batch), *(["cancelled", "enqueued"] if whole else ["cancelled"]))
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
        if counts := _counted_before(journal):
            pipe.hset(keys.batch(batch), mapping=counts)
        await pipe.execute()


def _counted_before(journal: Journal) -> dict[str, int]:
    """How many items ended, by status: those that wait for a retry as they ended before, until it is enqueued."""
    counts = Counter(journal.counts())
    counts.update(retry.before for retry in journal.retries() if retry.before)
    return dict(counts)
