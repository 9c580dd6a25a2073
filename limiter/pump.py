"""The pump: the one place of a process that talks to a limit's gate.

User tasks touch local futures and counters only, so cancelling them can never leak a permit. The pump
gathers everything that happened since its last call into one numbered call, repeats it unchanged until
it is answered, and hands out what the answer grants.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

from limiter.alarm import Alarm
from limiter.calls import Calls
from limiter.errors import LimitClosed
from limiter.keys import GateKeys
from limiter.leave import leave
from limiter.limits import Limits
from limiter.line import Line
from limiter.mend import mend
from limiter.news import News
from limiter.permit import Permit
from limiter.slots import Crew, Slots
from limiter.sync import SYNC, Abort, Answer, Call, Entry, Grant, read_answer
from limiter.together import no_values

if TYPE_CHECKING:
    from limiter.process import Process
    from limiter.together import Joint

log = logging.getLogger("pocketfleet.limiter")

FAULT_S = 1.0
"""How long a pump stands back after a fault of ours."""
IDLE_S = 1.0
"""How long a connection is kept that nobody needs."""


class Pump:
    """One event loop's dealings with one limit.

    Attributes:
        limits: the limit's values, None where it is used by its name alone; `values`: as calls bring them.
        waiters: who stands in line for a permit; `joints`: who waits here for this gate and others at once.
        slots: what is held; `news`: what happened since the last call; `calls`: what is said and heard.
        alarm: rings when there is something to say.
        calling: held while a call is in flight; whoever calls several gates holds those of all.
        over: it has left, or is leaving, and serves nobody any more.
    """

    def __init__(self, process: Process, limits: Limits | str) -> None:
        self.name = limits if isinstance(limits, str) else limits.name
        self.limits = None if isinstance(limits, str) else limits
        self.values = "" if isinstance(limits, str) else limits.as_argument()
        self.process = process
        self.waiters: deque[asyncio.Future[Permit]] = deque()
        self.joints: list[Joint] = []
        self.alarm = Alarm()
        self.news = News()
        self.slots = Slots()
        self.calls = Calls(self)
        self.calling = asyncio.Lock()
        self.closing = self.over = False
        self._keys = GateKeys(self.name).all
        self._line = Line(process.client, SYNC)
        self._round: deque[Joint] = deque()  # joints still to be tried since the last ring

    @property
    def held(self) -> int:
        """Slots held now."""
        return self.slots.held

    @property
    def safe(self) -> bool:
        """Whether the lease surely still holds."""
        return self.slots.safe

    @property
    def answer(self) -> Answer | None:
        """The gate's last answer, None before the first."""
        return self.calls.answer

    @property
    def wanted(self) -> bool:
        """Whether anybody here needs the gate."""
        if self.waiters or self.slots.crew or self.slots.held:
            return True
        return any(joint.waiting for joint in self.joints)

    @property
    def margin_s(self) -> float:
        """How long before its end a lease counts as lost: 2 s of the default 15."""
        lease_s = self.limits.lease_s if self.limits else self.process.lease_s
        return min(2.0, lease_s * 2 / 15)

    def lease_end(self, sent: float, told_s: float) -> float:
        """The monotonic second up to which a lease surely holds that was asked for at `sent`.

        `told_s`: what the gate said is left of it, 0.8 of it at least. The lease is the limit's, and may be a
        shorter one than ours.
        """
        return sent + told_s - min(self.margin_s, told_s / 6)

    # --- what user tasks call: no I/O --------------------------------------------------------------

    def queue(self, waiter: asyncio.Future[Permit], *, first: bool = False) -> None:
        """Stand in line for a permit; the future gets it, or `LimitClosed`."""
        if self.over:
            waiter.set_exception(LimitClosed(self.name))
            return
        if first:
            self.waiters.appendleft(waiter)
        else:
            self.waiters.append(waiter)
        # who stands in line already is told when to ask; more waiters change nothing until then
        if len(self.waiters) == 1 or not self.calls.blocked:
            self.kick()

    def release(self, permit: Permit) -> None:
        """The block is over: its slot is free from the next call on."""
        if self.slots.let_go(permit):
            self.alarm.ring()

    def return_unused(self, permit: Permit) -> None:
        """The block never started: its place in the window comes back too."""
        if self.slots.let_go(permit):
            self.news.return_start(permit.stamp, late=False)
            self.alarm.ring()

    def late(self, permit: Permit) -> None:
        """The permit's block cannot start in time: slot and start go back, and the slack grows."""
        self.news.return_start(permit.stamp, late=True)
        self.release(permit)

    def succeed(self, attempt: int) -> None:
        """One unit of work admitted as `attempt` went well (feeds the adaptive level)."""
        if attempt > self.calls.cut:
            self.news.succeed()

    def refuse(self, attempt: int, pause_s: float = 0.0) -> None:
        """The protected API refused a run admitted as `attempt`; it asks for a pause of that long."""
        self.news.refuse(attempt, pause_s)
        self.kick()

    def adopt(self, limits: Limits) -> None:
        """Bring values for a name that was used without."""
        self.limits, self.values = limits, limits.as_argument()
        self.kick()

    def reset_level(self) -> None:
        """Ask for the level to go back to its initial value; nothing in use is forgotten."""
        self.news.reset_level()
        self.kick()

    def employ(self, crew: Crew) -> None:
        """From now on claim jobs for `crew`."""
        self.slots.crew = crew
        self.kick()

    def of_flow(self, job: str, number: int) -> None:
        """Say which of the crew's flows (from 1) a claimed job belongs to."""
        claim = self.slots.claims.get(job)
        if claim is not None:
            claim.flow = number

    def settle(self, entry: Entry, *extra: Entry) -> None:
        """A claimed run is over (or goes back): free its slot and record it in the next call."""
        self.slots.end(entry.job, entry.attempt)
        self.news.add((*extra, entry))
        self.kick()

    def save(self, entry: Entry) -> asyncio.Future[None]:
        """Write a claimed run's checkpoint with the next call; the future is done when the gate has it.

        While Redis is away this waits. If the attempt is no longer ours the crew is told so first.
        """
        heard = entry.heard = self.process.loop.create_future()
        if self.over:
            heard.set_exception(LimitClosed(self.name))
            return heard
        self.news.add((entry,))
        self.kick()
        return heard

    def return_job(self, entry: Entry, stamp: int, *, late: bool) -> None:
        """A claimed job that was not started goes back, with its start."""
        self.news.return_start(stamp, late=late)
        self.settle(entry)

    def kick(self) -> None:
        """Something changed: call as soon as no call is in flight."""
        self.alarm.ring()

    def wake(self, wait_s: float) -> None:
        """The gate says it is worth asking in `wait_s` seconds."""
        if wait_s <= 0:
            self.alarm.ring()
        else:
            self.alarm.bring_forward(monotonic() + wait_s)

    def granted(self, grant: Grant) -> None:
        """The gate gave permits to the waiters here in a wake-up."""
        self.calls.granted(grant)

    def abort(self, abort: Abort) -> None:
        """The gate says that the batch of a claim was cancelled."""
        self.slots.abort(abort)

    async def contact(self) -> None:
        """Wait for the next answer of a gate that knows what we hold."""
        if self.over:
            raise LimitClosed(self.name)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.calls.contacts.append(waiter)
        self.kick()
        await waiter

    # --- the loop ----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Call whenever something changed or the gate said so; leave when closed or cancelled."""
        try:
            while not (self.closing and not self.news):
                if not self.calls.pressing:
                    await self._sleep()
                self.calls.pressing = False
                if self.closing and not self.calls.joined and not self.news:
                    return
                await self._try_to_exchange()
                if self._round:
                    self.kick()
        finally:
            self.over = True
            try:
                await leave(self, self._line, self._keys)
            finally:
                await self._line.close()

    async def _sleep(self) -> None:
        """Until there is something to say. A connection that nobody needs for a while is given back."""
        if not (self.calls.joined or self.wanted):
            self.alarm.due = monotonic() + IDLE_S
            await self.alarm.sleep(for_ever=False)
            if self.alarm.rung or self.calls.joined or self.wanted:
                return
            await self._disconnect()
        await self.alarm.sleep(for_ever=not (self.calls.joined or self.wanted))

    async def _disconnect(self) -> None:
        """The next call connects again."""
        async with self.calling:
            await self._line.close()
            for joint in self.joints:
                await joint.disconnect()

    async def _try_to_exchange(self) -> None:
        """A fault of ours must not end the only task that keeps the lease."""
        try:
            joint = self._next_joint()
            await (self._exchange() if joint is None else joint.exchange())
        except Exception:
            log.exception("pump.fault limit=%s", self.name)
            await asyncio.sleep(FAULT_S)
            self.kick()

    def _next_joint(self) -> Joint | None:
        """Who waits here for other gates too: one after the other, since each needs a call of its own."""
        if not self.joints or self.closing:
            return None
        if not self._round:
            self._round.extend(self.joints)
        while self._round:
            joint = self._round.popleft()
            if joint.waiting and joint.ready():
                return joint
        return None

    async def _exchange(self) -> None:
        async with self.calling:
            call = self.calls.begin()
            first_sent = monotonic()
            try:
                reply, sent = await self.process.ask(
                    self._line, self._keys, call.argv(), lambda: self.repair(call)
                )
            except ResponseError:
                self._forget(call)
                return
            self.calls.hear(call, read_answer(reply), first_sent, sent)

    async def repair(self, call: Call) -> bool:
        """A script met what it cannot read: have it mended; whether that was possible."""
        return await mend(self.process.client, self.name, call)

    def _forget(self, call: Call) -> None:
        """The gate has no values and noted nothing: fail who waits, unless values were brought meanwhile."""
        self.calls.unheard(call)
        self.alarm.due = monotonic() + self.process.lease_s / 3
        if self.values == call.limits:
            self._fail_waiters(no_values(self.name))
        else:
            self.kick()

    def _fail_waiters(self, error: Exception) -> None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)
        for joint in self.joints:
            joint.fail(error)
