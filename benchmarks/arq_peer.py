"""The peer arq, tuned: looks every 0.02 s, 100 jobs at a time, keeps no results, has no limits, logs nothing.

`python -m benchmarks.arq_peer work` is one worker process, `... put COUNT` enqueues with 32 calls in
flight and prints how long it took.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from arq import create_pool, run_worker
from arq.connections import RedisSettings

from benchmarks.line import stand_ready

IN_FLIGHT = 32
QUEUE = "arq:queue"


async def noop(ctx: dict[Any, Any], number: int) -> None:
    return None


async def startup(ctx: dict[Any, Any]) -> None:
    await stand_ready()


def settings() -> RedisSettings:
    return RedisSettings.from_dsn(os.environ["BENCH_URL"])


def work() -> None:
    worker = {"functions": [noop], "on_startup": startup, "redis_settings": settings()}
    tuned = {"poll_delay": 0.02, "max_jobs": 100, "keep_result": 0}
    run_worker(type("Tuned", (), worker | tuned))


async def put(count: int) -> float:
    pool = await create_pool(settings())
    numbers = iter(range(count))

    async def line(mine: Iterator[int]) -> None:
        for number in mine:
            await pool.enqueue_job("noop", number)

    began = perf_counter()
    await asyncio.gather(*(line(numbers) for _ in range(IN_FLIGHT)))
    took = perf_counter() - began
    await pool.aclose()
    return took


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work()
    else:
        print(json.dumps({"seconds": asyncio.run(put(int(sys.argv[2])))}))
