"""What a batch will take at these limits, before its first item: time, which limit binds, memory in Redis."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.limits import Limits
from producer.facts import known_batches
from producer.follow import read
from producer.memory import FULL, read_memory
from producer.texts import duration, size_text

JOB_BYTES = 210
"""What Redis needs for a waiting item beside its params, measured: key, payload's frame, place in the queue."""


@dataclass(frozen=True)
class Plan:
    """A forecast. Times are seconds; None where nobody knows how long a run takes.

    Attributes:
        run_s: seconds one run takes, as told or as measured; `measured_in`: the batch it was measured in.
        lasts_s: the whole batch, at least; `binds`: the limit that makes it so.
        starts_at: where the level begins, None where it does not adapt; `max_concurrent` is its ceiling then.
        enough: runs at a time from which on the per-minute limit alone decides; None without one.
        bytes_in_redis: for its waiting items; `room_in_redis`: bytes left there, None without a limit.
    """

    items: int
    max_concurrent: int
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
    starts_at: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> list[str]:
        """For people, one fact each."""
        told = [f"{self.items} items at {_limits(self)}: {self._time()}"]
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
            rounds = math.ceil(self.items / self.max_concurrent)
            times = "as long" if rounds == 1 else f"{rounds:,} times as long"
            return f"{times} as one run takes, which plan --seconds can say, {self.max_concurrent} at a time{self._level()}"
        known = "" if self.run_s is None else f" with runs of {self.run_s:.3g} s"
        where = f" as in batch {self.measured_in}" if self.measured_in else ""
        adapts = self.starts_at is not None and self.binds == "concurrency"
        least = "at least " if self.run_s is None or adapts else "about "
        bound = (
            "the limit per minute binds"
            if self.binds == "window"
            else f"{self.max_concurrent} at a time binds{self._level()}"
        )
        return f"{least}{duration(self.lasts_s)}{known}{where}, {bound}"

    def _level(self) -> str:
        """That the number of runs at a time is the most there can be, not what there will be."""
        return "" if self.starts_at is None else f" (the level's most; it starts at {self.starts_at})"


def _limits(plan: Plan) -> str:
    rate = f" and {plan.max_per_window} per {plan.window_s:g} s" if plan.max_per_window else ""
    return f"{plan.max_concurrent} at a time{rate}"


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
) -> Plan:
    """The forecast for `items` whose params take `params_bytes` together.

    >>> plan_for(600, 60_000, Limits("users", 5, 60), 2.0).lasts_s
    542.0
    """
    window_s = _window_time(items, limits)
    slots_s = None if run_s is None else math.ceil(items / limits.max_concurrent) * run_s
    lasts_s, binds = window_s, "window"
    if slots_s is not None and (window_s is None or slots_s >= window_s + run_s):  # type: ignore[operator]
        lasts_s, binds = slots_s, "concurrency"
    elif window_s is None:
        binds = "concurrency"
    elif run_s is not None:
        lasts_s = window_s + run_s
    enough = None
    if limits.max_per_window and run_s is not None:
        enough = max(1, math.ceil(limits.max_per_window / limits.window_s * run_s))
    return Plan(
        items=items,
        max_concurrent=limits.max_concurrent,
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
        starts_at=None if limits.floor == limits.max_concurrent else limits.start,
    )


def _window_time(items: int, limits: Limits) -> float | None:
    """When the last item may start: each window lets so many start, the first ones at once."""
    if not limits.max_per_window:
        return None
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
