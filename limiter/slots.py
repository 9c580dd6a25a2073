"""The slots an event loop holds at one gate: permits, claimed jobs, and the lease that keeps both.

Only the pump of that gate writes here: with a second writer of `held` the limit would not hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from limiter.permit import Permit
from limiter.sync import Abort, Claimed, Entry

if TYPE_CHECKING:
    from limiter.pump import Pump


class Crew(Protocol):
    """Who runs the jobs a pump claims: the worker's side."""

    @property
    def flows(self) -> Sequence[str]:
        """Names of the flows whose jobs it takes."""

    def room(self) -> int:
        """How many more jobs it would take now."""

    def take(self, jobs: list[Claimed], start_by: float, stamp: int) -> None:
        """Start them; one that cannot start before `start_by` (monotonic seconds) is given back."""

    def unheard(self) -> None:
        """The gate noted nothing of the call: nothing is asked for any more."""

    def lost(self, job: str) -> None:
        """The attempt is no longer ours: stop the run, its outcome will not be recorded."""

    def lease_lost(self) -> None:
        """The lease is down to its margin, and no answer came."""

    def abort(self, job: str) -> None:
        """Its batch was cancelled: stop the run, its slot is held until it has ended."""


class Slots:
    """Permits, claims and lease of one pump.

    Attributes:
        held: slots held now, permits and claims.
        claims: by job, the entry that says we still run it.
        crew: who runs claimed jobs, None where none are claimed.
        lease_until: monotonic second up to which the gate surely keeps what is held; start nothing after it.
    """

    def __init__(self) -> None:
        self.held = 0
        self.claims: dict[str, Entry] = {}
        self.crew: Crew | None = None
        self.lease_until = 0.0
        self._permits: set[Permit] = set()
        self._lease_watch: asyncio.TimerHandle | None = None
        self._looks_at = 0.0  # when that comes, monotonic s

    # --- permits -----------------------------------------------------------------------------------

    def new_permit(self, pump: Pump, attempt: int, stamp: int, start_by: float) -> Permit:
        """Hold one more slot."""
        permit = Permit(pump, attempt, stamp, start_by)
        self._permits.add(permit)
        self.held += 1
        return permit

    def let_go(self, permit: Permit) -> bool:
        """Hold its slot no more; False if that was said before."""
        if permit not in self._permits:
            return False
        self._permits.discard(permit)
        self.held -= 1
        return True

    # --- claims ------------------------------------------------------------------------------------

    def take(self, jobs: list[Claimed], start_by: float, stamp: int) -> None:
        """Hold these jobs and have the crew start them."""
        if self.crew is None:
            return
        self.held += len(jobs)
        for job in jobs:
            self.claims[job.id] = Entry(job.id, job.attempt, 1, "keep")
        self.crew.take(jobs, start_by, stamp)

    def end(self, job: str, attempt: int) -> bool:
        """Hold its slot no more; False if we did not claim it, or no more, or anew as another attempt."""
        claim = self.claims.get(job)
        if claim is None or claim.attempt != attempt:
            return False
        del self.claims[job]
        self.held -= 1
        return True

    def abort(self, abort: Abort) -> None:
        """The batch of a claim was cancelled; a claim that is over or another attempt stays as it is."""
        claim = self.claims.get(abort.job)
        if claim is not None and claim.attempt == abort.attempt and self.crew is not None:
            self.crew.abort(abort.job)

    # --- the lease ---------------------------------------------------------------------------------

    @property
    def safe(self) -> bool:
        """Whether the lease surely still holds."""
        return monotonic() < self.lease_until

    def watch_lease(self) -> None:
        """Have whoever holds something told when the lease ends."""
        if not self.held:
            return
        if self._lease_watch is not None:
            if self._looks_at <= self.lease_until:
                return  # it looks again when it comes
            self._lease_watch.cancel()  # the lease of the limit was made shorter
        self._looks_at = self.lease_until
        delay = max(0.0, self.lease_until - monotonic())
        self._lease_watch = asyncio.get_running_loop().call_later(delay, self._check_lease)

    def _check_lease(self) -> None:
        self._lease_watch = None
        if self.safe:
            self.watch_lease()
            return
        for permit in list(self._permits):
            permit.lose()
        if self.crew is not None:
            self.crew.lease_lost()

    def stop_watching(self) -> None:
        """The pump leaves; nobody is told any more."""
        if self._lease_watch is not None:
            self._lease_watch.cancel()
