"""What holds the fleet back at one limit: the facts of the last minutes, and one sentence."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from limiter.events import Event, read_events
from limiter.holders import Holder, read_holders
from limiter.keys import GateKeys
from limiter.view import GateView, read_gate, read_state

LOOK_BACK_S = 600.0
UNCHANGED_S = 600.0
"""A process that holds the same slots for that long without a start or an end is worth a look."""
ADMISSIONS_A_S = 100_000.0
"""More cannot be: the counter was set anew (a new gate, a repair)."""
ODD = ("stall", "clock", "repaired", "values", "cold", "behind", "reaped")


@dataclass(frozen=True)
class Pace:
    """What the fleet did while somebody called, as far as samples (one in 5 s) go back.

    Attributes:
        over_s: how long the samples cover, at most the last ten minutes.
        admissions: starts in that time, those that were given back included.
        busiest_minute: most admissions in 60 s, to the 5 s.
        peak: most slots in use at a time.
    """

    over_s: float
    admissions: int
    busiest_minute: int
    peak: int

    @property
    def per_minute(self) -> float:
        return self.admissions * 60 / self.over_s if self.over_s else 0.0


@dataclass(frozen=True)
class Diagnosis:
    """A limit as `pocketfleet limits doctor` shows it.

    Attributes:
        stale: holders whose lease is over, or whose slots have not moved for ten minutes.
        clock_behind_s: how far Redis' clock stands behind the time of the gate.
        cuts: the last five cuts of the level, oldest first.
        oddities: the last five stalls, clock steps, repairs, second values, cold starts and dead holders.
        verdict: what holds the fleet back, in one sentence.
    """

    gate: GateView
    pace: Pace
    holders: list[Holder]
    stale: list[Holder]
    clock_behind_s: float
    cuts: list[Event]
    oddities: list[Event]
    verdict: str


async def diagnose(client: Redis, limit: str) -> Diagnosis | None:
    """Everything about one limit, or None where there is none. Decides and changes nothing."""
    gate = await read_gate(client, limit)
    if gate is None:
        return None
    holders = await read_holders(client, limit)
    events = await read_events(client, limit)
    last, attempt, samples, now = await _facts(client, limit)
    stale = [each for each in holders if _is_stale(each)]
    cuts = [each for each in events if each.what == "cut"][-5:]
    return Diagnosis(
        gate=gate,
        pace=pace_of(samples, now, attempt, gate.in_use),
        holders=holders,
        stale=stale,
        clock_behind_s=max(0.0, last - now) if last - now > 1 else 0.0,
        cuts=cuts,
        oddities=[each for each in events if each.what in ODD][-5:],
        verdict=verdict(gate, stale, cuts, now),
    )


def pace_of(samples: list[tuple[float, float, int]], now: float, attempt: float, in_use: int) -> Pace:
    """Samples are (seconds, admissions counted, peak since the one before).

    >>> pace_of([(0, 100, 1), (30, 110, 4), (60, 140, 9)], 65, 141, 3)
    Pace(over_s=65, admissions=41, busiest_minute=40, peak=9)
    """
    seen = [each for each in samples if now - each[0] <= LOOK_BACK_S]
    if not seen:
        return Pace(0.0, 0, 0, in_use)
    points = [*seen, (now, attempt, in_use)]
    steps = [(then[0], then[0] - first[0], then[1] - first[1]) for first, then in pairwise(points)]
    steps = [(at, for_s, n) for at, for_s, n in steps if 0 < n <= max(1.0, for_s) * ADMISSIONS_A_S]
    busiest = max((_in_minute(steps, end) for end, _, _ in steps), default=0)
    return Pace(
        over_s=now - seen[0][0],
        admissions=int(sum(n for _, _, n in steps)),
        busiest_minute=int(busiest),
        peak=max(peak for _, _, peak in points),
    )


def _in_minute(steps: list[tuple[float, float, float]], end: float) -> float:
    """Admissions in the minute before `end`; a step that reaches beyond it counts by its share."""
    shares = ((min(at, end) - max(at - for_s, end - 60)) / for_s if for_s else 1.0 for at, for_s, _ in steps)
    return sum(n * share for (_, _, n), share in zip(steps, shares, strict=True) if share > 0)


def verdict(gate: GateView, stale: list[Holder], cuts: list[Event], now: float) -> str:
    """What holds the fleet back, most certain first."""
    reason = gate.holds_back()
    if not gate.alive:
        return reason or "nobody uses this limit now; the operator's values are kept for whoever comes"
    gone = [each for each in stale if each.lease_left_s < 0]
    slots = sum(each.held for each in gone)
    if slots and slots == gate.in_use:
        return f"no process lives: {slots} slots stand with dead ones until the next one calls"
    if reason.startswith("level"):
        return reason + _why_so_low(gate, cuts, now) + _who_keeps(stale)
    if reason:
        return reason
    if not any(gate.waiting_jobs.values()) and not gate.waiting_processes:
        return "nothing: no run waits here"
    if gate.waiting_processes:
        return "nothing: the next start is due now"
    return "nothing at this limit: the workers have no room (--max-jobs), or know other flows"


def _why_so_low(gate: GateView, cuts: list[Event], now: float) -> str:
    if int(gate.level) >= gate.max_concurrent:
        if gate.override and gate.override.max_concurrent:
            return f", set by {gate.override.by} (was {gate.override.old_max_concurrent})"
        return ", the most this limit allows"
    if not cuts:
        return f" (at most {gate.max_concurrent}): the level has not grown yet"
    ago = max(0.0, now - cuts[-1].at)
    return (
        f" (at most {gate.max_concurrent}): the provider refused a run {ago:.0f} s ago "
        f"(level {float(cuts[-1].before):g} -> {float(cuts[-1].after):g}), and it grows as nodes end well"
    )


def _who_keeps(stale: list[Holder]) -> str:
    keepers = [each for each in stale if each.held]
    if not keepers:
        return ""
    one = keepers[0]
    return (
        f"; {sum(each.held for each in keepers)} of the slots are stale, such as {one.held} of process "
        f"{one.pid} on {one.host}, unchanged for {one.since_s / 60:.0f} min"
    )


def _is_stale(holder: Holder) -> bool:
    return holder.lease_left_s < 0 or (holder.held > 0 and holder.since_s > UNCHANGED_S)


async def _facts(client: Redis, limit: str) -> tuple[float, float, list[tuple[float, float, int]], float]:
    """Time of the gate's last call, its counter of admissions, the samples, Redis' time; in seconds."""
    keys = GateKeys(limit)
    async with client.pipeline(transaction=False) as pipe:
        pipe.hget(keys.gate, "state")
        pipe.lrange(keys.samples, 0, -1)
        pipe.time()
        text, rows, (seconds, micros) = await pipe.execute(raise_on_error=False)
    if isinstance(rows, ResponseError):
        rows = []
    state = read_state(text)
    found = [each for each in map(_sample, rows) if each]
    return state["last"] / 1e6, state["attempt"], found, seconds + micros / 1e6


def _sample(row: Any) -> tuple[float, float, int] | None:
    words = row.split()
    if len(words) != 4 or not all(word.isdigit() for word in words[:3]):
        return None
    return int(words[0]) / 1e6, float(words[1]), int(words[2])


def shown(found: Diagnosis) -> list[str]:
    """The lines that `doctor` prints."""
    gate, pace = found.gate, found.pace
    lines = [
        f"{gate.name}: {found.verdict}",
        f"  in use    {gate.in_use} of {int(gate.level)}, most in the last {_span(pace.over_s)}: {pace.peak}"
        f" (limit {gate.max_concurrent})",
        f"  starts    {_starts(gate, pace)}",
    ]
    if gate.override:
        lines.append(f"  override  {override_line(gate)}")
    if gate.paused_for_s > 0:
        by = "after refusals at the lowest level" if gate.halted else "by the provider"
        lines.append(f"  paused    {gate.holds_back() if gate.paused_by else f'{by} {gate.pause_ends()}'}")
    if found.clock_behind_s:
        lines.append(
            f"  clock     Redis' clock stands {found.clock_behind_s:.0f} s behind: time stands still until then"
        )
    for each in found.stale:
        state = "its lease is over" if each.lease_left_s < 0 else f"unchanged for {each.since_s / 60:.0f} min"
        lines.append(f"  stale     {each.held} slots of pid {each.pid} on {each.host}: {state}")
    lines += [f"  cut       {each.clock()}  {each.sentence()}" for each in found.cuts]
    lines += [f"  noted     {each.clock()}  {each.sentence()}" for each in found.oddities]
    return lines


def _starts(gate: GateView, pace: Pace) -> str:
    """Those of the window until samples cover it: what started before the first one is in no rate."""
    window = f"{gate.max_per_window} in {gate.window_s:g} s" if gate.max_per_window else ""
    if window and pace.over_s < gate.window_s:
        return f"{gate.used} of {window}"
    rate = f" of {window}" if window else ", no limit per minute"
    if not pace.over_s:
        return f"not sampled yet{rate}"
    if pace.over_s < 60:  # a rate made of less would say more than was seen
        return f"{pace.admissions} in the last {_span(pace.over_s)}{rate}"
    return f"{pace.per_minute:.1f} a minute over {_span(pace.over_s)}, busiest minute {pace.busiest_minute}{rate}"


def override_line(gate: GateView) -> str:
    """The operator's values and what was before them."""
    override = gate.override
    if override is None:
        return ""
    parts = []
    if override.max_concurrent is not None:
        parts.append(f"{override.max_concurrent} at a time (was {override.old_max_concurrent or '-'})")
    if override.max_per_window is not None:
        rate = override.max_per_window or "no limit"
        parts.append(f"{rate} per {gate.window_s:g} s (was {override.old_max_per_window or 'no limit'})")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(override.at))
    return f"{', '.join(parts)} by {override.by} at {when}"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
