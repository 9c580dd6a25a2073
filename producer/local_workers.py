"""Worker processes that belong to one `run`: started, listened to, replaced when they die, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from producer.errors import ProducerError
from worker.lifeline import VARIABLE

MOST_DEATHS = 20
START_S = 60.0


class LocalWorkers:
    """`count` worker processes of one target on this host.

    Their output goes to `logs/worker-<n>.log` and, line by line, to `say`. They hold the reading end of a
    pipe: when this process ends, however it ends, they hand back what runs and leave.
    """

    def __init__(
        self, target: str, count: int, url: str, data_dir: Path, logs: Path, say: Callable[[str], None]
    ) -> None:
        self._target = target
        self._count = count
        self._logs = logs
        self._say = say
        self._reading, self._writing = os.pipe()
        self._env = {
            **os.environ,
            "POCKETFLEET_REDIS_URL": url,
            "POCKETFLEET_DATA_DIR": str(data_dir.resolve()),
        }
        self._env |= {VARIABLE: str(self._reading), "PYTHONUNBUFFERED": "1"}
        self._env.pop("POCKETFLEET_BURST", None)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False
        self.deaths = 0
        self.failed: str | None = None

    async def start(self) -> None:
        """Start them; they serve a moment later."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(1, self._count + 1)]

    async def stop(self, drain_s: float) -> None:
        """Let them drain; after that end what is left."""
        self._stopping = True
        self._close_pipe_if(drain_s <= 0)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        _, late = await asyncio.wait(self._keepers, timeout=drain_s + 10) if self._keepers else ((), ())
        if late:
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await asyncio.wait(late)
        self._close_pipe_if(True)

    def _close_pipe_if(self, now: bool) -> None:
        if now and self._writing >= 0:
            os.close(self._writing)
            os.close(self._reading)
            self._writing = self._reading = -1

    async def _keep(self, number: int) -> None:
        """One worker, started again when it dies."""
        with (self._logs / f"worker-{number}.log").open("ab") as log:
            while not self._stopping:
                code = await self._live(number, log)
                if self._stopping:
                    return
                if code in (2, 3):
                    self.failed = f"worker {number} could not start (exit code {code}); see {self._logs}"
                    return
                self.deaths += 1
                self._say(f"worker {number} died (exit code {code}); another one takes its place")
                if self.deaths > MOST_DEATHS:
                    self.failed = f"workers died {self.deaths} times; see {self._logs}"
                    return
                await asyncio.sleep(min(5.0, 0.2 * self.deaths))

    async def _live(self, number: int, log: IO[bytes]) -> int:
        command = [sys.executable, "-m", "pocketfleet", "worker", self._target]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._env,
            pass_fds=[self._reading],
            start_new_session=True,
            limit=2**20,
        )
        self._processes[number] = process
        assert process.stdout is not None
        while line := await _line(process.stdout):
            log.write(line)
            log.flush()
            self._hear(number, line)
        return await process.wait()

    def _hear(self, number: int, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\n")
        if text.startswith("worker serves "):
            return
        self._say(text if text.startswith("[") else f"[worker {number}] {text}")


async def _line(stream: asyncio.StreamReader) -> bytes:
    """A line, or a piece of one that is too long to hold."""
    try:
        return await stream.readline()
    except ValueError:
        return b"(a line past 1 MiB was cut)\n"


def checked_workers(workers: object) -> int | None:
    """None, 0 or a number of processes up to 1,000."""
    if workers is None or (
        isinstance(workers, int) and not isinstance(workers, bool) and 0 <= workers <= 1000
    ):
        return workers
    raise ProducerError(
        f"workers={workers!r} cannot hold: use None, 0 (this process) or a number up to 1,000"
    )
