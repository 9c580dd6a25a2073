"""The runs of one limit in this process: what its pump claims for and hands to."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from limiter.pump import Pump
from limiter.sync import MOST, Claimed
from worker.alone import AFTER_DEATHS, run_of
from worker.checkpoint import Saver
from worker.registry import ServedFlow
from worker.run import Run
from worker.store import Bases

if TYPE_CHECKING:
    from worker.fleet_worker import FleetWorker


log = logging.getLogger("pocketfleet.worker")

SLICE = 50


class Crew:
    """Serves the flows of one limit. Its worker decides how many runs there is room for.

    Attributes:
        asked: jobs asked for in the call that is in flight.
        wants: whether its last call was given all that it asked for, which may be nothing: then more jobs may
            wait, and the gate does not say so.
        fed: number of the worker's last answer that brought it jobs; the lowest has waited longest.
    """

    def __init__(self, worker: FleetWorker, pump: Pump, served: list[ServedFlow], client: Redis) -> None:
        self.pump = pump
        self.client = client
        self.bases = Bases(client)
        self.serves = {each.name: each for each in served}
        self.flows = [each.name for each in served]
        self.savers = {each.name: Saver(each) for each in served}
        self.asked = self.fed = 0
        self.wants = False
        self.runs: dict[str, Run] = {}
        self.show_traces = worker.show_traces
        self.children = worker.children
        self._worker = worker

    def room(self) -> int:
        self.asked = self._worker.room(self)
        return self.asked

    def take(self, jobs: list[Claimed], start_by: float, stamp: int) -> None:
        self.asked, self.wants = 0, len(jobs) >= min(self.asked, MOST)
        if jobs:
            self.fed = 1 + max(crew.fed for crew in self._worker.crews)
        runs = [
            run_of(self, claimed, start_by, stamp)
            if claimed.deaths >= AFTER_DEATHS
            else Run(self, claimed, start_by, stamp)
            for claimed in jobs
        ]
        for run in runs:
            self.runs[run.claimed.id] = run
            if self._worker.draining:  # told to stop while it asked: given back before it starts
                run.ending = "hand"
        self._start(runs)
        self._worker.offer()

    def unheard(self) -> None:
        self.asked, self.wants = 0, False
        self._worker.offer()

    def _start(self, runs: list[Run]) -> None:
        """Start a slice of the runs, the others a moment later, so that what ends at once is already on its
        way to the gate while the rest runs."""
        loop = asyncio.get_running_loop()
        for run in runs[:SLICE]:
            run.task = asyncio.Task(run.execute(), loop=loop)  # past the factory, which is for users' tasks
        if len(runs) > SLICE:
            loop.call_soon(self._start, runs[SLICE:])

    def lost(self, job: str) -> None:
        run = self.runs.get(job)
        if run is not None:
            run.stop("lost")

    def lease_lost(self) -> None:
        for run in list(self.runs.values()):
            run.lease_lost()

    def abort(self, job: str) -> None:
        """The batch of the attempt was cancelled: end the run at its next await."""
        run = self.runs.get(job)
        if run is not None:
            log.info("run.aborted job=%s", job)
            run.stop("aborted")

    def ended(self, run: Run) -> None:
        """Its place is free: the next call may ask for one job more."""
        if self.runs.get(run.claimed.id) is run:
            del self.runs[run.claimed.id]
            self.pump.kick()
            self._worker.offer()
