"""The seed's table: 100 items of two nodes that sleep 0.5 s each, 5 and 10 at a time.

Four worker processes wait already. Timed in the producer, from its call until it has the last outcome:
params to disk, enqueue, runs, outcomes, merge. `python -m benchmarks.seed_table FLOW COUNT` is that producer.
Beside it one process of plain asyncio does the same sleeps behind a semaphore: what it loses, the machine lost.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from time import perf_counter

from benchmarks.bench import Bench
from benchmarks.report import Chart, Goal, Result, Row, Sample

WORKERS, MOST = 4, 1.01


def measure(bench: Bench) -> Result:
    count = bench.size(100, 20)
    taken: dict[int, list[float]] = {5: [], 10: []}
    plain: dict[int, list[float]] = {5: [], 10: []}
    for number in range(bench.repetitions):
        for places in taken:
            bench.say(f"seed table, {places} at a time, repetition {number + 1}")
            ours, beside = _run(bench, places, count)
            taken[places].append(ours)
            plain[places].append(beside)
    result = Result("seed_table")
    for places, seconds in taken.items():
        what = f"{count} items x two 0.5 s nodes, {places} at a time, 4 workers"
        ideal = Sample((count / places,), "s")
        ours = Sample(tuple(seconds), "s")
        result.rows.append(Row(what, ours, ideal, "ideal", Goal("<=", MOST)))
        beside = Sample(tuple(plain[places]), "s")
        result.rows.append(Row(f"the same, {places} at a time", ours, beside, "one plain asyncio process"))
    bars = {f"{places} at a time": [each * places / count for each in taken[places]] for places in taken}
    result.charts.append(Chart("Seed table", "bar", "", "time over ideal", {**bars}))
    return result


def _run(bench: Bench, places: int, count: int) -> tuple[float, float]:
    """Seconds it took on the fleet, and in one plain process at the same time."""
    bench.empty()
    flow, module = f"seed{places}", "benchmarks.seed_table"
    with bench.workers(WORKERS, flow):
        bench.until_idle(flow, WORKERS)
        with bench.processes(1, module, "plain", places, count, heard=True) as (plain,):
            ours = float(bench.ask(module, flow, count))
            return ours, _said(plain)


def _said(process: subprocess.Popen[bytes]) -> float:
    assert process.stdout is not None
    return float(process.stdout.read())


async def plain(places: int, count: int) -> float:
    free = asyncio.Semaphore(places)

    async def run() -> None:
        async with free:
            await asyncio.sleep(0.5)
            await asyncio.sleep(0.5)

    began = perf_counter()
    await asyncio.gather(*(run() for _ in range(count)))
    return perf_counter() - began


async def produce(flow: str, count: int) -> float:
    from benchmarks.put import items
    from producer.fleet_run import FleetRun
    from worker.registry import find_flow

    target = f"benchmarks.flows:{flow}"
    found = find_flow(target)
    began = perf_counter()
    run = FleetRun(found, {}, params=items(count, {}), target=target, live=False)  # type: ignore[arg-type]
    await run.go()
    took = perf_counter() - began
    if run.completed != count:
        raise RuntimeError(f"{run.completed} of {count} flows completed")
    return took


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    if what == "plain":
        print(json.dumps(asyncio.run(plain(int(numbers[0]), int(numbers[1])))))
    else:
        print(json.dumps(asyncio.run(produce(what, int(numbers[0])))))
