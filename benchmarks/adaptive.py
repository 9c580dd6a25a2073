"""An API whose capacity the fleet does not know, and that changes: 20 at a time, 5 from 40 s on, 40 from 80 s on.

Above its capacity it answers 429. Score: the oracle's time over ours. The oracle knows every step and
keeps the API exactly full, so its time is the work divided by the capacity, step by step; of the per-minute
limit it is that of a client that starts as early as the limit and the ceiling allow. Ours is timed in
the producer, from the start of the API's clock to the last outcome. Every item has to complete.

One run of each: they last minutes, and a run is made of hundreds of decisions; BENCH_CASES=0,2 makes only
these of `CASES`. The reference runs beside them where BENCH_REFERENCE names the folder that holds its
package.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from benchmarks.adaptive_flows import API, CEILING, INITIAL
from benchmarks.adaptive_reference import FOLDER
from benchmarks.bench import Bench
from benchmarks.report import Chart, Goal, Result, Row, Sample
from limiter.keys import GateKeys

WORKERS = 4
STEPS = ((0.0, 20), (40.0, 5), (80.0, 40))
PER_MINUTE = 1200
PATIENCE_S = 900.0
MOST_REFUSED = Goal("<=", 0.05)


@dataclass(frozen=True)
class Case:
    """One run: which flow, how many items of how many calls, and what the API says."""

    what: str
    flow: str
    score: Goal | None = None
    refused: Goal | None = None
    items: int = 2000
    calls: int = 1
    call_s: float = 1.0
    retry_after: bool = False
    per_minute: int = 0
    plotted: bool = False


CASES = (
    Case("the reference's settings (0.5, 10, 1.2)", "threshold", Goal(">=", 0.75), MOST_REFUSED, plotted=True),
    Case("additive, 0.7", "additive", Goal(">=", 0.88), MOST_REFUSED, plotted=True),
    Case("ADAPTIVE_GENTLE (additive, 0.95)", "gentle", Goal(">=", 0.88), MOST_REFUSED, plotted=True),
    Case("ten 3 s calls: the reference's settings", "long_threshold", Goal(">=", 0.65), None, 200, 10, 3.0),
    Case("ten 3 s calls: additive, 0.7", "long_additive", Goal(">=", 0.65), None, 200, 10, 3.0),
    Case("with Retry-After: the reference's settings", "threshold", retry_after=True),
    Case("with Retry-After: additive, 0.7", "additive", retry_after=True),
    Case(f"{PER_MINUTE} a minute: additive, 0.7", "additive", per_minute=PER_MINUTE),
    Case(f"{PER_MINUTE} a minute, Retry-After: additive, 0.7", "additive", per_minute=PER_MINUTE, retry_after=True),
)  # fmt: skip


@dataclass
class Run:
    """What one run showed. Moments are seconds of the API's clock."""

    seconds: float
    completed: int
    refused_at: list[float]
    levels: list[tuple[float, float]] = field(default_factory=list)
    in_use: list[tuple[float, float]] = field(default_factory=list)


def measure(bench: Bench) -> Result:
    scale = 0.2 if bench.quick else 1.0
    result = Result("adaptive")
    asked = os.environ.get("BENCH_CASES", ",".join(map(str, range(len(CASES)))))
    for number in asked.split(","):
        _add(result, bench, CASES[int(number)], scale)
    if (Path(os.environ.get(FOLDER, "")) / "pocketflow_throttled").is_dir():
        _add_reference(result, bench, scale)
    else:
        result.notes.append(f"the reference was not measured: {FOLDER} names no folder with its package")
    result.notes.append(
        f"adaptive: one run each; capacity {', '.join(f'{most} from {second * scale:g} s' for second, most in STEPS)}"
        f"; from {INITIAL} (the preset: 5) up to {CEILING}; {WORKERS} worker processes; oracle = the API kept exactly full"
    )
    return result


def _add(result: Result, bench: Bench, case: Case, scale: float) -> None:
    bench.say(f"adaptive: {case.what}")
    run = _run(bench, case, scale)
    if run.completed != case.items:
        raise RuntimeError(f"{case.what}: {run.completed} of {case.items} items completed")
    ideal = oracle_s(case, scale)
    result.rows += [
        Row(f"oracle's time over ours: {case.what}", Sample((ideal / run.seconds,)), goal=case.score),
        Row(f"429 per item: {case.what}", Sample((len(run.refused_at) / case.items,)), goal=case.refused),
    ]
    bench.say(f"  {run.seconds:.1f} s, the oracle {ideal:.1f} s, {len(run.refused_at)} refusals")
    if case.plotted:
        result.charts.append(_chart(case.what, run, scale))


def _add_reference(result: Result, bench: Bench, scale: float) -> None:
    case = CASES[0]
    bench.say("adaptive: the reference, one process")
    with _api(bench, case, scale) as url:
        said = bench.ask("benchmarks.adaptive_reference", case.items, timeout_s=PATIENCE_S, env={API: url})
        refused = len(_log(url)["refused_at"])
    lost = said["failed"] / case.items
    result.rows += [
        Row("share of items lost: the reference, its own settings", Sample((lost,))),
        Row("oracle's time over its time: the reference", Sample((oracle_s(case, scale) / said["seconds"],))),
        Row("429 per item: the reference", Sample((refused / case.items,))),
    ]


# --- the oracle ------------------------------------------------------------------------------------


def oracle_s(case: Case, scale: float = 1.0) -> float:
    """Seconds of a client that knows the API.

    >>> oracle_s(Case("", "")), oracle_s(Case("", "", items=200, calls=10, call_s=3.0))
    (105.0, 205.0)
    >>> round(oracle_s(Case("", "", per_minute=1200)), 1)
    73.0
    """
    if case.per_minute:
        return _earliest(case, 60.0 * scale, case.call_s * scale)
    work = case.items * case.calls * case.call_s * scale
    for (begin, most), (end, _) in zip(STEPS, (*STEPS[1:], (float("inf"), 0)), strict=True):
        if work <= most * (end - begin) * scale:
            return begin * scale + work / most
        work -= most * (end - begin) * scale
    raise AssertionError("the last step has no end")


def _earliest(case: Case, window_s: float, call_s: float) -> float:
    """Each call as early as the window and the ceiling let it start."""
    starts: list[float] = []
    for number in range(case.items * case.calls):
        slot = starts[number - CEILING] + call_s if number >= CEILING else 0.0
        window = starts[number - case.per_minute] + window_s if number >= case.per_minute else 0.0
        starts.append(max(slot, window))
    return starts[-1] + call_s


# --- one run ---------------------------------------------------------------------------------------


def _run(bench: Bench, case: Case, scale: float) -> Run:
    bench.empty()
    target = f"benchmarks.adaptive_flows:{case.flow}"
    with _api(bench, case, scale) as url:
        env = {API: url}
        with bench.processes(WORKERS, "pocketfleet", "worker", target, env=env):
            bench.until_idle(case.flow, WORKERS)
            with _sampled(bench.url, case.flow) as samples:
                said = bench.ask(
                    "benchmarks.adaptive_flows", case.flow, case.items, timeout_s=PATIENCE_S, env=env
                )
        log = _log(url)
    return Run(said["seconds"], said["completed"], log["refused_at"], *_series(samples, log))


def _series(samples: list[tuple[float, float, float]], log: dict[str, Any]) -> tuple[Any, Any]:
    """Level and slots in use, on the API's clock."""
    zero = log["began"]
    on_clock = [(at - zero, level, in_use) for at, level, in_use in samples if at >= zero]
    return [(at, level) for at, level, _ in on_clock], [(at, in_use) for at, _, in_use in on_clock]


@contextlib.contextmanager
def _api(bench: Bench, case: Case, scale: float) -> Iterator[str]:
    steps = [] if case.per_minute else [(second * scale, most) for second, most in STEPS]
    args: list[object] = ["--steps", json.dumps(steps), "--delay", case.call_s * scale]
    args += ["--per-window", case.per_minute, "--window", 60.0 * scale]
    args += ["--retry-after"] if case.retry_after else []
    with bench.processes(1, "benchmarks.adaptive_api", *args, heard=True) as (process,):
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()


def _log(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/log", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


@contextlib.contextmanager
def _sampled(url: str, limit: str) -> Iterator[list[tuple[float, float, float]]]:
    """Ten times a second: moment (monotonic), level, slots in use."""
    samples: list[tuple[float, float, float]] = []
    over = threading.Event()

    def sample() -> None:
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            while not over.wait(0.1):
                found: Any = client.hget(GateKeys(limit).gate, "state")
                state = json.loads(found) if found else {"level": 0.0, "in_use": 0.0}
                samples.append((time.monotonic(), state["level"], state["in_use"]))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _chart(what: str, run: Run, scale: float) -> Chart:
    end = run.seconds
    capacity = [(second * scale, float(most)) for second, most in STEPS if second * scale < end]
    capacity.append((end, capacity[-1][1]))
    refused = [(at, 0.0) for at in run.refused_at]
    series = {"capacity": capacity, "level": run.levels, "in use": run.in_use, "429": refused}
    return Chart(what, "trace", "seconds", "at a time", {**series})
