"""One flow run on a worker, from claimed job to recorded outcome."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import socket
import time
import traceback
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from limiter.refusal import recognised
from limiter.sync import Claimed, Entry
from worker.checkpoint import Checkpoint, read_checkpoint, store_of, where_to_go_on, written
from worker.contract import COMPLETED, FAILED, Failure, Job, Outcome, decode_job, encode_outcome, split_job_id
from worker.difference import difference
from worker.failure import failure_of
from worker.guard import Refused, guard
from worker.record import record, settle, travelling
from worker.registry import ServedFlow
from worker.store import fresh_store
from worker.threads import RunThread
from worker.walk import NodeStep, walk

if TYPE_CHECKING:
    from limiter.pump import Pump
    from worker.crew import Crew

log = logging.getLogger("pocketfleet.worker")

HOST = socket.gethostname()
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0

item: contextvars.ContextVar[str] = contextvars.ContextVar("pocketfleet_item", default="")
"""Batch item of the run that is speaking, for prefixes of prints and logs."""

Ending = Literal["", "hand", "lost", "refused"]


class Run:
    """One attempt. `ending` says why it is being cancelled: handed back, or no longer ours."""

    __slots__ = (
        "batch",
        "claimed",
        "crew",
        "ending",
        "index",
        "kept",
        "node",
        "params",
        "start_by",
        "stamp",
        "started",
        "step",
        "task",
        "thread",
    )

    def __init__(self, crew: Crew, claimed: Claimed, start_by: float, stamp: int) -> None:
        self.crew = crew
        self.claimed = claimed
        self.start_by = start_by
        self.stamp = stamp
        self.ending: Ending = ""
        self.node = ""
        self.started = False
        self.step: NodeStep | None = None
        self.params: dict[str, Any] = {}
        self.kept: Checkpoint | None = None
        self.thread: RunThread | None = None
        self.task: asyncio.Task[None] | None = None
        _, self.batch, self.index = split_job_id(claimed.id)

    @property
    def pump(self) -> Pump:
        return self.crew.pump

    def stop(self, ending: Ending) -> None:
        """End the run at its next await; a thread of it is waited for."""
        self.ending = ending
        if self.task is not None and self.started:
            self.task.cancel()

    async def execute(self) -> None:
        """Decode, walk, and record. Never raises; a job that is not recorded comes back by itself."""
        self.started = True
        try:
            base = await self._base()
            if self.ending or monotonic() > self.start_by:
                self._give_back_unstarted()
            else:
                item.set(f"{self.batch}:{self.index}")
                await self._execute(base)
        except BaseException as error:
            # past the guards below only a fault of ours arrives; the job must not stay claimed for ever
            log.exception("run.fault job=%s", self.claimed.id)
            settle(self, FAILED, encode_outcome(Outcome(FAILED, failure=failure_of(error, self.node))))
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
            served = self.crew.serves[job.flow]
        except (msgspec.DecodeError, IndexError, KeyError):
            failure = Failure("CorruptJob", "the job's payload is not one of PocketFleet's; it was not run")
            corrupt = Outcome(FAILED, failure=failure, host=HOST, started=started, ended=started)
            settle(self, FAILED, encode_outcome(corrupt))
            return
        if len(self.crew.flows) > 1:
            self.pump.of_flow(self.claimed.id, self.crew.flows.index(job.flow) + 1)
        timings: list[tuple[str, float]] = []
        self.kept = read_checkpoint(self.claimed.saved)
        shared = fresh_store(base)
        outcome: Outcome | None
        try:
            outcome = await self._outcome(served, job, shared, timings)
            await self._end_thread()
        except Refused as refused:
            await self._end_thread()
            outcome = self._go_back(served, refused, fresh_store(base), shared)
        if outcome is None:
            self._give_up(served, fresh_store(base), shared)
            return
        outcome.difference, outcome.left_behind = difference(fresh_store(base), shared)
        outcome.nodes = timings
        outcome.attempts = self._attempts()
        outcome.host, outcome.started, outcome.ended = HOST, started, time.time()
        await record(self, outcome, served, job)

    async def _outcome(
        self,
        served: ServedFlow,
        job: Job,
        shared: dict[Any, Any],
        timings: list[tuple[str, float]],
    ) -> Outcome | None:
        """Walk the graph, from where it was left; None if the run was stopped before its end.

        Raises:
            Refused: the protected API refused the run.
        """
        params = job.params
        start = where_to_go_on(served.flow, self.kept) if self.kept is not None else None
        if self.kept is not None and start is not None:
            params = self.kept.params
            store_of(shared, self.kept)
        else:
            self.kept = None
        try:
            action = await walk(
                served.flow,
                params,
                shared,
                before_node=self._before_node,
                sync_runner=None if served.flow.inline_sync_nodes else self._in_thread,
                timings=timings,
                start=start or (),
            )
            self.pump.succeed(self.claimed.attempt)
            return Outcome(COMPLETED, travelling(action))
        except Refused:
            raise
        except asyncio.CancelledError as error:
            if self.ending:
                return None
            return Outcome(FAILED, failure=failure_of(error, self.node))
        except BaseException as error:
            hit = recognised(error)
            if hit is not None:
                raise Refused(hit) from error
            # SystemExit and KeyboardInterrupt of user code end only this run
            if self.crew.show_traces:
                traceback.print_exception(error)
            return Outcome(FAILED, failure=failure_of(error, self.node))

    async def _before_node(self, step: NodeStep) -> None:
        """The fence: no node starts unless the lease surely holds and the run is still ours."""
        if self.step is not None and self.step.part == "node":
            self.pump.succeed(self.claimed.attempt)  # the node before this one has ended well
        self.step = step
        self.node = type(step.node).__name__
        if step.parent is None:
            self.params = step.node.params
        while not self.pump.safe:
            await self.pump.contact()
        if self.ending:
            raise asyncio.CancelledError
        if step.part == "node":
            kept, self.kept = self.kept, None
            if kept is not None and kept.returned:
                guard(step.node, recognise=recognised, returned=kept.returned, items_digest=kept.items_digest)
            else:
                guard(step.node, recognise=recognised)

    def _go_back(
        self, served: ServedFlow, refused: Refused, base: dict[Any, Any], shared: dict[Any, Any]
    ) -> Outcome | None:
        """A refused run goes back to its place and resumes there; it is not a failure and not a try."""
        hit, answer = refused.hit, self.pump.answer
        now_s = answer.now / 1e6 if answer else 0.0
        before = read_checkpoint(self.claimed.saved)
        refused_at = before.refused_at if before and before.refused_at else now_s
        forgiven_s = (before.forgiven_s if before else 0.0) + (hit.retry_after or 0.0)
        self.pump.refuse(self.claimed.attempt, hit.retry_after or 0.0)
        if now_s - refused_at - forgiven_s > served.flow.refusal_patience_s:
            for_s = served.flow.refusal_patience_s
            text = f"refused for longer than refusal_patience_s={for_s:g}: {hit}"
            return Outcome(FAILED, failure=Failure("RateLimitHit", text[:2000], self.node))
        delay_s = hit.retry_after or min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(self.claimed.refusals, 10))
        if not hit.retry_after:
            delay_s *= random.uniform(0.5, 1.0)
        first = self._save(served, base, shared, refused, refused_at, forgiven_s)
        log.info("run.refused job=%s node=%s again_in_s=%.1f", self.claimed.id, self.node, delay_s)
        settle(self, "refuse", round(delay_s * 1e6), first)
        self.ending = "refused"
        return None

    def _save(
        self,
        served: ServedFlow,
        base: dict[Any, Any],
        shared: dict[Any, Any],
        refused: Refused | None = None,
        refused_at: float = 0.0,
        forgiven_s: float = 0.0,
    ) -> Entry | None:
        """The entry that keeps where the run stopped; None if it had not begun."""
        if self.step is None:
            return None
        data = written(served.flow, self.step, base, shared, self.params, refused, refused_at, forgiven_s)
        return Entry(self.claimed.id, self.claimed.attempt, 1, "save", data)

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

    def _attempts(self) -> dict[str, int]:
        claimed = self.claimed
        if not (claimed.deaths or claimed.refusals or claimed.hand_backs):
            return {}
        counts = {"deaths": claimed.deaths, "refusals": claimed.refusals, "hand_backs": claimed.hand_backs}
        return {kind: count for kind, count in counts.items() if count}

    def _give_back_unstarted(self) -> None:
        if self.ending != "lost":
            entry = Entry(self.claimed.id, self.claimed.attempt, 1, "back")
            self.pump.return_job(entry, self.stamp, late=not self.ending)

    def _give_up(self, served: ServedFlow, base: dict[Any, Any], shared: dict[Any, Any]) -> None:
        if self.ending == "hand":
            before = read_checkpoint(self.claimed.saved) or Checkpoint([], [])
            kept = self._save(
                served, base, shared, refused_at=before.refused_at, forgiven_s=before.forgiven_s
            )
            settle(self, "hand", first=kept)
