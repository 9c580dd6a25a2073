"""What the fault suite shares: a server that can be hurt, a fleet on it, and the judgement of a batch.

The judge is the ledger that the runs write (see `tests.fleet`), never the state of the gate.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from limiter.keys import GateKeys
from producer.follow import Ended
from tests import proxy, servers
from tests.fleet import Child, Ledger, Note, Site, until
from tests.stalls import frozen
from worker.contract import limit_of

TARGET = "faulty:flow"
LIMIT = limit_of(TARGET)
JITTER_S = 0.05
"""Between a run's start and its first line in the ledger."""

FLOW = """
import asyncio
from ledger import noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Work(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["item"]):
            await asyncio.sleep(self.params["s"])
        return self.params["item"]

    async def post_async(self, shared, prep_res, exec_res):
        shared[exec_res] = 1
        return "done"

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = %(concurrent)d
    max_flows_per_minute = %(starts)s
    window_s = %(window_s)s

flow = Flow(start=Work())
"""


def seed() -> int:
    """FAULT_SEED, or a new one; printed, so that a failing run can be repeated."""
    found = int(os.environ.get("FAULT_SEED") or random.randrange(2**31))
    print(f"FAULT_SEED={found}")
    return found


class Server:
    """A real server on a unix socket, with an append-only file unless it is told to forget."""

    def __init__(self, directory: Path, *options: str, kind: str = "valkey", keeps: bool = True) -> None:
        self.socket = directory / "s"
        self._directory = directory
        self._kind = kind
        self._options = ("--enable-debug-command", "yes", *options)
        self._keeps = keeps
        self._process = self._start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def _start(self) -> subprocess.Popen[bytes]:
        keep = ("--appendonly", "yes", "--appendfsync", "everysec") if self._keeps else ()
        return servers.start(self._kind, self._directory, *self._options, *keep)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def restart(self) -> None:
        """Start it again after `kill`; with the file it knows everything, else nothing."""
        self._process = self._start()

    def freeze(self, for_s: float) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        time.sleep(for_s)
        os.kill(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)
            self._process.terminate()
            self._process.wait(10)

    def ask(self, *words: Any) -> Any:
        """One command, over a connection of its own."""
        client = redis.Redis(unix_socket_path=str(self.socket))
        try:
            return client.execute_command(*words)  # type: ignore[no-untyped-call]
        finally:
            client.close()


class Since(Ledger):
    """The ledger from one moment on."""

    def __init__(self, ledger: Ledger, at: float) -> None:
        super().__init__(ledger.path)
        self.at = at

    def notes(self, word: str = "") -> list[Note]:
        return [each for each in super().notes(word) if each.at >= self.at]


class Rig:
    """A server behind a proxy, a user's directory, and workers that reach the server through the proxy.

    Attributes:
        concurrent, starts, window_s: the limit, as the flow has it (`starts` a window, or None).
        notes: the ledger since the last `begin`.
    """

    def __init__(
        self,
        directory: Path,
        server: Server,
        door: proxy.Proxy,
        *,
        concurrent: int = 5,
        starts: int | None = 100,
        window_s: float = 2.0,
        lease_s: float = 2.0,
    ) -> None:
        self.server, self.door = server, door
        self.concurrent, self.starts, self.window_s, self.lease_s = concurrent, starts, window_s, lease_s
        self.site = Site(directory, server.url)
        values = {"concurrent": concurrent, "starts": starts, "window_s": window_s}
        self.site.write("faulty.py", FLOW % values)
        self.site.env |= {"POCKETFLEET_LEASE_S": str(lease_s), "POCKETFLEET_DRAIN_S": "5"}
        self.workers: list[Child] = []
        self.killed: dict[int, float] = {}
        self.batch = ""
        self.count = 0
        self.notes = Since(self.site.ledger, 0.0)
        self._batches = 0
        self._items: list[dict[str, Any]] = []
        self._said: dict[int, int] = {}

    # --- workers -----------------------------------------------------------------------------------

    def hire(self, count: int, **env: Any) -> list[Child]:
        """Start workers and wait until they serve."""
        given = {"POCKETFLEET_REDIS_URL": self.door.url} | env
        new = [self.site.pocketfleet("worker", TARGET, **given) for _ in range(count)]
        until(
            lambda: all("worker serves" in worker.output() for worker in new),
            lambda: f"all serve: {[(worker.lives(), worker.output()) for worker in new]}",
        )
        self.workers += new
        return new

    def kill(self, worker: Child) -> None:
        self.workers.remove(worker)
        self.killed[worker.pid] = worker.kill()

    def dismiss(self, worker: Child) -> None:
        """SIGTERM, and its end with exit code 0."""
        self.workers.remove(worker)
        worker.tell(signal.SIGTERM)
        assert worker.code() == 0, worker.output()

    def busiest(self) -> Child:
        """The worker that runs the most. With fewer places than workers one may run nothing for long."""
        until(lambda: any(self.notes.running(worker.pid) for worker in self.workers), "a worker runs some")
        return max(self.workers, key=lambda worker: len(self.notes.running(worker.pid)))

    def all_live(self) -> None:
        for worker in self.workers:
            assert worker.lives(), f"a worker ended:\n{worker.output()[-3000:]}"

    # --- batches -----------------------------------------------------------------------------------

    def begin(self, count: int, s: float | Callable[[int], float] = 0.08) -> str:
        """Enqueue a batch and let the ledger count from now on."""
        self._batches += 1
        self.batch, self.count = f"b{self._batches}", count
        self.notes = Since(self.site.ledger, time.monotonic())
        self.killed = {}
        self._said = {worker.pid: len(worker.output()) for worker in self.workers}
        seconds = s if callable(s) else lambda n: s
        self._items = [{"item": f"{self.batch}.{n}", "s": seconds(n)} for n in range(count)]
        self.enqueue_again()
        return self.batch

    def enqueue_again(self) -> None:
        """The batch of `begin` once more, from its spool: only what Redis does not know is added."""
        self.site.enqueue(TARGET, self._items, self.batch)

    def reach(self, ended: int) -> None:
        """Wait until that many runs of the batch have ended."""
        until(lambda: self.notes.count("end") >= ended, f"{ended} ended of {self.batch}; {self.last_words()}")

    def said(self, worker: Child) -> str:
        """What a worker printed since `begin`."""
        return worker.output()[self._said.get(worker.pid, 0) :]

    def last_words(self) -> str:
        return "\n".join(f"{worker.pid}: {self.said(worker)[-500:]}" for worker in self.workers)

    def ended(self) -> list[Ended]:
        """All outcomes of the batch."""
        return self.site.ended(TARGET, self.count, self.batch)

    # --- the judgement -----------------------------------------------------------------------------

    def judge(self, *, again: int = 0, over: int = 0, trouble: bool | None = None) -> list[Ended]:
        """The batch ends well: one outcome per item, both limits held, nothing in use, all workers alive.

        Args:
            again: most runs that may have been executed a second time.
            over: how many runs more than the limit may have been running at a time.
            trouble: whether each worker said what was wrong, once, and once that it was over.

        A machine that stood still has frozen its workers, and what that may cost is allowed beside it.
        """
        ended = self.ended()
        stood_still = frozen(self.notes.at, self.lease_s / 3)  # a third of a lease is between two calls
        again, over = again + stood_still * self.concurrent, over + stood_still * self.concurrent
        assert Counter(each.index for each in ended) == Counter(range(self.count)), "one outcome per item"
        assert {each.outcome.status for each in ended} == {"completed"}, {each.outcome for each in ended}
        starts = self.notes.items("start")
        assert set(starts) == {f"{self.batch}.{n}" for n in range(self.count)}
        twice = {item: count for item, count in starts.items() if count > 1}
        assert sum(count - 1 for count in twice.values()) <= again, f"executed again: {twice}"
        assert self.notes.peak(self.killed) <= self.concurrent + over
        if self.starts:
            assert self.notes.busiest(self.window_s - JITTER_S) <= self.starts
        until(lambda: self.state()["in_use"] == 0, f"nothing in use: {self.state()}")
        self.all_live()
        for worker in self.workers:
            self._judge_words(worker, trouble, most=3 + stood_still)
        return ended

    def _judge_words(self, worker: Child, trouble: bool | None, most: int) -> None:
        said = self.said(worker)
        assert "Traceback" not in said, said
        assert "pump.fault" not in said and "run.fault" not in said, said
        if trouble is not None:
            if trouble or most == 3:
                until(
                    lambda: (self.said(worker).count("redis.back") >= 1) is trouble,
                    f"redis.back={trouble}: {said}",
                )
            said = self.said(worker)
            back = said.count("redis.back")
            assert back <= most and said.count("redis.trouble") <= 3 * back, f"said once: {said}"

    def state(self) -> dict[str, Any]:
        with self.site.client() as client:
            found: Any = client.hget(GateKeys(LIMIT).gate, "state")
        state: dict[str, Any] = json.loads(found or '{"in_use": -1}')
        return state


@contextlib.contextmanager
def rig(
    *,
    workers: int = 3,
    keeps: bool = True,
    options: tuple[str, ...] = (),
    kind: str = "valkey",
    **limit: Any,
) -> Iterator[Rig]:
    """A fleet under test; everything it started is ended."""
    with tempfile.TemporaryDirectory(prefix="pf") as name, contextlib.ExitStack() as stack:
        data = Path(name) / "server"
        data.mkdir()
        server = Server(data, *options, kind=kind, keeps=keeps)
        stack.callback(server.stop)
        door = stack.enter_context(proxy.before(server.socket, seed()))
        here = Rig(Path(name), server, door, **limit)
        stack.callback(here.site.end)
        here.hire(workers)
        yield here


def during(act: Callable[[], object], for_s: float, every_s: float) -> int:
    """Do something again and again; returns how often."""
    times, end = 0, time.monotonic() + for_s
    while time.monotonic() < end:
        act()
        times += 1
        time.sleep(every_s)
    return times


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
