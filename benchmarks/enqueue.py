"""Enqueueing: items a second against arq's best rate (32 calls in flight), and the producer's memory.

Ours takes dicts from a generator, checks that they can travel, writes them to disk and puts them into the
queue, all of it timed. Memory is the most the producer had, for many items beside few.
"""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.report import Chart, Goal, Result, Row, Sample

LEAST, FLAT = 8.0, 1.1
MB = 1024 * 1024


def measure(bench: Bench) -> Result:
    ours, arq = bench.size(100_000, 20_000), bench.size(10_000, 2_000)
    few, many = 10_000, bench.size(1_000_000, 100_000)
    rates: dict[str, list[float]] = {"PocketFleet, spool included": [], "arq, 32 calls in flight": []}
    peaks: dict[int, list[float]] = {few: [], many: []}
    for number in range(bench.repetitions):
        bench.say(f"enqueue, repetition {number + 1}")
        mine, others = rates.values()
        others.append(arq / _put(bench, "benchmarks.arq_peer", "put", arq)["seconds"])
        mine.append(ours / _put(bench, "benchmarks.put", "noop", ours)["seconds"])
        for count, values in peaks.items():
            values.append(_put(bench, "benchmarks.put", "noop", count)["peak"] / MB)
    bench.empty()
    rate, peer = (Sample(tuple(values), "/s") for values in rates.values())
    low, high = (Sample(tuple(values), "MB") for values in peaks.values())
    rows = [
        Row(f"enqueue {ours:,} items, spool included", rate, peer, "arq, 32 in flight", Goal(">=", LEAST)),
        Row(f"producer's most memory, {many:,} items", high, low, f"{few:,} items", Goal("<=", FLAT)),
    ]
    return Result("enqueue", rows, [Chart("Enqueue", "bar", "", "items per second", {**rates})])


def _put(bench: Bench, module: str, *args: object) -> Any:
    bench.empty()
    return bench.ask(module, *args)
