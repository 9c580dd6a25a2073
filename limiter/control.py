"""What an operator asks of a limit: one script, typed. In force from the next call of every process on."""

from __future__ import annotations

import getpass
import os
import socket
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from limiter.errors import LimitsError
from limiter.keys import GateKeys
from limiter.printable import printable
from limiter.script import script

CONTROL = Path(__file__).with_name("control.lua")
FOREVER_US = 2**52
LONGEST_PAUSE_S = 366 * 86_400.0
"""A pause that shall last longer has no end: it is resumed by hand."""

KEEP = ""
"""A value that `set_values` leaves as it is."""

_NOT_POISON = ("NOLIMITS", "OOM", "READONLY", "MISCONF", "NOPERM", "NOAUTH", "CLUSTERDOWN", "MOVED", "BUSY")


@dataclass(frozen=True)
class Override:
    """The operator's word on a limit. `None` = nothing said; times are us of Redis' clock.

    Attributes:
        max_concurrent, max_per_window: instead of the limit's own; a rate of 0 lifts it.
        set_at, set_by, old_max, old_rate: when and who set them, and what was in force before.
        paused_until: `FOREVER_US` = until resumed.
    """

    max_concurrent: int | None = None
    max_per_window: int | None = None
    set_at: int | None = None
    set_by: str | None = None
    old_max: int | None = None
    old_rate: int | None = None
    paused_until: int | None = None
    paused_at: int | None = None
    paused_by: str | None = None


def read_override(text: str) -> Override:
    """The words of `override.lua`; what cannot be read says nothing."""
    words = text.split()
    if len(words) != 12:
        return Override()
    try:
        top, rate, until, _, _, set_at, _, old_max, old_rate, _, paused_at, _ = (
            _whole(word) for word in words
        )
    except ValueError:
        return Override()
    return Override(
        max_concurrent=top,
        max_per_window=rate,
        set_at=set_at,
        set_by=_said(words[6]),
        old_max=old_max,
        old_rate=old_rate,
        paused_until=until,
        paused_at=paused_at,
        paused_by=_said(words[11]),
    )


@dataclass(frozen=True)
class Change:
    """What a command found and left. Times are us of Redis' clock; a rate of 0 is none.

    Attributes:
        alive: the gate exists; without one the word is kept and holds once a process comes.
        repaired: keys and fields that were poisoned, now gone or mended.
    """

    alive: bool
    now: int
    override: Override
    max_concurrent: int
    max_per_window: int
    max_before: int
    rate_before: int
    paused_until_before: int
    level_before: float
    repaired: str


async def set_values(
    client: Redis, limit: str, by: str, max_concurrent: int | str = KEEP, max_per_window: int | str = KEEP
) -> Change:
    """Other values than the limit's own, until `clear`; `max_per_window=0` lifts the rate."""
    return await _command(client, limit, "set", by, max_concurrent, max_per_window)


async def clear(client: Redis, limit: str, by: str) -> Change:
    """The limit's own values again; the level goes back to where it was."""
    return await _command(client, limit, "clear", by)


async def pause(client: Redis, limit: str, by: str, for_s: float | None) -> Change:
    """Admit nothing for that long (None: until resumed). What runs goes on."""
    return await _command(client, limit, "pause", by, KEEP if for_s is None else round(for_s * 1e6))


async def resume(client: Redis, limit: str, by: str) -> Change:
    """End the pause, whoever asked for it."""
    return await _command(client, limit, "resume", by)


async def reset(client: Redis, limit: str, by: str) -> Change:
    """The level goes back to its initial value; no start and no slot in use is forgotten."""
    return await _command(client, limit, "reset", by)


async def repair(
    client: Redis, limit: str, by: str, flows: Iterable[str] = (), batches: Iterable[str] = ()
) -> Change:
    """Mend the keys that a script could not read. A gate that lost part of its state holds as after a loss."""
    beside: list[str] = []
    for flow in flows:
        beside += (f"queue:{flow}", "zset", f"idle:{flow}", "zset")
    for batch in batches:
        beside += (f"batch:{batch}", "hash", f"done:{batch}", "string", f"out:{batch}", "stream")
    return await _command(client, limit, "repair", by, *beside)


def may_be_poison(error: ResponseError) -> bool:
    """Whether a script failed at what it found in its keys, rather than at the state of the server."""
    said = str(error)
    if type(error) is not ResponseError:  # redis-py knows it: read-only, out of memory, no right
        return False
    return not said.startswith(_NOT_POISON) and any(
        sign in said for sign in ("WRONGTYPE", "user_script", "running script")
    )


@cache
def this_operator() -> str:
    """`user@host`, as far as the system knows a name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname() or 'host'}"


def checked_by(by: str | None) -> str:
    """Who asks, at most 100 characters; `user@host` where nobody is named."""
    if by is None:
        return this_operator()
    if not isinstance(by, str) or not by.strip() or len(by) > 100 or not by.strip().isprintable():
        raise LimitsError(
            f"by={by!r} cannot be used: name who asks in 1 to 100 printable characters", key="by", value=by
        )
    return by.strip()


async def _command(client: Redis, limit: str, act: str, by: str, *words: Any) -> Change:
    # one id for all repetitions of a call whose answer was lost
    args = ["", "", act, quote(by, safe="@:+"), uuid.uuid4().hex[:16], *words]
    args += [KEEP] * (7 - len(args))
    return _change(await script(client, CONTROL)(keys=GateKeys(limit).all, args=args))


def _change(reply: list[Any]) -> Change:
    words = [each.decode() if isinstance(each, bytes) else str(each) for each in reply]
    return Change(
        alive=words[0] == "1",
        now=int(words[1]),
        override=read_override(words[2]),
        max_concurrent=int(float(words[3])),
        max_per_window=int(float(words[4])),
        max_before=int(float(words[5])),
        rate_before=int(float(words[6])),
        paused_until_before=int(words[7]),
        level_before=float(words[8]),
        repaired=words[9],
    )


def _whole(word: str) -> int | None:
    """A number, or None for a word that is none of those we count with."""
    return int(word) if word.isascii() and word.isdigit() else None


def _said(word: str) -> str | None:
    return None if word == "-" else printable(unquote(word))
