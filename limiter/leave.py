"""How a pump leaves its gate: it gives everything back in one last call, and nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from limiter.errors import LimitClosed
from limiter.line import Line

if TYPE_CHECKING:
    from limiter.pump import Pump

log = logging.getLogger("pocketfleet.limiter")


async def leave(pump: Pump, line: Line, keys: Sequence[str]) -> None:
    """Give everything back in one last call, also while the loop is being cancelled."""
    pump.slots.stop_watching()
    for waiter in pump.waiters:
        if not waiter.done():
            waiter.set_exception(LimitClosed(pump.name))
    for contact in pump.calls.contacts:
        contact.cancel()
    alone = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            alone = await pump.calling.acquire()  # a call for several gates may be in flight
    try:
        if pump.calls.joined:
            await _say_good_bye(pump, line, keys)
    finally:
        if alone:
            pump.calling.release()


async def _say_good_bye(pump: Pump, line: Line, keys: Sequence[str]) -> None:
    call = pump.calls.good_bye()
    try:
        async with asyncio.timeout(2.0):
            await line.call(keys, call.argv())
    except (RedisError, OSError, TimeoutError) as error:
        log.warning("pump.left_unheard limit=%s error=%s", pump.name, type(error).__name__)
    finally:
        for entry in (*call.heard, *pump.news.entries):
            if entry.heard is not None:
                entry.heard.cancel()
