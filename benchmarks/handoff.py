"""From a place that comes free to the next start, in another process.

Four processes with 25 tasks each want the same few slots and hold each for 20 ms. The n-th end is paired
with the start that it made room for, the (n + slots)-th; only pairs across processes count. RTT is measured
before each repetition: in a loop, as the goal has it, and by a client that rests 20 ms before each call, as
the processes here do.
"""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from statistics import median

from benchmarks.bench import Bench
from benchmarks.line import StartingLine
from benchmarks.report import Chart, Goal, Result, Row, Sample
from benchmarks.server import rtt_s

PROCESSES, TASKS, WORK_S = 4, 25, 0.02
ROUNDS = {1: 2, 5: 8}
MOST = 6.0

Delays = dict[tuple[str, int], list[list[float]]]


def measure(bench: Bench) -> Result:
    peers = ["ours", "self-limiters"] if find_spec("self_limiters") else ["ours"]
    delays: Delays = {}
    busy, resting = [], []
    for number in range(bench.repetitions):
        bench.say(f"hand-off, repetition {number + 1}")
        busy.append(rtt_s(bench.url) * 1000)
        resting.append(rtt_s(bench.url, 100, WORK_S) * 1000)
        for slots in ROUNDS:
            for peer in peers:
                delays.setdefault((peer, slots), []).append(_delays(bench, peer, slots))
    rows = _rows(delays, Sample(tuple(busy), "ms"), Sample(tuple(resting), "ms"))
    spread = {
        f"{'PocketFleet' if peer == 'ours' else peer}, {_slots(slots)}": [
            each for one in lists for each in one
        ]
        for (peer, slots), lists in delays.items()
    }
    return Result(
        "handoff", rows, [Chart("Freed place to next start", "spread", "ms", "share started", {**spread})]
    )


def _rows(delays: Delays, busy: Sample, resting: Sample) -> list[Row]:
    rows = []
    for (peer, slots), repetitions in delays.items():
        what = f"freed place to next start, {_slots(slots)}, 4 processes"
        middle = Sample(tuple(median(each) for each in repetitions), "ms")
        if peer == "ours":
            rows.append(Row(what, middle, busy, "RTT", Goal("<=", MOST)))
            rows.append(Row(f"{what}, against a resting client", middle, resting, "RTT, a call in 20 ms"))
        else:
            rows.append(Row(f"{what}: {peer}", middle, busy, "RTT"))
    return rows


def _slots(count: int) -> str:
    return f"{count} slot{'s' if count > 1 else ''}"


def _delays(bench: Bench, peer: str, slots: int) -> list[float]:
    bench.empty()
    line = StartingLine()
    args = (peer, "hold", slots, TASKS, ROUNDS[slots], WORK_S)
    with bench.processes(PROCESSES, "benchmarks.contenders", *args, line=line, heard=True) as started:
        line.wait(PROCESSES)
        line.go()
        holds = [_holds(process) for process in started]
    line.close()
    return _between(holds, slots)


def _holds(process: subprocess.Popen[bytes]) -> list[tuple[int, int]]:
    said, _ = process.communicate(timeout=120)
    return [(start, end) for start, end in json.loads(said)]


def _between(holds: list[list[tuple[int, int]]], slots: int) -> list[float]:
    """Milliseconds from each end to the start that it made room for, if that was in another process.

    >>> _between([[(0, 10)], [(12, 20)]], 1)
    [2e-06]
    """
    starts = sorted((start, number) for number, mine in enumerate(holds) for start, _ in mine)
    ends = sorted((end, number) for number, mine in enumerate(holds) for _, end in mine)
    pairs = zip(ends, starts[slots:], strict=False)
    return [(start - end) / 1e6 for (end, mine), (start, other) in pairs if mine != other]
