"""Permits of several gates at once: all or none, in one call that is every gate's `sync`.

Nobody holds one gate while it waits for another. A process stands in the line of the gate that refuses it
and lets others pass at those that would not. So that both are free for it in the end, it has, by turns, one
place left free at those gates, for a while that doubles: it uses none of it, and nobody is blocked for longer
(two such processes, or one that holds what another waits for, pass each other by).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

from limiter.errors import AdmissionTimeout, LimitClosed, LimitsError
from limiter.keys import GateKeys
from limiter.line import Line
from limiter.permit import Permit
from limiter.sync import TOGETHER, Call, read_answer, together_argv

if TYPE_CHECKING:
    from limiter.process import Process
    from limiter.pump import Pump

Permits = tuple[Permit, ...]

PASS_S = 0.2
"""How long others are let pass before a first place is kept."""
FIRST_KEEP_S, LONGEST_KEEP_S = 0.5, 10.0


class Joint:
    """One process' waiters for the same gates. The gates' pumps send its calls."""

    def __init__(self, process: Process, pumps: Sequence[Pump]) -> None:
        self.pumps = pumps
        self.stands_at: set[str] = set()
        self._process = process
        self._line = Line(process.client, TOGETHER)
        self._keys = [key for pump in pumps for key in GateKeys(pump.name).all]
        self._waiters: deque[asyncio.Future[Permits]] = deque()
        self._patience = Patience()
        self._singles_first = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        while self._waiters and self._waiters[0].done():
            self._waiters.popleft()
        return bool(self._waiters)

    def ready(self) -> bool:
        """Whether every gate has answered once; asks those that have not."""
        unknown = [pump for pump in self.pumps if pump.answer is None]
        for pump in unknown:
            pump.kick()
        return not unknown

    def queue(self, waiter: asyncio.Future[Permits], *, first: bool = False) -> None:
        """Stand in line for one permit of each gate; the future gets them, or `LimitClosed`."""
        over = next((pump.name for pump in self.pumps if pump.over), None)
        if over is not None:
            waiter.set_exception(LimitClosed(over))
            return
        if not self.waiting:
            self._patience.begin(monotonic())
        self._waiters.insert(0 if first else len(self._waiters), waiter)
        if len(self._waiters) == 1 or not self.stands_at:
            self.kick()

    def left(self) -> None:
        """Somebody waits no more; if it was the last, our places in the lines, and kept ones, are given up."""
        if not self.waiting:
            self.stands_at = set()
            for pump in self.pumps:
                pump.kick()

    def fail(self, error: Exception) -> None:
        """Nobody here can be served."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)

    def kick(self) -> None:
        self.pumps[0].kick()

    def refused_by(self) -> str:
        """What each gate last said, for people."""
        said = [f"{pump.name}: {pump.answer.reason}" for pump in self.pumps if pump.answer is not None]
        return ", ".join(said)

    async def exchange(self) -> None:
        """One call for all gates, while none of their pumps has another in flight."""
        async with contextlib.AsyncExitStack() as calling:
            for (
                pump
            ) in self.pumps:  # in order of their names, so that two exchanges never wait for each other
                await calling.enter_async_context(pump.calling)
            if self.waiting and not any(pump.closing for pump in self.pumps):
                await self._exchange()

    async def _exchange(self) -> None:
        self._waiters = deque(waiter for waiter in self._waiters if not waiter.done())
        calls = [pump.calls.begin(self) for pump in self.pumps]
        sent_at = monotonic()
        keep_us = round(self._patience.keeps_for_s(sent_at) * 1e6)
        args = together_argv(calls, len(self._waiters), singles_first=self._singles_first, keep_us=keep_us)
        try:
            replies, sent = await self._process.ask(self._line, self._keys, args, lambda: self._repair(calls))
        except ResponseError as error:
            for pump, call in zip(self.pumps, calls, strict=True):
                pump.calls.unheard(call)
            self._say_why(error)
            return
        answers = [read_answer(reply) for reply in replies]  # all, before anything is taken over
        permits = [
            pump.calls.hear(call, answer, sent_at, sent)
            for pump, call, answer in zip(self.pumps, calls, answers, strict=True)
        ]
        self._hand_out(permits)

    async def _repair(self, calls: list[Call]) -> bool:
        return all([await pump.repair(call) for pump, call in zip(self.pumps, calls, strict=True)])

    def _say_why(self, error: ResponseError) -> None:
        """Every refusal of the script as such: nothing was noted."""
        names = ", ".join(repr(pump.name) for pump in self.pumps)
        if str(error).startswith("NOLIMITS"):
            self.fail(no_values(str(error).rpartition(" ")[2]))
        else:
            sentence = (
                f"limit({names}) cannot be taken together on this Redis Cluster, where the names lie in different "
                "slots: take them one inside the other, in the same order everywhere"
            )
            self.fail(LimitsError(sentence, key="limit", value=names))

    def _hand_out(self, permits: list[list[Permit]]) -> None:
        count = min(map(len, permits))
        for number in range(count):
            self._hand_over(tuple([each[number] for each in permits]))
        for each in permits:  # a gate that gave although another had forgotten us
            for permit in each[count:]:
                permit.return_unused()
        # whoever was served steps back: those who want one gate alone and those who want several take turns
        self._singles_first = count > 0
        now = monotonic()
        if count:
            self._patience.begin(now)
        self.stands_at = {
            pump.name for pump in self.pumps if self.waiting and pump.answer and pump.answer.stands
        }
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.waiting:
            self._timer = asyncio.get_running_loop().call_later(self._patience.changes_in_s(now), self.kick)

    def _hand_over(self, permits: Permits) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(permits)
                return
        for permit in permits:  # whoever asked for them was cancelled meanwhile
            permit.return_unused()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(LimitClosed(self.pumps[0].name))
        await self.disconnect()

    async def disconnect(self) -> None:
        """The next call connects again."""
        await self._line.close()


class Patience:
    """When to let others pass and when to have a place kept: by turns, each time twice as long.

    >>> patience = Patience()
    >>> patience.begin(100.0)
    >>> [patience.keeps_for_s(at) for at in (100.0, 100.1, 100.25, 100.5, 101.0, 101.5, 102.0)]
    [0.0, 0.0, 0.5, 0.25, 0.0, 1.0, 0.5]
    """

    def __init__(self) -> None:
        self._keeps = False
        self._changes_at = 0.0
        self._keep_s = FIRST_KEEP_S

    def begin(self, now: float) -> None:
        self._keeps, self._changes_at, self._keep_s = False, now + PASS_S, FIRST_KEEP_S

    def keeps_for_s(self, now: float) -> float:
        """For how many seconds more places are to be left free for us; 0 = let others pass."""
        if now >= self._changes_at:
            self._changes_at = now + self._keep_s
            if self._keeps:
                self._keep_s = min(LONGEST_KEEP_S, self._keep_s * 2)
            self._keeps = not self._keeps
        return self._changes_at - now if self._keeps else 0.0

    def changes_in_s(self, now: float) -> float:
        return max(0.0, self._changes_at - now)


def no_values(name: str) -> LimitsError:
    sentence = f"limit '{name}' has no values yet: give max_concurrent= where it is first used"
    return LimitsError(sentence, key="limit", value=name)


async def acquire_together(
    process: Process, pumps: Sequence[Pump], timeout_s: float | None = None
) -> Permits:
    """Wait for one permit of each gate. Cancelling the wait, at any moment, leaves nothing behind."""
    loop = asyncio.get_running_loop()
    give_up_at = None if timeout_s is None else monotonic() + timeout_s
    joint = process.joint(pumps)
    again = False
    while True:
        waiter: asyncio.Future[Permits] = loop.create_future()
        joint.queue(waiter, first=again)
        timer = None
        if give_up_at is not None and timeout_s is not None:
            timer = loop.call_later(max(0.0, give_up_at - monotonic()), _give_up, waiter, joint, timeout_s)
        try:
            permits = await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                for permit in waiter.result():
                    permit.return_unused()
            joint.left()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if monotonic() <= min(permit.start_by for permit in permits):
            return permits
        for permit in permits:
            permit.late()
        again = True


def _give_up(waiter: asyncio.Future[Permits], joint: Joint, timeout_s: float) -> None:
    if not waiter.done():
        names = "' and '".join(pump.name for pump in joint.pumps)
        waiter.set_exception(AdmissionTimeout(names, timeout_s, joint.refused_by()))
