"""A batch from its enqueue to its last outcome: who runs its jobs, what they give, how it ends when stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.client import open_client
from limiter.connect import Place
from producer.aside import aside
from producer.cancel import cancel, withdraw
from producer.errors import FlowFailed
from producer.follow import Ended
from producer.follower import Follower
from producer.gathering import ConflictError, Gathering
from producer.hands import Hands, worker_here, workers_beside
from producer.journal import Journal
from producer.line_file import LineFile, check_output
from producer.progress import Progress
from producer.spool import Spool
from producer.who_runs import others_first, unserved

if TYPE_CHECKING:
    from producer.fleet_run import FleetRun

SHOWN_FAILURES = 10
WITHDRAW_S = 30.0


class Supervision:
    """Supervises the batch of one `FleetRun`, and writes into it what became of the items."""

    def __init__(self, run: FleetRun, client: Redis, place: Place, spool: Spool, journal: Journal) -> None:
        self._run = run
        self._client = client
        self._place = place
        self._spool = spool
        self._journal = journal
        self._lines = self._own_file(run.output) if run.output else None
        self._progress = Progress(
            run.served.name,
            run.served.limits.name,
            spool.count,
            shown=run.live,
            live=run.workers != 0,
            workers=run.workers or 0,
        )

    def _own_file(self, path: Path) -> LineFile:
        """The output file; another run that named it may have written since it was checked first."""
        check_output(path, self._run.settings.data_dir, self._run.batch)
        return LineFile(path, self._spool, self._journal)

    async def go(self) -> None:
        """Enqueue what is missing and follow it to its end; the journal has caught up with Redis."""
        run, progress = self._run, self._progress
        run.was_over = run.is_over(self._journal)
        began = time.monotonic()
        try:
            async with self._hands() as hands:
                progress.start(self._client)
                try:
                    if not run.was_over:
                        if run.workers is not None:
                            await self._say_what_runs_first()
                        await run.forecast(self._client, self._spool, self._journal, progress.say)
                    await self._do(hands)
                finally:
                    run.seconds = time.monotonic() - began
                    await progress.stop()
        finally:
            if self._lines:
                self._lines.close()

    @contextlib.asynccontextmanager
    async def _hands(self) -> AsyncIterator[Hands | None]:
        """Whoever runs the jobs: workers that are there, this process, or processes of our own."""
        run = self._run
        if run.workers is None or run.was_over:
            yield None
        elif run.workers == 0:
            async with worker_here(self._place, run.served, run.settings) as here:
                yield here
        else:
            about = (run.served, run.workers, self._place, run.settings, run.logs)
            async with workers_beside(*about, self._progress.say, run.batch) as beside:
                yield beside

    async def _say_what_runs_first(self) -> None:
        """Before the first item is out: our own workers run what earlier batches left."""
        served = self._run.served
        said = await others_first(self._client, served.limits.name, served.name, self._run.batch)
        if said:
            self._progress.say(said)

    async def _say_who_runs(self) -> None:
        """A remark only: the first items are on their way meanwhile, and a Redis that is away ends nothing here."""
        served = self._run.served
        with contextlib.suppress(RedisError, OSError):
            said = await unserved(self._client, served.name, served.limits.name, served.target)
            if said:
                self._progress.say(said)

    async def _do(self, hands: Hands | None) -> None:
        run = self._run
        try:
            await self._enqueue_and_follow(hands)
        except ConflictError:
            await self._end_batch(everything=True)
            raise
        except asyncio.CancelledError as stopped:
            if run.workers is None:
                self._leave_running(stopped)
            else:
                await self._end_batch(everything=False)
            raise
        except BaseException:
            if run.workers is not None:
                await self._end_batch(everything=False)
            raise

    async def _enqueue_and_follow(self, hands: Hands | None) -> None:
        """Both at once: a batch that waits for room in Redis gets it from what has ended."""
        announced = asyncio.Event()
        self._progress.on_enqueued = announced.set
        sending = asyncio.create_task(
            self._run.enqueue_missing(self._client, self._spool, self._journal, self._progress)
        )
        sending.add_done_callback(lambda _: announced.set())
        beside: list[asyncio.Task[None]] = [sending]
        try:
            await announced.wait()
            if self._run.workers is None and not self._run.was_over:
                beside.append(asyncio.create_task(self._say_who_runs()))
            self._progress.before = self._spool.count - self._journal.pending
            await self._follow(hands, sending)
            await sending
        finally:
            for task in beside:
                while not task.done():
                    task.cancel()  # Python 3.11 can lose one in a call to Redis
                    await asyncio.wait([task], timeout=1.0)

    # --- stopped -----------------------------------------------------------------------------------

    def _leave_running(self, stopped: asyncio.CancelledError) -> None:
        """Who follows is gone; the fleet's workers go on."""
        batch = self._run.batch
        words = f"batch {batch} goes on without us; follow it: pocketfleet batch wait {batch}"
        stopped.add_note(words)
        aside(words)

    async def _end_batch(self, *, everything: bool) -> None:
        """Leave nothing behind that other workers would run unasked: what never began leaves the queue."""
        spool = self._spool
        about = (self._client, spool.limit, spool.flow, spool.batch, spool.count)
        ending = cancel(*about) if everything else withdraw(*about)
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await asyncio.shield(asyncio.wait_for(ending, WITHDRAW_S))

    # --- outcomes ----------------------------------------------------------------------------------

    async def _follow(self, hands: Hands | None, sending: asyncio.Task[None]) -> None:
        gathering = Gathering(self._run.flow, self._run.shared, self._spool)
        self._run.results = gathering.results
        reader, task = open_client(self._place.url), asyncio.current_task()
        follower = self._follower(reader, sending)
        try:
            async for ended in follower.news():
                if self._lines:
                    self._lines.catch_up()
                for each in ended:
                    self._take(gathering, each)
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError  # Python 3.11's wait_for, under redis-py, can lose it
                if sending.done():
                    sending.result()  # raises what stopped it
                failed = hands.failed if hands is not None else None
                if failed is not None and self._journal.pending:
                    raise failed
        finally:
            await reader.aclose()
        if self._lines:
            self._lines.catch_up()
        self._finish(gathering, follower.lost)

    def _follower(self, reader: Redis, sending: asyncio.Task[None]) -> Follower:
        return Follower(
            reader,
            self._spool.limit,
            self._spool.flow,
            self._run.batch,
            journal=self._journal,
            lease_s=self._run.settings.lease_s,
            say=self._progress.say,
            grows=lambda: not sending.done(),
        )

    def _take(self, gathering: Gathering, ended: Ended) -> None:
        run = self._run
        try:
            failed, conflict = gathering.take(ended)
        finally:
            self._progress.counted(gathering.completed, gathering.failed)
            run.completed, run.failed = gathering.completed, gathering.failed
            run.refusals, run.successes = gathering.refusals, gathering.successes
        if failed is not None:
            self._show(failed)
        if conflict is not None:
            self._progress.say(f"conflict: {conflict}")

    def _show(self, failed: FlowFailed) -> None:
        """The first failures, as they come; the rest is in the output file."""
        run, say = self._run, self._progress.say
        if not run.live or run.failed > SHOWN_FAILURES:
            return
        say(str(failed).replace(f"item {failed.index}", f"[item {failed.index}]", 1))
        if run.failed == SHOWN_FAILURES:
            say("further failures are not shown here" + (f": see {run.output}" if run.output else ""))

    def _finish(self, gathering: Gathering, lost: list[int]) -> None:
        run = self._run
        told = gathering.conflicts
        if gathering.replaced:
            gathering = self._gathered_anew()
        run.lost = lost
        run.unrun = self._journal.pending - len(lost)
        conflict = gathering.finish(lost)
        if conflict is not None and not told:
            self._progress.say(f"conflict: {conflict}")
        run.conflicts = gathering.conflicts
        for key in sorted(gathering.kept_local, key=repr):
            self._progress.say(
                f"the caller's shared[{key!r:.80}] stays as it is: the store that the batch was enqueued with "
                "has no such entry (local_keys, or set since), so what runs wrote there is in the output lines only"
            )

    def _gathered_anew(self) -> Gathering:
        """From what counts: what a run changed that was retried since is not among it."""
        run = self._run
        gathering = Gathering(run.flow, run.shared, self._spool)
        for ended in self._journal.latest():
            gathering.take(ended)
        run.results = gathering.results
        run.completed, run.failed = gathering.completed, gathering.failed
        return gathering
