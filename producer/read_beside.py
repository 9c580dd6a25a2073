"""Items of an iterator that may block, such as standard input: read in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

AHEAD = 50
"""So many items are read before anybody asks for them; each may be large."""


async def read_beside(items: Iterator[Any]) -> AsyncIterator[Any]:
    """The items, each as soon as it is there. Whoever waits for the next one can be cancelled at once.

    A thread that blocks then is left behind; it does not keep the process from ending.
    """
    box: Queue[Any] = Queue(AHEAD)
    there, loop = asyncio.Event(), asyncio.get_running_loop()
    threading.Thread(target=_read, args=(items, box, there, loop), daemon=True).start()
    while True:
        there.clear()  # before looking: what comes after the look sets it
        try:
            item = box.get_nowait()
        except Empty:
            await there.wait()
            continue
        if isinstance(item, _End):
            if item.fault is not None:
                raise item.fault
            return
        yield item


@dataclass
class _End:
    fault: Exception | None = None


def _read(
    items: Iterator[Any], box: Queue[Any], there: asyncio.Event, loop: asyncio.AbstractEventLoop
) -> None:
    for item in _with_end(items):
        box.put(item)
        if not there.is_set():
            try:
                loop.call_soon_threadsafe(there.set)
            except RuntimeError:  # the loop is closed, so nobody waits any more
                return


def _with_end(items: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from items
    except Exception as fault:
        yield _End(fault)
    else:
        yield _End()
