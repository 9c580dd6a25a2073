"""SystemExit and KeyboardInterrupt of user code end its run, never the worker.

asyncio lets the two through: raised in a task of user code (one item of a parallel batch node is one) they
end the event loop. So the coroutine of each task that a run starts is wrapped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from worker.output import item
from worker.run import LeftTask


@contextmanager
def contained_tasks() -> Iterator[None]:
    """While the block runs, tasks that are started inside a run raise `LeftTask` instead of the two."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    make: Callable[..., Any] = before or (lambda loop, coro, **given: asyncio.Task(coro, loop=loop, **given))

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **given: Any) -> Any:
        return make(loop, _Contained(coro) if item.get() and asyncio.iscoroutine(coro) else coro, **given)

    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(before)


class _Contained(Coroutine[Any, Any, Any]):
    """Steps a coroutine as its task would. Nothing around it that is left unstarted: a task that is cancelled
    before its first step tells the user's own coroutine, which else would complain that nobody awaited it."""

    __slots__ = ("_coro",)

    def __init__(self, coro: Coroutine[Any, Any, Any]) -> None:
        self._coro = coro

    def send(self, value: Any) -> Any:
        try:
            return self._coro.send(value)
        except (SystemExit, KeyboardInterrupt) as error:
            raise LeftTask from error

    def throw(self, *error: Any) -> Any:
        try:
            return self._coro.throw(*error)
        except (SystemExit, KeyboardInterrupt) as error:
            raise LeftTask from error

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        return self._coro.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)  # cr_frame, __qualname__: what shows a task to people
