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
        return make(loop, _contained(coro) if item.get() else coro, **given)

    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(before)


async def _contained(coro: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coro
    except (SystemExit, KeyboardInterrupt) as error:
        raise LeftTask from error
