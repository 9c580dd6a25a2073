"""The starting line: processes say that they are ready, then all of them go at once. No Redis in it."""

from __future__ import annotations

import asyncio
import os
import select
import time

READY, GO = "BENCH_READY_FD", "BENCH_GO_FD"


class StartingLine:
    """The side of the process that starts them; pass `fds` and `env` on to each."""

    def __init__(self) -> None:
        self._ready, ready_end = os.pipe()
        go_end, self._go = os.pipe()
        self.fds = (ready_end, go_end)
        self.env = {READY: str(ready_end), GO: str(go_end)}

    def wait(self, count: int, timeout_s: float = 60.0) -> None:
        """Until `count` processes stand at the line."""
        deadline = time.monotonic() + timeout_s
        while count > 0:
            if not select.select([self._ready], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{count} processes were not ready within {timeout_s:g} s")
            count -= len(os.read(self._ready, count))

    def go(self) -> float:
        """Release them all; returns the moment, on the clock of `time.perf_counter`."""
        now = time.perf_counter()
        os.close(self._go)
        self._go = -1
        return now

    def close(self) -> None:
        for fd in (self._ready, self._go, *self.fds):
            if fd >= 0:
                os.close(fd)


async def stand_ready() -> None:
    """Stand at the line until everybody goes; returns at once in a process that was given none."""
    if READY not in os.environ:
        return
    os.write(int(os.environ[READY]), b".")
    await asyncio.to_thread(os.read, int(os.environ[GO]), 1)
