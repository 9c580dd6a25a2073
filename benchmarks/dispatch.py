"""From enqueue to start with four idle workers: jobs come at 100 a second, one by one.

Timed from just before the sender's call to the first statement of the node or task, on the clock that all
processes of a machine share. Ours is the call that a producer makes for a chunk, here of one item; the
batch is on disk and announced before. Both senders and all workers are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import PEERS, Bench
from benchmarks.open_loop import STARTS, read_starts, send_at
from benchmarks.report import Chart, Goal, Result, Row, Sample
from benchmarks.server import rtt_s
from limiter.keys import GateKeys

WORKERS, PER_S, FLOW = 4, 100, "dispatch"
MOST = 1.2


def measure(bench: Bench) -> Result:
    result = Result("dispatch")
    delays: dict[str, list[list[float]]] = {"PocketFleet": [], "taskiq stream": []}
    trips = []
    if not PEERS.exists():
        result.notes.append("taskiq is not there to be measured: `make bench` makes its virtual environment")
    for number in range(bench.repetitions):
        bench.say(f"enqueue to start, repetition {number + 1}")
        trips.append(rtt_s(bench.url))
        if PEERS.exists():
            delays["taskiq stream"].append(_taskiq(bench, number))
        delays["PocketFleet"].append(_ours(bench, number))
    ours = _sample(delays["PocketFleet"])
    peer = _sample(delays["taskiq stream"]) if PEERS.exists() else None
    what = "enqueue to start, 4 idle workers, 100 a second"
    result.rows.append(Row(what, ours, peer, "taskiq stream", Goal("<=", MOST)))
    rtt = Sample(tuple(trip * 1000 for trip in trips), "ms")
    result.rows.append(Row("the same in round trips", ours, rtt, "RTT"))
    spread = {name: [each for one in lists for each in one] for name, lists in delays.items() if lists}
    result.charts.append(Chart("Enqueue to start", "spread", "ms", "share started", {**spread}))
    return result


def _sample(repetitions: list[list[float]]) -> Sample:
    return Sample(tuple(median(each) for each in repetitions), "ms")


def _ours(bench: Bench, number: int) -> list[float]:
    bench.empty()
    starts = bench.home / f"starts-ours-{number}"
    with bench.workers(WORKERS, FLOW, env={STARTS: str(starts)}):
        bench.until_idle(FLOW, WORKERS)
        sent = bench.ask("benchmarks.dispatch", _count(bench), PER_S)
        return _delays(bench, sent, starts)


def _taskiq(bench: Bench, number: int) -> list[float]:
    bench.empty()
    starts = bench.home / f"starts-taskiq-{number}"
    args = ("worker", "benchmarks.taskiq_peer:broker", "--workers", WORKERS, "--log-level", "WARNING")
    with bench.processes(1, "taskiq", *args, python=PEERS, env={STARTS: str(starts)}):
        bench.until(lambda: _reading(bench) == WORKERS, "taskiq's workers waiting", 60.0)
        sent = bench.ask("benchmarks.taskiq_peer", _count(bench), PER_S, python=PEERS)
        return _delays(bench, sent, starts)


def _reading(bench: Bench) -> int:
    return sum(str(each["cmd"]).startswith("xreadgroup") for each in bench.client.client_list())


def _count(bench: Bench) -> int:
    return bench.size(1_000, 300)


def _delays(bench: Bench, sent: list[int], starts: Path) -> list[float]:
    """Milliseconds, the first tenth left out."""
    bench.until(lambda: len(read_starts(starts)) == len(sent), "every job started", 30.0)
    started = read_starts(starts)
    first = len(sent) // 10
    return [(started[number] - moment) / 1e6 for number, moment in enumerate(sent)][first:]


async def send(count: int, per_s: float) -> list[int]:
    """Our sender, in a process of its own."""
    from benchmarks.put import items
    from limiter.client import open_retrying_client
    from limiter.script import script
    from producer.announce import announce
    from producer.batch import as_async, new_batch_id, write_spool
    from producer.enqueue import ENQUEUE, SPACING
    from worker.contract import encode_job
    from worker.registry import find_flow, named

    target = f"benchmarks.flows:{FLOW}"
    served = named(find_flow(target), target, 15.0)
    source = as_async(items(count, {}), "items")
    batch = new_batch_id(FLOW)
    home = Path(os.environ["POCKETFLEET_DATA_DIR"])
    spool = await write_spool(home, batch, served, source, bytes, max_bytes=1000, where="items")
    client = open_retrying_client(os.environ["BENCH_URL"])
    await announce(client, spool)
    add, keys = script(client, ENQUEUE), GateKeys(FLOW).all

    async def one(number: int) -> Any:
        payload = encode_job(FLOW, {"i": number}, 0)
        return await add(keys=keys, args=["", "", batch, FLOW, SPACING, 0, "", number, payload])

    try:
        return await send_at(per_s, count, one)
    finally:
        await client.aclose()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(send(int(sys.argv[1]), float(sys.argv[2])))))
