"""A batch in a program's hands: its outcomes as they come, its results at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from limiter.client import open_client
from limiter.settings import load
from producer.actions import cancel_batch
from producer.aside import aside
from producer.errors import FlowFailed, ProducerError
from producer.follow import Ended
from producer.follower import Follower, catch_up, mend, named
from producer.journal import Journal
from producer.known import Known, known_batch
from producer.lines import record_of
from producer.settings import ProducerSettings
from worker.contract import ABORTED, COMPLETED, LOST, Failure


class ItemsLost(ProducerError):
    """Redis has lost items of a batch. Carries `batch` and the `indexes` of the items."""

    exit_code = 1

    def __init__(self, batch: str, indexes: list[int]) -> None:
        super().__init__(f"Redis has lost {named(indexes)} of batch {batch}; {mend(batch)}")
        self.batch = batch
        self.indexes = indexes


@dataclass(frozen=True)
class ItemOutcome:
    """How one item ended.

    Attributes:
        index, params: which item.
        status: completed, failed, aborted, quarantined or lost.
        retry: how often it had been retried.
        action: the run's last action.
        changed: what the run changed in the shared store.
        error: type, message, node and short trace unless it completed.
        attempts: executions so far by kind; `nodes`: name and seconds of each node that ran.
        host: where it ran; `seconds`: how long.
        left_behind: paths of entries of the shared store that could not travel.
        notes: what else there is to say, such as why the run started over.
    """

    index: int
    params: dict[str, Any]
    status: str
    retry: int
    action: Any
    changed: Any
    error: Failure | None
    attempts: dict[str, int]
    nodes: list[Any]
    host: str
    seconds: float
    left_behind: list[str]
    notes: list[str]

    @property
    def completed(self) -> bool:
        return self.status == COMPLETED


class Batch:
    """A batch that was enqueued; workers run it whether anybody follows it or not.

    `async for outcome in batch` gives each item's outcome once, those of before first, and ends with the
    batch; an item that is retried meanwhile gives another one. May be done again. A loop that is cancelled
    leaves the batch running and says its id.

    Attributes:
        id: names it to every command and to `run_on_fleet(batch=...)`.
        flow, count: the flow's name and the number of items.
    """

    def __init__(self, id: str, flow: str, count: int) -> None:
        self.id = id
        self.flow = flow
        self.count = count

    def __repr__(self) -> str:
        return f"<Batch {self.id} of {self.flow}, {self.count} items>"

    async def __aiter__(self) -> AsyncIterator[ItemOutcome]:
        """
        Raises:
            ItemsLost: once everything else has ended.
            InOtherHands: another producer follows the batch.
        """
        if not self.count:
            return
        try:
            async with known_batch(load(ProducerSettings), self.id) as known:
                with known.locked_journal() as journal:
                    await catch_up(known.client, known.limit, self.id, journal)
                    async for outcome in _outcomes(known, journal):
                        yield outcome
        except asyncio.CancelledError as stopped:
            words = f"batch {self.id} goes on without us; follow it: pocketfleet batch wait {self.id}"
            stopped.add_note(words)
            aside(words)
            raise

    async def results(self) -> list[Any]:
        """The last action of each run in input order once all have ended, a `FlowFailed` where one did not
        complete, was lost, or did not run because the batch was cancelled."""
        unrun = Failure("Cancelled", "its batch was cancelled before it ran")
        found: list[Any] = [FlowFailed(index, ABORTED, unrun) for index in range(self.count)]
        try:
            async for outcome in self:
                found[outcome.index] = (
                    outcome.action
                    if outcome.completed
                    else FlowFailed(outcome.index, outcome.status, outcome.error)
                )
        except ItemsLost as error:
            gone = Failure("Lost", "Redis lost it before it ended")
            for index in error.indexes:
                found[index] = FlowFailed(index, LOST, gone)
        return found

    async def cancel(self) -> None:
        """Take what waits off the queue and end what runs at its next await."""
        await cancel_batch(load(ProducerSettings), self.id)


async def _outcomes(known: Known, journal: Journal) -> AsyncIterator[ItemOutcome]:
    reader = open_client(known.place.url)
    follower = Follower(
        reader,
        known.limit,
        known.flow,
        known.batch,
        journal=journal,
        lease_s=known.settings.lease_s,
    )
    try:
        async for ended in follower.news():
            for each in ended:
                yield _told(known, each)
    finally:
        await reader.aclose()
    if follower.lost:
        raise ItemsLost(known.batch, follower.lost)


def _told(known: Known, ended: Ended) -> ItemOutcome:
    return ItemOutcome(**record_of(ended, known.own_spool.params(ended.index)))
