"""Worker processes that belong to one `run`: started, listened to, replaced when they die, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from limiter.printable import plain
from producer.errors import ProducerError, WorkersError
from worker.lifeline import VARIABLE

MOST_DEATHS = 20
START_S = 60.0
SILENT_S, LAST_WORDS_S = 0.5, 10.0
"""A worker that has ended is heard until nothing has come for so long, and for so long at most."""


class LocalWorkers:
    """`count` worker processes of one target on this host.

    Their output goes to `logs/worker-<n>.log` as it comes and, line by line and without what a terminal
    would obey, to `say`: what nodes print for an item of `batch` as `[item 7] ...`. They hold the reading
    end of a pipe: when this process ends, however it ends, they hand back what runs and leave.

    Attributes:
        failed: why they cannot go on, once they cannot.
    """

    def __init__(
        self,
        target: str,
        count: int,
        url: str,
        data_dir: Path,
        logs: Path,
        say: Callable[[str], None],
        batch: str = "",
    ) -> None:
        self._target = target
        self._count = count
        self._logs = logs
        self._say = say
        self._item = re.compile(rf"\[{re.escape(batch)}:(\d+)\] ")
        self._last: dict[int, str] = {}
        self._heard: dict[int, int] = {}
        self._reading, self._writing = os.pipe()
        self._env = {
            **os.environ,
            "POCKETFLEET_REDIS_URL": url,
            "POCKETFLEET_DATA_DIR": str(data_dir.resolve()),
        }
        if home := _home_of(target):
            self._env["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        self._env |= {VARIABLE: str(self._reading), "PYTHONUNBUFFERED": "1"}
        self._env.pop("POCKETFLEET_BURST", None)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = self._log_failed = False
        self.deaths = 0
        self.failed: WorkersError | None = None

    async def start(self) -> None:
        """Start them; they serve a moment later.

        Raises:
            WorkersError: there can be no folder for their logs.
        """
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._close_pipe_if(True)
            raise _unwritable(self._logs, error) from None
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
        path = self._logs / f"worker-{number}.log"
        try:
            log = path.open("ab", buffering=0)
        except OSError as error:
            self.failed = _unwritable(path, error)
            return
        try:
            await self._keep_alive(number, log)
        except OSError as error:
            self.failed = WorkersError(f"worker {number} cannot go on: {_reason(error)}")
        finally:
            log.close()

    async def _keep_alive(self, number: int, log: IO[bytes]) -> None:
        while not self._stopping:
            code = await self._live(number, log)
            if self._stopping:
                return
            said = self._last.get(number, "").removeprefix("pocketfleet: ")
            if code == 3 and any(sign in said for sign in PASSING):
                # the run itself has reached Redis: an outage met at the start is waited for as any other
                await asyncio.sleep(1.0)
                continue
            if code in (2, 3):
                self.failed = WorkersError(said or f"worker {number} could not start", code)
                return
            self.deaths += 1
            self._say(f"worker {number} died ({_ended(code)}); another one takes its place")
            if self.deaths > MOST_DEATHS:
                sentence = f"workers died {self.deaths} times, the last one by {_ended(code)}"
                self.failed = WorkersError(f"{sentence}: see {self._logs}/worker-{number}.log")
                return
            await asyncio.sleep(min(5.0, 0.2 * self.deaths))

    async def _live(self, number: int, log: IO[bytes]) -> int:
        """A worker from its start to its end; its exit code."""
        # a pipe of our own: asyncio's `wait` waits for the end of its pipes too, which what a node has
        # started and left behind may keep open
        reading, writing = os.pipe()
        stream = asyncio.StreamReader(limit=2**20)
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), io.FileIO(reading)
        )
        hearing = asyncio.create_task(self._listen(number, stream, log))
        try:
            process = await self._started(number, writing)
            ending = asyncio.create_task(process.wait())
            await asyncio.wait((ending, hearing), return_when=asyncio.FIRST_COMPLETED)
            if not hearing.done():
                await self._last_words(number, hearing)
            if hearing.done():
                hearing.result()
            return await ending
        finally:
            hearing.cancel()
            pipe.close()

    async def _started(self, number: int, writing: int) -> asyncio.subprocess.Process:
        """A worker that prints to `writing`, which is closed here."""
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pocketfleet", "worker", self._target),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=asyncio.subprocess.STDOUT,
                env=self._env,
                pass_fds=[self._reading],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        self._processes[number] = process
        if self._stopping:  # `stop` came while it was being started
            process.terminate()
        return process

    async def _listen(self, number: int, stream: asyncio.StreamReader, log: IO[bytes]) -> None:
        while line := await _line(stream):
            self._write(log, line)
            self._hear(number, line)

    async def _last_words(self, number: int, hearing: asyncio.Task[None]) -> None:
        """What it wrote before its end: all of it, or, where others have its pipe, until they are silent."""
        for _ in range(round(LAST_WORDS_S / SILENT_S)):
            heard = self._heard.get(number)
            await asyncio.wait([hearing], timeout=SILENT_S)
            if hearing.done() or self._heard.get(number) == heard:
                return

    def _write(self, log: IO[bytes], line: bytes) -> None:
        """A log that takes no more is said once: who reads no pipe stops the worker that writes into it."""
        try:
            log.write(line)
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                self._say(f"{_unwritable(Path(log.name), error)}; what workers print is not kept there")

    def _hear(self, number: int, line: bytes) -> None:
        self._heard[number] = self._heard.get(number, 0) + 1
        text = plain(line.decode(errors="replace").rstrip("\r\n"))
        self._last[number] = text or self._last.get(number, "")
        if text.startswith(UNSAID):
            return
        item = self._item.match(text)
        if item:
            if not text.startswith(UNSAID, item.end()):
                self._say(f"[item {item[1]}] {text[item.end() :]}")
        else:
            self._say(text if TAG.match(text) else f"[worker {number}] {text}")


PASSING = ("cannot be reached", "does not answer", "is still loading", "as many clients")
"""Last words of a worker that found Redis away when it started."""
UNSAID = ("worker serves ", "INFO pocketfleet.", "pocketfleet: ")
"""Lines of a worker that are in its log only; its last words come with the error they cause."""
TAG = re.compile(r"\[[A-Za-z0-9_.-]{1,128}:\d+\] ")


def _home_of(target: str) -> str | None:
    """The directory from which this process imported the target, if workers would not look there."""
    name = target.partition(":")[0]
    file = getattr(sys.modules.get(name) or sys.modules.get("__main__"), "__file__", None)
    if not file or "site-packages" in Path(file).parts:
        return None
    path = Path(file).resolve()
    home = path.parents[name.count(".") + (path.name == "__init__.py")]
    return None if home == Path.cwd() else str(home)


def _unwritable(path: Path, error: OSError) -> WorkersError:
    return WorkersError(f"cannot write {path}: {_reason(error)}")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _ended(code: int) -> str:
    """
    >>> _ended(1), _ended(-9)
    ('exit code 1', 'signal 9')
    """
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


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
