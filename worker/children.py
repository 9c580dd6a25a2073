"""The processes of a worker in which runs can be alone: started when they are needed, used once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys

from worker.frames import Frames
from worker.registry import ServedFlow

log = logging.getLogger("pocketfleet.worker")

MOST = 2
"""Processes of one worker at a time."""
IDLE_S, START_S, END_S = 30.0, 60.0, 3.0
"""How long one may wait for a run, take to start, and take to end."""


class Child:
    """A process in which one run can be alone."""

    def __init__(self, served: ServedFlow) -> None:
        self.served = served
        self.ready = False
        self._process: asyncio.subprocess.Process | None = None
        self._frames: Frames | None = None

    async def start(self) -> None:
        """Start it, and wait until it could run. Raises OSError or TimeoutError if it cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "worker.alone_child", str(theirs.fileno())),
                *(self.served.target, repr(self.served.limits.lease_s)),
                stdin=asyncio.subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._frames = Frames(*await asyncio.open_connection(sock=ours, limit=2**20))
        async with asyncio.timeout(START_S):
            if await self._frames.receive() != ["ready"]:
                raise OSError(f"it ended with {await self.ended()} before it could run anything")
        self.ready = True

    @property
    def frames(self) -> Frames:
        assert self._frames is not None
        return self._frames

    def alive(self) -> bool:
        return self.ready and self._process is not None and self._process.returncode is None

    async def ended(self) -> str:
        """Wait for its end, and say what it was.

        `exit code 3`, or `signal 11 (SIGSEGV)`.
        """
        assert self._process is not None
        code = await self._process.wait()
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {-code} ({signal.Signals(-code).name})"
        return f"signal {-code}"

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._frames is not None:
            self._frames.close()


class Children:
    """The processes of one worker in which runs can be alone: at most `MOST`, started when they are needed."""

    def __init__(self) -> None:
        self._all: set[Child] = set()
        self._spare: dict[str, Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._cannot: set[str] = set()

    def can(self, flow: str) -> bool:
        """Whether runs of a flow can be alone; not if its process could not start."""
        return flow not in self._cannot

    def take(self, served: ServedFlow) -> Child | None:
        """A process that is ready, for one run; None if none is yet."""
        spare = self._spare.get(served.name)
        if spare is not None and spare.alive():
            del self._spare[served.name]
            return spare
        if spare is None and len(self._all) < MOST:
            child = self._spare[served.name] = Child(served)
            self._all.add(child)
            task = asyncio.get_running_loop().create_task(self._start(child))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif spare is not None and spare.ready:
            self.give_up(spare)
        return None

    def let_end(self, child: Child) -> None:
        """Its run is over: it may close what it has open."""
        task = asyncio.get_running_loop().create_task(self._ending(child))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ending(self, child: Child) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await child.ended()
        self.give_up(child)

    def give_up(self, child: Child) -> None:
        """Kill it, if it still lives."""
        child.kill()
        self._all.discard(child)
        if self._spare.get(child.served.name) is child:
            del self._spare[child.served.name]

    async def _start(self, child: Child) -> None:
        name = child.served.name
        try:
            await child.start()
        except (OSError, TimeoutError) as error:
            self._cannot.add(name)
            self.give_up(child)
            log.error("alone.cannot_start flow=%s: %s; its suspects run among the others", name, error)
            return
        await asyncio.sleep(IDLE_S)
        if self._spare.get(name) is child:
            self.give_up(child)

    def end(self) -> None:
        """Kill all of them: whatever ran there has been handed back."""
        for task in self._tasks:
            task.cancel()
        for child in list(self._all):
            self.give_up(child)
