"""What a gate looks like just now, for people: read without deciding anything."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from limiter.keys import GateKeys


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

    def holds_back(self) -> str:
        """What keeps the next run from starting, in words; '' if nothing does."""
        if self.closed_for_s > 0:
            return f"cold start: admits again in {self.closed_for_s:.0f} s"
        if self.paused_for_s > 0:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + self.paused_for_s))
            return f"pause asked for by the provider, {self.paused_for_s:.0f} s more, until {until}"
        if self.max_per_window and self.used >= self.max_per_window:
            return (
                f"window: {self.used} of {self.max_per_window} starts in {self.window_s:g} s, "
                f"next in {self.next_start_s:.1f} s"
            )
        if self.in_use >= int(self.level):
            return f"level: {self.in_use} of {int(self.level)} at a time"
        if not self.served and any(self.waiting_jobs.values()):
            return "no worker lives"
        return ""


async def read_gate(client: Redis, name: str) -> GateView | None:
    """The gate of a limit, or None if there is none (nobody has called yet, or not for a long time)."""
    keys = GateKeys(name)
    async with client.pipeline(transaction=False) as pipe:
        pipe.hget(keys.gate, "state")
        pipe.time()
        pipe.smembers(keys.flows)
        pipe.zcard(keys.leases)
        pipe.get(keys.override)
        text, (seconds, micros), flows, living, _override = await pipe.execute()
    if text is None:
        return None
    state: dict[str, float] = json.loads(text)
    now = max(seconds * 1e6 + micros, state["last"])
    used, next_start = await _window(client, keys, state, now)
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
        level=state["level"],
        in_use=int(state["in_use"]),
        used=used,
        waiting_processes=int(state["waiting"]),
        processes=living,
        waiting_jobs=waiting,
        paused_for_s=max(0.0, (state["pause"] - now) / 1e6),
        closed_for_s=max(0.0, (opens - now) / 1e6),
        next_start_s=next_start,
        served=living > 0,
    )


async def _window(client: Redis, keys: GateKeys, state: dict[str, float], now: float) -> tuple[int, float]:
    """Starts inside the window, and seconds until the next place comes free."""
    rate = int(state["rate"])
    if not rate:
        return 0, 0.0
    stamps: Any = await client.lrange(keys.starts, -rate, -1)  # type: ignore[misc]
    inside = [float(stamp) for stamp in stamps if float(stamp) > now - state["window"]]
    if len(inside) < rate:
        return len(inside), 0.0
    return len(inside), max(0.0, (inside[0] + state["window"] - now) / 1e6)


async def known_limits(client: Redis) -> list[str]:
    """Names of the limits that have a gate, in order."""
    found = []
    async for key in client.scan_iter(match="pocketfleet:{*}:gate", count=1000):
        found.append(key.decode()[len("pocketfleet:{") : -len("}:gate")])
    return sorted(found)
