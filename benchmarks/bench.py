"""What every measurement is given: the server, the processes it starts, and how often to repeat."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from benchmarks.line import StartingLine
from benchmarks.server import Counts
from limiter.keys import GateKeys

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(sys.prefix) / "peers" / "bin" / "python"
"""A second virtual environment, for peers that cannot share ours."""


class Bench:
    """One run of the benchmarks.

    Attributes:
        quick: fewer items and one repetition: a look, not a measurement.
        url: the server all peers share.
        home: a directory of this run; every process works in it, so that no `.env` is read.
    """

    def __init__(self, url: str, home: Path, *, quick: bool) -> None:
        self.quick = quick
        self.url = url
        self.home = home
        self.client: Any = redis.Redis.from_url(url)
        self.counts = Counts(self.client)
        self._logs = 0

    @property
    def repetitions(self) -> int:
        return 1 if self.quick else 3

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Tell whoever waits what is being measured."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def empty(self) -> None:
        self.client.flushall()

    # --- processes ---------------------------------------------------------------------------------

    def ask(
        self,
        module: str,
        *args: object,
        python: Path | None = None,
        timeout_s: float = 300.0,
        env: dict[str, str] | None = None,
    ) -> Any:
        """Run a module of ours to its end; returns the JSON it prints last."""
        with (self.home / f"{module}.err").open("w") as errors:
            done = subprocess.run(
                self._command(module, args, python),
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self.environment() | (env or {}),
                cwd=self.home,
                timeout=timeout_s,
            )
        if done.returncode:
            text = (self.home / f"{module}.err").read_text()[-2000:]
            raise RuntimeError(f"{module} {' '.join(map(str, args))} ended with {done.returncode}: {text}")
        return json.loads(done.stdout.decode().strip().rsplit("\n", 1)[-1])

    @contextlib.contextmanager
    def processes(
        self,
        count: int,
        module: str,
        *args: object,
        python: Path | None = None,
        line: StartingLine | None = None,
        env: dict[str, str] | None = None,
        heard: bool = False,
    ) -> Iterator[list[subprocess.Popen[bytes]]]:
        """`count` processes of a module, ended with SIGTERM when the block ends.

        `heard`: what they print is for the caller to read; else it goes to a log.
        """
        started: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(count):
                started.append(self._start(self._command(module, args, python), line, env or {}, heard))
            yield started
        finally:
            _end(started)

    def workers(
        self, count: int, flow: str, line: StartingLine | None = None, env: dict[str, str] | None = None
    ) -> contextlib.AbstractContextManager[list[subprocess.Popen[bytes]]]:
        """`count` of our worker processes, started as a user does."""
        return self.processes(count, "pocketfleet", "worker", f"benchmarks.flows:{flow}", line=line, env=env)

    def _command(self, module: str, args: tuple[object, ...], python: Path | None) -> list[str]:
        return [str(python or sys.executable), "-m", module, *map(str, args)]

    def _start(
        self, command: list[str], line: StartingLine | None, env: dict[str, str], heard: bool
    ) -> subprocess.Popen[bytes]:
        self._logs += 1
        with (self.home / f"process-{self._logs}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if heard else log,
                stderr=log,
                env=self.environment() | (line.env if line else {}) | env,
                cwd=self.home,
                pass_fds=line.fds if line else (),
            )

    def environment(self) -> dict[str, str]:
        """Nothing of the user's own settings, and the server of this run."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("POCKETFLEET_")}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "POCKETFLEET_REDIS_URL": self.url,
            "POCKETFLEET_DATA_DIR": str(self.home / "data"),
            "BENCH_URL": self.url,
        }

    # --- waiting -----------------------------------------------------------------------------------

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 300.0) -> float:
        """Look every 5 ms until `holds`; returns the moment, on the clock of `time.perf_counter`."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; see the logs in {self.home}")
            time.sleep(0.005)
        return time.perf_counter()

    def until_empty(self, queue: str) -> float:
        """Until nothing of a queue waits or runs. arq's queue and ours both keep a job until it is done."""

        def is_empty() -> bool:
            self.counts.own("zcard")
            return bool(self.client.zcard(queue) == 0)

        return self.until(is_empty, f"queue {queue} empty")

    def until_idle(self, flow: str, count: int) -> None:
        """Until `count` of our workers have found that there is nothing to do."""
        key = GateKeys(flow).idle(flow)
        self.until(lambda: bool(self.client.zcard(key) == count), f"{count} idle workers of {flow}", 60.0)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
