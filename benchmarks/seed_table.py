"""The seed's table: 100 items of two nodes that sleep 0.5 s each, 5 and 10 at a time.

Four worker processes wait already. Timed in the producer, from its call until it has the last outcome:
params to disk, enqueue, runs, outcomes, merge. `python -m benchmarks.seed_table FLOW COUNT` is that producer.
"""

from __future__ import annotations

import asyncio
import json
import sys
from time import perf_counter

from benchmarks.bench import Bench
from benchmarks.report import Chart, Goal, Result, Row, Sample

WORKERS, MOST = 4, 1.01


def measure(bench: Bench) -> Result:
    count = bench.size(100, 20)
    taken: dict[int, list[float]] = {5: [], 10: []}
    for number in range(bench.repetitions):
        for places, seconds in taken.items():
            bench.say(f"seed table, {places} at a time, repetition {number + 1}")
            seconds.append(_run(bench, f"seed{places}", count))
    result = Result("seed_table")
    for places, seconds in taken.items():
        what = f"{count} items x two 0.5 s nodes, {places} at a time, 4 workers"
        ideal = Sample((count / places,), "s")
        result.rows.append(Row(what, Sample(tuple(seconds), "s"), ideal, "ideal", Goal("<=", MOST)))
    bars = {f"{places} at a time": [each * places / count for each in taken[places]] for places in taken}
    result.charts.append(Chart("Seed table", "bar", "", "time over ideal", {**bars}))
    return result


def _run(bench: Bench, flow: str, count: int) -> float:
    bench.empty()
    with bench.workers(WORKERS, flow):
        bench.until_idle(flow, WORKERS)
        return float(bench.ask("benchmarks.seed_table", flow, count))


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
    print(json.dumps(asyncio.run(produce(sys.argv[1], int(sys.argv[2])))))
