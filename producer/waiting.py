"""Waiting for a batch that others run, and reading what it has given so far."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from limiter.client import open_client
from producer.batch_lock import InOtherHands
from producer.batch_views import status_of_known
from producer.facts import read_facts
from producer.follow import Ended, read
from producer.follower import Follower, catch_up
from producer.journal import Journal
from producer.known import Known, known_batch
from producer.line_file import LineFile, check_output
from producer.lines import record_of
from producer.progress import Progress
from producer.settings import ProducerSettings
from worker.contract import COMPLETED


async def wait_for(settings: ProducerSettings, batch: str, output: Path | None) -> dict[str, Any]:
    """Follow a batch until it is over; returns its status then.

    With the batch's spool at hand what comes is written down, so that no later command asks for it again.

    Raises:
        SpoolError: nobody knows the batch; with `output`: it has no spool here, or another producer has it.
    """
    if output is not None:
        check_output(output, settings.data_dir, batch)
    async with known_batch(settings, batch) as known:
        with contextlib.ExitStack() as stack:
            journal = None
            if output is not None or known.spool is not None:
                try:
                    journal = stack.enter_context(known.locked_journal())
                except InOtherHands:
                    if output is not None:
                        raise
            if journal is not None:
                await catch_up(known.client, known.limit, batch, journal)
            lines = None
            if output is not None and journal is not None:
                lines = stack.enter_context(contextlib.closing(LineFile(output, known.own_spool, journal)))
            await _follow(known, journal, lines)
        # not by its id again: the embedded server would end and start in between
        known.facts = await read_facts(known.client, known.limit, batch)
        return await status_of_known(known)


async def _follow(known: Known, journal: Journal | None, lines: LineFile | None) -> None:
    progress = Progress(known.flow, known.limit, known.count)
    progress.sent = known.count
    progress.before = known.facts.done if known.facts is not None else 0
    progress.start(known.client)
    reader = open_client(known.place.url)
    follower = Follower(
        reader,
        known.limit,
        known.flow,
        known.batch,
        journal=journal,
        lease_s=known.settings.lease_s,
        say=progress.say,
    )
    try:
        async for ended in follower.news():
            if journal is not None:  # an item that is retried ends twice
                counts = journal.counts()
                progress.counted(counts.pop(COMPLETED, 0), sum(counts.values()))
            else:
                for each in ended:
                    progress.count(each.status == COMPLETED)
            if lines is not None:
                lines.catch_up()
        if lines is not None:
            lines.catch_up()  # what was known before there was news
    finally:
        await reader.aclose()
        await progress.stop()


async def records(
    settings: ProducerSettings, batch: str, *, failed: bool = False
) -> AsyncGenerator[dict[str, Any], None]:
    """What every attempt that ended has given so far, in the order of receipt, as an output line tells it.

    With `failed` only the last attempt of each item, where that did not complete.
    """
    async with known_batch(settings, batch) as known:
        await known.caught_up()
        spool = known.spool
        async with contextlib.aclosing(_failures(known) if failed else _ended(known)) as found:
            async for ended in found:
                if spool is None or ended.index >= spool.count:  # another host has appended it
                    yield record_of(ended, None)
                else:
                    yield record_of(ended, spool.params(ended.index))
        if spool is None:
            print(f"batch {batch} has no spool here, so params are not shown", file=sys.stderr, flush=True)


async def _ended(known: Known) -> AsyncGenerator[Ended, None]:
    """From the journal; what another producer is about to write down, and without one all, from Redis."""
    journal = known.read_journal()
    if journal is not None:
        for ended, _ in journal.outcomes():
            yield ended
    async with contextlib.aclosing(_not_in(journal, known)) as found:
        async for ended in found:
            yield ended


async def _failures(known: Known) -> AsyncGenerator[Ended, None]:
    """How each item ended last, of those that did not complete."""
    journal = known.read_journal()
    newer: dict[int, Ended | None] = {}
    async for ended in _not_in(journal, known):
        newer[ended.index] = ended if ended.status != COMPLETED else None
    for ended in journal.latest() if journal is not None else ():
        if ended.status != COMPLETED and ended.index not in newer:
            yield ended
    for last in newer.values():
        if last is not None:
            yield last


async def _not_in(journal: Journal | None, known: Known) -> AsyncGenerator[Ended, None]:
    """What stands in Redis and not in the journal."""
    if journal is not None and (known.facts is None or known.facts.epoch != journal.epoch):
        return
    position = journal.position if journal is not None else "0-0"
    while found := await read(known.client, known.limit, known.batch, position, None):
        position = found[-1].position
        for ended in found:
            yield ended
