"""`limit()`: hold permits of fleet-wide limits while a block runs, in asyncio code or in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache, partial
from time import monotonic
from types import TracebackType

from limiter import background
from limiter.current import current_process
from limiter.errors import LeaseLost, LimitsError
from limiter.held import Holding, held_by, hold, is_inside, let_go, refuse_held
from limiter.limits import Limits, checked_name, checked_pacing, checked_timeout
from limiter.loops import open_already
from limiter.permit import Permit, acquire
from limiter.process import Process
from limiter.pump import Pump
from limiter.refusal import RateLimitHit, hit_of, mark_fed
from limiter.together import acquire_together

DEFAULT_LEASE_S = 15.0
UNLIMITED = 1_000_000


@lru_cache(maxsize=4096)
def _limits(
    name: str, max_concurrent: int | None, max_per_minute: int | None, pacing: str, lease_s: float
) -> Limits | str:
    even = checked_pacing(pacing, max_per_minute)
    if max_concurrent is None and max_per_minute is None:
        return checked_name(name)
    return Limits(
        name,
        max_concurrent=UNLIMITED if max_concurrent is None else max_concurrent,
        max_per_window=max_per_minute,
        even=even,
        lease_s=lease_s,
    )


_Part = tuple[str, int | None, int | None, str]  # name, max_concurrent, max_per_minute, pacing
_Inside = dict[Holding, asyncio.AbstractEventLoop | None]  # the newest last; None: of a thread
_GONE = object()


@lru_cache(maxsize=4096)
def _one(part: _Part) -> tuple[tuple[_Part], tuple[str], tuple[Limits | str]]:
    """Parts, names and values of a block of one gate; refuses nonsense."""
    return (part,), (part[0],), (_limits(*part, DEFAULT_LEASE_S),)


class limit:  # noqa: N801 - reads as a verb: async with limit("openai", ...)
    """Hold one permit of a fleet-wide limit while the block runs.

    `async with limit("openai", max_concurrent=10, max_per_minute=500): ...` in any asyncio code, on any
    host; `with limit(...)` in a thread that runs no event loop, such as a sync node's. Waits for a place in
    the window and a free slot, keeps the lease alive in the background, and gives the slot back on exit,
    also when the block raises or is cancelled. Its place in the window stays spent. Callers of one process
    are served in order; between processes it goes round by turns. A name without numbers uses the values
    its gate has.

    `limit("openai", "search")` takes one permit of each or none, in one step, and never holds one while it
    waits for the other. Numbers belong to one name, so they are given there:
    `limit(limit("openai", max_concurrent=10), "search")`.

    A provider's refusal that leaves the block (a 429, a `RateLimitHit`) is told to this gate, and not to
    those around it. One object may be used by many tasks and threads at a time.

    Args:
        names: 1 to 128 of `[A-Za-z0-9_.-]` each; everyone who uses a name shares the limit. A `limit(...)`
            stands for its name and numbers.
        max_concurrent: slots of the whole fleet (None: no such limit).
        max_per_minute: starts in any 60 s (None: no such limit).
        pacing: "burst" (starts as fast as the minute allows) or "even" (spread over it).
        timeout_s: give up after that many seconds of waiting, more than 0 (None: wait). A free place takes a
            round trip to Redis too.

    Raises:
        LimitsError: a name or number that cannot hold.
        HeldAlready: this run is inside one of the gates.
        AdmissionTimeout: not admitted within `timeout_s`.
        WaitCircle: gates wait for each other, so this wait was ended.
        LeaseLost: the lease ran out while the block ran; in asyncio code the block was cancelled.
        LimitClosed: the event loop is ending, and has given everything back.
    """

    __slots__ = ("names", "_inside", "_parts", "_timeout_s", "_values")

    def __init__(
        self,
        *names: str | limit,
        max_concurrent: int | None = None,
        max_per_minute: int | None = None,
        pacing: str = "burst",
        timeout_s: float | None = None,
    ) -> None:
        self._parts: Sequence[_Part]
        self.names: Sequence[str]
        values: Sequence[Limits | str]
        if len(names) == 1 and isinstance(names[0], str):
            part = (names[0], max_concurrent, max_per_minute, pacing)
            self._parts, self.names, values = _one(part)
        else:
            self._parts = _parts(names, (max_concurrent, max_per_minute, pacing))
            self.names = tuple([part[0] for part in self._parts])
            values = tuple([_limits(*part, DEFAULT_LEASE_S) for part in self._parts])
        self._values = DEFAULT_LEASE_S, values  # for processes of that lease
        self._timeout_s = checked_timeout(timeout_s)
        self._inside: _Inside = {}

    @classmethod
    def of(cls, limits: Limits) -> limit:
        """The block of a limit whose values are known, with a lease of their own."""
        block = cls.__new__(cls)
        block.names, block._parts, block._timeout_s = (limits.name,), (), None
        block._inside, block._values = {}, (limits.lease_s, (limits,))
        return block

    # --- in asyncio code ---------------------------------------------------------------------------

    async def __aenter__(self) -> Permit:
        loop = asyncio.get_running_loop()
        process = open_already(loop)
        permits: Sequence[Permit]
        if is_inside():
            refuse_held(self.names)
            permits = await self._acquire()
        elif process is None or len(self.names) > 1:
            permits = await self._acquire()
        else:  # as a rule
            permits = (await acquire(process.pump(self._values_of(process)[0]), self._timeout_s),)
        task = asyncio.current_task(loop)
        for permit in permits:
            permit.bind(task)
        self._inside[hold(self.names, self, permits)] = loop
        return permits[0]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        holding = self._leave(asyncio.get_running_loop())
        if holding is None:
            return
        teach(holding.permits, error is None, lesson(error) if error else None)
        lost = []
        for permit in holding.permits:
            permit.bind(None)
            permit.release()
            if permit.lost:
                lost.append(permit.limit)
        if lost and (_was_ours(len(lost), error) or error is None):
            raise LeaseLost(lost[0]) from error

    # --- in a thread -------------------------------------------------------------------------------

    def __enter__(self) -> Permit:
        _refuse_on_loop(self.names)
        refuse_held(self.names)
        permits = background.run(self._acquire(), _return_unused)
        while monotonic() > min(permit.start_by for permit in permits):
            background.call(partial(_too_late, permits))
            permits = background.run(self._acquire(), _return_unused)
        self._inside[hold(self.names, self, permits)] = None
        return permits[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        holding = self._leave(None)
        if holding is None:
            return
        background.call(partial(_give_back, holding.permits, error is None, lesson(error)))
        lost = next((permit.limit for permit in holding.permits if permit.lost), None)
        if lost is not None and error is None:
            raise LeaseLost(lost)

    # -----------------------------------------------------------------------------------------------

    def _leave(self, loop: asyncio.AbstractEventLoop | None) -> Holding | None:
        """The block that ends, held no more; its loop, or None of a thread's.

        A block that was entered in a copy of the context, as by another task or thread, is not known to who
        leaves it: then it is the newest one. Permits of one gate are alike, so what counts is that each end
        gives back one.
        """
        own = held_by(self)
        if own is not None and self._took(own, loop):
            return own
        return next((each for each in reversed([*self._inside]) if self._took(each, loop)), None)

    def _took(self, holding: Holding, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Take it off the list, unless another thread just did."""
        if self._inside.get(holding, _GONE) is not loop or self._inside.pop(holding, _GONE) is _GONE:
            return False
        let_go(holding)
        return True

    async def _acquire(self) -> Sequence[Permit]:
        process = open_already(asyncio.get_running_loop()) or await current_process()
        pumps = [process.pump(values) for values in self._values_of(process)]
        if is_inside():
            async with process.circles.watched(self.names):
                return await self._admitted(process, pumps)
        return await self._admitted(process, pumps)

    def _values_of(self, process: Process) -> Sequence[Limits | str]:
        lease_s, values = self._values
        if process.lease_s != lease_s:
            values = tuple([_limits(*part, process.lease_s) for part in self._parts])
            self._values = process.lease_s, values
        return values

    async def _admitted(self, process: Process, pumps: Sequence[Pump]) -> Sequence[Permit]:
        if len(pumps) == 1:
            return (await acquire(pumps[0], self._timeout_s),)
        return await acquire_together(process, pumps, self._timeout_s)


def _parts(names: Sequence[str | limit], numbers: tuple[int | None, int | None, str]) -> list[_Part]:
    """Name and numbers of each gate, in order of their names; the same name may not come twice."""
    shown = ", ".join(repr(name.names[0] if isinstance(name, limit) else name) for name in names)
    if not names:
        raise LimitsError('limit() has no name: write limit("openai", max_concurrent=10)', key="limit")
    if numbers != (None, None, "burst"):
        raise LimitsError(
            f"limit({shown}) has several names, and numbers belong to one: write them there, as in "
            'limit(limit("openai", max_concurrent=10), "search")',
            key="limit",
            value=shown,
        )
    found = [part for name in names for part in _of(name)]
    if len({part[0] for part in found}) < len(found):
        raise LimitsError(f"limit({shown}) names one limit twice: name it once", key="limit", value=shown)
    return sorted(found, key=lambda part: part[0])


def _of(name: str | limit) -> Sequence[_Part]:
    return name._parts if isinstance(name, limit) else ((checked_name(name), None, None, "burst"),)


def lesson(error: BaseException | None) -> RateLimitHit | None:
    """The refusal that leaves a block, if no gate inside it has learnt of it; from now on one has."""
    hit = hit_of(error)
    if error is None or hit is None or hit.fed:
        return None
    mark_fed(error, hit)
    return hit


def teach(permits: Sequence[Permit], well: bool, hit: RateLimitHit | None) -> None:
    """Tell the gates how their block ended. A refusal is told to the innermost ones only."""
    for permit in permits:
        if well:
            permit.succeed()
        elif hit is not None:
            permit.refuse(hit.retry_after or 0.0)


def _give_back(permits: Sequence[Permit], well: bool, hit: RateLimitHit | None) -> None:
    teach(permits, well, hit)
    for permit in permits:
        permit.release()


def _too_late(permits: Sequence[Permit]) -> None:
    for permit in permits:
        permit.late()


def _was_ours(cancels: int, error: BaseException | None) -> bool:
    """Take back the cancels of lost leases; whether the block was ended by nothing else."""
    task, left = asyncio.current_task(), 1
    for _ in range(cancels):
        left = task.uncancel() if task is not None else left
    return left <= 0 and isinstance(error, asyncio.CancelledError)


def _return_unused(permits: Sequence[Permit]) -> None:
    for permit in permits:
        permit.return_unused()


def _refuse_on_loop(names: Sequence[str]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    shown = ", ".join(repr(name) for name in names)
    raise LimitsError(
        f"`with limit({shown})` would block the event loop that runs in this thread: write "
        f"`async with limit({shown})` (in a sync node that runs inline, make the node async)",
        key="limit",
        value=shown,
    )
