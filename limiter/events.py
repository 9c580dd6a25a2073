"""The trail of a limit: what happened to it, why, and who did it. About the last 1,000 entries, for a week."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from limiter.keys import GateKeys
from limiter.printable import printable


@dataclass(frozen=True)
class Event:
    """One entry.

    Attributes:
        at: when, seconds since 1970 by Redis' clock.
        what: cut, recovery, pause, resume, override, clear, reset, reaped, cold, values, stall, clock
            or repaired.
        why: the cause, in words.
        before, after: what changed, as text: levels, seconds, slots or values.
        who: a process (`host:pid:…`), an operator, `gate` or `redis`.
    """

    at: float
    what: str
    why: str
    before: str
    after: str
    who: str

    def sentence(self) -> str:
        """One line for people, without the time."""
        phrase = _PHRASES.get(self.what, "{what}: {why} {before} {after}")
        return phrase.format(
            what=self.what,
            why=self.why,
            before=_short(self.before),
            after=_span(self.after) if self.what == "pause" else _short(self.after),
            who=self.who,
        )

    def clock(self) -> str:
        """The time of the entry, local, with the day where it is not today."""
        then = time.localtime(self.at)
        today = time.strftime("%Y%m%d", then) == time.strftime("%Y%m%d")
        return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)


_PHRASES = {
    "cut": "level cut {before} -> {after}: {why} ({who})",
    "recovery": "level grown {before} -> {after}: {why}",
    "pause": "paused {after}, {why} ({who})",
    "resume": "resumed by {who} (was paused by {before})",
    "override": "override by {who}: {before} -> {after}",
    "clear": "override cleared by {who}: {before} -> {after}",
    "reset": "level reset {before} -> {after}: {why} ({who})",
    "reaped": "holder {who} is gone with {before} slots: {why}",
    "cold": "admissions held for {after} s: {why}",
    "behind": "the gate was set back to an older state: it knew call {after} of {who} and not call {before}",
    "values": "two values: {before} and {after}; {why} ({who})",
    "stall": "no call for {after} s: Redis stood still or its clock jumped; leases were extended",
    "clock": "Redis' clock {why}, from {before} to {after}",
    "repaired": "poisoned state repaired: {before} ({who})",
}


async def read_events(client: Redis, limit: str, count: int = 1000) -> list[Event]:
    """The last `count` entries, oldest first."""
    try:
        rows: Any = await client.xrevrange(GateKeys(limit).events, count=count)
    except ResponseError:
        return []  # a key of another type; whoever writes next repairs it
    return [_event(fields) for _, fields in reversed(rows)]


def _event(fields: dict[bytes, bytes]) -> Event:
    words = {
        name.decode(errors="replace"): printable(value.decode(errors="replace"))
        for name, value in fields.items()
    }
    return Event(
        at=int(words.get("at", "0")) / 1e6,
        what=words.get("what", ""),
        why=words.get("why", ""),
        before=words.get("from", ""),
        after=words.get("to", ""),
        who=printable(unquote(words.get("who", ""))),
    )


def _span(seconds: str) -> str:
    return seconds if seconds.startswith("until") else f"for {_short(seconds)} s"


def _short(value: str) -> str:
    """Numbers as people read them."""
    try:
        return f"{float(value):.4g}" if len(value) > 4 and float(value) < 1e9 else value
    except ValueError:
        return value
