"""What can be done to a batch that is under way or over: cancel it, retry it, resubmit what was lost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from producer.cancel import Cancelled, cancel
from producer.enqueue import enqueue
from producer.facts import read_facts
from producer.follower import catch_up
from producer.known import known_batch
from producer.settings import ProducerSettings
from producer.who_runs import unserved_batch
from worker.contract import STATUSES


async def cancel_batch(settings: ProducerSettings, batch: str) -> Cancelled:
    """Take a batch off the queue and end its runs; one that is over stays as it is. May be repeated."""
    async with known_batch(settings, batch) as known:
        done = await cancel(known.client, known.limit, known.flow, batch, known.count)
        if done.waiting or done.running:
            return done
        facts = await read_facts(known.client, known.limit, batch)
        over = facts is not None and facts.over and not facts.cancelled and not facts.missing
        return replace(done, over=over)


@dataclass(frozen=True)
class Retried:
    """Items that run again: how many, and how many of them an earlier retry had brought into the queue already;
    how many never ran and are not in the queue either; a warning if nobody serves."""

    count: int
    there: int
    unrun: int
    unserved: str


async def retry_failed(settings: ProducerSettings, batch: str) -> Retried:
    """Enqueue every item again that ended without completing.

    Raises:
        SpoolError: the spool is not here, or another producer has the batch.
    """
    async with known_batch(settings, batch) as known:
        with known.locked_journal() as journal:
            await catch_up(known.client, known.limit, batch, journal)
            journal.ask_again(list(journal.ended_with(STATUSES[1:])))
            asked, added = len(journal.retries()), 0
            if asked:
                done = await enqueue(
                    known.client, known.own_spool, journal=journal, keep_s=settings.keep_s, only_retries=True
                )
                added = done.added
        facts = await read_facts(known.client, known.limit, batch)
        unrun = facts.missing if facts else 0
        return Retried(asked, asked - added, unrun, await unserved_batch(known))


async def resubmit_lost(settings: ProducerSettings, batch: str) -> tuple[int, str]:
    """Enqueue every item again that has no outcome and is not in the queue; how many, and a warning.

    Raises:
        SpoolError: the spool is not here, or another producer has the batch.
    """
    async with known_batch(settings, batch) as known:
        with known.locked_journal() as journal:
            await catch_up(known.client, known.limit, batch, journal)
            if not journal.pending:
                return 0, ""
            done = await enqueue(
                known.client, known.own_spool, journal=journal, keep_s=settings.keep_s, however_old=True
            )
        return done.added, await unserved_batch(known)
