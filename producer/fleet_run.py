"""One batch from a caller's store to merged results: enqueue, follow, merge."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.client import checked_connection, open_client, open_retrying_client
from limiter.connect import Place, find_redis
from limiter.errors import LimiterError
from limiter.keys import GateKeys
from limiter.settings import load
from limiter.view import read_gate
from producer.batch import as_async, checked_items, encoded_base, new_batch_id, write_spool
from producer.batch_lock import BatchLock
from producer.cancel import cancel, withdraw
from producer.enqueue import enqueue
from producer.errors import ProducerError
from producer.facts import read_facts
from producer.flows import FlowFailed, ThrottledAsyncParallelBatchFlow, found_name
from producer.follow import Ended
from producer.follower import Follower, catch_up
from producer.gathering import ConflictError, Gathering
from producer.hands import Hands, worker_here, workers_beside
from producer.journal import Journal
from producer.lines import LineFile, check_writable
from producer.local_workers import checked_workers
from producer.plan import Plan, measured_run_s, plan_for, room_in_redis
from producer.progress import Progress
from producer.prune import sweep
from producer.settings import ProducerSettings
from producer.spool import Spool
from worker.contract import ABORTED, LOST, checked_batch
from worker.errors import WorkerError
from worker.presence import living_workers
from worker.registry import ServedFlow, checked_flow, named, refuse_while_importing

SHOWN_FAILURES = 10
WITHDRAW_S = 30.0
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
        users_part: `prep_async` or `post_async` once that raised, else ''.
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
        params: Iterable[Any] | None = None,
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
        self.users_part = ""
        self.refusals = self.successes = 0
        self.level: int | None = None
        self.output = Path(output) if output else None
        self.spool: Spool | None = None
        self.added = self.done_before = self.completed = self.failed = self.conflicts = self.unrun = 0
        self.lost: list[int] = []
        self.was_over = False
        self.seconds = 0.0
        self.results: list[Any] = []
        self._flow = flow
        self._shared = shared
        self._params = params
        self._params_from = params_from
        self._first = first
        self._live = live
        self._key = key
        self._weight = checked_weight(weight)
        self._says_plan = forecast

    async def go(self) -> Any:
        """Enqueue, follow, merge; returns what the flow's `post_async` returns."""
        if self.output is not None:
            check_writable(self.output)
        async with self._redis(start=True) as (client, place):
            await sweep(client, self.settings)
            prepared, items, where = await self._items()
            with BatchLock(self.settings.data_dir, self.batch):
                self.spool = spool = await self._write_spool(client, items, where)
                if spool.count:
                    with Journal(spool.home, self.batch, spool.count) as journal:
                        await self._run(client, place, spool, journal)
                    self.level = await self._last_level(client)
        with self._users("post_async"):
            return await self._flow.post_async(self._shared, prepared, self.results)

    async def enqueue_only(self) -> Spool:
        """Put the batch into the queue and leave it to the workers."""
        async with self._redis(start=False) as (client, _):
            await sweep(client, self.settings)
            _, items, where = await self._items()
            with BatchLock(self.settings.data_dir, self.batch):
                self.spool = spool = await self._write_spool(client, items, where)
                await self._warn_if_unserved(client, _to_stderr)
                with Journal(spool.home, self.batch, spool.count) as journal:
                    await catch_up(client, spool.limit, self.batch, journal)
                    await self._forecast(client, spool, journal, _to_stderr)
                    await self._enqueue(client, spool, journal)
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
        return plan_for(
            count,
            size,
            self.served.limits,
            run_s,
            measured_in=where,
            keep_result_s=self._flow.keep_result_s,
            keep_s=self.settings.keep_s,
            room_in_redis=await room_in_redis(client),
        )

    async def _forecast(
        self, client: Redis, spool: Spool, journal: Journal, say: Callable[[str], None]
    ) -> None:
        """The plan of what is to be enqueued, in one line."""
        if not self._says_plan or not journal.pending:
            return
        share = journal.pending / spool.count
        plan = await self._plan(client, journal.pending, round(spool.end_of(spool.count) * share))
        say(plan.line())

    @property
    def unfinished(self) -> int:
        """Items that failed, were lost or did not run."""
        return self.failed + len(self.lost) + self.unrun

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

    async def _write_spool(self, client: Redis, items: AsyncIterator[Any], where: str) -> Spool:
        facts = None
        if not Spool.exists(self.settings.data_dir, self.batch):
            facts = await read_facts(client, self.served.limits.name, self.batch, digests=True)
        return await write_spool(
            self.settings.data_dir,
            self.batch,
            self.served,
            items,
            lambda: encoded_base(self._shared, self._flow.local_keys),
            max_bytes=self.settings.max_param_bytes,
            where=where,
            first=self._first,
            key=self._key,
            weight=self._weight,
            facts=facts,
        )

    async def _enqueue(
        self, client: Redis, spool: Spool, journal: Journal, told: Callable[[int], None] = lambda sent: None
    ) -> None:
        """Put into the queue what is missing; a batch that is over is not touched."""
        if not journal.pending and not any(journal.ended_with((LOST, ABORTED))):
            told(spool.count)
            self.done_before = spool.count
            return
        done = await enqueue(client, spool, told, journal=journal, keep_s=self.settings.keep_s)
        self.added, self.done_before = done.added, done.done

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

    async def _run(self, client: Redis, place: Place, spool: Spool, journal: Journal) -> None:
        await catch_up(client, spool.limit, self.batch, journal)
        lines = LineFile(self.output, spool, journal) if self.output else None
        self.was_over = over = not journal.pending and not any(journal.ended_with((LOST, ABORTED)))
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
            async with self._hands(place, progress, idle=over) as hands:
                progress.start(client)
                try:
                    if not over:
                        await self._say_who_runs(client, progress.say)
                        await self._forecast(client, spool, journal, progress.say)
                    await self._do(client, place, spool, journal, progress, lines, hands)
                finally:
                    self.seconds = time.monotonic() - began
                    await progress.stop()
        finally:
            if lines:
                lines.close()

    async def _do(
        self,
        client: Redis,
        place: Place,
        spool: Spool,
        journal: Journal,
        progress: Progress,
        lines: LineFile | None,
        hands: Hands | None,
    ) -> None:
        try:
            await self._enqueue(client, spool, journal, progress.enqueued)
            await self._follow(place, spool, journal, progress, lines, hands)
        except ConflictError:
            await self._end_batch(client, spool, everything=True)
            raise
        except asyncio.CancelledError as stopped:
            if self.workers is None:
                self._leave_running(stopped)
            else:
                await self._end_batch(client, spool, everything=False)
            raise
        except BaseException:
            if self.workers is not None:
                await self._end_batch(client, spool, everything=False)
            raise

    def _leave_running(self, stopped: asyncio.CancelledError) -> None:
        """Who follows is gone; the fleet's workers go on."""
        words = f"batch {self.batch} goes on without us; follow it: pocketfleet batch wait {self.batch}"
        stopped.add_note(words)
        print(words, file=sys.stderr, flush=True)

    async def _end_batch(self, client: Redis, spool: Spool, *, everything: bool) -> None:
        """Leave nothing behind that other workers would run unasked: what never began leaves the queue."""
        about = (client, spool.limit, spool.flow, spool.batch, spool.count)
        ending = cancel(*about) if everything else withdraw(*about)
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await asyncio.shield(asyncio.wait_for(ending, WITHDRAW_S))

    async def _say_who_runs(self, client: Redis, say: Callable[[str], None]) -> None:
        if self.workers is None:
            await self._warn_if_unserved(client, say)
        else:
            await self._warn_of_others(client, say)

    @contextlib.asynccontextmanager
    async def _hands(self, place: Place, progress: Progress, *, idle: bool) -> AsyncIterator[Hands | None]:
        """Whoever runs the jobs: workers that are there, this process, or processes of our own."""
        if self.workers is None or idle:
            yield None
        elif self.workers == 0:
            async with worker_here(place, self.served, self.settings) as here:
                yield here
        else:
            about = (self.served, self.workers, place, self.settings, self.logs)
            async with workers_beside(*about, progress.say, self.batch) as beside:
                yield beside

    async def _follow(
        self,
        place: Place,
        spool: Spool,
        journal: Journal,
        progress: Progress,
        lines: LineFile | None,
        hands: Hands | None,
    ) -> None:
        gathering = Gathering(self._flow, self._shared, spool)
        self.results = gathering.results
        reader, task = open_client(place.url), asyncio.current_task()
        follower = Follower(
            reader,
            spool.limit,
            spool.flow,
            self.batch,
            journal=journal,
            lease_s=self.settings.lease_s,
            say=progress.say,
        )
        try:
            async for ended in follower.news():
                if lines:
                    lines.catch_up()
                for each in ended:
                    self._take(gathering, each, progress)
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError  # Python 3.11's wait_for, under redis-py, can lose it
                failed = hands.failed if hands is not None else None
                if failed is not None and journal.pending:
                    raise failed
        finally:
            await reader.aclose()
        if lines:
            lines.catch_up()
        self.lost = follower.lost
        self.unrun = journal.pending - len(follower.lost)
        conflict = gathering.finish(follower.lost)
        if conflict is not None:
            progress.say(f"conflict: {conflict}")
        self.conflicts = gathering.conflicts

    def _take(self, gathering: Gathering, ended: Ended, progress: Progress) -> None:
        try:
            failed, conflict = gathering.take(ended)
        finally:
            progress.count(gathering.completed > self.completed)
            self.completed, self.failed = gathering.completed, gathering.failed
            self.refusals, self.successes = gathering.refusals, gathering.successes
        if failed is not None:
            self._show(failed, progress)
        if conflict is not None:
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


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def checked_weight(weight: object) -> float:
    """A weight that can hold.

    Raises:
        ProducerError: names the bounds.
    """
    if isinstance(weight, (int, float)) and not isinstance(weight, bool) and LIGHTEST <= weight <= HEAVIEST:
        return float(weight)
    raise ProducerError(f"weight={weight!r} cannot hold: use a number from {LIGHTEST:g} to {HEAVIEST:g}")
