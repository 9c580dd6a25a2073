"""One batch from a caller's store to merged results: enqueue, follow, merge."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from limiter.client import checked_connection, open_client, open_retrying_client
from limiter.connect import Place, find_redis
from limiter.process import open_process
from limiter.settings import load
from producer.batch import as_async, encoded_base, enqueue, new_batch_id, write_spool
from producer.errors import ProducerError
from producer.flows import FlowFailed, ThrottledAsyncParallelBatchFlow
from producer.follow import Ended, outcomes
from producer.lines import LineFile
from producer.local_workers import LocalWorkers, checked_workers
from producer.merge import Conflict, Merger
from producer.progress import Progress
from producer.settings import ProducerSettings
from producer.spool import BatchLock, Spool
from worker import codec
from worker.contract import COMPLETED, checked_batch
from worker.fleet_worker import FleetWorker
from worker.presence import living_workers
from worker.registry import ServedFlow, checked_flow, named


class ConflictError(ProducerError):
    """Two runs changed one entry and the flow says conflicts="fail". Carries `conflict`."""

    exit_code = 1

    def __init__(self, conflict: Conflict) -> None:
        super().__init__(str(conflict))
        self.conflict = conflict


class FleetRun:
    """Runs one batch of `flow` on the fleet; `go` does it, the attributes tell of it afterwards.

    Args:
        target: where workers find the flow; default: the name it is found under.
        params: param dicts instead of those of `prep_async`.
        first: take only that many items.
        follow: False ends after the enqueue.
        live: show progress.
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
        params: Iterable[Any] | None = None,
        params_from: str = "--params",
        first: int | None = None,
        live: bool = True,
    ) -> None:
        self.settings = load(ProducerSettings)
        checked_flow(flow, target or "this flow")
        name = flow.fleet_name(target)
        self.served: ServedFlow = named(flow, target or name, self.settings.lease_s)
        self.batch = checked_batch(batch) if batch is not None else new_batch_id(name)
        self.workers = checked_workers(workers)
        self.completed = self.failed = 0
        self.output = Path(output) if output else None
        self.spool: Spool | None = None
        self.conflict: Conflict | None = None
        self.added = self.done_before = 0
        self.seconds = 0.0
        self._flow = flow
        self._shared = shared
        self._params = params
        self._params_from = params_from
        self._first = first
        self._live = live
        self._results: list[Any] = []

    async def go(self) -> Any:
        """Enqueue, follow, merge; returns what the flow's `post_async` returns."""
        prepared, items, where = await self._items()
        with BatchLock(self.settings.data_dir, self.batch):
            self.spool = await self._write_spool(items, where)
            async with self._redis(start=True) as (client, place):
                await self._run(client, place, self.spool)
        return await self._flow.post_async(self._shared, prepared, self._results)

    async def enqueue_only(self) -> Spool:
        """Put the batch into the queue and leave it to the workers."""
        _, items, where = await self._items()
        async with self._redis(start=False) as (client, _):
            with BatchLock(self.settings.data_dir, self.batch):
                self.spool = await self._write_spool(items, where)
                self.added, self.done_before = await enqueue(client, self.spool)
            self.serving = await self._serving(client)
        return self.spool

    # --- before ------------------------------------------------------------------------------------

    async def _items(self) -> tuple[Any, AsyncIterator[Any], str]:
        """What `prep_async` returned if it is a list, the items, and where they come from."""
        if self._params is not None:
            return None, as_async(self._params, self._params_from), self._params_from
        prepared = self._flow.prep_async(self._shared)
        if hasattr(prepared, "__await__"):
            prepared = await prepared
        return (
            (prepared if isinstance(prepared, list) else None),
            as_async(prepared, "prep_async"),
            "prep_async",
        )

    async def _write_spool(self, items: AsyncIterator[Any], where: str) -> Spool:
        return await write_spool(
            self.settings.data_dir,
            self.batch,
            self.served,
            items,
            lambda: encoded_base(self._shared, self._flow.local_keys),
            max_bytes=self.settings.max_param_bytes,
            where=where,
            first=self._first,
        )

    @contextlib.asynccontextmanager
    async def _redis(self, *, start: bool) -> AsyncIterator[tuple[Redis, Place]]:
        place = await asyncio.to_thread(find_redis, self.settings, start=start)
        client = open_retrying_client(place.url)
        try:
            await checked_connection(client, place.shown)
            yield client, place
        finally:
            await client.aclose()
            await asyncio.to_thread(place.close)

    async def _serving(self, client: Redis) -> int:
        return sum(self.served.name in info.flows for info in await living_workers(client))

    # --- during ------------------------------------------------------------------------------------

    async def _run(self, client: Redis, place: Place, spool: Spool) -> None:
        progress = Progress(self.served.name, self.served.limits.name, spool.count, shown=self._live)
        began = time.monotonic()
        async with self._hands(client, place, progress) as hands:
            progress.start(client)
            try:
                self.added, self.done_before = await enqueue(
                    client, spool, lambda sent: setattr(progress, "sent", sent)
                )
                if self.workers is None and not await self._serving(client):
                    progress.say(
                        f"no worker serves {self.served.name}; start one: pocketfleet worker {self.served.target}"
                    )
                await self._follow(place, spool, progress, hands)
            finally:
                self.seconds = time.monotonic() - began
                await progress.stop()

    @contextlib.asynccontextmanager
    async def _hands(
        self, client: Redis, place: Place, progress: Progress
    ) -> AsyncIterator[LocalWorkers | None]:
        """Whoever runs the jobs: workers that are there, this process, or processes of our own."""
        if self.workers is None:
            yield None
        elif self.workers == 0:
            async with self._worker_here(place):
                yield None
        else:
            logs = self.settings.data_dir / "logs" / self.batch
            workers = LocalWorkers(
                self.served.target, self.workers, place.url, self.settings.data_dir, logs, progress.say
            )
            await workers.start()
            drain_s = 0.0
            try:
                yield workers
                drain_s = self.settings.drain_s
            finally:
                await workers.stop(drain_s)

    @contextlib.asynccontextmanager
    async def _worker_here(self, place: Place) -> AsyncIterator[None]:
        """A worker in this process: full tracebacks, breakpoints work."""
        process = await open_process(place.url, lease_s=self.settings.lease_s, stall_limit_s=86_400.0)
        worker = FleetWorker(
            process,
            [self.served],
            max_jobs=self.settings.max_jobs,
            drain_s=self.settings.drain_s,
            show_traces=True,
        )
        running = asyncio.create_task(worker.run())
        finished = False
        try:
            yield
            finished = True
        finally:
            worker.stop(at_once=not finished)
            await asyncio.shield(asyncio.gather(running, return_exceptions=True))
            await asyncio.shield(process.close())

    async def _follow(
        self, place: Place, spool: Spool, progress: Progress, hands: LocalWorkers | None
    ) -> None:
        base_bytes = spool.base()
        base = codec.decode(base_bytes) if base_bytes else {}
        store = self._shared if isinstance(self._shared, dict) else {}
        merger = Merger(store, base, self._flow.merge)
        lines = LineFile(self.output) if self.output else None
        self._results = [None] * spool.count
        seen = bytearray(spool.count)
        left = spool.count
        reader = open_client(place.url)
        try:
            if left:
                async for ended in outcomes(reader, self.served.limits.name, self.batch):
                    for each in ended:
                        if each.index < spool.count and not seen[each.index]:
                            seen[each.index] = 1
                            left -= 1
                            self._take(each, spool, merger, lines, progress)
                    if lines:
                        lines.flush()
                    if not left:
                        break
                    if hands is not None and hands.failed:
                        raise ProducerError(hands.failed)
        finally:
            if lines:
                lines.close()
            await reader.aclose()
        merger.finish()

    def _take(
        self, ended: Ended, spool: Spool, merger: Merger, lines: LineFile | None, progress: Progress
    ) -> None:
        outcome = ended.outcome
        completed = outcome.status == COMPLETED
        progress.count(completed)
        self.completed, self.failed = progress.completed, progress.failed
        if completed:
            self._results[ended.index] = outcome.action
        else:
            self._results[ended.index] = FlowFailed(ended.index, outcome.status, outcome.failure)
        if not spool.received(ended.index):
            spool.mark_received(ended.index)
        if lines:
            lines.write(ended, spool.params(ended.index))
        conflict = merger.add(ended.index, outcome.difference)
        if conflict is not None:
            self.conflict = conflict
            if self._flow.conflicts == "fail":
                raise ConflictError(conflict)
            progress.say(f"conflict: {conflict}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
