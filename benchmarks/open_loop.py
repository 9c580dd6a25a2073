"""From enqueue to start: send at a fixed rate, note when each was sent and when it started.

Standard library only, since a peer runs it in a virtual environment of its own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

STARTS = "BENCH_STARTS"
"""The file in which nodes and tasks note when they started."""


def note_start(number: int) -> None:
    """One line `number nanoseconds`, on the clock that all processes of a machine share."""
    now = time.monotonic_ns()
    fd = os.open(os.environ[STARTS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, b"%d %d\n" % (number, now))
    os.close(fd)


def read_starts(path: Path) -> dict[int, int]:
    """What `note_start` wrote so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(number): int(moment) for number, moment in (line.split() for line in lines)}


async def send_at(per_s: float, count: int, send: Callable[[int], Awaitable[object]]) -> list[int]:
    """Call `send` for 0, 1, 2, ... `per_s` times a second, answered or not; when each call began, ns."""
    began = [0] * count
    flying: set[asyncio.Task[None]] = set()

    async def call(number: int) -> None:
        began[number] = time.monotonic_ns()
        await send(number)

    due = time.monotonic()
    for number in range(count):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(call(number))
        flying.add(task)
        task.add_done_callback(flying.discard)
        due += 1 / per_s
    await asyncio.gather(*flying)
    return began
