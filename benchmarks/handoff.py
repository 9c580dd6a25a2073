"""From a place that comes free to the next start, in another process.

Four processes with 25 tasks each want the same few slots and hold each for 20 ms. The n-th end is paired
with the start that it made room for, the (n + slots)-th; only pairs across processes count. RTT is measured
in the same run, before each repetition.
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


def measure(bench: Bench) -> Result:
    result = Result("handoff")
    peers = ["ours", "self-limiters"] if find_spec("self_limiters") else ["ours"]
    delays: dict[tuple[str, int], list[list[float]]] = {}
    trips = []
    for number in range(bench.repetitions):
        bench.say(f"hand-off, repetition {number + 1}")
        trips.append(rtt_s(bench.url) * 1000)
        for slots in ROUNDS:
            for peer in peers:
                delays.setdefault((peer, slots), []).append(_delays(bench, peer, slots))
    rtt = Sample(tuple(trips), "ms")
    for (peer, slots), repetitions in delays.items():
        ours = peer == "ours"
        what = f"freed place to next start, {_slots(slots)}, 4 processes"
        middle = Sample(tuple(median(each) for each in repetitions), "ms")
        result.rows.append(
            Row(what if ours else f"{what}: {peer}", middle, rtt, "RTT", Goal("<=", MOST) if ours else None)
        )
    spread = {
        f"{'PocketFleet' if peer == 'ours' else peer}, {_slots(slots)}": [each for one in lists for each in one]
        for (peer, slots), lists in delays.items()
    }
    result.charts.append(Chart("Freed place to next start", "spread", "ms", "share started", {**spread}))
    return result


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
