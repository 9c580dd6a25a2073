"""What a worker sends that has nothing to do, or may not: calls a second of the busiest one.

Four workers without jobs, four that want a flow's only place, and four that wait for the window, watched
for 20 s through MONITOR. Every command a client sends is a call, also in a pipeline; those inside scripts
are not. What nobody's name stands on is shared among all.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from urllib.parse import urlsplit

from benchmarks.bench import Bench
from benchmarks.report import Goal, Result, Row, Sample

WORKERS, MOST = 4, 1.0
WATCHED = {
    "noop": "idle worker, calls a second",
    "one_place": "worker blocked by the level, calls a second",
    "five_a_minute": "worker blocked by the window, calls a second",
}
LINE = re.compile(r"\+?(\d+\.\d+) \[\d+ (\S+)\] \"(\w+)\"")
PROCESS = re.compile(r"[\w.-]+:(\d+):[0-9a-f]{8}")


def measure(bench: Bench) -> Result:
    found: dict[str, list[float]] = {flow: [] for flow in WATCHED}
    kinds: Counter[str] = Counter()
    for number in range(bench.repetitions):
        bench.say(f"idle and blocked workers, repetition {number + 1}")
        for flow, rate in _watch(bench, bench.size(20, 10), kinds).items():
            found[flow].append(rate)
    rows = [
        Row(what, Sample(tuple(found[flow]), "/s"), goal=Goal("<=", MOST)) for flow, what in WATCHED.items()
    ]
    total = kinds.total()
    shares = ", ".join(f"{kind} {count / total:.0%}" for kind, count in kinds.most_common())
    return Result("idle", rows, notes=[f"calls of idle and blocked workers: {shares}"])


def _watch(bench: Bench, seconds: float, kinds: Counter[str]) -> dict[str, float]:
    """Calls a second of the busiest worker of each flow."""
    bench.empty()
    monitor = Monitor(bench.url)
    groups = {flow: bench.workers(WORKERS, flow) for flow in WATCHED}
    with groups["noop"] as idle, groups["one_place"] as one, groups["five_a_minute"] as window:
        flow_of = {
            process.pid: flow
            for flow, group in zip(WATCHED, (idle, one, window), strict=True)
            for process in group
        }
        for flow in WATCHED:
            bench.until_idle(flow, WORKERS)
        bench.ask("benchmarks.put", "one_place", 20, seconds * 10)
        bench.ask("benchmarks.put", "five_a_minute", 20)
        time.sleep(3)
        began = time.time()
        time.sleep(seconds)
        calls = monitor.calls(began, began + seconds)
        for flow in ("one_place", "five_a_minute"):
            if not bench.client.zcard(f"pocketfleet:{{{flow}}}:tickets"):
                raise RuntimeError(f"no worker of {flow} was blocked")
    monitor.close()
    unnamed = sum(calls.pop(0, Counter()).values()) / len(flow_of)
    worst = dict.fromkeys(WATCHED, 0.0)
    for pid, flow in flow_of.items():
        mine = calls.get(pid, Counter())
        kinds.update(mine)
        worst[flow] = max(worst[flow], (mine.total() + unnamed) / seconds)
    return worst


class Monitor:
    """Everything the server does, from the moment this is made, in a thread of its own."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port))
        self._socket.sendall(b"MONITOR\r\n")
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._socket.makefile("r", errors="replace") as lines:
            try:
                for line in lines:
                    self._lines.append(line)
            except OSError:
                return

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def calls(self, began: float, ended: float) -> dict[int, Counter[str]]:
        """What clients sent between two moments, by pid; pid 0: connections that never named theirs."""
        pid_of: dict[str, int] = {}
        seen: list[tuple[str, str]] = []
        for line in list(self._lines):
            found = LINE.match(line)
            if found is None or found[2] == "lua":
                continue
            named = PROCESS.search(line)
            if named:
                pid_of.setdefault(found[2], int(named[1]))
            if began <= float(found[1]) < ended:
                seen.append((found[2], found[3].lower()))
        calls: dict[int, Counter[str]] = {}
        for address, command in seen:
            calls.setdefault(pid_of.get(address, 0), Counter())[command] += 1
        return calls
