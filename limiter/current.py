"""The process of the running loop: opened at its first use, closed with the loop."""

from __future__ import annotations

import asyncio

from limiter.connect import find_redis
from limiter.loops import of_loop
from limiter.process import Process, open_process
from limiter.settings import FleetSettings, load


async def current_process(settings: FleetSettings | None = None) -> Process:
    """The process of the running loop, opened at its first use and closed with the loop.

    Joins the Redis of POCKETFLEET_REDIS_URL, or the embedded server, which it starts if none answers.
    """
    loop = asyncio.get_running_loop()
    opening = of_loop.get(loop)
    if opening is None:
        opening = loop.create_task(_open_default(settings or load(FleetSettings)))
        of_loop[loop] = opening
        opening.add_done_callback(lambda task: _forget_failed(loop, task))
    return await asyncio.shield(opening)


def _forget_failed(loop: asyncio.AbstractEventLoop, task: asyncio.Future[Process]) -> None:
    if task.cancelled() or task.exception() is not None:
        of_loop.pop(loop, None)


async def _open_default(settings: FleetSettings) -> Process:
    place = await asyncio.to_thread(find_redis, settings, start=True)
    process = await open_process(place.url, lease_s=settings.lease_s, stall_limit_s=settings.stall_limit_s)
    process.on_close(place.close)
    guard = asyncio.create_task(_close_with_loop(process), name="pocketfleet-guard")
    process.keep(guard)
    return process


async def _close_with_loop(process: Process) -> None:
    """`asyncio.run` cancels every task at its end: that is the moment to give everything back."""
    try:
        await asyncio.Event().wait()
    finally:
        await process.close()
