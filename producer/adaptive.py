"""The flow class whose concurrency follows what the protected API allows."""

from __future__ import annotations

from typing import Any

from limiter.errors import LimitsError
from limiter.limits import Limits, checked_count, checked_float
from limiter.pump import Pump
from producer.flows import ThrottledAsyncParallelBatchFlow

GROWTH = {"threshold": False, "additive": True}


class AdaptiveThrottledBatchFlow(ThrottledAsyncParallelBatchFlow):
    """A batch flow whose level is cut when the API refuses and grows back when it does not.

    One level for the whole fleet, in Redis: however many refusals one spell of congestion brings, it is
    cut once, and a cut reaches flows that are already waiting, on every host. Finished nodes count as
    successes, while the level is what holds the fleet back.

    Class attributes, each also a keyword, besides those of `ThrottledAsyncParallelBatchFlow`:
        initial_concurrent_flows, min_concurrent_flows, max_concurrent_flows: start, floor and ceiling.
        backoff_factor: the level is multiplied by it, once per spell of refusals (0.01 to 1).
        recovery_threshold, recovery_factor: after so many successes the level grows by that factor,
            and by one at least.
        recovery: "threshold" (that rule) or "additive" (TCP's: steep up to just below what was last
            refused, there one more per level's worth of successes, and steep again once past it).

    What was refused is tried again after two to six levels' worth of successes (additive: the deeper the cut,
    the later) or six (threshold). Cuts with no success between them go deeper, down to a half. Where the
    level can fall no further the fleet halts, for 1 s, then twice as long each time up to 16 s, until a run
    succeeds.
    docs/backoff.md says when to use which.
    """

    initial_concurrent_flows: int = 5
    min_concurrent_flows: int = 1
    max_concurrent_flows: int = 20
    backoff_factor: float = 0.5
    recovery_threshold: int = 10
    recovery_factor: float = 1.2
    recovery: str = "threshold"

    _keywords = (
        *ThrottledAsyncParallelBatchFlow._keywords,
        "initial_concurrent_flows",
        "min_concurrent_flows",
        "backoff_factor",
        "recovery_threshold",
        "recovery_factor",
        "recovery",
    )

    def _check(self) -> None:
        super()._check()
        low = checked_count(self.min_concurrent_flows, "min_concurrent_flows")
        start = checked_count(self.initial_concurrent_flows, "initial_concurrent_flows")
        high = checked_count(self.max_concurrent_flows, "max_concurrent_flows")
        assert low is not None and start is not None and high is not None
        if not low <= start <= high:
            raise LimitsError(
                f"min_concurrent_flows={low}, initial_concurrent_flows={start} and max_concurrent_flows={high} "
                "cannot hold together: use min <= initial <= max",
                key="initial_concurrent_flows",
                value=start,
            )
        checked_count(self.recovery_threshold, "recovery_threshold")
        checked_float(self.backoff_factor, "backoff_factor", 0.01, 1.0)
        checked_float(self.recovery_factor, "recovery_factor", 1.0, 100.0)
        if self.recovery not in GROWTH:
            raise LimitsError(
                f"recovery={self.recovery!r} cannot hold: use 'threshold' or 'additive'",
                key="recovery",
                value=self.recovery,
            )

    def fleet_limits(self, flow_name: str, lease_s: float) -> Limits:
        fixed = super().fleet_limits(flow_name, lease_s)
        return Limits(
            fixed.name,
            max_concurrent=self.max_concurrent_flows,
            max_per_window=self.max_flows_per_minute,
            min_concurrent=self.min_concurrent_flows,
            initial_concurrent=self.initial_concurrent_flows,
            backoff_factor=self.backoff_factor,
            recovery_threshold=self.recovery_threshold,
            recovery_factor=self.recovery_factor,
            additive=GROWTH[self.recovery],
            even=fixed.even,
            window_s=self.window_s,
            lease_s=lease_s,
        )

    @property
    def current_concurrent_flows(self) -> int:
        """The fleet's level as this process last heard it."""
        return self._level if self._level is not None else self.initial_concurrent_flows

    @property
    def stats(self) -> dict[str, Any]:
        """Those of the fixed flow, and the level, successes since the last refusal, refusals.

        After `run_on_fleet` they tell of the whole batch: the level as the fleet left it, every refusal of
        its runs, and the runs completed since one that had been refused, in the order in which they ended.
        """
        return {
            **super().stats,
            "current_concurrent_flows": self.current_concurrent_flows,
            "consecutive_successes": self._successes,
            "total_rate_limits": self._rate_limits,
        }

    def reset_adaptive_state(self) -> None:
        """Forget this flow's statistics and ask for the level to go back to its initial value."""
        self.reset_limiter()

    def _heard(self, pump: Pump) -> None:
        if pump.answer is not None:
            self._level = int(pump.answer.level)
