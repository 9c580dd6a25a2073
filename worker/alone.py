"""Runs under which processes have died run alone, each in a process of its own, so that they harm no other.

The worker keeps the claim and its lease; the process (`worker.alone_child`) runs the nodes, and asks before
each of them. If it ends without a word while its worker lives, that was the run's own doing and nothing else's:
a host that is lost takes both. So only such a death counts towards quarantine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from limiter.keys import GateKeys
from limiter.sync import Claimed, Entry
from worker.checkpoint import Checkpoint, encode_checkpoint, read_checkpoint
from worker.children import Child
from worker.contract import QUARANTINED, Failure, Outcome, decode_job, encode_outcome
from worker.keeping import BESIDE
from worker.leaving import give_back_unstarted
from worker.record import fetch, save_entry, settle, store_beside, take_away
from worker.registry import ServedFlow
from worker.run import HOST, Ending, Run, attempts_of

if TYPE_CHECKING:
    from worker.crew import Crew

log = logging.getLogger("pocketfleet.worker")

AFTER_DEATHS = 2
"""A run is alone once so many processes have died under it."""
PUT_OFF_S = 1.0
"""Until a process is ready for it a run waits in its place."""
HAND_OVER_S = 4.0
"""A run that is handed back may take that long to leave."""
SETTLE_S = 0.2
"""Whoever kills a whole host kills us within that time too: then nothing is recorded."""


def run_of(crew: Crew, claimed: Claimed, start_by: float, stamp: int) -> Run:
    """The run of a claim under which processes have died."""
    try:
        served = crew.serves[decode_job(claimed.payload).flow]
    except (msgspec.DecodeError, IndexError, KeyError):
        return Run(crew, claimed, start_by, stamp)
    if not crew.children.can(served.name):
        return Run(crew, claimed, start_by, stamp)
    return LoneRun(crew, claimed, start_by, stamp, served)


class LoneRun(Run):
    """One attempt in a process of its own, seen from the worker."""

    __slots__ = ("_child", "_saved")

    def __init__(self, crew: Crew, claimed: Claimed, start_by: float, stamp: int, served: ServedFlow) -> None:
        super().__init__(crew, claimed, start_by, stamp)
        self.served = served
        self.flow_number = crew.flows.index(served.name) + 1
        self._child: Child | None = None
        self._saved = claimed.saved

    def stop(self, ending: Ending) -> None:
        """Have it leave; one that is no longer ours, or does not leave, is killed."""
        self.ending = ending
        if self._child is None:
            return
        if ending == "lost":
            self._child.kill()
        else:
            self._child.frames.send("stop", ending)
            asyncio.get_running_loop().call_later(HAND_OVER_S, self._child.kill)

    async def execute(self) -> None:
        self.started = True
        assert self.served is not None
        try:
            base = await self.crew.bases.base(self.pump.name, self.batch)
            late = monotonic() > self.start_by  # asked first: a process that was taken is not given back
            child = None if self.ending or late else self.crew.children.take(self.served)
            if child is None:
                self._put_off(late)
                return
            log.info("run.alone job=%s deaths=%d", self.claimed.id, self.claimed.deaths)
            self._child = child
            self.pump.of_flow(self.claimed.id, self.flow_number)
            await self._watch(child, base)
        except Exception:
            log.exception("run.fault job=%s", self.claimed.id)
            settle(self, "hand")
        finally:
            if self._child is not None:
                self.crew.children.let_end(self._child)
            self.crew.ended(self)

    def _put_off(self, late: bool) -> None:
        """No process is ready for it, or it is too late: back to its place, with its start, for the moment
        that a process takes."""
        if self.ending:
            give_back_unstarted(self)
            return
        entry = Entry(self.claimed.id, self.claimed.attempt, self.flow_number, "wait", round(PUT_OFF_S * 1e6))
        self.pump.return_job(entry, self.stamp, late=late)

    async def _watch(self, child: Child, base: bytes) -> None:
        claimed, kept = self.claimed, self._saved
        if kept == BESIDE:
            kept = await fetch(self, GateKeys(self.pump.name).kept(self.batch, self.index))
        began = time.time()
        counts = (claimed.deaths, claimed.refusals, claimed.hand_backs)
        child.frames.send(
            "run", claimed.id, claimed.attempt, *counts, kept, claimed.payload, base, self.pump.name
        )
        while (message := await child.frames.receive()) is not None:
            if await self._heard(child, *message):
                return
        await self._died(await child.ended(), began)

    async def _heard(self, child: Child, what: str, *args: Any) -> bool:
        """Do what the run asks for; True when it has settled."""
        if what == "settle":
            settles, arg, first = args
            settle(
                self, settles, arg, Entry(self.claimed.id, self.claimed.attempt, *first) if first else None
            )
            return True
        if what == "succeed":
            self.pump.succeed(self.claimed.attempt)
        elif what == "refuse":
            self.pump.refuse(self.claimed.attempt, args[0])
        else:
            number, *given = args
            child.frames.send("answer", number, await self._answer(what, *given))
        return False

    async def _answer(self, what: str, *args: Any) -> Any:
        if what == "get":
            return await fetch(self, args[0])
        if what == "set":
            return await store_beside(self, args[0], args[1])
        if what == "unlink":
            return await take_away(self, args[0])
        if what == "save":
            flow_number, how, arg = args
            await self.pump.save(Entry(self.claimed.id, self.claimed.attempt, flow_number, how, arg))
            self._saved = arg if how == "save" else BESIDE
        self.node = args[0] if what == "contact" else self.node
        while not self.pump.safe:
            await self.pump.contact()
        return self.pump.answer.now if self.pump.answer else 0

    async def _died(self, how: str, began: float) -> None:
        """Its process ended without a word, and we live."""
        await asyncio.sleep(SETTLE_S)
        if self.ending == "lost":
            return
        if self.ending:
            settle(self, "hand")
            return
        assert self.served is not None
        counted = await self._counted()
        died_alone, most = counted.died_alone + 1, self.served.flow.quarantine_after
        log.warning("run.died_alone job=%s by=%s", self.claimed.id, how)
        if died_alone >= most:
            settle(self, QUARANTINED, encode_outcome(self._quarantined(how, died_alone, began)))
            return
        counted = msgspec.structs.replace(counted, died_alone=died_alone)
        settle(self, "died", first=await save_entry(self, encode_checkpoint(counted)))

    async def _counted(self) -> Checkpoint:
        kept = self._saved
        if kept == BESIDE:
            kept = await fetch(self, GateKeys(self.pump.name).kept(self.batch, self.index))
        return read_checkpoint(kept) or Checkpoint()

    def _quarantined(self, how: str, died_alone: int, began: float) -> Outcome:
        times = "once" if died_alone == 1 else f"{died_alone} times"
        text = (
            f"its process ended with {how} while it ran alone ({times}), after the death of "
            f"{self.claimed.deaths - died_alone + 1} processes that it shared; it is not run again by itself"
        )
        return Outcome(
            QUARANTINED,
            failure=Failure("ProcessDied", text, self.node),
            attempts=attempts_of(self.claimed, died_alone - 1) | {"deaths": self.claimed.deaths + 1},
            host=HOST,
            started=began,
            ended=time.time(),
        )
