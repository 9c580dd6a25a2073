"""What tests of whole processes share: a user's directory, a server, processes in it, and their ledger.

The ledger is the independent judge: every run appends a line when it starts and one when it ends. On
Linux all processes of a machine read the same monotonic clock, so the lines of all can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import redis

from limiter.client import open_retrying_client
from limiter.keys import GateKeys
from limiter.limits import Limits
from producer.batch import as_async, write_spool
from producer.enqueue import enqueue
from producer.follow import Ended, outcomes
from tests import servers
from tests.prefork import Forked, can_fork
from worker.contract import FleetFlow, limit_of
from worker.registry import ServedFlow

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0
"""A condition that does not come true within that time never will, on however busy a machine."""

LEDGER = """
import contextlib, os, time

_path = os.environ["LEDGER"]
_file = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(word, item="-"):
    os.write(_file, f"{time.monotonic():.6f} {os.getpid()} {word} {item}\\n".encode())


@contextlib.contextmanager
def noted(item):
    note("start", item)
    try:
        yield
    except BaseException:
        note("left", item)
        raise
    note("end", item)


def times_started(item):
    with open(_path) as file:
        return sum(line.split()[2:] == ["start", str(item)] for line in file)
"""


@dataclass(frozen=True)
class Note:
    """One line of the ledger: when (seconds, monotonic), which process, what, and about which item."""

    at: float
    pid: int
    word: str
    item: str


class Ledger:
    """What the runs themselves wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def notes(self, word: str = "") -> list[Note]:
        """Every line, or those of one word, in order of time."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_text().rpartition("\n")  # the last line may be on its way
        lines = [line.split() for line in whole.splitlines()]
        found = [Note(float(at), int(pid), what, item) for at, pid, what, item in lines]
        return sorted((each for each in found if word in ("", each.word)), key=lambda each: each.at)

    def count(self, word: str) -> int:
        return len(self.notes(word))

    def items(self, word: str) -> Counter[str]:
        return Counter(each.item for each in self.notes(word))

    def running(self, pid: int = 0) -> set[str]:
        """Items that have started and not ended, of one process or of all."""
        open_: Counter[str] = Counter()
        for each in self.notes():
            if pid in (0, each.pid):
                open_[each.item] += {"start": 1, "end": -1, "left": -1}.get(each.word, 0)
        return {item for item, count in open_.items() if count > 0}

    def peak(self, killed: dict[int, float] | None = None) -> int:
        """Most runs at the same time. What a killed process ran is over at the second of its kill."""
        steps = [(each.at, 1 if each.word == "start" else -1) for each in self.notes() if each.item != "-"]
        for pid, at in (killed or {}).items():
            steps += [(at, -1)] * len(self.running(pid))
        most = now = 0
        for _, step in sorted(steps):
            now += step
            most = max(most, now)
        return most

    def busiest(self, window_s: float, word: str = "start") -> int:
        """Most notes of a word in any window of that length."""
        times = [each.at for each in self.notes(word)]
        return max((bisect_left(times, at + window_s) - n for n, at in enumerate(times)), default=0)


class Child:
    """A process that a test started; what it prints goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes] | Forked, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    def start(cls, command: list[str], directory: Path, env: dict[str, str], log: Path, **more: Any) -> Child:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **more
            )
        return cls(process, log)

    @classmethod
    def fork(cls, words: Sequence[str], directory: Path, env: dict[str, str], log: Path) -> Child:
        """Start `pocketfleet words...`, see tests.prefork."""
        with log.open("wb") as file:
            return cls(Forked(words, directory, env, file.fileno()), log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def code(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; the exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {timeout_s:g} s:\n{self.output()}") from None

    def tell(self, number: signal.Signals) -> float:
        """Send a signal; returns the second at which it was sent."""
        assert self._process.poll() is None, f"it has ended:\n{self.output()}"
        at = time.monotonic()
        os.kill(self.pid, number)
        return at

    def kill(self) -> float:
        """kill -9; returns the second at which it was dead."""
        self.tell(signal.SIGKILL)
        self._process.wait(PATIENCE_S)
        return time.monotonic()

    def lives(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE_S)


class Site:
    """A user's directory with modules of theirs, and the processes started in it.

    Attributes:
        url: the server of the site; '' leaves the processes to the embedded one.
        ledger: what the runs wrote.
        starts_anew: whether every command is a new interpreter; else it may be the fork of one.
    """

    starts_anew = False

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        self.ledger = Ledger(directory / "ledger.txt")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("POCKETFLEET_")}
        self.env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "LEDGER": str(self.ledger.path)}
        if url:
            self.env["POCKETFLEET_REDIS_URL"] = url
        self._children: list[Child] = []
        self.write("ledger.py", LEDGER)

    def write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text)
        # Bytecode of the module as it was may be of the same second and size, and would be taken for this one's.
        shutil.rmtree(self.directory / "__pycache__", ignore_errors=True)
        return path

    def python(self, *words: str, pass_fds: Iterable[int] = (), **env: Any) -> Child:
        """Start `python words...`; keywords in capitals are its environment."""
        command, fds = [sys.executable, *words], tuple(pass_fds)
        return self._kept(Child.start(command, self.directory, self._given(env), self._log(), pass_fds=fds))

    def _given(self, env: dict[str, Any]) -> dict[str, str]:
        return self.env | {name: str(value) for name, value in env.items()}

    def _log(self) -> Path:
        return self.directory / f"child-{len(self._children)}.log"

    def _kept(self, child: Child) -> Child:
        self._children.append(child)
        return child

    def arq(self, flows: str, *options: str, pass_fds: Iterable[int] = (), **env: Any) -> Child:
        """arq's own command on our settings class."""
        words = ["-m", "arq", "worker.main.WorkerSettings", *options]
        return self.python(*words, pass_fds=pass_fds, POCKETFLEET_FLOWS=flows, **env)

    def pocketfleet(self, *words: str, **env: Any) -> Child:
        """Start `pocketfleet words...`; by a fork, unless its environment or this site wants a new interpreter."""
        given = self._given(env)
        if self.starts_anew or not can_fork(given):
            return self.python("-m", "pocketfleet", *words, **env)
        return self._kept(Child.fork(words, self.directory, given, self._log()))

    def typed(self, line: str, **env: Any) -> Child:
        """A command line that PocketFleet printed."""
        name, *words = shlex.split(line)
        assert name == "pocketfleet"
        return self.pocketfleet(*words, **env)

    def enqueue(self, target: str, items: list[dict[str, Any]], batch: str = "b") -> None:
        """Put items into the queue of the flow `target`, as `pocketfleet enqueue` does."""
        limit = limit_of(target)
        served = ServedFlow(target, target, Limits(limit), cast(FleetFlow, None))

        async def go() -> None:
            source = as_async(items, "items")
            data_dir = self.directory / ".pocketfleet"
            spool = await write_spool(
                data_dir, batch, served, source, bytes, max_bytes=65_536, where="items", first=None
            )
            client = open_retrying_client(self.url)
            await enqueue(client, spool)
            await client.aclose()

        asyncio.run(go())

    def ended(self, target: str, count: int, batch: str = "b") -> list[Ended]:
        """Every outcome of a batch so far, once there are at least `count`."""

        async def go() -> list[Ended]:
            client = open_retrying_client(self.url)
            found: list[Ended] = []
            try:
                async with asyncio.timeout(PATIENCE_S):
                    async for some in outcomes(client, limit_of(target), batch):
                        found += some
                        if len(found) >= count:
                            return found
            finally:
                await client.aclose()
            return found

        return asyncio.run(go())

    def waiting(self, target: str) -> int:
        """Jobs of a flow that wait or run."""
        with self.client() as client:
            return int(client.zcard(GateKeys(limit_of(target)).queue(target)))  # type: ignore[arg-type]

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        client = redis.Redis.from_url(self.url)
        try:
            yield client
        finally:
            client.close()

    def end(self) -> None:
        for child in self._children:
            child.end()


@contextlib.contextmanager
def site(modules: dict[str, str], *, embedded: bool = False) -> Iterator[Site]:
    """A user's directory with these files, a server (or none), and an end to all that was started."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pf")))
        url = "" if embedded else stack.enter_context(servers.running("valkey"))
        place = Site(directory, url)
        stack.callback(place.end)
        for name, text in modules.items():
            place.write(name, text)
        yield place


def until(
    condition: Callable[[], object], what: str | Callable[[], str] = "", *, timeout_s: float = PATIENCE_S
) -> float:
    """Wait for a condition; returns the second at which it was seen to hold. `what` is asked if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            said = what() if callable(what) else what
            raise AssertionError(f"not within {timeout_s:g} s: {said or condition}")
        time.sleep(0.01)
    return time.monotonic()


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    try:
        text = "".join(each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    return [child for child in map(int, text.split()) if lives(child)]


def processes_in(directory: Path) -> list[str]:
    """Processes that were started in a directory and still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == directory:
                found.append(process.name)
    return found
