"""The worker's loop: serve flows until told to stop, then drain, then hand back what is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from redis.exceptions import RedisError

from limiter.keys import GateKeys
from limiter.process import Process
from worker.children import Children
from worker.contained import contained_tasks
from worker.crew import SLICE, Crew
from worker.presence import Presence
from worker.registry import ServedFlow
from worker.run import Run

log = logging.getLogger("pocketfleet.worker")

LOOK_S = 0.5
"""How often a burst worker that has nothing to do looks whether others still have."""
STOP_S = 5.0
"""How long `on_worker_stop` of a flow may take in a worker that was told to hurry."""


class FleetWorker:
    """Runs the jobs of `served` flows, at most `max_jobs` at a time.

    Args:
        drain_s: seconds runs may go on once told to stop; then they are handed back, not counted as tries.
        burst: end by itself when nothing of the flows waits or runs anywhere.
        show_traces: print the whole traceback of a run that fails.

    Attributes:
        starting: the flow whose `on_worker_start` runs, or has failed; None once all have begun.
    """

    def __init__(
        self,
        process: Process,
        served: list[ServedFlow],
        *,
        max_jobs: int,
        drain_s: float,
        burst: bool = False,
        show_traces: bool = False,
    ) -> None:
        self._process = process
        self._served = served
        self._max_jobs = max_jobs
        self._drain_s = drain_s
        self._burst = burst
        self.show_traces = show_traces
        self.draining = False
        self.starting: ServedFlow | None = None
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self.crews: list[Crew] = []
        self.children = Children()
        self.stopped = asyncio.Event()

    async def run(self) -> None:
        """Serve until `stop`, until cancelled, or, in burst, until there is nothing left anywhere."""
        try:
            with contained_tasks():
                await self._serve()
        finally:
            self.stopped.set()

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more jobs and let runs finish for `drain_s`, or not at all; then hand them back."""
        self.draining = True  # from this moment: what another worker hands back is not for us
        if at_once:
            self._hurry.set()
        self._stopping.set()

    def room(self, crew: Crew) -> int:
        """How many more runs `crew` may start: what is free and not asked for by others, and no more than its
        share while others want places too."""
        if self.draining:
            return 0
        free = self._max_jobs - self.running
        if len(self.crews) > 1:
            free -= sum(other.asked for other in self.crews if other is not crew)
            free = min(free, self._share(crew) - len(crew.runs))
        return max(0, free)

    def _share(self, crew: Crew) -> int:
        """An equal part of the places that are not taken by crews which want no more; what does not divide goes
        to those that got nothing for longest."""
        others = [other for other in self.crews if other is not crew]
        wanting = [other for other in others if other.wants]
        if not wanting:
            return self._max_jobs
        places = self._max_jobs - sum(len(other.runs) for other in others if not other.wants)
        ahead = sum(other.fed < crew.fed for other in wanting)
        return (places + len(wanting) - ahead) // (len(wanting) + 1)

    @property
    def running(self) -> int:
        return sum(len(crew.runs) for crew in self.crews)

    def offer(self) -> None:
        """Places have come free, or nobody asks for them any more: have the crews ask that want them."""
        if len(self.crews) > 1:
            for crew in self.crews:
                if crew.wants and not crew.asked and self.room(crew):
                    crew.pump.kick()

    async def _serve(self) -> None:
        for each in self._served:
            self.starting = each
            await _hook(each.flow.on_worker_start())
        self.starting = None
        presence = Presence(self._process, self._served, lambda: self.running)
        announcing = asyncio.create_task(presence.announce())
        try:
            self._employ()
            await self._until_stopped()
        finally:
            await see_through(self._end(presence, announcing), lambda: self.stop(at_once=True))

    def _employ(self) -> None:
        by_limit: dict[str, list[ServedFlow]] = {}
        for each in self._served:
            by_limit.setdefault(each.limits.name, []).append(each)
        for served in by_limit.values():
            pump = self._process.pump(served[0].limits)
            crew = Crew(self, pump, served, self._process.client)
            self.crews.append(crew)
            log.info("worker.serves limit=%s flows=%s", pump.name, ",".join(crew.flows))
        for crew in self.crews:
            crew.pump.employ(crew)

    async def _until_stopped(self) -> None:
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(LOOK_S if self._burst else None):
                    await self._stopping.wait()
            except TimeoutError:
                # while Redis is away nobody knows what is left there
                with contextlib.suppress(RedisError, OSError):
                    if await self._nothing_left():
                        return

    async def _nothing_left(self) -> bool:
        if self.running:
            return False
        for crew in self.crews:
            if crew.pump.answer is None or crew.pump.answer.reason != "jobs":
                return False
            keys = GateKeys(crew.pump.name)
            for flow in crew.flows:
                if await self._process.client.zcard(keys.queue(flow)):
                    return False
        return True

    async def _end(self, presence: Presence, announcing: asyncio.Task[None]) -> None:
        await self._drain()  # the crews stay employed: the last call must name the flows it stood idle for
        self.children.end()
        announcing.cancel()
        await presence.leave()
        for each in self._served:
            try:
                await self._let_close(each)
            except Exception:
                log.exception("worker.stop_hook_failed flow=%s", each.name)

    async def _let_close(self, served: ServedFlow) -> None:
        """Call `on_worker_stop`. Told to hurry, as by a second signal, a worker waits for it no longer than `STOP_S`."""
        closing = asyncio.create_task(_hook(served.flow.on_worker_stop()))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((closing, hurry), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((closing,), timeout=STOP_S)
        hurry.cancel()
        if not closing.done():
            closing.cancel()
            raise TimeoutError(f"it did not end within {STOP_S:g} s")
        closing.result()

    async def _drain(self) -> None:
        """Let runs finish for the grace, then hand them back; wait until the gate has heard."""
        self.draining = True
        for crew in self.crews:
            crew.pump.kick()
        if self.running:
            log.info("worker.drains running=%d for_s=%g", self.running, self._drain_s)
            await self._let_finish()
        for run in self._runs():
            log.info("run.handed_back job=%s", run.claimed.id)
            run.stop("hand")
        if tasks := self._tasks():
            await asyncio.wait(tasks, timeout=1.0 if self._hurry.is_set() else 5.0)

    async def _let_finish(self) -> None:
        for _ in range(1 + self.running // SLICE):
            await asyncio.sleep(0)  # the last slices of a claim start a moment later
        if not self._tasks():
            return
        hurry = asyncio.ensure_future(self._hurry.wait())
        finished = asyncio.ensure_future(asyncio.wait(self._tasks()))
        both: list[asyncio.Future[Any]] = [hurry, finished]
        await asyncio.wait(both, timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        for each in both:
            each.cancel()

    def _runs(self) -> list[Run]:
        return [run for crew in self.crews for run in crew.runs.values()]

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [run.task for run in self._runs() if run.task is not None]


async def _hook(call: Awaitable[None]) -> None:
    """Await what a hook of a flow does. A task that it has cancelled itself does not pass for our being cancelled."""
    try:
        await call
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("what it awaited was cancelled") from error


async def see_through(ending: Coroutine[Any, Any, None], hasten: Callable[[], None] = lambda: None) -> None:
    """Await `ending` to its end: cancelling the wait, as a second signal does, only calls `hasten`."""
    task = asyncio.create_task(ending)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            hasten()
    task.result()
