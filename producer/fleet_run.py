"""One batch from a caller's store to merged results: enqueue, follow, merge."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.client import checked_connection, open_client, open_retrying_client
from limiter.connect import Place, find_redis
from limiter.errors import LimiterError
from limiter.keys import GateKeys
from limiter.process import open_process
from limiter.settings import load
from limiter.view import read_gate
from producer.batch import as_async, encoded_base, enqueue, new_batch_id, write_spool
from producer.debugger import one_prompt
from producer.errors import ProducerError, WorkersError
from producer.flows import FlowFailed, ThrottledAsyncParallelBatchFlow, found_name
from producer.follow import Ended, outcomes
from producer.lines import LineFile, check_writable
from producer.local_workers import LocalWorkers, checked_workers
from producer.merge import Conflict, Merger
from producer.progress import Progress
from producer.settings import ProducerSettings
from producer.spool import BatchLock, Spool
from worker import codec
from worker.contract import COMPLETED, checked_batch
from worker.errors import WorkerError
from worker.fleet_worker import FleetWorker
from worker.presence import living_workers
from worker.registry import ServedFlow, checked_flow, named, refuse_while_importing, said

SHOWN_FAILURES = 10


class Hands(Protocol):
    """Whoever runs the jobs for this run."""

    @property
    def failed(self) -> WorkersError | None:
        """Why it cannot go on, once it cannot."""


class ConflictError(ProducerError):
    """Two runs changed one entry and the flow says conflicts="fail". Carries `conflict`."""

    exit_code = 1

    def __init__(self, conflict: Conflict) -> None:
        said = str(conflict).replace(", and the last item in input order wins", "")
        super().__init__(f"stopped, as conflicts='fail' asks: {said}")
        self.conflict = conflict


class FleetRun:
    """Runs one batch of `flow` on the fleet; `go` does it, the attributes tell of it afterwards.

    Args:
        target: where workers find the flow; default: the name it is found under.
        params: param dicts instead of those of `prep_async`.
        first: take only that many items.
        live: show progress.

    Attributes:
        users_part: `prep_async` or `post_async` once that raised, else ''.
        spool: the batch's, once it is written.
        refusals: how often its runs were refused; successes: runs completed since one that was refused.
        level: the fleet's level at the batch's end, None if it is not known.
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
        self.users_part = ""
        self.completed = self.failed = self.refusals = self.successes = 0
        self.level: int | None = None
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
        self.results: list[Any] = []

    async def go(self) -> Any:
        """Enqueue, follow, merge; returns what the flow's `post_async` returns."""
        if self.output is not None:
            check_writable(self.output)
        async with self._redis(start=True) as (client, place):
            prepared, items, where = await self._items()
            with BatchLock(self.settings.data_dir, self.batch):
                self.spool = await self._write_spool(items, where)
                if self.spool.count:
                    await self._run(client, place, self.spool)
                    self.level = await self._last_level(client)
        with self._users("post_async"):
            return await self._flow.post_async(self._shared, prepared, self.results)

    async def enqueue_only(self) -> Spool:
        """Put the batch into the queue and leave it to the workers."""
        async with self._redis(start=False) as (client, _):
            _, items, where = await self._items()
            with BatchLock(self.settings.data_dir, self.batch):
                self.spool = await self._write_spool(items, where)
                await self._warn_if_unserved(client, lambda text: print(text, file=sys.stderr, flush=True))
                self.added, self.done_before = await enqueue(client, self.spool)
        return self.spool

    def knows(self, key: str) -> bool:
        """Whether the caller's store has that key."""
        return isinstance(self._shared, dict) and key in self._shared

    # --- before ------------------------------------------------------------------------------------

    async def _items(self) -> tuple[Any, AsyncIterator[Any], str]:
        """What `prep_async` returned if it is a list, the items, and where they come from."""
        if self._params is not None:
            return None, as_async(self._params, self._params_from), self._params_from
        with self._users("prep_async"):
            prepared: Any = self._flow.prep_async(self._shared)
            if hasattr(prepared, "__await__"):
                prepared = await prepared
        items = self._from_user(as_async(prepared, "prep_async"))
        return (prepared if isinstance(prepared, list) else None), items, "prep_async"

    async def _from_user(self, items: AsyncIterator[Any]) -> AsyncIterator[Any]:
        with self._users("prep_async"):
            async for each in items:
                yield each

    @contextlib.contextmanager
    def _users(self, part: str) -> Iterator[None]:
        """Remember that it was the flow's own code that raised; what it raised goes on unchanged."""
        try:
            yield
        except (LimiterError, ProducerError, WorkerError, RedisError):
            raise
        except Exception:
            self.users_part = part
            raise

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
        hasty, client = open_retrying_client(place.url, retries=1), open_retrying_client(place.url)
        try:
            await checked_connection(hasty, place.shown)
            yield client, place
        finally:
            await hasty.aclose()
            await client.aclose()
            await asyncio.to_thread(place.close)

    async def _warn_if_unserved(self, client: Redis, say: Callable[[str], None]) -> None:
        """Say at once when no worker would take the jobs."""
        if not any(self.served.name in info.flows for info in await living_workers(client)):
            name, target = self.served.name, self.served.target
            say(f"no worker serves {name}; start one: pocketfleet worker {target}")

    async def _warn_of_others(self, client: Redis, say: Callable[[str], None]) -> None:
        """What an earlier batch left in the queue runs first, and may be unexpected."""
        keys = GateKeys(self.served.limits.name)
        waiting = await client.zcard(keys.queue(self.served.name))
        own = await client.hget(keys.batch(self.batch), "left")  # type: ignore[misc]
        others = waiting - int(own or 0)
        if others > 0:
            items = "1 item" if others == 1 else f"{others} items"
            say(f"{items} of earlier batches wait for {self.served.name}: these workers run them too")

    async def _last_level(self, client: Redis) -> int | None:
        """For the statistics only: a batch that is over does not fail for it."""
        try:
            gate = await read_gate(client, self.served.limits.name)
        except RedisError:
            return None
        return int(gate.level) if gate else None

    # --- during ------------------------------------------------------------------------------------

    async def _run(self, client: Redis, place: Place, spool: Spool) -> None:
        lines = LineFile(self.output) if self.output else None
        progress = Progress(
            self.served.name,
            self.served.limits.name,
            spool.count,
            shown=self._live,
            live=self.workers != 0,
            workers=self.workers or 0,
        )
        began = time.monotonic()
        try:
            async with self._hands(place, progress) as hands:
                progress.start(client)
                try:
                    if self.workers is None:
                        await self._warn_if_unserved(client, progress.say)
                    else:
                        await self._warn_of_others(client, progress.say)
                    self.added, self.done_before = await enqueue(client, spool, progress.enqueued)
                    await self._follow(place, spool, progress, lines, hands)
                finally:
                    self.seconds = time.monotonic() - began
                    await progress.stop()
        finally:
            if lines:
                lines.close()

    @contextlib.asynccontextmanager
    async def _hands(self, place: Place, progress: Progress) -> AsyncIterator[Hands | None]:
        """Whoever runs the jobs: workers that are there, this process, or processes of our own."""
        if self.workers is None:
            yield None
        elif self.workers == 0:
            async with self._worker_here(place) as here:
                yield here
        else:
            workers = LocalWorkers(
                self.served.target,
                self.workers,
                place.url,
                self.settings.data_dir,
                self.logs,
                progress.say,
                self.batch,
            )
            await workers.start()
            drain_s = 0.0
            try:
                yield workers
                drain_s = self.settings.drain_s
            finally:
                await workers.stop(drain_s)

    @contextlib.asynccontextmanager
    async def _worker_here(self, place: Place) -> AsyncIterator[Hands]:
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
        loop = asyncio.get_running_loop()
        with one_prompt(lambda: _hand_back(worker, loop)):
            try:
                yield _Here(running)
                finished = True
            finally:
                worker.stop(at_once=not finished)
                await asyncio.shield(asyncio.gather(running, return_exceptions=True))
                await asyncio.shield(process.close())

    async def _follow(
        self, place: Place, spool: Spool, progress: Progress, lines: LineFile | None, hands: Hands | None
    ) -> None:
        base_bytes = spool.base()
        base = codec.decode(base_bytes) if base_bytes else {}
        store = self._shared if isinstance(self._shared, dict) else {}
        merger = Merger(store, base, self._flow.merge)
        self.results = [None] * spool.count
        seen = bytearray(spool.count)
        left = spool.count
        reader, task = open_client(place.url), asyncio.current_task()
        try:
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
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError  # Python 3.11's wait_for, under redis-py, can lose it
                failed = hands.failed if hands is not None else None
                if failed is not None:
                    raise failed
        finally:
            await reader.aclose()
        merger.finish()

    def _take(
        self, ended: Ended, spool: Spool, merger: Merger, lines: LineFile | None, progress: Progress
    ) -> None:
        outcome = ended.outcome
        completed = outcome.status == COMPLETED
        progress.count(completed)
        refusals = outcome.attempts.get("refusals", 0)
        self.refusals += refusals
        self.successes = (0 if refusals else self.successes) + completed
        self.completed, self.failed = progress.completed, progress.failed
        if completed:
            self.results[ended.index] = outcome.action
        else:
            failed = FlowFailed(ended.index, outcome.status, outcome.failure)
            self.results[ended.index] = failed
            self._show(failed, progress)
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

    def _show(self, failed: FlowFailed, progress: Progress) -> None:
        """The first failures, as they come; the rest is in the output file."""
        if not self._live or self.failed > SHOWN_FAILURES:
            return
        progress.say(str(failed).replace(f"item {failed.index}", f"[item {failed.index}]", 1))
        if self.failed == SHOWN_FAILURES:
            progress.say(
                "further failures are not shown here" + (f": see {self.output}" if self.output else "")
            )


def _hand_back(worker: FleetWorker, loop: asyncio.AbstractEventLoop) -> None:
    """Take nothing more; whatever runs has not failed, and is to be done again. From any thread."""
    loop.call_soon_threadsafe(partial(worker.stop, at_once=True))
    for crew in worker.crews:
        for run in list(crew.runs.values()):
            run.ending = "hand"


class _Here:
    """The worker in this process, as seen by the run that follows it."""

    def __init__(self, running: asyncio.Task[None]) -> None:
        self._running = running

    @property
    def failed(self) -> WorkersError | None:
        if not self._running.done():
            return None
        error = None if self._running.cancelled() else self._running.exception()
        if error is None:
            return WorkersError("the worker in this process ended before the batch did")
        traceback.print_exception(error)
        return WorkersError(f"the worker in this process ended: {said(error)}", 2)
