"""`limits`: look at limits and change them while the fleet runs, from any asyncio program.

    from pocketfleet import limits

    await limits.pause("openai", for_s=30)
    await limits.set("openai", max_concurrent=3)

What is changed is in force everywhere from the next call of each process on; no slot in use is taken away
and no start forgotten. Names of flows may be written with their `:`.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from limiter import control
from limiter.check import checked_connection
from limiter.client import open_retrying_client
from limiter.connect import find_redis
from limiter.control import KEEP, LONGEST_PAUSE_S, Change, checked_by
from limiter.doctor import Diagnosis, diagnose
from limiter.errors import LimitsError
from limiter.events import Event, read_events
from limiter.holders import Holder, read_holders
from limiter.limits import checked_count, checked_float, checked_name
from limiter.loops import open_already
from limiter.settings import FleetSettings, load
from limiter.view import GateView, known_limits, read_gate

MOST_NAMED = 20
"""Limits that a sentence names at most."""


class LiveLimits:
    """The limits of the fleet at the Redis of POCKETFLEET_REDIS_URL, or of the embedded server that runs.

    Raises, each method:
        LimitsError: a name or value that cannot hold, or a limit that nobody knows.
        RedisRefused: no Redis can be reached.
    """

    async def show(self, name: str | None = None) -> list[GateView]:
        """One limit, or all of them, as they are now."""
        async with _client() as client:
            if name is not None:
                return [await _known(client, limit_name(name))]
            views = [await read_gate(client, each) for each in await known_limits(client)]
            return [view for view in views if view is not None]

    async def set(
        self,
        name: str,
        *,
        max_concurrent: int | str = KEEP,
        max_per_minute: int | str | None = KEEP,
        by: str | None = None,
    ) -> Change:
        """Put other values over the limit's own, until `clear`; what is left out stays.

        Below what is in use nothing is admitted until enough has ended; nothing is interrupted. A rate is
        counted from the starts that are known: a limit without any has none written down before.

        Args:
            max_concurrent: slots of the whole fleet; the level may grow up to it.
            max_per_minute: starts in a window of the limit (60 s), None for no such limit.
            by: who asks; `user@host` where nobody is named.
        """
        if max_concurrent == KEEP and max_per_minute == KEEP:
            raise LimitsError(
                "nothing to set: give max_concurrent (--max-concurrent), max_per_minute (--max-per-minute) or both",
                key="max_concurrent",
            )
        top: int | str = KEEP
        rate: int | str = KEEP
        if max_concurrent != KEEP:
            top = checked_count(max_concurrent, "max_concurrent") or 0
        if max_per_minute != KEEP:
            rate = checked_count(max_per_minute, "max_per_minute", none_ok=True) or 0
        limit, who = limit_name(name), checked_by(by)
        async with _client() as client:
            return await control.set_values(client, limit, who, top, rate)

    async def clear(self, name: str, *, by: str | None = None) -> Change:
        """The limit's own values again; a pause stays."""
        limit, who = limit_name(name), checked_by(by)
        async with _client() as client:
            await _known(client, limit)
            return await control.clear(client, limit, who)

    async def pause(self, name: str, for_s: float | None = None, *, by: str | None = None) -> Change:
        """Admit nothing for `for_s` seconds, or until `resume`; also when all processes are gone meanwhile."""
        if for_s is not None:
            for_s = checked_float(for_s, "for_s", 0.001, LONGEST_PAUSE_S)
        limit, who = limit_name(name), checked_by(by)
        async with _client() as client:
            return await control.pause(client, limit, who, for_s)

    async def resume(self, name: str, *, by: str | None = None) -> Change:
        """End the pause, an operator's as well as one that the provider asked for."""
        limit, who = limit_name(name), checked_by(by)
        async with _client() as client:
            await _known(client, limit)
            return await control.resume(client, limit, who)

    async def reset(self, name: str, *, by: str | None = None) -> Change:
        """The adaptive level goes back to its initial value; no slot and no start is forgotten."""
        limit, who = limit_name(name), checked_by(by)
        async with _client() as client:
            await _known(client, limit)
            return await control.reset(client, limit, who)

    async def holders(self, name: str) -> list[Holder]:
        """The processes of a limit and what each holds, those that hold most first."""
        async with _client() as client:
            await _known(client, limit_name(name))
            return await read_holders(client, limit_name(name))

    async def events(self, name: str, count: int = 100) -> list[Event]:
        """The last entries of the limit's trail, oldest first."""
        async with _client() as client:
            return await read_events(client, limit_name(name), count)

    async def doctor(self, name: str) -> Diagnosis:
        """What holds the fleet back here, and the facts of the last minutes."""
        limit = limit_name(name)
        async with _client() as client:
            await _known(client, limit)
            found = await diagnose(client, limit)
            if found is None:
                raise LimitsError(f"limit '{limit}' is gone: nobody uses it", key="limit", value=limit)
            return found


limits = LiveLimits()


def limit_name(name: str) -> str:
    """The name of a limit; that of a flow has a '.' for its ':'."""
    return checked_name(name.replace(":", ".") if isinstance(name, str) else name)


async def _known(client: Redis, limit: str) -> GateView:
    view = await read_gate(client, limit)
    if view is None:
        names = await known_limits(client)
        known = ", ".join(names[:MOST_NAMED]) + (" …" if len(names) > MOST_NAMED else "")
        raise LimitsError(
            f"limit '{limit}' is not known here{did_you_mean(limit, names)} (known: {known or 'none'})",
            key="limit",
            value=limit,
        )
    return view


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """
    >>> did_you_mean("opnai", ["openai", "users.flow"]), did_you_mean("zzz", ["openai"])
    ("; did you mean 'openai'?", '')
    """
    close = difflib.get_close_matches(name, [each for each in names if each != name], 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


@asynccontextmanager
async def _client() -> AsyncIterator[Redis]:
    """That of the running loop's process, else one for this call."""
    process = open_already(asyncio.get_running_loop())
    if process is not None:
        yield process.client
        return
    place = await asyncio.to_thread(find_redis, load(FleetSettings), start=False)
    client = open_retrying_client(place.url, retries=1)
    try:
        await checked_connection(client, place.shown)
        yield client
    finally:
        await client.aclose()
        place.close()
