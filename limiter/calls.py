"""The numbered calls of a pump to its gate: what each says, and what its answer changes.

Decisions only: whoever sends a call (the pump, or a `Joint` for several gates) begins it here and brings the
answer back. One is in flight at a time. Grants come between calls, in a wake-up, and belong to the last one.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from limiter.notes import Notes
from limiter.permit import Permit
from limiter.sync import OK, UNKNOWN, Answer, Call, Entry, Grant

if TYPE_CHECKING:
    from limiter.pump import Pump
    from limiter.together import Joint

log = logging.getLogger("pocketfleet.limiter")

CROWD = 32
"""From so many waiters on, half of them are asked for at a time."""
BLOCKED = ("level", "window", "pacing", "pause", "cold", "turn")
"""Reasons of an answer which say that the gate refuses, and tells when to ask again."""


class Calls:
    """What one pump says to its gate and has heard from it.

    Attributes:
        answer: the gate's last answer, None before the first.
        blocked: whether the gate refuses us, and has said when to ask again.
        pressing: whether there was more to say when the answer came: the next call goes out before anything
            that the answer started runs, so that Redis and we work at the same time.
        joined: whether the gate knows us.
        spoke_at: when it last answered, monotonic seconds.
        cut: the gate's last cut of the level; successes admitted before it do not count.
        contacts: who waits for the next answer of a gate that knows what we hold.
    """

    def __init__(self, pump: Pump) -> None:
        self.answer: Answer | None = None
        self.blocked = self.pressing = False
        self.joined = False
        self.spoke_at = 0.0
        self.cut = 0
        self.contacts: list[asyncio.Future[None]] = []
        self._pump = pump
        self._news = pump.news
        self._slots = pump.slots
        self._waiters = pump.waiters
        self._notes = Notes(pump.name)
        self._seq = self._birth = self._started = 0
        self._override = ""
        self._remember_until = 0.0
        self._in_flight: Call | None = None
        self._early: list[Grant] = []  # grants that overtook the answer they belong to
        self._last_grant = 0
        self._answered_sent = 0.0  # when the call of the last answer was first sent, monotonic s
        self._answered_now = 0  # the gate's time in that answer, us
        self._known_waiters = 0  # waiters that the gate has heard of and not served
        self._unsure = False  # the gate did not know us, and has not yet said which claims are still ours

    def begin(self, joint: Joint | None = None) -> Call:
        """The next call; it is in flight until `hear` or `unheard`. `joint`: those it asks for as well."""
        self._say_again()
        self._pump.alarm.listen()
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
            log.exception("pump.fault limit=%s", self._pump.name)
            self._pump.kick()
        self._in_flight = None
        early, self._early = self._early, []
        for grant in early:
            self.granted(grant)
        if first and self._pump.joints:
            self._pump.kick()
        return together

    def unheard(self, call: Call) -> None:
        """The gate noted nothing of it: what happened is said again in the next one, under its number."""
        self._in_flight = None
        self._seq -= 1
        self._news.put_back(call)
        if self._slots.crew is not None:
            self._slots.crew.unheard()

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
        if not self._slots.safe:  # not taken over: its start and its turn come back with the next call
            self._pump.kick()
            return
        self._last_grant = grant.attempt
        # the gate's clock ran from its answer to the grant, and no answer is older than its call
        granted_at = min(monotonic(), self._answered_sent + (grant.now - self._answered_now) / 1e6)
        self._remember_start(grant.stamp)
        start_by = granted_at + grant.slack_s if grant.stamp else float("inf")
        self._hand_out_permits(grant.attempt, grant.count, grant.stamp, start_by)
        self._known_waiters -= grant.count
        self._slots.watch_lease()
        if len(self._waiters) > self._known_waiters:
            self._pump.kick()

    def good_bye(self) -> Call:
        """The last call: everything goes back."""
        self.joined = False
        self._say_again()
        call = self._compose()
        call.held, call.permits, call.jobs, call.leave = 0, 0, 0, True
        call.entries += [Entry(e.job, e.attempt, e.flow, "hand") for e in self._slots.claims.values()]
        return call

    def _say_again(self) -> None:
        """Cancelled or failed in the middle of a call: whether it was heard is unknown; entries may come twice."""
        if self._in_flight is not None:
            self._news.add_first(self._in_flight.entries)
            self._in_flight = None

    # --- what a call says --------------------------------------------------------------------------

    def _compose(self, joint: Joint | None = None) -> Call:
        pump, news, held, waiters = self._pump, self._news, self._slots.held, self._waiters
        pump.alarm.rung = False
        self._seq += 1
        while waiters and waiters[0].done():
            waiters.popleft()
        crew = self._slots.crew
        # what has ended was a claim of that gate too: one that lost its data must adopt it
        remember = held > 0 or bool(news.entries) or monotonic() < self._remember_until
        call = Call(
            pump.process.id,
            self._seq,
            held=held,
            permits=self._permits_to_ask(),
            # while the gate has yet to hear what we run, that may stand in the queue
            jobs=crew.room() if crew and not (pump.closing or self._unsure) else 0,
            birth=self._birth if remember else 0,
            started=self._started,
            limits=pump.values,
            override=self._override,
            counted_under=self.cut,
            leave=not pump.wanted,
            stand=self._stands_beside(joint),
            last_grant=self._last_grant,
            flows=crew.flows if crew else (),
        )
        news.put_into(call)
        if news:
            pump.kick()
        return call

    def _permits_to_ask(self) -> int:
        """For a crowd that takes turns half of it at a time: one half runs while the other is asked for."""
        waiting = len(self._waiters)
        if waiting < CROWD or self.blocked:
            return waiting
        return min(waiting, (waiting + self._slots.held + 1) // 2)

    def _stands_beside(self, joint: Joint | None) -> bool:
        """Whether somebody whom the call does not ask for stands in line here, for other gates too."""
        name = self._pump.name
        return any(
            each is not joint and name in each.stands_at and each.waiting for each in self._pump.joints
        )

    # --- what an answer changes --------------------------------------------------------------------

    def _apply(self, call: Call, answer: Answer, first_sent: float, sent: float) -> list[Permit]:
        pump, slots = self._pump, self._slots
        self.answer = answer
        self.blocked = answer.reason in BLOCKED
        if answer.status not in (OK, UNKNOWN):
            log.error("pump.stale limit=%s seq=%d", pump.name, call.seq)
            self._news.add_first(call.entries)
            pump.kick()
            return []
        if answer.birth != self._birth:
            self._last_grant = 0  # another gate counts anew
        self._birth, self._started, self.cut = answer.birth, answer.started, answer.cut
        self._override = answer.override
        if answer.note:
            self._notes.hear(answer.note, pump.values)
        self.joined = not call.leave
        self.spoke_at = monotonic()
        # an answer given to the first sending of a repeated call counts from then
        pump.alarm.expect((self.spoke_at if sent - first_sent < 0.05 else first_sent) + answer.wait_s)
        self._lose_claims(call, answer.refused)
        self._hear_lease(answer, sent)
        self._answered_sent, self._answered_now = first_sent, answer.now
        alone = answer.permits - answer.together
        self._known_waiters = call.permits - alone
        self._remember_start(answer.stamp)
        start_by = first_sent + answer.slack_s if answer.stamp else float("inf")
        together = [
            slots.new_permit(pump, answer.attempt - alone - number, answer.stamp, start_by)
            for number in range(answer.together)
        ]
        self._hand_out_permits(answer.attempt, alone, answer.stamp, start_by)
        slots.take(answer.jobs, start_by, answer.stamp)
        slots.watch_lease()
        self._tell_who_waits(call)
        self.pressing = bool(self._news) or (bool(self._waiters) and not self.blocked)
        if self.pressing:
            pump.kick()
        return together

    def _lose_claims(self, call: Call, refused: list[str]) -> None:
        """Entries of these jobs were refused; a run of them that goes on is no longer ours."""
        if not refused:
            return
        kept = {entry.job: entry.attempt for entry in call.entries if entry.what == "keep"}
        kept.update((entry.job, entry.attempt) for entry in call.heard)
        for job in refused:
            log.info("claim.lost limit=%s job=%s", self._pump.name, job)
            if job in kept and self._slots.end(job, kept[job]):
                self._pump.kick()
                if self._slots.crew:
                    self._slots.crew.lost(job)

    def _hear_lease(self, answer: Answer, sent: float) -> None:
        """A gate that did not know us keeps nothing before it has heard what we hold."""
        if answer.status == UNKNOWN:
            self._news.add_first(self._slots.claims.values())
            self._pump.kick()
        was_unsure = self._unsure
        self._unsure = (was_unsure or answer.status == UNKNOWN) and self._news.keeps
        if was_unsure:
            self._pump.kick()  # no job was asked for
        if not self._unsure:
            self._slots.lease_until = self._pump.lease_end(sent, answer.lease_s)

    def _remember_start(self, stamp: int) -> None:
        """While a start of ours is younger than the window, we remember the gate."""
        if stamp:
            limits = self._pump.limits
            self._remember_until = monotonic() + (limits.window_s if limits else 60.0)

    def _hand_out_permits(self, attempt: int, count: int, stamp: int, start_by: float) -> None:
        pump, waiters = self._pump, self._waiters
        for number in range(attempt - count + 1, attempt + 1):
            permit = self._slots.new_permit(pump, number, stamp, start_by)
            while waiters:
                waiter = waiters.popleft()
                if not waiter.done():
                    waiter.set_result(permit)
                    break
            else:
                pump.return_unused(permit)  # whoever asked for it was cancelled meanwhile

    def _tell_who_waits(self, call: Call) -> None:
        for entry in call.heard:
            if entry.heard is not None and not entry.heard.done():
                entry.heard.set_result(None)
        if not self._unsure:
            for contact in self.contacts:
                if not contact.done():
                    contact.set_result(None)
            self.contacts.clear()
