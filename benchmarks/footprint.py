"""What a batch costs Redis: bytes while its items wait, beside arq's for the same params, and a cancel of all.

Every item has the params `{"i": number, "seconds": 0.5}`, under a batch id as `pocketfleet enqueue` makes it.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench
from benchmarks.report import Goal, Result, Row, Sample
from limiter.client import open_retrying_client
from producer.cancel import cancel

MOST, LONGEST_S = 1.0, 5.0


def measure(bench: Bench) -> Result:
    items, many = bench.size(100_000, 20_000), bench.size(1_000_000, 100_000)
    ours: list[float] = []
    arq: list[float] = []
    took: list[float] = []
    blocks: list[float] = []
    for number in range(bench.repetitions):
        bench.say(f"bytes in Redis and cancel, repetition {number + 1}")
        ours.append(_bytes(bench, items, "benchmarks.put", "noop", items, 0.5))
        arq.append(_bytes(bench, items, "benchmarks.arq_peer", "put_params", items))
        seconds, block_ms = _cancel(bench, many)
        took.append(seconds)
        blocks.append(block_ms)
    bench.empty()
    rows = [
        Row(
            f"Redis bytes per waiting item, {items:,} of them",
            Sample(tuple(ours), "B"),
            Sample(tuple(arq), "B"),
            "arq, the same params",
            Goal("<=", MOST),
        ),
        Row(f"cancel {many:,} waiting items", Sample(tuple(took), "s"), goal=Goal("<=", LONGEST_S)),
        Row("a call of that cancel holds Redis for, on average", Sample(tuple(blocks), "ms")),
    ]
    return Result("footprint", rows)


def _bytes(bench: Bench, items: int, module: str, *args: object) -> float:
    """What Redis' own count of used memory gains, per item."""
    bench.empty()
    before = int(bench.client.info("memory")["used_memory"])
    bench.ask(module, *args)
    return (int(bench.client.info("memory")["used_memory"]) - before) / items


def _cancel(bench: Bench, items: int) -> tuple[float, float]:
    """Seconds it takes, and milliseconds of one of its calls, as the server counts them."""
    bench.empty()
    batch = bench.ask("benchmarks.put", "noop", items)["batch"]
    bench.client.config_resetstat()
    began = time.perf_counter()
    taken = asyncio.run(_cancelled(bench.url, batch, items))
    seconds = time.perf_counter() - began
    if taken != items:
        raise RuntimeError(f"{taken} of {items} items were taken off the queue")
    return seconds, float(bench.client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]) / 1000


async def _cancelled(url: str, batch: str, items: int) -> int:
    client = open_retrying_client(url)
    try:
        return (await cancel(client, "noop", "noop", batch, items)).waiting
    finally:
        await client.aclose()
