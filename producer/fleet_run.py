"""One batch from a caller's store to merged results: prepare, enqueue, supervise."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.check import checked_connection
from limiter.client import open_retrying_client
from limiter.connect import Place, find_redis
from limiter.settings import current_directory, load
from limiter.view import read_gate
from producer.aside import aside
from producer.batch import (
    as_async,
    checked_items,
    encoded_base,
    new_batch_id,
    other_store,
    write_spool,
)
from producer.batch_lock import BatchLock
from producer.enqueue import enqueue
from producer.errors import ProducerError
from producer.facts import facts_by_id
from producer.flows import ThrottledAsyncParallelBatchFlow
from producer.follower import catch_up
from producer.found_name import found_name
from producer.journal import Journal
from producer.line_file import check_output
from producer.local_workers import checked_workers
from producer.plan import Plan, in_force, measured_run_s, plan_for, room_in_redis
from producer.progress import Progress
from producer.prune import sweep
from producer.room import Room
from producer.settings import ProducerSettings
from producer.spool import Spool
from producer.supervision import Supervision
from producer.users_part import UsersPart
from producer.who_runs import unserved
from worker.contract import ABORTED, LOST, checked_batch
from worker.registry import ServedFlow, checked_flow, named, refuse_while_importing

LIGHTEST, HEAVIEST = 0.001, 1000.0


class FleetRun:
    """Runs one batch of `flow` on the fleet; `go` does it, the attributes tell of it afterwards.

    Args:
        target: where workers find the flow; default: the name it is found under.
        params: param dicts instead of those of `prep_async`.
        first: take only that many items.
        live: show progress.
        key: the params' entry that identifies an item across runs; '' = its position.
        weight: the batch's share of the limit among other batches: 2 gets twice as much as 1.
        forecast: say in one line how long it will take, before the first item is enqueued.

    Attributes:
        flow, shared, live: as given.
        spool: the batch's, once it is written.
        refusals: how often its runs were refused; successes: runs completed since one that was refused.
        level: the fleet's level at the batch's end, None if it is not known.
        lost: items that Redis lost; `unrun`: items that did not run because the batch was cancelled.
        added: items that were put into the queue; `was_over`: there was nothing left to run.
    """

    def __init__(
        self,
        flow: ThrottledAsyncParallelBatchFlow,
        shared: Any,
        *,
        batch: str | None = None,
        workers: int | None = None,
        output: str | Path | None = None,
        target: str | None = None,
        params: Iterable[Any] | AsyncIterator[Any] | None = None,
        params_from: str = "--params",
        first: int | None = None,
        live: bool = True,
        key: str = "",
        weight: float = 1.0,
        forecast: bool = False,
    ) -> None:
        refuse_while_importing("run_on_fleet")
        self.settings = load(ProducerSettings)
        checked_flow(flow, target or "this flow")
        target = target or found_name(flow)
        name = flow.fleet_name(target)
        self.served: ServedFlow = named(flow, target or name, self.settings.lease_s)
        self.batch = checked_batch(batch) if batch is not None else new_batch_id(name)
        self.workers = checked_workers(workers)
        if self.workers and target is None:
            raise ProducerError(
                f"workers={workers} cannot start: flow '{name}' stands in no module under a name of its own, so they "
                "could not find it; make it an attribute of a module, such as flow in users.py"
            )
        self.logs = self.settings.data_dir / "logs" / self.batch
        self._users = UsersPart(flow, shared)
        self.refusals = self.successes = 0
        self.level: int | None = None
        self.output = Path(output) if output else None
        self.spool: Spool | None = None
        self.added = self.done_before = self.completed = self.failed = self.conflicts = self.unrun = 0
        self.lost: list[int] = []
        self.was_over = False
        self.seconds = 0.0
        self.results: list[Any] = []
        self.flow = flow
        self.shared = shared
        self._params = params
        self._params_from = params_from
        self._first = first
        self.live = live
        self._key = key
        self._weight = checked_weight(weight)
        self._says_plan = forecast

    async def go(self) -> Any:
        """Enqueue, follow, merge; returns what the flow's `post_async` returns."""
        if self.output is not None:
            check_output(self.output, self.settings.data_dir, self.batch)
        async with self._redis(start=True) as (client, place):
            await sweep(client, self.settings)
            prepared, items, where = await self._items()
            with BatchLock(self.settings.data_dir, self.batch):
                self.spool = spool = await self._write_spool(client, items, where)
                if spool.count:
                    with Journal(spool.home, self.batch, spool.count) as journal:
                        await catch_up(client, spool.limit, self.batch, journal)
                        await Supervision(self, client, place, spool, journal).go()
                    self.level = await self._last_level(client)
        return await self._users.post(prepared, self.results)

    async def enqueue_only(self) -> Spool:
        """Put the batch into the queue and leave it to the workers."""
        async with self._redis(start=False) as (client, place):
            await sweep(client, self.settings)
            _, items, where = await self._items()
            with BatchLock(self.settings.data_dir, self.batch):
                self.spool = spool = await self._write_spool(client, items, where)
                leaving = self.batch if place.embedded else ""
                about = (self.served.name, self.served.limits.name, self.served.target)
                if said := await unserved(client, *about, leaving=leaving):
                    aside(said)
                with Journal(spool.home, self.batch, spool.count) as journal:
                    await catch_up(client, spool.limit, self.batch, journal)
                    await self.forecast(client, spool, journal, aside)
                    await self.enqueue_missing(client, spool, journal)
        return spool

    async def plan(self, run_s: float | None = None) -> Plan:
        """A forecast, after checking every item; nothing is written or enqueued.

        Args:
            run_s: seconds one run takes; default: as measured in the latest batch of the flow.
        """
        async with self._redis(start=True) as (client, _):
            _, items, where = await self._items()
            count, size = await checked_items(items, self.settings.max_param_bytes, where, self._first)
            return await self._plan(client, count, size, run_s)

    async def _plan(self, client: Redis, count: int, size: int, run_s: float | None = None) -> Plan:
        where = ""
        if run_s is None:
            run_s, where = await measured_run_s(client, self.served.name)
        own = self.served.limits
        limits, because = in_force(own, await read_gate(client, own.name))
        return plan_for(
            count,
            size,
            limits,
            run_s,
            ceiling=own.max_concurrent,
            because=because,
            measured_in=where,
            keep_result_s=self.flow.keep_result_s,
            keep_s=self.settings.keep_s,
            room_in_redis=await room_in_redis(client),
        )

    async def forecast(
        self, client: Redis, spool: Spool, journal: Journal, say: Callable[[str], None]
    ) -> None:
        """The plan of what is to be enqueued, in one line."""
        if not self._says_plan or not journal.pending:
            return
        share = journal.pending / spool.count
        plan = await self._plan(client, journal.pending, round(spool.end_of(spool.count) * share))
        say(plan.line())

    @property
    def users_part(self) -> str:
        """`prep_async` or `post_async` once that raised, else ''."""
        return self._users.raised

    @property
    def unfinished(self) -> int:
        """Items that failed, were lost or did not run."""
        return self.failed + len(self.lost) + self.unrun

    def is_over(self, journal: Journal) -> bool:
        """Whether nothing is left to run, by a journal that has caught up with Redis."""
        return not journal.pending and not any(journal.ended_with((LOST, ABORTED)))

    def knows(self, key: str) -> bool:
        """Whether the caller's store has that key."""
        return isinstance(self.shared, dict) and key in self.shared

    # --- before ------------------------------------------------------------------------------------

    async def _items(self) -> tuple[Any, AsyncIterator[Any], str]:
        """What `prep_async` returned if it is a list, the items, and where they come from."""
        if self._params is not None:
            return None, as_async(self._params, self._params_from), self._params_from
        here = current_directory()
        prepared, items = await self._users.prep()
        if here is not None and here != current_directory():
            self._stay_in(here)
        return prepared, items, "prep_async"

    def _stay_in(self, here: Path) -> None:
        """Our files are where they were, although `prep_async` went to another directory."""
        self.settings.data_dir = here / self.settings.data_dir
        self.logs = here / self.logs
        self.output = self.output and here / self.output

    async def _write_spool(self, client: Redis, items: AsyncIterator[Any], where: str) -> Spool:
        known = Spool.exists(self.settings.data_dir, self.batch)
        facts = await facts_by_id(client, self.batch, self.served.limits.name, digests=not known)
        spool = await write_spool(
            self.settings.data_dir,
            self.batch,
            self.served,
            items,
            lambda: encoded_base(self.shared, self.flow.local_keys),
            max_bytes=self.settings.max_param_bytes,
            where=where,
            first=self._first,
            key=self._key,
            weight=self._weight,
            facts=facts,
        )
        if known or facts is not None:
            about = (self.batch, self.shared, self.flow.local_keys, spool.base())
            if said := other_store(*about):
                aside(said)
        return spool

    async def enqueue_missing(
        self, client: Redis, spool: Spool, journal: Journal, progress: Progress | None = None
    ) -> None:
        """Put into the queue what is missing; a batch that is over is not touched."""
        told = progress.enqueued if progress else lambda sent: None
        if self.is_over(journal):
            told(spool.count)
            self.done_before = spool.count
            return
        room = Room(
            client,
            spool,
            patience_s=self.settings.memory_patience_s,
            note=progress.wait_for if progress else None,
            say=progress.say if progress else aside,
            target=self.served.target,
        )
        done = await enqueue(client, spool, told, journal=journal, keep_s=self.settings.keep_s, room=room)
        self.added, self.done_before = done.added, done.done

    @contextlib.asynccontextmanager
    async def _redis(self, *, start: bool) -> AsyncIterator[tuple[Redis, Place]]:
        place = await asyncio.to_thread(find_redis, self.settings, start=start)
        hasty = open_retrying_client(place.url, retries=1)
        client = open_retrying_client(place.url, waits_if_full=False)
        try:
            await checked_connection(hasty, place.shown)
            yield client, place
        finally:
            await hasty.aclose()
            await client.aclose()
            await asyncio.to_thread(place.close)

    async def _last_level(self, client: Redis) -> int | None:
        """For the statistics only: a batch that is over does not fail for it."""
        try:
            gate = await read_gate(client, self.served.limits.name)
        except RedisError:
            return None
        return int(gate.level) if gate else None


def checked_weight(weight: object) -> float:
    """A weight that can hold.

    Raises:
        ProducerError: names the bounds.
    """
    if isinstance(weight, (int, float)) and not isinstance(weight, bool) and LIGHTEST <= weight <= HEAVIEST:
        return float(weight)
    raise ProducerError(f"weight={weight!r} cannot hold: use a number from {LIGHTEST:g} to {HEAVIEST:g}")
