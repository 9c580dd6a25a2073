"""A permit: the right to run, and the wait for it."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from limiter.errors import AdmissionTimeout

if TYPE_CHECKING:
    from limiter.pump import Pump


class Permit:
    """The right to run: one start in the window, one slot.

    Attributes:
        attempt: the gate's number for this admission; it never repeats.
        stamp: the start's mark in the window, us of Redis' clock; 0 where no per-minute limit is set.
        start_by: monotonic second by which the block must start.
        lost: the lease ran out while the permit was held.
    """

    __slots__ = ("_holder", "_pump", "attempt", "lost", "stamp", "start_by")

    def __init__(self, pump: Pump, attempt: int, stamp: int, start_by: float) -> None:
        self._pump = pump
        self._holder: asyncio.Task[object] | None = None
        self.attempt = attempt
        self.stamp = stamp
        self.start_by = start_by
        self.lost = False

    def bind(self, task: asyncio.Task[object] | None) -> None:
        """End `task` if the lease is lost."""
        self._holder = task

    def lose(self) -> None:
        """The lease is lost: whoever is bound to the permit is cancelled."""
        if not self.lost:
            self.lost = True
            if self._holder is not None:
                self._holder.cancel()

    @property
    def limit(self) -> str:
        """Name of its limit."""
        return self._pump.name

    def release(self) -> None:
        """Give the slot back. A second call does nothing."""
        self._pump.release(self)

    def succeed(self) -> None:
        """What it protected went well (feeds an adaptive level)."""
        self._pump.succeed(self.attempt)

    def refuse(self, pause_s: float) -> None:
        """What it protected was refused by the provider, which asks for a pause of that long."""
        self._pump.refuse(self.attempt, pause_s)

    def late(self) -> None:
        """Its block cannot start in time: slot and start go back, and the gate's slack grows."""
        self._pump.late(self)

    def return_unused(self) -> None:
        """Its block never started: slot and start go back."""
        self._pump.return_unused(self)


async def acquire(pump: Pump, timeout_s: float | None = None) -> Permit:
    """Wait for a permit. Cancelling the wait, at any moment, leaves nothing behind."""
    loop = pump.process.loop
    give_up_at = None if timeout_s is None else monotonic() + timeout_s
    again = False
    while True:
        waiter: asyncio.Future[Permit] = loop.create_future()
        pump.queue(waiter, first=again)
        timer = None
        if give_up_at is not None and timeout_s is not None:
            timer = loop.call_later(max(0.0, give_up_at - monotonic()), _give_up, waiter, pump, timeout_s)
        try:
            permit = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                pump.return_unused(waiter.result())
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if monotonic() <= permit.start_by:
            return permit
        pump.late(permit)
        again = True


def _give_up(waiter: asyncio.Future[Permit], pump: Pump, timeout_s: float) -> None:
    if not waiter.done():
        reason = pump.answer.reason if pump.answer else "nothing yet"
        waiter.set_exception(AdmissionTimeout(pump.name, timeout_s, reason))
