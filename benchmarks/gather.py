"""Gathering outcomes: Redis commands for each one that a producer follows, while one worker runs the batch.

Nobody else sends XREAD or BITCOUNT: a read is one XREAD, a look at the batch one HMGET and one BITCOUNT.
"""

from __future__ import annotations

import asyncio
import json
import sys

from benchmarks.bench import Bench
from benchmarks.report import Goal, Result, Row, Sample
from producer.enqueued import Batch

MOST = 0.01


def measure(bench: Bench) -> Result:
    items = bench.size(100_000, 20_000)
    found: list[float] = []
    for number in range(bench.repetitions):
        bench.say(f"gathering, repetition {number + 1}")
        bench.empty()
        batch = bench.ask("benchmarks.put", "noop", items)["batch"]
        before = _commands(bench)
        with bench.workers(1, "noop"):
            gathered = bench.ask("benchmarks.gather", batch, items)["gathered"]
        if gathered != items:
            raise RuntimeError(f"{gathered} of {items} outcomes came")
        found.append((_commands(bench) - before) / items)
    bench.empty()
    row = Row(f"commands per outcome, gathering {items:,}", Sample(tuple(found)), goal=Goal("<=", MOST))
    return Result("gather", [row])


def _commands(bench: Bench) -> int:
    stats = bench.client.info("commandstats")

    def calls(name: str) -> int:
        return int(stats.get(f"cmdstat_{name}", {}).get("calls", 0))

    return calls("xread") + 2 * calls("bitcount")


async def gathered(batch: str, items: int) -> int:
    return sum([1 async for _ in Batch(batch, "noop", items)])


if __name__ == "__main__":
    print(json.dumps({"gathered": asyncio.run(gathered(sys.argv[1], int(sys.argv[2])))}))
