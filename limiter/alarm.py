"""A sleep that ends at a time which may move, or as soon as something rings."""

from __future__ import annotations

import asyncio
from time import monotonic


class Alarm:
    """`sleep` returns once `ring` was called since the last sleep, or when `due` (monotonic s) comes."""

    def __init__(self) -> None:
        self.due = 0.0
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
        if due < self.due:
            self.due = due
            if self._timer is not None:
                self._set_timer()

    async def sleep(self, *, for_ever: bool) -> None:
        """Until rung or due; `for_ever`: until rung."""
        if self.rung:
            await asyncio.sleep(0)  # let everything that is ready now ride on the same call
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
