"""Who runs the jobs of a run: workers that are there, this process, or processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from limiter.connect import Place
from limiter.process import open_process
from producer.debugger import one_prompt
from producer.errors import WorkersError
from producer.local_workers import LocalWorkers
from producer.settings import ProducerSettings
from worker.fleet_worker import FleetWorker
from worker.registry import ServedFlow, said


class Hands(Protocol):
    """Whoever runs the jobs for this run."""

    @property
    def failed(self) -> WorkersError | None:
        """Why it cannot go on, once it cannot."""


@contextlib.asynccontextmanager
async def worker_here(place: Place, served: ServedFlow, settings: ProducerSettings) -> AsyncIterator[Hands]:
    """A worker in this process: full tracebacks, breakpoints work."""
    process = await open_process(place.url, lease_s=settings.lease_s, stall_limit_s=86_400.0)
    worker = FleetWorker(
        process, [served], max_jobs=settings.max_jobs, drain_s=settings.drain_s, show_traces=True
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


@contextlib.asynccontextmanager
async def workers_beside(
    served: ServedFlow,
    count: int,
    place: Place,
    settings: ProducerSettings,
    logs: Path,
    say: Callable[[str], None],
    batch: str,
) -> AsyncIterator[Hands]:
    """`count` worker processes on this host; they drain at the end, or leave at once where that is a fault."""
    workers = LocalWorkers(served.target, count, place.url, settings.data_dir, logs, say, batch)
    await workers.start()
    drain_s = 0.0
    try:
        yield workers
        drain_s = settings.drain_s
    finally:
        await workers.stop(drain_s)


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
