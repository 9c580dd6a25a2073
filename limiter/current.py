"""The process of the running loop: opened at its first use, closed with the loop."""

from __future__ import annotations

import asyncio
from functools import partial

from limiter.connect import find_redis
from limiter.errors import LimitClosed
from limiter.loops import ending, forget, of_loop
from limiter.process import Process, open_process
from limiter.settings import FleetSettings, load


async def current_process(settings: FleetSettings | None = None) -> Process:
    """The process of the running loop, opened at its first use and closed with the loop.

    Joins the Redis of POCKETFLEET_REDIS_URL, or the embedded server, which it starts if none answers.

    Raises:
        LimitClosed: the loop is ending.
    """
    loop = asyncio.get_running_loop()
    opening = of_loop.get(loop)
    if opening is None:
        if loop in ending:
            raise LimitClosed
        opening = loop.create_task(_open_default(settings or load(FleetSettings)))
        of_loop[loop] = opening
        opening.add_done_callback(lambda task: _forget_failed(loop, task))
    return await asyncio.shield(opening)


def _forget_failed(loop: asyncio.AbstractEventLoop, task: asyncio.Future[Process]) -> None:
    if task.cancelled() or task.exception() is not None:
        forget(loop)


async def _open_default(settings: FleetSettings) -> Process:
    place = await asyncio.to_thread(find_redis, settings, start=True)
    process = await open_process(place.url, lease_s=settings.lease_s, stall_limit_s=settings.stall_limit_s)
    process.on_close(place.close)
    process.on_close(partial(forget, process.loop))
    closed = asyncio.Event()
    process.on_close(closed.set)
    guard = asyncio.create_task(_close_with_loop(process, closed), name="pocketfleet-guard")
    process.keep(guard)
    return process


async def _close_with_loop(process: Process, closed: asyncio.Event) -> None:
    """`asyncio.run` cancels every task at its end: that is the moment to give everything back."""
    try:
        await closed.wait()
    except asyncio.CancelledError:
        ending.add(process.loop)
        await process.close()
        raise
