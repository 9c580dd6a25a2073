"""The checkpoints of one run: where it begins, what is written between its nodes, what it goes back with."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from limiter.keys import GateKeys
from limiter.sync import Entry
from worker.checkpoint import MOST_BYTES, CannotSave, Checkpoint, Saver, encode_checkpoint, read_checkpoint
from worker.contract import Job, decode_job
from worker.record import LARGE, fetch, save_entry
from worker.refused import Refused
from worker.store import fresh_store
from worker.walk import NodeStep, Start

if TYPE_CHECKING:
    from worker.run import Run

log = logging.getLogger("pocketfleet.worker")

BESIDE = b"beside"
NEW = Checkpoint()
NOTHING = b"\xc1"
"""What no encoder writes."""


class Keeping:
    """Keeps one run of a flow.

    Attributes:
        counted: what earlier attempts counted (when it was first refused and so on); not to be changed.
        saves: whether it is saved before each node but the first.
        step: the node before which it was last saved, or with which it began.
        resumed: the checkpoint it began with, if it did; its batch node's items are in it.
        note: why it started over although it had been saved; '' if it did not.
    """

    __slots__ = ("_base", "_last", "_run", "_saver", "counted", "note", "resumed", "saves", "step")

    def __init__(self, run: Run, saver: Saver, base: dict[Any, Any]) -> None:
        self._run = run
        self._saver = saver
        self.saves = saver.saves
        self._base = base
        self._last = b""  # the run as it stood before `step`; b'' = at its very beginning
        self.step: NodeStep | None = None
        self.counted = NEW
        self.resumed: Checkpoint | None = None
        self.note = ""

    async def begin(self, base: bytes, job: Job) -> tuple[dict[Any, Any], Start | None]:
        """The run's store and where it begins, None for the graph's start. Puts saved params into `job`."""
        data = self._run.claimed.saved
        if data == BESIDE:
            key = GateKeys(self._run.pump.name).kept(self._run.batch, self._run.index)
            data = await fetch(self._run, key) or NOTHING
        kept = read_checkpoint(data)
        self.counted = kept or self.counted
        if kept is not None and not kept.path:
            return fresh_store(base), None
        start = self._saver.start_of(kept) if kept is not None else None
        if kept is None or start is None:
            why = "cannot be read" if kept is None else "was made with another graph of the flow"
            return self._start_over(base, f"its checkpoint {why}")
        shared = fresh_store(base)
        try:
            self._saver.restore(shared, kept)
        except Exception as error:  # the user's own load_entry
            return self._start_over(base, f"load_entry failed: {type(error).__name__}")
        self._last, self.resumed = data, kept
        job.params = job.params if kept.params is None else kept.params
        return shared, start

    def _start_over(self, base: bytes, why: str) -> tuple[dict[Any, Any], None]:
        self.note = f"started over: {why}"
        log.warning("run.starts_over job=%s flow=%s: %s", self._run.claimed.id, self._saver.name, why)
        return fresh_store(base), None

    def before(self, step: NodeStep, shared: dict[Any, Any]) -> Awaitable[None] | None:
        """Write where the run stands before it does `step`; None where it cannot be written.

        Done once the gate has it, and then the run is still ours, or it has been cancelled.
        """
        try:
            data = self._encoded(self._written(step, shared))
        except CannotSave as why:
            self._saver.warn(str(why))
            self.saves = False
            return None
        run, self._last, self.step = self._run, data, step
        if len(data) > LARGE:
            return self._save_large(data)
        return run.pump.save(Entry(run.claimed.id, run.claimed.attempt, run.flow_number, "save", data))

    async def _save_large(self, data: bytes) -> None:
        await self._run.pump.save(await save_entry(self._run, data))

    async def refused(self, step: NodeStep | None, shared: dict[Any, Any], refused: Refused) -> Entry:
        """What a refused run goes back with: as it stood before the node, and the items that had returned."""
        kept = self._at(step, shared)
        same_step = kept is not None or step is self.step
        kept = kept or read_checkpoint(self._last) or self._saver.fresh()
        kept.with_counts_of(self.counted).refused(refused if same_step else None)
        try:
            data = self._encoded(kept)
        except CannotSave:
            data = encode_checkpoint(Checkpoint().with_counts_of(self.counted))
        return await save_entry(self._run, data)

    async def handed_back(self, step: NodeStep | None, shared: dict[Any, Any]) -> Entry | None:
        """What a run that is handed back brings; None if what stands with the gate is the latest."""
        kept = self._at(step, shared)
        if kept is None:
            return None
        try:
            return await save_entry(self._run, self._encoded(kept.with_counts_of(self.counted)))
        except CannotSave:
            return None

    def _at(self, step: NodeStep | None, shared: dict[Any, Any]) -> Checkpoint | None:
        """The run as it stands now; None where it was saved before the node, or has not got beyond the first.

        Only a flow with `checkpoint=False` is saved as late as this.
        """
        if self._saver.saves or step is None or step is self.step:
            return None
        try:
            return self._written(step, shared)
        except CannotSave as why:
            self._saver.warn(str(why))
            return None

    def _written(self, step: NodeStep, shared: dict[Any, Any]) -> Checkpoint:
        payload = self._run.claimed.payload
        # small params are written each time: cheaper than to see whether a node changed them
        params = decode_job(payload).params if len(payload) > 1024 else None
        kept = self._saver.written(step, self._base, shared, params)
        return kept if self.counted is NEW else kept.with_counts_of(self.counted)

    @staticmethod
    def _encoded(kept: Checkpoint) -> bytes:
        data = encode_checkpoint(kept)
        if len(data) > MOST_BYTES:
            raise CannotSave(f"a checkpoint of {len(data):,} bytes is too large (at most {MOST_BYTES:,})")
        return data
