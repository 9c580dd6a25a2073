"""The peer taskiq with its Redis stream broker: acknowledges, keeps no results.

It needs a newer redis-py than arq, so it runs in a virtual environment of its own (`make bench` makes it).
`python -m benchmarks.taskiq_peer COUNT RATE` sends; `python -m taskiq worker benchmarks.taskiq_peer:broker`
works.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from taskiq_redis import RedisStreamBroker  # type: ignore[import-not-found, unused-ignore]

from benchmarks.open_loop import note_start, send_at

broker = RedisStreamBroker(os.environ["BENCH_URL"])


@broker.task(task_name="note")  # type: ignore[untyped-decorator, unused-ignore]
async def note(number: int) -> None:
    note_start(number)


async def send(count: int, per_s: float) -> list[int]:
    await broker.startup()
    try:
        return await send_at(per_s, count, note.kiq)
    finally:
        await broker.shutdown()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(send(int(sys.argv[1]), float(sys.argv[2])))))
