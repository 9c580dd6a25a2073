"""One flow run on a worker, from claimed job to recorded outcome."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import socket
import time
import traceback
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from arq.jobs import serialize_result
from redis.exceptions import RedisError

from limiter.keys import GateKeys
from limiter.sync import Claimed, Entry
from worker import codec
from worker.codec import CannotTravel, travels
from worker.contract import (
    COMPLETED,
    FAILED,
    Failure,
    Job,
    Outcome,
    decode_job,
    encode_outcome,
    queue_key,
    split_job_id,
)
from worker.difference import difference
from worker.failure import failure_of
from worker.registry import ServedFlow
from worker.store import fresh_store
from worker.threads import RunThread
from worker.walk import NodeStep, walk

if TYPE_CHECKING:
    from limiter.pump import Pump
    from worker.crew import Crew

log = logging.getLogger("pocketfleet.worker")

HOST = socket.gethostname()
LARGE = 64 * 1024
"""An outcome above that many bytes is stored beside the call and only named in it."""
BLOB_MS = 7 * 24 * 3600 * 1000

item: contextvars.ContextVar[str] = contextvars.ContextVar("pocketfleet_item", default="")
"""Batch item of the run that is speaking, for prefixes of prints and logs."""

Ending = Literal["", "hand", "lost"]


class Run:
    """One attempt. `ending` says why it is being cancelled: handed back, or no longer ours."""

    __slots__ = (
        "batch",
        "claimed",
        "crew",
        "ending",
        "index",
        "node",
        "start_by",
        "stamp",
        "started",
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
            if self.ending or monotonic() > self.start_by:
                self._give_back_unstarted()
            else:
                item.set(f"{self.batch}:{self.index}")
                await self._execute()
        except BaseException as error:
            # past the guards below only a fault of ours arrives; the job must not stay claimed for ever
            log.exception("run.fault job=%s", self.claimed.id)
            self._settle(Outcome(FAILED, failure=failure_of(error, self.node)), None)
        finally:
            self.crew.ended(self)

    async def _execute(self) -> None:
        started = time.time()
        try:
            job = decode_job(self.claimed.payload)
            served = self.crew.serves[job.flow]
        except (msgspec.DecodeError, IndexError, KeyError):
            failure = Failure("CorruptJob", "the job's payload is not one of PocketFleet's; it was not run")
            self._settle(Outcome(FAILED, failure=failure, host=HOST, started=started, ended=started), None)
            return
        if len(self.crew.flows) > 1:
            self.pump.of_flow(self.claimed.id, self.crew.flows.index(job.flow) + 1)
        timings: list[tuple[str, float]] = []
        outcome = await self._outcome(served, job, timings)
        await self._end_thread()
        if outcome is None:
            self._give_up()
            return
        outcome.nodes = timings
        outcome.attempts = self._attempts()
        outcome.host, outcome.started, outcome.ended = HOST, started, time.time()
        await self._record(outcome, served, job)

    async def _outcome(
        self, served: ServedFlow, job: Job, timings: list[tuple[str, float]]
    ) -> Outcome | None:
        """Walk the graph; None if the run was stopped before its end."""
        try:
            base = self.crew.bases.known(self.pump.name, self.batch)
            if base is None:
                base = await self.crew.bases.base(self.pump.name, self.batch)
            shared = fresh_store(base)
            action = await walk(
                served.flow,
                job.params,
                shared,
                before_node=self._before_node,
                sync_runner=None if served.flow.inline_sync_nodes else self._in_thread,
                timings=timings,
            )
            changed, left_behind = difference(fresh_store(base), shared)
            self.pump.succeed(self.claimed.attempt)
            return Outcome(COMPLETED, _travelling(action), changed or None, left_behind=left_behind)
        except asyncio.CancelledError as error:
            if self.ending:
                return None
            return Outcome(FAILED, failure=failure_of(error, self.node))
        except BaseException as error:  # SystemExit and KeyboardInterrupt of user code end only this run
            if self.crew.show_traces:
                traceback.print_exception(error)
            return Outcome(FAILED, failure=failure_of(error, self.node))

    async def _before_node(self, step: NodeStep) -> None:
        """The fence: no node starts unless the lease surely holds and the run is still ours."""
        self.node = type(step.node).__name__
        while not self.pump.safe:
            await self.pump.contact()
        if self.ending:
            raise asyncio.CancelledError

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

    def _give_up(self) -> None:
        if self.ending == "hand":
            self.pump.settle(Entry(self.claimed.id, self.claimed.attempt, 1, "hand"))

    async def _record(self, outcome: Outcome, served: ServedFlow, job: Job) -> None:
        result = self._arq_result(outcome, served, job) if served.flow.keep_result_s > 0 else None
        data = encode_outcome(outcome)
        if len(data) <= LARGE:
            self._settle(outcome, result, data)
            return
        await self._store_blob(data)
        self._settle(outcome, result, b"", "blob:")

    async def _store_blob(self, data: bytes) -> None:
        key = GateKeys(self.pump.name).blob(self.batch, self.index, self.claimed.attempt)
        pause_s = 0.05
        while True:
            try:
                await self.crew.client.set(key, data, px=BLOB_MS)
                return
            except (RedisError, OSError):
                await asyncio.sleep(pause_s)
                pause_s = min(1.0, pause_s * 2)

    def _settle(
        self, outcome: Outcome, result: Entry | None, data: bytes | None = None, how: str = ""
    ) -> None:
        number = self.crew.flow_number(self.claimed.id)
        payload = encode_outcome(outcome) if data is None else data
        entry = Entry(self.claimed.id, self.claimed.attempt, number, how + outcome.status, payload)
        if result is None:
            self.pump.settle(entry)
        else:
            self.pump.settle(entry, result)

    def _arq_result(self, outcome: Outcome, served: ServedFlow, job: Job) -> Entry | None:
        """arq's own result record, for `Job.result()`: the last action, or the failure as text."""
        failure = outcome.failure
        record = serialize_result(
            function=served.name,
            args=(job.params,),
            kwargs={},
            job_try=1,
            enqueue_time_ms=job.enqueue_ms,
            success=failure is None,
            result=outcome.action if failure is None else f"{failure.type}: {failure.message}",
            start_ms=round(outcome.started * 1000),
            finished_ms=round(outcome.ended * 1000),
            ref=self.claimed.id,
            queue_name=queue_key(self.pump.name, served.name),
            job_id=self.claimed.id,
            serializer=codec.encode,
        )
        how = f"result:{round(served.flow.keep_result_s * 1000)}"
        return Entry(self.claimed.id, self.claimed.attempt, 1, how, record) if record else None


def _travelling(action: Any) -> Any:
    """The last action if it can travel: actions are mostly text or None."""
    if action is None or type(action) is str:
        return action
    try:
        travels(action)
    except CannotTravel:
        return None
    return action
