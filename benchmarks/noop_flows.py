"""Flows that do nothing: what the machinery itself costs, against tuned arq.

The jobs of a cell are queued first. Then its worker processes start, connect, and stand at a starting line
inside their start-up hook (arq's `on_startup`, our `on_worker_start`); released together, they are timed
until the queue is empty, which for both means that every job has ended and, for ours, that its outcome is
recorded. arq runs without any limit and keeps no results; ours run under both limits, out of the way.

Commands are what Redis ran meanwhile, inside scripts included. Calls are EVALSHA and what else only
clients send; a worker's heartbeat, less than one call a second, is measured by `idle`.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.arq_peer import QUEUE
from benchmarks.bench import Bench
from benchmarks.line import StartingLine
from benchmarks.report import Chart, Goal, Result, Row, Sample
from limiter.keys import GateKeys

FACTORS = {1: 8.0, 4: 15.0, 8: 30.0}
COMMANDS, FLATNESS, CALLS = 7.0, 1.05, 0.25
JOBS, FLOWS = 5_000, {"noop": 40_000, "level5": 10_000, "unsaved": 20_000, "saved": 20_000}
"""Of arq and of ours: each takes some seconds, so that the start of the processes weighs little."""
KEPT, KEPT_AT = 0.6, (1, 4)
"""What flows of two nodes keep of their rate when each is saved after its first node, with so many workers."""
SENT = ("evalsha", "eval", "fcall", "get", "ping", "subscribe", "script|load")


@dataclass(frozen=True)
class Cell:
    """One peer at one number of workers, once."""

    rate: float
    commands: float
    calls: float


Cells = dict[tuple[str, int], list[Cell]]


def measure(bench: Bench) -> Result:
    cells: Cells = {}
    for number in range(bench.repetitions):
        for workers in FACTORS:
            bench.say(f"no-op flows, {workers} workers, repetition {number + 1}")
            cells.setdefault(("arq", workers), []).append(_arq(bench, workers, bench.size(JOBS, 1_000)))
            for flow in ("noop", "level5") if workers in (1, 8) else ("noop",):
                cell = _ours(bench, flow, workers, bench.size(FLOWS[flow], 5_000))
                cells.setdefault((flow, workers), []).append(cell)
            for flow in ("unsaved", "saved") if workers in KEPT_AT else ():
                cell = _ours(bench, flow, workers, bench.size(FLOWS[flow], 5_000))
                cells.setdefault((flow, workers), []).append(cell)
    return Result("noop_flows", _rows(cells), _charts(cells))


def _ours(bench: Bench, flow: str, workers: int, count: int) -> Cell:
    bench.empty()
    batch = bench.ask("benchmarks.put", flow, count)["batch"]
    line = StartingLine()
    with bench.workers(workers, flow, line):
        cell = _timed(bench, line, workers, GateKeys(flow).queue(flow), count)
    completed = int(bench.client.hget(GateKeys(flow).batch(batch), "completed") or 0)
    recorded = bench.client.xlen(GateKeys(flow).out(batch))
    if not completed == recorded == count:
        raise RuntimeError(f"{completed} completed and {recorded} recorded of {count} flows")
    return cell


def _arq(bench: Bench, workers: int, count: int) -> Cell:
    bench.empty()
    bench.ask("benchmarks.arq_peer", "put", count)
    line = StartingLine()
    with bench.processes(workers, "benchmarks.arq_peer", "work", line=line):
        return _timed(bench, line, workers, QUEUE, count)


def _timed(bench: Bench, line: StartingLine, workers: int, queue: str, count: int) -> Cell:
    line.wait(workers)
    bench.counts.reset()
    began = line.go()
    seconds = bench.until_empty(queue) - began
    counts = bench.counts.read()
    line.close()
    calls = sum(counts.get(name, 0) for name in SENT)
    return Cell(count / seconds, sum(counts.values()) / count, calls / count)


def _rows(cells: Cells) -> list[Row]:
    rows = [_rate_row(cells, workers, factor) for workers, factor in FACTORS.items()]
    rows += [_kept_row(cells, workers) for workers in KEPT_AT]
    rows += [_commands_row(cells, workers) for workers in FACTORS]
    rows.append(
        Row(
            "commands per flow, 8 workers over 1",
            _growth(cells, "noop"),
            _growth(cells, "arq"),
            "tuned arq",
            Goal("<=", FLATNESS),
            by_ratio=False,
        )
    )
    rows += [
        Row(
            f"calls per flow, {_workers(workers)}",
            _sample(cells, "noop", workers, "calls"),
            goal=Goal("<=", CALLS),
        )
        for workers in FACTORS
    ]
    for what in ("commands", "calls"):
        rows += [
            Row(
                f"{what} per flow, level 5 binding, {_workers(workers)}",
                _sample(cells, "level5", workers, what),
            )
            for workers in (1, 8)
        ]
    return rows


def _rate_row(cells: Cells, workers: int, factor: float) -> Row:
    return Row(
        f"no-op flows, both limits on, {_workers(workers)}",
        _sample(cells, "noop", workers, "rate", "/s"),
        _sample(cells, "arq", workers, "rate", "/s"),
        "tuned arq, no limits",
        Goal(">=", factor),
    )


def _kept_row(cells: Cells, workers: int) -> Row:
    return Row(
        f"two-node no-op flows with checkpoints, {_workers(workers)}",
        _sample(cells, "saved", workers, "rate", "/s"),
        _sample(cells, "unsaved", workers, "rate", "/s"),
        "the same without",
        Goal(">=", KEPT),
    )


def _commands_row(cells: Cells, workers: int) -> Row:
    return Row(
        f"commands per flow, {_workers(workers)}",
        _sample(cells, "noop", workers, "commands"),
        _sample(cells, "arq", workers, "commands"),
        "tuned arq",
        Goal("<=", COMMANDS),
        by_ratio=False,
    )


def _sample(cells: Cells, peer: str, workers: int, what: str, unit: str = "") -> Sample:
    return Sample(tuple(getattr(cell, what) for cell in cells[peer, workers]), unit)


def _growth(cells: Cells, peer: str) -> Sample:
    pairs = zip(cells[peer, 8], cells[peer, 1], strict=True)
    return Sample(tuple(many.commands / single.commands for many, single in pairs))


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _charts(cells: Cells) -> list[Chart]:
    def lines(what: str) -> dict[str, list[tuple[float, float]]]:
        named = {"PocketFleet, both limits on": "noop", "tuned arq, no limits": "arq"}
        return {
            name: [(workers, _sample(cells, peer, workers, what).middle) for workers in FACTORS]
            for name, peer in named.items()
        }

    return [
        Chart("No-op flows", "line", "worker processes", "per second", {**lines("rate")}, log_y=True),
        Chart("Redis commands per flow", "line", "worker processes", "commands", {**lines("commands")}),
    ]
