"""Acquire+release pairs a second in one process: 100 tasks, 1,000 slots, so nothing waits."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.bench import Bench
from benchmarks.report import Chart, Goal, Result, Row, Sample

TASKS, LEAST = 100, 15.0


def measure(bench: Bench) -> Result:
    result = Result("permits")
    peers = ["ours", "self-limiters"] if find_spec("self_limiters") else ["ours"]
    rates: dict[str, list[float]] = {peer: [] for peer in peers}
    if len(peers) == 1:
        result.notes.append("self-limiters is not there to be measured: `make bench` installs it")
    for number in range(bench.repetitions):
        bench.say(f"permits, repetition {number + 1}")
        for peer in peers:
            bench.empty()
            rates[peer].append(bench.ask("benchmarks.contenders", peer, "pairs", TASKS, bench.size(3, 1)))
    samples = {peer: Sample(tuple(values), "/s") for peer, values in rates.items()}
    what = "acquire+release pairs, one process, 100 tasks"
    other = samples.get("self-limiters")
    result.rows.append(Row(what, samples["ours"], other, "self-limiters", Goal(">=", LEAST)))
    bars = {"PocketFleet" if name == "ours" else name: values for name, values in rates.items()}
    result.charts.append(Chart("Permits", "bar", "", "pairs per second", {**bars}))
    return result
