"""A sleep that ends at a time which may move, or as soon as something rings."""

from __future__ import annotations

import asyncio
import math
from time import monotonic


class Alarm:
    """`sleep` returns once `ring` was called since the last sleep, or when `due` (monotonic s) comes.

    What `bring_forward` was told since `listen` holds beside a later `expect`: it may be newer.
    """

    def __init__(self) -> None:
        self.due = 0.0
        self._hint = math.inf
        self.rung = False
        self._sleeping: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def ring(self) -> None:
        """Something changed."""
        if not self.rung:
            self.rung = True
            self._end()

    def bring_forward(self, due: float) -> None:
        """Sleep no longer than until `due`."""
        self._hint = min(self._hint, due)
        if due < self.due:
            self.due = due
            if self._timer is not None:
                self._set_timer()

    def listen(self) -> None:
        """A question is asked now: hints from before it are answered by its answer."""
        self._hint = math.inf

    def expect(self, due: float) -> None:
        """The answer says when it is due, unless a hint that came meanwhile says earlier."""
        self.due = min(due, self._hint)
        if self._sleeping is not None:  # a call for several gates, made by another pump
            self._set_timer()

    async def sleep(self, *, for_ever: bool) -> None:
        """Until rung or due; `for_ever`: until rung."""
        await asyncio.sleep(0)  # let everything that is ready now run first, and ride on the same call
        if self.rung:
            return
        self._sleeping = asyncio.get_running_loop().create_future()
        if not for_ever:
            self._set_timer()
        try:
            await self._sleeping
        finally:
            self._sleeping = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, self.due - monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._end)

    def _end(self) -> None:
        if self._sleeping is not None and not self._sleeping.done():
            self._sleeping.set_result(None)
