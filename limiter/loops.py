"""Which process each event loop of this Python process has; what all of them must agree on."""

from __future__ import annotations

import asyncio
import os
import weakref
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

from limiter.errors import LimitsError
from limiter.limits import Limits

if TYPE_CHECKING:
    from limiter.process import Process

of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Future[Process]] = (
    weakref.WeakKeyDictionary()
)
"""By loop, its process, or that it is being opened. The value holds its key: `forget` it with the loop."""
ending: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
"""Loops whose tasks are being cancelled: what is opened there now would never be closed."""
_recent: tuple[asyncio.AbstractEventLoop, Process] | None = None  # what `open_already` last found


def _forget_all() -> None:
    global _recent
    of_loop.clear()
    _recent = None


os.register_at_fork(after_in_child=_forget_all)


def forget(loop: asyncio.AbstractEventLoop) -> None:
    """Its process is closed, or gone with it."""
    global _recent
    of_loop.pop(loop, None)
    if _recent is not None and _recent[0] is loop:
        _recent = None


def adopt(process: Process) -> None:
    """Make it the process of the running loop, unless that has one: `limit()` then shares its pumps."""
    loop = asyncio.get_running_loop()
    if loop not in of_loop:
        opened: asyncio.Future[Process] = loop.create_future()
        opened.set_result(process)
        of_loop[loop] = opened
        process.on_close(partial(forget, loop))


def open_already(loop: asyncio.AbstractEventLoop) -> Process | None:
    """The process of the running `loop` if it is open: what `current_process` gives, without a wait."""
    global _recent
    recent = _recent
    if recent is not None and recent[0] is loop and not recent[1].closed:
        return recent[1]
    opening = of_loop.get(loop)
    if opening is None or not opening.done() or opening.cancelled() or opening.exception() is not None:
        return None
    _recent = (loop, opening.result())
    return opening.result()


def two_values(one: Limits, other: Limits) -> LimitsError:
    """Names what differs as it is typed for `limit()`."""
    differs = [each.name for each in fields(Limits) if getattr(one, each.name) != getattr(other, each.name)]

    def shown(limits: Limits) -> str:
        return ", ".join(f"{TYPED.get(key, key)}={getattr(limits, key)}" for key in differs)

    return LimitsError(
        f"limit '{one.name}' is used with two different values in this process: {shown(one)} and "
        f"{shown(other)}; use one",
        key="limit",
        value=one.name,
    )


TYPED = {"max_per_window": "max_per_minute"}


def refuse_other_values(process: Process, limits: Limits) -> None:
    """The loops of one process must agree too, that of `with limit()` among them."""
    for loop, opening in list(of_loop.items()):
        if loop.is_closed() or not opening.done() or opening.cancelled() or opening.exception():
            continue
        pump = opening.result().pumps.get(limits.name)
        if opening.result() is not process and pump and pump.limits not in (None, limits):
            assert pump.limits is not None
            raise two_values(pump.limits, limits)
