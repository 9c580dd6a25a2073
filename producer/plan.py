"""What a batch will take at these limits, before its first item: time, which limit binds, memory in Redis."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.limits import Limits
from limiter.view import GateView
from producer.facts import known_batches
from producer.follow import read
from producer.memory import FULL, read_memory
from producer.texts import duration, size_text

JOB_BYTES = 350
"""What Redis needs for a waiting item beside its params, measured: key, payload's frame, place in the queue."""


@dataclass(frozen=True)
class Plan:
    """A forecast. Times are seconds; None where nobody knows how long a run takes.

    Attributes:
        max_concurrent: the ceiling; `at_a_time`: what the plan counts with, and `because`, why if that is
            another number.
        run_s: seconds one run takes, as told or as measured; `measured_in`: the batch it was measured in.
        lasts_s: the whole batch, at least; `binds`: the limit that makes it so.
        enough: runs at a time from which on the per-minute limit alone decides; None without one.
        bytes_in_redis: for its waiting items; `room_in_redis`: bytes left there, None without a limit.
    """

    items: int
    max_concurrent: int
    at_a_time: int
    because: str
    max_per_window: int | None
    window_s: float
    run_s: float | None
    measured_in: str
    lasts_s: float | None
    binds: str
    enough: int | None
    bytes_in_redis: int
    room_in_redis: int | None
    expires: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> list[str]:
        """For people, one fact each."""
        told = [f"{self.items} items at {_limits(self)}: {self._time()}"]
        if self.because and self.binds == "window":
            told.append(f"counted with {_at_a_time(self)}")
        if self.enough is not None and self.run_s is not None and self.binds == "concurrency":
            told.append(f"from {self.enough} at a time on, the limit per minute would be what binds")
        room = "" if self.room_in_redis is None else f" of {size_text(self.room_in_redis)} free"
        told.append(f"waiting, they take about {size_text(self.bytes_in_redis)} of Redis{room}")
        if self.room_in_redis is not None and self.bytes_in_redis > FULL * self.room_in_redis:
            told.append(
                "that does not fit: raise Redis' maxmemory, enqueue in parts with --first, or pass a path instead of data"
            )
        told.append(self.expires)
        return told

    def line(self) -> str:
        """The same in one line, shown at every enqueue."""
        return f"plan: {self._time()}; about {size_text(self.bytes_in_redis)} of Redis while they wait"

    def _time(self) -> str:
        if not self.items:
            return "nothing to do"
        if self.lasts_s is None:
            rounds = math.ceil(self.items / self.at_a_time)
            times = "as long" if rounds == 1 else f"{rounds:,} times as long"
            return f"{times} as one run takes, which plan --seconds can say, {_at_a_time(self)}"
        known = "" if self.run_s is None else f" with runs of {self.run_s:.3g} s"
        where = f" as in batch {self.measured_in}" if self.measured_in else ""
        least = "at least " if self.run_s is None else "about "
        bound = "the limit per minute binds" if self.binds == "window" else f"{_at_a_time(self)} binds"
        return f"{least}{duration(self.lasts_s)}{known}{where}, {bound}"


def _limits(plan: Plan) -> str:
    rate = f" and {plan.max_per_window} per {plan.window_s:g} s" if plan.max_per_window else ""
    return f"{plan.at_a_time} at a time{rate}"


def _at_a_time(plan: Plan) -> str:
    because = f" ({plan.because})" if plan.because else ""
    return f"{plan.at_a_time} at a time{because}"


def in_force(limits: Limits, gate: GateView | None) -> tuple[Limits, str]:
    """What a flow runs under just now, and why that is not its own `max_concurrent`.

    An operator's values go before the flow's. An adaptive flow runs at the level that stands in Redis, or
    at the one it begins with.
    """
    override = gate.override if gate is not None else None
    ceiling, rate = limits.max_concurrent, limits.max_per_window
    if override is not None:
        ceiling = override.max_concurrent or ceiling
        rate = rate if override.max_per_window is None else override.max_per_window or None
    because = f"set by {override.by}" if override is not None and override.max_concurrent else ""
    level = ceiling
    if limits.floor < limits.max_concurrent:
        there = gate is not None and gate.alive and gate.level >= 1
        level = min(ceiling, int(gate.level) if there and gate is not None else limits.start)
        if level < ceiling:
            where = "the level in Redis now" if there else "the level it begins with"
            because = f"{where}; the ceiling is {ceiling}"
    now = replace(
        limits, max_concurrent=level, max_per_window=rate, min_concurrent=None, initial_concurrent=None
    )
    return now, because


def plan_for(
    items: int,
    params_bytes: int,
    limits: Limits,
    run_s: float | None,
    *,
    measured_in: str = "",
    keep_result_s: float = 0.0,
    keep_s: float = 604_800.0,
    room_in_redis: int | None = None,
    ceiling: int | None = None,
    because: str = "",
) -> Plan:
    """The forecast for `items` whose params take `params_bytes` together.

    Args:
        limits: those that the batch would run under; `because`: why they are not the flow's own, whose
            `max_concurrent` is `ceiling`.

    >>> plan_for(600, 60_000, Limits("users", 5, 60), 2.0).lasts_s
    542.0
    """
    window_s = _window_time(items, limits)
    lasts_s, binds = (window_s, "window") if window_s else (None, "concurrency")
    if run_s is not None:
        lasts_s = math.ceil(items / limits.max_concurrent) * run_s
        if window_s is not None and window_s + run_s > lasts_s:
            lasts_s, binds = window_s + run_s, "window"
        else:
            binds = "concurrency"
    enough = None
    if limits.max_per_window and run_s is not None:
        enough = max(1, math.ceil(limits.max_per_window / limits.window_s * run_s))
    return Plan(
        items=items,
        max_concurrent=ceiling or limits.max_concurrent,
        at_a_time=limits.max_concurrent,
        because=because,
        max_per_window=limits.max_per_window,
        window_s=limits.window_s,
        run_s=run_s,
        measured_in=measured_in,
        lasts_s=lasts_s,
        binds=binds,
        enough=enough,
        bytes_in_redis=params_bytes + items * JOB_BYTES,
        room_in_redis=room_in_redis,
        expires=_expires(lasts_s, keep_result_s, keep_s),
    )


def _window_time(items: int, limits: Limits) -> float | None:
    """When the last item may start: each window lets so many start, the first ones at once (or, with even
    pacing, one after the other)."""
    if not limits.max_per_window:
        return None
    if limits.even:
        return max(0, items - 1) * limits.window_s / limits.max_per_window
    return max(0, math.ceil(items / limits.max_per_window) - 1) * limits.window_s


def _expires(lasts_s: float | None, keep_result_s: float, keep_s: float) -> str:
    kept = (
        f"nothing expires while it waits or runs; outcomes are kept {duration(keep_s)} from the batch's end"
    )
    if keep_result_s and lasts_s is not None and keep_result_s < lasts_s:
        return (
            f"{kept}; arq's own results (keep_result_s={keep_result_s:g}) of the first items expire before the last "
            "ones are done"
        )
    return kept


async def measured_run_s(client: Redis, flow: str) -> tuple[float | None, str]:
    """How long a run of the flow took on average in the latest batch that has outcomes, and which that is."""
    for facts in reversed(await known_batches(client)):
        if facts.flow != flow:
            continue
        ended = [each.outcome for each in await read(client, facts.limit, facts.batch, "0-0", None)]
        times = [outcome.ended - outcome.started for outcome in ended if outcome.ended and outcome.started]
        if times:
            return sum(times) / len(times), facts.batch
    return None, ""


async def room_in_redis(client: Redis) -> int | None:
    """Bytes that Redis may still take; None where it has no limit or does not say."""
    try:
        memory = await read_memory(client)
    except RedisError:
        return None
    return max(0, memory.limit - memory.used) if memory.limit else None
