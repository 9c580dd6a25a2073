"""The process in which one run is alone: `python -m worker.alone_child FD TARGET LEASE_S`.

It talks to its worker only, over the socket FD, and ends with it. What the run prints goes where the worker's
prints go.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

from limiter.settings import load
from limiter.sync import Claimed, Entry
from worker import output
from worker.checkpoint import Saver
from worker.contained import contained_tasks
from worker.contract import split_job_id
from worker.crew import Crew
from worker.forked import let_go_in_forks
from worker.frames import Frames
from worker.registry import ServedFlow, serve
from worker.run import Run
from worker.settings import WorkerSettings

STOP_S = 2.0


class Worker:
    """Stands in for a crew, its pump, its bases and its client: asks the real ones."""

    show_traces = False

    def __init__(self, frames: Frames, served: ServedFlow) -> None:
        self.pump = self.client = self.bases = self
        self.serves = {served.name: served}
        self.flows = [served.name]
        self.savers = {served.name: Saver(served)}
        self.name = ""
        self.answer = SimpleNamespace(now=0)
        self.base = b""
        self._frames = frames
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._sure = False
        self.run: Run | None = None

    async def hear(self) -> None:
        """Take answers and orders; end the process when the worker is gone."""
        while (message := await self._frames.receive()) is not None:
            if message[0] == "answer":
                asked = self._asked.pop(message[1], None)
                if asked is not None and not asked.done():
                    asked.set_result(message[2])
            elif message[0] == "stop" and self.run is not None:
                self.run.stop(message[1])
        os._exit(0)

    async def _ask(self, what: str, *args: Any) -> Any:
        number = next(self._numbers)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        self._frames.send(what, number, *args)
        return await asked

    # --- the pump's side ---------------------------------------------------------------------------

    @property
    def safe(self) -> bool:
        """True once after each word of the worker that the run may go on."""
        sure, self._sure = self._sure, False
        return sure

    async def contact(self) -> None:
        self.answer.now = await self._ask("contact", self.run.node if self.run else "")
        self._sure = True

    async def save(self, entry: Entry) -> None:
        self.answer.now = await self._ask("save", entry.flow, entry.what, entry.arg)
        await self.contact()

    def succeed(self, attempt: int) -> None:
        self._frames.send("succeed")

    def refuse(self, attempt: int, pause_s: float = 0.0) -> None:
        self._frames.send("refuse", pause_s)

    def settle(self, entry: Entry, *extra: Entry) -> None:
        first = [(each.flow, each.what, each.arg) for each in extra[:1]]
        self._frames.send("settle", entry.what, entry.arg, first[0] if first else None)

    def of_flow(self, job: str, number: int) -> None:
        """The worker knows."""

    # --- the others --------------------------------------------------------------------------------

    def known(self, limit: str, batch: str) -> bytes:
        return self.base

    async def get(self, key: str) -> Any:
        return await self._ask("get", key)

    async def set(self, key: str, data: bytes, px: int) -> Any:
        return await self._ask("set", key, data)

    async def unlink(self, key: str) -> Any:
        return await self._ask("unlink", key)

    def ended(self, run: Run) -> None:
        """The worker knows."""


async def main(descriptor: int, target: str, lease_s: float) -> None:
    """Get ready, run one run, and end."""
    connection = await asyncio.open_connection(sock=socket.socket(fileno=descriptor), limit=2**20)
    frames = Frames(*connection)
    (served,) = serve([target], lease_s)
    await served.flow.on_worker_start()
    worker = Worker(frames, served)
    frames.send("ready")
    order = await frames.receive()
    if order is None:
        return
    _, job, attempt, deaths, refusals, hand_backs, saved, payload, worker.base, worker.name = order
    claimed = Claimed(job, attempt, deaths, refusals, hand_backs, saved, payload)
    split_job_id(job)
    run = worker.run = Run(cast(Crew, worker), claimed, float("inf"), 0)
    hearing = asyncio.create_task(worker.hear())
    with contained_tasks():
        run.task = asyncio.create_task(run.execute())
        await run.task
    with contextlib.suppress(Exception):
        async with asyncio.timeout(STOP_S):
            await served.flow.on_worker_stop()
    hearing.cancel()
    frames.close()


def end_with(parent: int) -> None:
    """End when the worker is gone, also while user code keeps the event loop."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        # the worker says when to leave; SIG_IGN would be inherited by what a node starts
        signal.signal(number, lambda *_: None)
    let_go_in_forks()
    output.prefix_items(load(WorkerSettings).log_level)
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
    sys.stdout.flush()
    os._exit(0)  # threads that user code left behind must not keep it
