"""Node classes in the reference's style, whose limits hold across copies, flows and hosts."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from pocketflow import AsyncNode, AsyncParallelBatchNode

from limiter.current import current_process
from limiter.limit import limit as block
from limiter.limits import Limits, checked_count, checked_name, checked_pacing
from worker.keywords import set_keywords


class ThrottledParallelBatchNode(AsyncParallelBatchNode):  # type: ignore[type-arg]
    """Calls `exec_async` for the items of `prep_async` in parallel, each under a fleet-wide limit.

    Class attributes, each also a keyword:
        max_concurrent, max_per_minute: items at a time and starts in any 60 s, in the whole fleet.
        pacing: "burst" (starts as fast as the minute allows) or "even" (spread over it).
        limit: name of the limit; default: module and name of the node's class.

    A provider's refusal of an item is told to this limit, not to the flow's; the run goes back and resumes.
    """

    max_concurrent: int = 5
    max_per_minute: int | None = None
    pacing: str = "burst"
    limit: str | None = None
    _keywords: tuple[str, ...] = ("max_concurrent", "max_per_minute", "pacing", "limit")

    def __init__(self, max_retries: int = 1, wait: int = 0, **values: Any) -> None:
        super().__init__(max_retries, wait)
        set_keywords(self, self._keywords, values)
        self._limits(15.0)  # refuse nonsense here, not at the first item

    def _limit_name(self) -> str:
        if self.limit is not None:
            return checked_name(self.limit)
        text = f"{type(self).__module__}.{type(self).__qualname__}"
        return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:128]

    def _limits(self, lease_s: float) -> Limits:
        return Limits(
            self._limit_name(),
            max_concurrent=self.max_concurrent,
            max_per_window=checked_count(self.max_per_minute, "max_per_minute", none_ok=True),
            even=checked_pacing(self.pacing, self.max_per_minute),
            lease_s=lease_s,
        )

    async def _exec(self, items: Any) -> list[Any]:  # type: ignore[override]
        process = await current_process()
        gate = block.of(self._limits(process.lease_s))
        tasks = [asyncio.ensure_future(self._gated(gate, each)) for each in items or []]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            # who still waits at the gate must not call any more once the node is over
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _gated(self, gate: block, item: Any) -> Any:
        async with gate:
            return await AsyncNode._exec(self, item)


class AdaptiveThrottledNode(ThrottledParallelBatchNode):
    """A throttled node whose level is cut when the API refuses an item and grows back when it does not.

    Class attributes, each also a keyword, besides those of `ThrottledParallelBatchNode`:
        initial_concurrent, min_concurrent, max_concurrent: start, floor and ceiling of the level.
        backoff_factor, recovery_threshold, recovery_factor: as of `AdaptiveThrottledBatchFlow`.
    """

    initial_concurrent: int = 5
    min_concurrent: int = 1
    max_concurrent: int = 20
    backoff_factor: float = 0.5
    recovery_threshold: int = 10
    recovery_factor: float = 1.2
    _keywords = (
        *ThrottledParallelBatchNode._keywords,
        "initial_concurrent",
        "min_concurrent",
        "backoff_factor",
        "recovery_threshold",
        "recovery_factor",
    )

    def _limits(self, lease_s: float) -> Limits:
        return Limits(
            self._limit_name(),
            max_concurrent=self.max_concurrent,
            max_per_window=checked_count(self.max_per_minute, "max_per_minute", none_ok=True),
            even=checked_pacing(self.pacing, self.max_per_minute),
            min_concurrent=self.min_concurrent,
            initial_concurrent=self.initial_concurrent,
            backoff_factor=self.backoff_factor,
            recovery_threshold=self.recovery_threshold,
            recovery_factor=self.recovery_factor,
            lease_s=lease_s,
        )
