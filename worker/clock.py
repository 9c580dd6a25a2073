"""How long the nodes of a run may run: the time between them, in which it waits, does not count."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

from worker.contract import Failure


class Clock:
    """Cancels `task` once the nodes between `start` and `stop` have taken `limit_s` together.

    Attributes:
        ran_out: whether it did.
    """

    __slots__ = ("ran_out", "_left_s", "_limit_s", "_since", "_task", "_timer")

    def __init__(self, limit_s: float, task: asyncio.Task[Any] | None) -> None:
        self.ran_out = False
        self._limit_s = self._left_s = limit_s
        self._task = task
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """A node begins."""
        self._since = monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, self._left_s), self._run_out)

    def stop(self) -> None:
        """It has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s -= monotonic() - self._since

    def failure(self, node: str) -> Failure:
        text = f"its nodes ran for longer than flow_timeout_s={self._limit_s:g} (time spent waiting is not counted)"
        return Failure("FlowTimeout", text, node)

    def _run_out(self) -> None:
        self._timer = None
        self.ran_out = True
        if self._task is not None:
            self._task.cancel()
