"""What a gate looks like just now, for people: read without deciding anything."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from limiter.control import FOREVER_US, Override, read_override
from limiter.keys import GateKeys
from limiter.limits import NAME

MOST_GONE = 64
"""So many dead processes are looked at; whoever calls the gate next reaps as many."""


@dataclass(frozen=True)
class OverrideView:
    """An operator's values. `None` = not overridden (or none, in the old values); a rate of 0 is none."""

    max_concurrent: int | None
    max_per_window: int | None
    by: str
    at: float
    old_max_concurrent: int | None
    old_max_per_window: int | None


@dataclass(frozen=True)
class GateView:
    """One limit at one moment. `_s` are seconds from now; counts are of the whole fleet."""

    name: str
    max_concurrent: int
    min_concurrent: int
    max_per_window: int | None
    window_s: float
    lease_s: float
    level: float
    in_use: int
    used: int
    waiting_processes: int
    processes: int
    waiting_jobs: dict[str, int]
    paused_for_s: float
    closed_for_s: float
    next_start_s: float
    served: bool
    alive: bool = True
    """False: nobody has called for long; only the operator's word is kept."""
    paused_by: str | None = None
    """Who paused, None where the provider did (a refusal with Retry-After) or nothing is paused."""
    paused_until: float | None = None
    """Seconds since 1970 by Redis' clock; None: not paused, or until resumed (`paused_for_s` is inf)."""
    override: OverrideView | None = None
    """The operator's values; `max_concurrent` and `max_per_window` above are those in force."""
    paced_for_s: float = 0.0
    halted: bool = False
    """Runs were refused at the lowest level, and none has succeeded since: the fleet pauses by itself."""
    first_freed_s: float = 0.0
    """Until the oldest start leaves the window; `last_freed_s`: until the newest one does. 0 without a start."""
    last_freed_s: float = 0.0

    def holds_back(self) -> str:
        """What keeps the next run from starting, in words; '' if nothing does."""
        if self.paused_for_s > 0 and self.paused_by:
            return f"paused by {self.paused_by} {self.pause_ends()}"
        if self.closed_for_s > 0:
            return f"cold start: admits again in {self.closed_for_s:.0f} s"
        if self.paused_for_s > 0:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + self.paused_for_s))
            why = (
                "pause after refusals at the lowest level"
                if self.halted
                else "pause asked for by the provider"
            )
            return f"{why}, {self.paused_for_s:.0f} s more, until {until}"
        if not self.alive:
            return ""
        if self.max_per_window and self.used >= self.max_per_window:
            return (
                f"window: {self.used} of {self.max_per_window} starts in {self.window_s:g} s, "
                f"next in {self.next_start_s:.1f} s"
            )
        if self.paced_for_s > 0:
            return f"even pacing: next start in {self.paced_for_s:.1f} s"
        if self.in_use >= int(self.level):
            return f"level: {self.in_use} of {int(self.level)} at a time"
        if not self.served and any(self.waiting_jobs.values()):
            return "no worker lives"
        return ""

    def pause_ends(self) -> str:
        """'until 12:30:05 (12 s more)' or 'until resumed'."""
        if math.isinf(self.paused_for_s):
            return "until resumed"
        until = time.strftime("%H:%M:%S", time.localtime(time.time() + self.paused_for_s))
        return f"until {until} ({self.paused_for_s:.0f} s more)"


async def read_gate(client: Redis, name: str) -> GateView | None:
    """The gate of a limit, or None if there is none (nobody has called yet, or not for a long time).

    An operator's pause or values that wait for a gate are shown too, with `alive=False`.
    """
    keys = GateKeys(name)
    async with client.pipeline(transaction=False) as pipe:
        pipe.hget(keys.gate, "state")
        pipe.time()
        pipe.smembers(keys.flows)
        pipe.zcard(keys.leases)
        pipe.zrange(keys.leases, 0, MOST_GONE - 1, withscores=True)
        pipe.get(keys.override)
        pipe.hget(keys.gate, "override")
        text, (seconds, micros), flows, known, leases, kept, said = await pipe.execute(raise_on_error=False)
    alive = isinstance(text, bytes)
    state = read_state(text)
    flows = [] if isinstance(flows, Exception) else flows
    known, leases = (0, []) if isinstance(known, Exception) else (known, leases)
    now = max(seconds * 1e6 + micros, state["last"])
    gone = [process for process, ends in leases if ends < now]
    living = known - len(gone)
    word = said if alive else kept
    override = read_override(word.decode()) if isinstance(word, bytes) else Override()
    if not alive and not (override.set_at or override.paused_until):
        return None
    state["max"] = override.max_concurrent or state["max"]
    if override.max_per_window is not None:
        state["rate"] = override.max_per_window
    paused_until, paused_by = _pause(state["pause"], override, now)
    freed = await _window(client, keys, state, now)
    full = bool(state["rate"]) and len(freed) >= state["rate"]
    opens = (
        state["gen"] + max(state["lease"], state["window"] if state["rate"] else 0) if state["cold"] else 0
    )
    names = sorted(flow.decode() for flow in flows)
    waiting = {flow: await client.zcount(keys.queue(flow), "-inf", 2**52) for flow in names}
    return GateView(
        name=name,
        max_concurrent=int(state["max"]),
        min_concurrent=int(state["min"]),
        max_per_window=int(state["rate"]) or None,
        window_s=state["window"] / 1e6,
        lease_s=state["lease"] / 1e6,
        level=min(state["level"], state["max"]) if state["ceiling"] else state["level"],
        in_use=max(0, int(state["in_use"]) - await _still_held(client, keys, gone)),
        used=len(freed),
        waiting_processes=int(state["waiting"]),
        processes=living,
        waiting_jobs=waiting,
        paused_for_s=math.inf if paused_until == FOREVER_US else max(0.0, (paused_until - now) / 1e6),
        closed_for_s=max(0.0, (opens - now) / 1e6),
        next_start_s=freed[0] if full else 0.0,
        paced_for_s=max(0.0, (state.get("next_start", 0) - now) / 1e6)
        if state.get("even") and state["rate"]
        else 0.0,
        served=living > 0,
        alive=alive,
        paused_by=paused_by,
        paused_until=paused_until / 1e6 if now < paused_until < FOREVER_US else None,
        override=_override_view(override),
        halted=state.get("halt", 0) > 0,
        first_freed_s=freed[0] if freed else 0.0,
        last_freed_s=freed[-1] if freed else 0.0,
    )


def _pause(provider: float, override: Override, now: float) -> tuple[float, str | None]:
    """Until when nothing is admitted, us, and who said so if an operator did."""
    mine = override.paused_until or 0
    if mine > now and mine >= provider:
        return mine, override.paused_by
    return provider, None


def _override_view(override: Override) -> OverrideView | None:
    if override.set_at is None:
        return None
    return OverrideView(
        max_concurrent=override.max_concurrent,
        max_per_window=override.max_per_window,
        by=override.set_by or "",
        at=override.set_at / 1e6,
        old_max_concurrent=override.old_max or None,
        old_max_per_window=override.old_rate or None,
    )


def read_state(text: Any) -> defaultdict[str, float]:
    """The gate's field `state`; what is missing or poisoned reads as 0, as in `gate.lua`."""
    state: defaultdict[str, float] = defaultdict(float)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        state.update({name: _number(value) for name, value in json.loads(text).items()})
    return state


def _number(value: Any) -> float:
    try:
        number = float(value or 0)
    except (ValueError, TypeError):
        return 0.0
    return number if math.isfinite(number) and number >= 0 else 0.0


async def _still_held(client: Redis, keys: GateKeys, gone: list[bytes]) -> int:
    """Slots of processes whose lease has ended, which the next caller gets back."""
    if not gone:
        return 0
    records: Any = await client.hmget(keys.gate, [b"p:" + process for process in gone])  # type: ignore[misc]
    words = ((record or b"").split(b" ") for record in records)
    return sum(int(each[1]) for each in words if len(each) > 1 and each[1].isdigit())


async def _window(client: Redis, keys: GateKeys, state: dict[str, float], now: float) -> list[float]:
    """Per start inside the window the seconds until it leaves it, ascending."""
    rate = int(state["rate"])
    if not rate:
        return []
    try:
        stamps: Any = await client.lrange(keys.starts, -rate, -1)  # type: ignore[misc]
    except ResponseError:
        return []
    freed = ((_number(stamp) + state["window"] - now) / 1e6 for stamp in stamps)
    return sorted(seconds for seconds in freed if seconds > 0)


async def known_limits(client: Redis) -> list[str]:
    """Names of the limits that have a gate, or an operator's word that waits for one, in order."""
    found = set()
    async for key in client.scan_iter(match="pocketfleet:{*}:*", count=1000):
        name, _, what = key.decode(errors="replace")[len("pocketfleet:{") :].partition("}:")
        if not NAME.fullmatch(name):
            continue  # none of ours has such a name
        if what == "gate" or (what == "override" and await read_gate(client, name)):
            found.add(name)
    return sorted(found)
