"""Processes that take permits, of ours or of the peer self-limiters; each prints one line of JSON.

`python -m benchmarks.contenders PEER pairs TASKS SECONDS`: acquire+release pairs a second, nothing waits.
`python -m benchmarks.contenders PEER hold SLOTS TASKS ROUNDS SECONDS`: start and end of each hold, ns.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from benchmarks.line import stand_ready
from pocketfleet import limit

Permits = Callable[[], AbstractAsyncContextManager[object]]


def permits(peer: str, name: str, slots: int) -> Permits:
    """What to enter for a permit."""
    if peer == "ours":
        return lambda: limit(name, max_concurrent=slots)
    from self_limiters import Semaphore  # type: ignore[import-not-found, unused-ignore]

    semaphore = Semaphore(name=name, capacity=slots, redis_url=os.environ["BENCH_URL"])
    return lambda: semaphore  # type: ignore[no-any-return, unused-ignore]


async def pairs(peer: str, tasks: int, seconds: float) -> float:
    permit, done = permits(peer, "pairs", 1000), 0
    async with permit():
        pass

    async def take() -> None:
        nonlocal done
        while time.perf_counter() < until:
            async with permit():
                pass
            done += 1

    began = time.perf_counter()
    until = began + seconds
    await asyncio.gather(*(take() for _ in range(tasks)))
    return done / (time.perf_counter() - began)


async def hold(peer: str, slots: int, tasks: int, rounds: int, seconds: float) -> list[tuple[int, int]]:
    permit, held = permits(peer, f"hold{slots}", slots), []
    async with permit():
        pass
    await stand_ready()

    async def work() -> None:
        for _ in range(rounds):
            async with permit():
                start = time.monotonic_ns()
                await asyncio.sleep(seconds)
                held.append((start, time.monotonic_ns()))

    await asyncio.gather(*(work() for _ in range(tasks)))
    return held


def main(peer: str, what: str, *numbers: str) -> None:
    if what == "pairs":
        print(json.dumps(asyncio.run(pairs(peer, int(numbers[0]), float(numbers[1])))))
    else:
        slots, tasks, rounds = map(int, numbers[:3])
        print(json.dumps(asyncio.run(hold(peer, slots, tasks, rounds, float(numbers[3])))))
    if peer != "ours":
        sys.stdout.flush()
        os._exit(0)  # self-limiters' threads may crash an interpreter that is shutting down


if __name__ == "__main__":
    main(*sys.argv[1:])
