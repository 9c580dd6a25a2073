"""A permit, and `limit()`: hold one while a block of any asyncio code runs."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from limiter.errors import AdmissionTimeout, LeaseLost
from limiter.limits import Limits, checked_name

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

    def release(self) -> None:
        """Give the slot back. A second call does nothing."""
        self._pump.release(self)


async def acquire(pump: Pump, timeout_s: float | None = None) -> Permit:
    """Wait for a permit. Cancelling the wait, at any moment, leaves nothing behind."""
    loop = asyncio.get_running_loop()
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


@lru_cache(maxsize=4096)
def _limits(
    name: str, max_concurrent: int | None, max_per_minute: int | None, lease_s: float
) -> Limits | str:
    if max_concurrent is None and max_per_minute is None:
        return checked_name(name)
    return Limits(
        name,
        max_concurrent=1_000_000 if max_concurrent is None else max_concurrent,
        max_per_window=max_per_minute,
        lease_s=lease_s,
    )


class limit:  # noqa: N801 - reads as a verb: async with limit("openai", ...)
    """Hold one permit of a fleet-wide limit while the block runs.

    `async with limit("openai", max_concurrent=10, max_per_minute=500): ...` in any asyncio code, on any
    host. Waits for a place in the window and a free slot, keeps the lease alive in the background, and
    gives the slot back on exit, also when the block raises or is cancelled. Its place in the window stays
    spent. Callers of one process are served in order; between processes it goes round by turns. A name
    without numbers uses the values its gate has.

    Args:
        name: 1 to 128 of `[A-Za-z0-9_.-]`; everyone who uses the name shares the limit.
        max_concurrent: slots of the whole fleet (None: no such limit).
        max_per_minute: starts in any 60 s (None: no such limit).
        timeout_s: give up after that many seconds of waiting (None: wait).

    Raises:
        LimitsError: a name or number that cannot hold.
        AdmissionTimeout: not admitted within `timeout_s`.
        LeaseLost: the lease ran out while the block ran; the block was cancelled.
    """

    __slots__ = ("_max_concurrent", "_max_per_minute", "_name", "_permit", "_task", "_timeout_s")

    def __init__(
        self,
        name: str,
        *,
        max_concurrent: int | None = None,
        max_per_minute: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._name = name
        self._max_concurrent = max_concurrent
        self._max_per_minute = max_per_minute
        self._timeout_s = timeout_s
        self._permit: Permit | None = None
        self._task: asyncio.Task[object] | None = None
        _limits(name, max_concurrent, max_per_minute, 15.0)  # refuse nonsense here, not at the first wait

    async def __aenter__(self) -> Permit:
        from limiter.process import current_process

        process = await current_process()
        limits = _limits(self._name, self._max_concurrent, self._max_per_minute, process.lease_s)
        permit = await acquire(process.pump(limits), self._timeout_s)
        self._permit = permit
        self._task = asyncio.current_task()
        permit.bind(self._task)
        return permit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        permit = self._permit
        if permit is None:
            return
        permit.bind(None)
        permit.release()
        if permit.lost:
            ours = self._task is not None and self._task.uncancel() <= 0
            if kind is None or (ours and issubclass(kind, asyncio.CancelledError)):
                raise LeaseLost(self._name) from error
