"""Enqueueing: items a second against arq's best rate (32 calls in flight), and the producer's memory.

Ours takes dicts from a generator, checks that they can travel, writes them to disk and puts them into the
queue, all of it timed. Memory is the most the producer had, for many items beside few, and its course over
time. A million items are also held against arq as most programs call it, one by one.
"""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.report import Chart, Goal, Result, Row, Sample

LEAST, FLAT = 8.0, 1.1
LEAST_ONE_BY_ONE, MOST_MB = 10.0, 150.0
MB = 1024 * 1024


def measure(bench: Bench) -> Result:
    ours, arq = bench.size(100_000, 20_000), bench.size(10_000, 2_000)
    few, many = 10_000, bench.size(1_000_000, 100_000)
    rates: dict[str, list[float]] = {"PocketFleet, spool included": [], "arq, 32 calls in flight": []}
    peaks: dict[int, list[float]] = {few: [], many: []}
    one_by_one: list[float] = []
    million: list[float] = []
    traces: dict[str, list[tuple[float, float]]] = {}
    for number in range(bench.repetitions):
        bench.say(f"enqueue, repetition {number + 1}")
        mine, others = rates.values()
        one_by_one.append(arq / _put(bench, "benchmarks.arq_peer", "put", arq, 1)["seconds"])
        others.append(arq / _put(bench, "benchmarks.arq_peer", "put", arq)["seconds"])
        mine.append(ours / _put(bench, "benchmarks.put", "noop", ours)["seconds"])
        for count, values in peaks.items():
            told = _put(bench, "benchmarks.put", "noop", count)
            values.append(told["peak"] / MB)
            if count == many:
                million.append(count / told["seconds"])
                traces[f"run {number + 1}"] = [tuple(point) for point in told["trace"]]
    bench.empty()
    rate, peer = (Sample(tuple(values), "/s") for values in rates.values())
    alone, long = Sample(tuple(one_by_one), "/s"), Sample(tuple(million), "/s")
    low, high = (Sample(tuple(values), "MB") for values in peaks.values())
    rows = [
        Row(f"enqueue {ours:,} items, spool included", rate, peer, "arq, 32 in flight", Goal(">=", LEAST)),
        Row(f"producer's most memory, {many:,} items", high, low, f"{few:,} items", Goal("<=", FLAT)),
        Row(
            f"enqueue {many:,} items, spool included",
            long,
            alone,
            "arq, one by one",
            Goal(">=", LEAST_ONE_BY_ONE),
        ),
        Row(f"memory of a producer of {many:,} generated items, at most", high, goal=Goal("<=", MOST_MB)),
    ]
    longest = max((point[0] for points in traces.values() for point in points), default=0.0)
    traces[f"goal, {MOST_MB:g} MB"] = [(0.0, MOST_MB), (longest, MOST_MB)]
    charts = [
        Chart("Enqueue", "bar", "", "items per second", {**rates}),
        Chart(f"Producer of {many:,} items", "trace", "seconds", "resident memory, MB", {**traces}),
    ]
    return Result("enqueue", rows, charts)


def _put(bench: Bench, module: str, *args: object) -> Any:
    bench.empty()
    return bench.ask(module, *args)
