"""`limit()`: hold a permit while a block of any asyncio code runs."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from types import TracebackType

from limiter.errors import LeaseLost
from limiter.limits import Limits, checked_name
from limiter.permit import Permit, acquire
from limiter.process import current_process, open_already

DEFAULT_LEASE_S = 15.0


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

    __slots__ = ("_limits", "_max_concurrent", "_max_per_minute", "_name", "_permit", "_task", "_timeout_s")

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
        self._limits = _limits(name, max_concurrent, max_per_minute, DEFAULT_LEASE_S)  # refuses nonsense here

    async def __aenter__(self) -> Permit:
        process = open_already() or await current_process()
        if process.lease_s != DEFAULT_LEASE_S:
            self._limits = _limits(self._name, self._max_concurrent, self._max_per_minute, process.lease_s)
        permit = await acquire(process.pump(self._limits), self._timeout_s)
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
