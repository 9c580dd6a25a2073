"""One flow run on a worker, from claimed job to recorded outcome."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from limiter.held import Waits, hold, let_go, waits
from limiter.sync import Claimed
from worker.clock import Clock
from worker.contract import (
    COMPLETED,
    FAILED,
    Failure,
    Job,
    Outcome,
    decode_job,
    encode_outcome,
    split_job_id,
)
from worker.difference import difference
from worker.failure import failure_of
from worker.guard import guard
from worker.keeping import Keeping
from worker.leaving import give_back_unstarted, give_up, go_back, leave_as_saved
from worker.output import end_lines, item
from worker.record import record, settle, travelling
from worker.refused import Refused
from worker.registry import ServedFlow
from worker.store import fresh_store
from worker.threads import RunThread
from worker.walk import NodeStep, walk

if TYPE_CHECKING:
    from worker.crew import Crew

log = logging.getLogger("pocketfleet.worker")

HOST = socket.gethostname()

Ending = Literal["", "hand", "lost", "refused", "aborted"]


class LeftTask(BaseException):
    """What left a task of user code was SystemExit or KeyboardInterrupt, its cause."""


class Run:
    """One attempt. `ending` says why it is being cancelled: handed back, no longer ours, or its batch is."""

    __slots__ = (
        "batch",
        "claimed",
        "clock",
        "crew",
        "ending",
        "first",
        "flow_number",
        "index",
        "keeping",
        "node",
        "pump",
        "recognise",
        "served",
        "shared",
        "start_by",
        "stamp",
        "started",
        "step",
        "task",
        "thread",
        "timings",
        "untouched",
        "waits",
    )

    def __init__(self, crew: Crew, claimed: Claimed, start_by: float, stamp: int) -> None:
        self.crew = crew
        self.pump = crew.pump
        self.claimed = claimed
        self.start_by = start_by
        self.stamp = stamp
        self.ending: Ending = ""
        self.node = ""
        self.started = False
        self.flow_number = 1
        self.served: ServedFlow | None = None
        self.shared: dict[Any, Any] = {}
        self.untouched: dict[Any, Any] = {}
        self.keeping: Keeping | None = None
        self.first: NodeStep | None = None
        self.step: NodeStep | None = None
        self.clock: Clock | None = None
        self.timings: list[tuple[str, float]] = []
        self.thread: RunThread | None = None
        self.task: asyncio.Task[None] | None = None
        self.waits = Waits()
        _, self.batch, self.index = split_job_id(claimed.id)

    def stop(self, ending: Ending) -> None:
        """End the run at its next await. A thread of it is waited for, and one that is handed back keeps
        what the node in its thread has done: it ends before the next node."""
        self.ending = ending
        self.waits.stop()
        if ending == "hand" and self.thread is not None and self.thread.busy:
            return
        if self.task is not None and self.started:
            self.task.cancel()

    def lease_lost(self) -> None:
        """The lease is down to its margin: the run ends now, if its flow wants that."""
        if not self.ending and self.served is not None and self.served.flow.on_lost_lease == "cancel":
            log.warning("run.cancelled job=%s node=%s: the lease is lost", self.claimed.id, self.node)
            self.stop("hand")

    async def execute(self) -> None:
        """Decode, walk, and record. Never raises; a job that is not recorded comes back by itself."""
        self.started = True
        try:
            base = await self._base()
            if self.ending or monotonic() > self.start_by:
                give_back_unstarted(self)
            else:
                item.set(f"{self.batch}:{self.index}")
                waits.set(self.waits)
                holding = hold((self.pump.name,), self)
                try:
                    await self._execute(base)
                finally:
                    let_go(holding)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and self.ending:
                leave_as_saved(self)  # stopped while it was on its way to the gate
                return
            # past the guards below only a fault of ours arrives; the job must not stay claimed for ever
            log.exception("run.fault job=%s", self.claimed.id)
            settle(self, FAILED, encode_outcome(Outcome(FAILED, failure=failure_of(error, self.node))))
        finally:
            try:
                end_lines()
            finally:
                self.crew.ended(self)

    async def _base(self) -> bytes:
        """The batch's base, before the start is checked: its first runs wait for Redis and could be late."""
        known = self.crew.bases.known(self.pump.name, self.batch)
        if known is not None:
            return known
        try:
            return await self.crew.bases.base(self.pump.name, self.batch)
        except asyncio.CancelledError:
            if self.ending:
                return b""
            raise

    async def _execute(self, base: bytes) -> None:
        started = time.time()
        try:
            job = decode_job(self.claimed.payload)
            served = self.served = self.crew.serves[job.flow]
        except (msgspec.DecodeError, IndexError, KeyError):
            failure = Failure("CorruptJob", "the job's payload is not one of PocketFleet's; it was not run")
            corrupt = Outcome(FAILED, failure=failure, host=HOST, started=started, ended=started)
            settle(self, FAILED, encode_outcome(corrupt))
            return
        self.recognise = served.recognise
        if len(self.crew.flows) > 1:
            self.flow_number = self.crew.flows.index(job.flow) + 1
            self.pump.of_flow(self.claimed.id, self.flow_number)
        self.untouched = fresh_store(base)
        if self.claimed.saved or self.crew.savers[job.flow].saves:
            self.keeping = Keeping(self, self.crew.savers[job.flow], self.untouched)
        outcome: Outcome | None
        try:
            outcome = await self._outcome(served, job, base)
            await self._end_thread()
        except Refused as refused:
            await self._end_thread()
            outcome = await go_back(self, served, refused)
        if outcome is None:
            await give_up(self, served)
            return
        outcome.difference, outcome.left_behind = difference(self.untouched, self.shared)
        outcome.nodes, outcome.retry = self.timings, job.retry
        if self.claimed.deaths or self.claimed.refusals or self.claimed.hand_backs:
            keeping = self.kept(served)
            outcome.attempts = attempts_of(self.claimed, keeping.counted.died_alone)
            outcome.notes = [keeping.note] if keeping.note else []
        outcome.host, outcome.started, outcome.ended = HOST, started, time.time()
        await record(self, outcome, served, job)

    async def _outcome(self, served: ServedFlow, job: Job, base: bytes) -> Outcome | None:
        """Walk the graph, from where it was left; None if the run was stopped before its end.

        Raises:
            Refused: the protected API refused the run.
        """
        try:
            if self.claimed.saved:
                self.shared, start = await self.kept(served).begin(base, job)
            else:
                self.shared, start = fresh_store(base), None
            if served.flow.flow_timeout_s is not None:
                self.clock = Clock(served.flow.flow_timeout_s, asyncio.current_task())
            try:
                action = await walk(
                    served.flow,
                    job.params,
                    self.shared,
                    before_node=self._before_node,
                    sync_runner=None if served.flow.inline_sync_nodes else self._in_thread,
                    timings=self.timings,
                    start=start,
                )
            finally:
                if self.clock is not None:
                    self.clock.stop()
            self.pump.succeed(self.claimed.attempt)
            return Outcome(COMPLETED, travelling(action))
        except Refused:
            raise
        except BaseException as error:
            if self.ending:  # whatever user code made of the cancellation
                return None
            if self.clock is not None and self.clock.ran_out:
                return Outcome(FAILED, failure=self.clock.failure(self.node))
            if isinstance(error, LeftTask) and error.__cause__ is not None:
                error = error.__cause__
            hit = self.recognise(error)
            if hit is not None:
                raise Refused(hit) from error
            # SystemExit and KeyboardInterrupt of user code end only this run
            if self.crew.show_traces:
                traceback.print_exception(error)
            return Outcome(FAILED, failure=failure_of(error, self.node))

    async def _before_node(self, step: NodeStep) -> None:
        """The fence: no node starts unless the run is saved, the lease surely holds and the run is ours."""
        if self.clock is not None:
            self.clock.stop()
        first = self.step is None
        if self.step is None:
            self.first = step
        elif self.step.part == "node":
            self.pump.succeed(self.claimed.attempt)  # the node before this one has ended well
        self.step = step
        self.node = type(step.node).__name__
        keeping = self.keeping
        if keeping is not None:
            if first:
                keeping.step = step
            elif keeping.saves:
                saving = keeping.before(step, self.shared)
                if saving is not None:
                    await saving
        while not self.pump.safe:
            await self.pump.contact()
        if self.ending or (self.clock is not None and self.clock.ran_out):
            raise asyncio.CancelledError
        if step.part == "node":
            resumed = keeping.resumed if first and keeping is not None else None
            if resumed is not None and resumed.returned:
                guard(
                    step.node,
                    recognise=self.recognise,
                    returned=resumed.returned,
                    items_digest=resumed.items_digest,
                )
            else:
                guard(step.node, recognise=self.recognise)
        if self.clock is not None:
            self.clock.start()

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        if self.thread is None:
            self.thread = RunThread(f"run-{self.batch}:{self.index}")
        return await self.thread.call(function, *args)

    async def _end_thread(self) -> None:
        """A slot is counted until its thread has really ended, also when the run was stopped."""
        thread = self.thread
        if thread is None:
            return
        while True:
            try:
                await thread.wait_ended()
                return
            except asyncio.CancelledError:
                continue

    def kept(self, served: ServedFlow) -> Keeping:
        """The run's checkpoints; most runs of one node never need them."""
        if self.keeping is None:
            self.keeping = Keeping(self, self.crew.savers[served.name], self.untouched)
            self.keeping.step = self.first
        return self.keeping


def attempts_of(claimed: Claimed, died_alone: int = 0) -> dict[str, int]:
    """How often a run was begun, by what ended it; nothing for one that was begun once."""
    if not (claimed.deaths or claimed.refusals or claimed.hand_backs):
        return {}
    counts = {
        "tries": 1 + died_alone,
        "deaths": claimed.deaths,
        "refusals": claimed.refusals,
        "hand_backs": claimed.hand_backs,
    }
    return {kind: count for kind, count in counts.items() if count}
