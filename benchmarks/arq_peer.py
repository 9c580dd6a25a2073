"""The peer arq, tuned: looks every 0.02 s, 100 jobs at a time, keeps no results, has no limits, logs nothing.

`python -m benchmarks.arq_peer work` is one worker process, `... put COUNT [IN_FLIGHT]` enqueues with that many
calls in flight (32) and prints how long it took, `... put_params COUNT` the same with a dict of params.
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
from benchmarks.put import items

IN_FLIGHT = 32
QUEUE = "arq:queue"


async def noop(ctx: dict[Any, Any], number: int) -> None:
    return None


async def startup(ctx: dict[Any, Any]) -> None:
    await stand_ready()


def settings() -> RedisSettings:
    found = RedisSettings.from_dsn(os.environ["BENCH_URL"])
    found.conn_timeout = 10  # of its default, 1 s, a busy machine takes more
    return found


def work() -> None:
    worker = {"functions": [noop], "on_startup": startup, "redis_settings": settings()}
    tuned = {"poll_delay": 0.02, "max_jobs": 100, "keep_result": 0}
    run_worker(type("Tuned", (), worker | tuned))


async def put(given: Iterator[Any], in_flight: int = IN_FLIGHT) -> float:
    pool = await create_pool(settings())

    async def line(mine: Iterator[Any]) -> None:
        for each in mine:
            await pool.enqueue_job("noop", each)

    began = perf_counter()
    await asyncio.gather(*(line(given) for _ in range(in_flight)))
    took = perf_counter() - began
    await pool.aclose()
    return took


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work()
    elif sys.argv[1] == "put":
        print(
            json.dumps({"seconds": asyncio.run(put(iter(range(int(sys.argv[2]))), *map(int, sys.argv[3:])))})
        )
    else:
        print(json.dumps({"seconds": asyncio.run(put(items(int(sys.argv[2]), {"seconds": 0.5})))}))
