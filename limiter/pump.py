"""The pump: the one place of a process that talks to a limit's gate.

User tasks touch local futures and counters only, so cancelling them can never leak a permit. The pump
gathers everything that happened since its last call into one numbered call, repeats it unchanged until
it is answered, and hands out what the answer grants.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from redis.exceptions import RedisError, ResponseError

from limiter.alarm import Alarm
from limiter.control import repair
from limiter.keys import GateKeys
from limiter.limits import Limits, shown_values
from limiter.line import Line
from limiter.news import News
from limiter.permit import Permit
from limiter.sync import OK, SYNC, UNKNOWN, Abort, Answer, Call, Claimed, Entry, Grant, read_answer
from limiter.together import no_values

if TYPE_CHECKING:
    from limiter.process import Process
    from limiter.together import Joint

log = logging.getLogger("pocketfleet.limiter")


BLOCKED = ("level", "window", "pacing", "pause", "cold", "turn")
"""Reasons of an answer which say that the gate refuses, and tells when to ask again."""


class Crew(Protocol):
    """Who runs the jobs a pump claims: the worker's side."""

    @property
    def flows(self) -> Sequence[str]:
        """Names of the flows whose jobs it takes."""

    def room(self) -> int:
        """How many more jobs it would take now."""

    def take(self, jobs: list[Claimed], start_by: float, stamp: int) -> None:
        """Start them; one that cannot start before `start_by` (monotonic seconds) is given back."""

    def lost(self, job: str) -> None:
        """The attempt is no longer ours: stop the run, its outcome will not be recorded."""

    def lease_lost(self) -> None:
        """The lease is down to its margin, and no answer came."""

    def abort(self, job: str) -> None:
        """Its batch was cancelled: stop the run, its slot is held until it has ended."""


class Pump:
    """One event loop's dealings with one limit.

    Attributes:
        held: slots held now, permits and claims.
        lease_until: monotonic second up to which the gate surely keeps them; start nothing after it. A gate
            that did not know us keeps nothing before it has heard what we hold.
        answer: the gate's last answer, None before the first.
        calling: held while a call is in flight; whoever calls several gates holds those of all.
        joints: who waits here for this gate and others at once.
    """

    def __init__(self, process: Process, limits: Limits | str) -> None:
        self.name = limits if isinstance(limits, str) else limits.name
        self.limits = None if isinstance(limits, str) else limits
        self._config = "" if isinstance(limits, str) else limits.as_argument()
        self.process = process
        self._keys = GateKeys(self.name).all
        self._line = Line(process.client, SYNC)
        self._crew: Crew | None = None
        self._waiters: deque[asyncio.Future[Permit]] = deque()
        self._permits: set[Permit] = set()
        self._claims: dict[str, Entry] = {}
        self._news = News()
        self._alarm = Alarm()
        self._seq = self._birth = self._started = self._cut = 0
        self._remember_until = 0.0
        self._override = ""
        self._notes: set[str] = set()
        self._reset = False
        self._in_flight: Call | None = None
        self._early: list[Grant] = []  # grants that overtook the answer they belong to
        self._last_grant = 0
        self._answered_sent = 0.0  # when the call of the last answer was first sent, monotonic s
        self._answered_now = 0  # the gate's time in that answer, us
        self._known_waiters = 0  # waiters that the gate has heard of and not served
        self._unsure = False  # the gate did not know us, and has not yet said which claims are still ours
        self._lease_watch: asyncio.TimerHandle | None = None
        self._contact: list[asyncio.Future[None]] = []
        self._round: deque[Joint] = deque()  # joints still to be tried since the last ring
        self.calling = asyncio.Lock()
        self.joints: list[Joint] = []
        self.joined = False
        self.closing = False
        self.held = 0
        self.lease_until = 0.0
        self.spoke_at = 0.0
        self.answer: Answer | None = None

    # --- what user tasks call: no I/O --------------------------------------------------------------

    def queue(self, waiter: asyncio.Future[Permit], *, first: bool = False) -> None:
        """Stand in line for a permit; the future gets it."""
        if first:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        # who stands in line already is told when to ask; more waiters change nothing until then
        if len(self._waiters) == 1 or not self._blocked():
            self.kick()

    def release(self, permit: Permit) -> None:
        """The block is over: its slot is free from the next call on."""
        if permit in self._permits:
            self._permits.discard(permit)
            self.held -= 1
            self.kick()

    def return_unused(self, permit: Permit) -> None:
        """The block never started: its place in the window comes back too."""
        if permit in self._permits:
            self._news.return_start(permit.stamp, late=False)
            self.release(permit)

    def succeed(self, attempt: int) -> None:
        """One unit of work admitted as `attempt` went well (feeds the adaptive level)."""
        if attempt > self._cut:
            self._news.succeed()

    def refuse(self, attempt: int, pause_s: float = 0.0) -> None:
        """The protected API refused a run admitted as `attempt`; it asks for a pause of that long."""
        self._news.refuse(attempt, pause_s)
        self.kick()

    def adopt(self, limits: Limits) -> None:
        """Bring values for a name that was used without."""
        self.limits, self._config = limits, limits.as_argument()
        self.kick()

    def reset_level(self) -> None:
        """Ask for the level to go back to its initial value; nothing in use is forgotten."""
        self._reset = True
        self.kick()

    def employ(self, crew: Crew) -> None:
        """From now on claim jobs for `crew`."""
        self._crew = crew
        self.kick()

    def of_flow(self, job: str, number: int) -> None:
        """Say which of the crew's flows (from 1) a claimed job belongs to."""
        claim = self._claims.get(job)
        if claim is not None:
            claim.flow = number

    def settle(self, entry: Entry, *extra: Entry) -> None:
        """A claimed run is over (or goes back): free its slot and record it in the next call."""
        if self._claims.pop(entry.job, None) is not None:
            self.held -= 1
        self._news.add((*extra, entry))
        self.kick()

    async def save(self, entry: Entry) -> None:
        """Write a claimed run's checkpoint with the next call, and return when the gate has it.

        While Redis is away this waits. If the attempt is no longer ours the crew is told so first.
        """
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry.heard = heard
        self._news.add((entry,))
        self.kick()
        await heard

    def return_job(self, entry: Entry, stamp: int, *, late: bool) -> None:
        """A claimed job that was not started goes back, with its start."""
        self._news.return_start(stamp, late=late)
        self.settle(entry)

    def kick(self) -> None:
        """Something changed: call as soon as no call is in flight."""
        self._alarm.ring()

    def wake(self, wait_s: float) -> None:
        """The gate says it is worth asking in `wait_s` seconds."""
        if wait_s <= 0:
            self._alarm.ring()
        else:
            self._alarm.bring_forward(monotonic() + wait_s)

    def granted(self, grant: Grant) -> None:
        """The gate gave permits to the waiters here, after it answered call `grant.seq`.

        Void if a later call was composed: that one says what is held without them.
        """
        if grant.seq != self._seq or grant.attempt <= self._last_grant:
            return
        if self._in_flight is not None:
            self._early.append(grant)
            return
        if not self.joined:
            return
        self._last_grant = grant.attempt
        if not self.safe:
            self.kick()
            return
        # the gate's clock ran from its answer to the grant, and no answer is older than its call
        granted_at = min(monotonic(), self._answered_sent + (grant.now - self._answered_now) / 1e6)
        self._remember_start(grant.stamp)
        start_by = granted_at + grant.slack_s if grant.stamp else float("inf")
        self._hand_out_permits(grant.attempt, grant.count, grant.stamp, start_by)
        self._known_waiters -= grant.count
        self._watch_lease()
        if len(self._waiters) > self._known_waiters:
            self.kick()

    def abort(self, abort: Abort) -> None:
        """The batch of a claim was cancelled; a claim that is over or another attempt stays as it is."""
        claim = self._claims.get(abort.job)
        if claim is not None and claim.attempt == abort.attempt and self._crew is not None:
            self._crew.abort(abort.job)

    @property
    def safe(self) -> bool:
        """Whether the lease surely still holds."""
        return monotonic() < self.lease_until

    async def contact(self) -> None:
        """Wait for the next answer of a gate that knows what we hold."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._contact.append(waiter)
        self.kick()
        await waiter

    # --- the loop ----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Call whenever something changed or the gate said so; leave when closed or cancelled."""
        try:
            while not (self.closing and not self._news):
                await self._alarm.sleep(for_ever=not (self.joined or self._wanted()))
                if self.closing and not self.joined and not self._news:
                    return
                joint = self._next_joint()
                await (self._exchange() if joint is None else joint.exchange())
                if self._round:
                    self.kick()
        finally:
            try:
                await self._leave()
            finally:
                await self._line.close()

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
            call = self.begin()
            first_sent = monotonic()
            try:
                reply, sent = await self.process.ask(
                    self._line, self._keys, call.argv(), lambda: self.repair(call)
                )
            except ResponseError:
                self._forget(call)
                return
            self.hear(call, read_answer(reply), first_sent, sent)

    def begin(self, joint: Joint | None = None) -> Call:
        """The next call; it is in flight until `hear` or `unheard`. `joint`: those it asks for as well."""
        self._in_flight = self._compose(joint)
        return self._in_flight

    def hear(self, call: Call, answer: Answer, first_sent: float, sent: float) -> list[Permit]:
        """Take over the answer; returns the permits that were given together with other gates'."""
        together: list[Permit] = []
        first = self.answer is None
        try:
            together = self._apply(call, answer, first_sent, sent)
        except Exception:
            # a fault of ours must not end the only task that keeps the lease
            log.exception("pump.fault limit=%s", self.name)
            self.kick()
        self._in_flight = None
        early, self._early = self._early, []
        for grant in early:
            self.granted(grant)
        if first and self.joints:
            self.kick()
        return together

    def unheard(self, call: Call) -> None:
        """The gate noted nothing of it: what happened is said again in the next one."""
        self._in_flight = None
        self._news.put_back(call)
        self._reset = self._reset or call.reset

    def _wanted(self) -> bool:
        if self._waiters or self._crew or self.held:
            return True
        return any(joint.waiting for joint in self.joints)

    def _blocked(self) -> bool:
        return self.answer is not None and self.answer.reason in BLOCKED

    def _compose(self, joint: Joint | None = None) -> Call:
        self._alarm.rung = False
        self._seq += 1
        while self._waiters and self._waiters[0].done():
            self._waiters.popleft()
        crew = self._crew
        # what has ended was a claim of that gate too: one that lost its data must adopt it
        remember = self.held > 0 or bool(self._news.entries) or monotonic() < self._remember_until
        call = Call(
            self.process.id,
            self._seq,
            held=self.held,
            permits=len(self._waiters),
            jobs=crew.room() if crew and not self.closing else 0,
            birth=self._birth if remember else 0,
            started=self._started,
            limits=self._config,
            override=self._override,
            counted_under=self._cut,
            leave=not self._wanted(),
            reset=self._reset,
            stand=self._stands_beside(joint),
            flows=crew.flows if crew else (),
        )
        self._reset = False
        self._news.put_into(call)
        if self._news:
            self.kick()
        return call

    def _stands_beside(self, joint: Joint | None) -> bool:
        """Whether somebody whom the call does not ask for stands in line here, for other gates too."""
        return any(each is not joint and self.name in each.stands_at and each.waiting for each in self.joints)

    async def repair(self, call: Call) -> bool:
        """A script met what it cannot read: have it mended, and say so once; whether that was possible."""
        batches = {entry.job.rpartition(":")[0].partition("}:")[2] for entry in call.entries}
        try:
            change = await repair(self.process.client, self.name, self.process.id, call.flows, batches)
        except (RedisError, OSError) as fault:
            log.debug("gate.not_repaired limit=%s error=%s", self.name, fault)
            return False
        if change.repaired:
            log.warning("gate.repaired limit=%s what=%s", self.name, change.repaired)
        return bool(change.repaired)

    def _forget(self, call: Call) -> None:
        """The gate has no values and noted nothing: fail who waits, unless values were brought meanwhile."""
        self.unheard(call)
        if self._config == call.limits:
            self._fail_waiters(no_values(self.name))
        else:
            self.kick()

    def _fail_waiters(self, error: Exception) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)
        for joint in self.joints:
            joint.fail(error)

    # --- what an answer changes --------------------------------------------------------------------

    def _apply(self, call: Call, answer: Answer, first_sent: float, sent: float) -> list[Permit]:
        self.answer = answer
        if answer.status not in (OK, UNKNOWN):
            log.error("pump.stale limit=%s seq=%d", self.name, call.seq)
            self._news.add_first(call.entries)
            self.kick()
            return []
        self._birth, self._started, self._cut = answer.birth, answer.started, answer.cut
        self._override = answer.override
        if answer.note:
            self._hear_note(answer.note)
        self.joined = not call.leave
        self.spoke_at = monotonic()
        # an answer given to the first sending of a repeated call counts from then
        self._alarm.due = (self.spoke_at if sent - first_sent < 0.05 else first_sent) + answer.wait_s
        self._hear_refused(call, answer.refused)
        if answer.status == UNKNOWN:
            self._news.add_first(self._claims.values())
            self.kick()
        self._unsure = (self._unsure or answer.status == UNKNOWN) and self._news.keeps
        if not self._unsure:
            self.lease_until = sent + answer.lease_s - self.margin_s
        self._answered_sent, self._answered_now = first_sent, answer.now
        alone = answer.permits - answer.together
        self._known_waiters = call.permits - alone
        self._remember_start(answer.stamp)
        start_by = first_sent + answer.slack_s if answer.stamp else float("inf")
        together = [
            self._permit(answer.attempt - alone - number, answer.stamp, start_by)
            for number in range(answer.together)
        ]
        self._hand_out_permits(answer.attempt, alone, answer.stamp, start_by)
        self._hand_out_jobs(answer, start_by)
        self._watch_lease()
        for entry in call.heard:
            _resolve(entry.heard)
        if not self._unsure:
            for waiter in self._contact:
                _resolve(waiter)
            self._contact.clear()
        return together

    def _remember_start(self, stamp: int) -> None:
        """While a start of ours is younger than the window, we remember the gate."""
        if stamp:
            self._remember_until = monotonic() + (self.limits.window_s if self.limits else 60.0)

    @property
    def margin_s(self) -> float:
        """How long before its end a lease counts as lost: 2 s of the default 15."""
        lease_s = self.limits.lease_s if self.limits else 15.0
        return min(2.0, lease_s * 2 / 15)

    def _hear_note(self, note: str) -> None:
        """Each note of the gate is logged once."""
        if note in self._notes:
            return
        self._notes.add(note)
        what, _, rest = note.partition("=")
        if what == "repaired":
            self._notes.discard(note)  # a second time is news again
            log.warning("gate.repaired limit=%s what=%s", self.name, rest)
        else:
            mine, theirs = shown_values(self._config), shown_values(rest.replace(",", " "))
            log.warning(
                "limit.two_values limit=%s ours=(%s) theirs=(%s) in_force=%s",
                self.name,
                mine,
                theirs,
                "ours, we started later" if what == "older" else "theirs, they started later",
            )

    def _hear_refused(self, call: Call, refused: list[str]) -> None:
        if not refused:
            return
        kept = {entry.job for entry in call.entries if entry.what == "keep"}
        kept.update(entry.job for entry in call.heard)
        for job in refused:
            log.info("claim.lost limit=%s job=%s", self.name, job)
            if job in kept and self._claims.pop(job, None) is not None:
                self.held -= 1
                self.kick()
                if self._crew:
                    self._crew.lost(job)

    def _hand_out_permits(self, attempt: int, count: int, stamp: int, start_by: float) -> None:
        for number in range(attempt - count + 1, attempt + 1):
            permit = self._permit(number, stamp, start_by)
            while self._waiters:
                waiter = self._waiters.popleft()
                if not waiter.done():
                    waiter.set_result(permit)
                    break
            else:
                self.return_unused(permit)  # whoever asked for it was cancelled meanwhile

    def _permit(self, attempt: int, stamp: int, start_by: float) -> Permit:
        permit = Permit(self, attempt, stamp, start_by)
        self._permits.add(permit)
        self.held += 1
        return permit

    def _hand_out_jobs(self, answer: Answer, start_by: float) -> None:
        if self._crew is None:
            return
        self.held += len(answer.jobs)
        for job in answer.jobs:
            self._claims[job.id] = Entry(job.id, job.attempt, 1, "keep")
        self._crew.take(answer.jobs, start_by, answer.stamp)

    def late(self, permit: Permit) -> None:
        """The permit's block cannot start in time: slot and start go back, and the slack grows."""
        self._news.return_start(permit.stamp, late=True)
        self.release(permit)

    # --- the lease ---------------------------------------------------------------------------------

    def _watch_lease(self) -> None:
        if self._lease_watch is None and self.held:
            delay = max(0.0, self.lease_until - monotonic())
            self._lease_watch = asyncio.get_running_loop().call_later(delay, self._lease_check)

    def _lease_check(self) -> None:
        self._lease_watch = None
        if not self.safe:
            for permit in list(self._permits):
                permit.lose()
            if self._crew is not None:
                self._crew.lease_lost()
        else:
            self._watch_lease()

    # --- the end -----------------------------------------------------------------------------------

    async def _leave(self) -> None:
        """Give everything back in one last call, also while the loop is being cancelled."""
        if self._lease_watch is not None:
            self._lease_watch.cancel()
        for waiter in self._waiters:
            waiter.cancel()
        alone = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                alone = await self.calling.acquire()  # a call for several gates may be in flight
        try:
            await self._say_good_bye()
        finally:
            if alone:
                self.calling.release()

    async def _say_good_bye(self) -> None:
        if not self.joined:
            return
        self.joined = False
        if self._in_flight is not None:
            # cancelled in the middle of a call: whether it was heard is unknown, and entries may come twice
            self._news.add_first(self._in_flight.entries)
        call = self._compose()
        call.held, call.permits, call.jobs, call.leave = 0, 0, 0, True
        call.entries += [Entry(e.job, e.attempt, e.flow, "hand") for e in self._claims.values()]
        try:
            async with asyncio.timeout(2.0):
                await self._line.call(self._keys, call.argv())
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("pump.left_unheard limit=%s error=%s", self.name, type(error).__name__)


def _resolve(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
