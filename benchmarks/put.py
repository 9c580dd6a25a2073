"""A producer of its own: enqueue items from a generator and say how long it took and how large it grew.

`python -m benchmarks.put FLOW COUNT [SECONDS]` prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from producer.fleet_run import FleetRun
from worker.registry import find_flow


def peak_bytes() -> int:
    """The most memory this process had. Linux counts it anew for each program, `getrusage` does not."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def items(count: int, more: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"i": number, **more}


class Trace:
    """The memory of this process every 0.1 s, as [seconds, MB]; empty where the system has no /proc."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._began = perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        pages = Path("/proc/self/statm")
        while pages.exists() and not self._over.wait(0.1):
            size = int(pages.read_text().split()[1]) * resource.getpagesize()
            self.points.append((round(perf_counter() - self._began, 2), round(size / 1024**2, 2)))


async def put(flow: str, count: int, more: dict[str, Any]) -> dict[str, Any]:
    target = f"benchmarks.flows:{flow}"
    began = perf_counter()
    run = FleetRun(find_flow(target), {}, params=items(count, more), target=target, live=False)  # type: ignore[arg-type]
    with Trace() as trace:
        await run.enqueue_only()
    told = {"seconds": perf_counter() - began, "peak": peak_bytes(), "batch": run.batch, "added": run.added}
    return {**told, "trace": trace.points}


if __name__ == "__main__":
    more = {"seconds": float(sys.argv[3])} if len(sys.argv) > 3 else {}
    print(json.dumps(asyncio.run(put(sys.argv[1], int(sys.argv[2]), more))))
