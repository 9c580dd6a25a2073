"""Guards of batch nodes: the others' results survive the refusal of one item."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from threading import get_ident
from typing import Any

from worker.batch_items import BatchItems, Returned
from worker.node_guard import AsyncGuard, Guard
from worker.refused import Recognise, Refused

_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class BatchGuard(Guard):
    """A sync batch node: its items' results are remembered."""

    __slots__ = ("items", "plain_fallback", "plain_all")

    def __init__(self, node: Any, recognise: Recognise, returned: Returned, digest: bytes | None) -> None:
        super().__init__(node, recognise, returned, digest)
        self.items = BatchItems(returned, digest)
        self.plain_fallback = node.exec_fallback
        self.plain_all = node._exec
        own = node.__dict__
        own["exec_fallback"] = self.exec_fallback
        own["_exec"] = self._exec

    def exec(self, item: Any) -> Any:
        items, who = self.items, get_ident()
        place = items.begin(item, who)
        if place in items.known:
            return items.end(who, items.known[place])
        try:
            return items.end(who, self.plain_exec(item))
        except Exception as error:
            self.check(error)
            raise

    def exec_fallback(self, item: Any, error: Exception) -> Any:
        try:
            return self.items.end(get_ident(), self.plain_fallback(item, error))
        except Exception as failure:
            self.check(failure)
            raise

    def _exec(self, given: Any) -> Any:
        self.items.open(given)
        results = self.plain_all(given)
        self.items.raise_if_refused()
        self.let_go("exec_fallback", "_exec")
        return results

    def check(self, error: Exception) -> None:
        hit = self.recognise(error)
        if hit is not None:
            self.items.refuse(hit)
            raise Refused(hit) from error

    def leave(self, error: BaseException) -> None:
        if isinstance(error, _NOT_OURS):
            return
        hit = self.items.hit or self.hit_in(error)
        if hit is not None:
            raise self.items.refused(hit) from error


class AsyncBatchGuard(AsyncGuard):
    """The same for an async one, in turn or in parallel."""

    __slots__ = ("items", "plain_fallback", "plain_all", "runner")

    def __init__(self, node: Any, recognise: Recognise, returned: Returned, digest: bytes | None) -> None:
        super().__init__(node, recognise, returned, digest)
        self.items = BatchItems(returned, digest)
        self.plain_fallback = node.exec_fallback_async
        self.plain_all = node._exec
        self.runner: asyncio.Task[Any] | None = None
        own = node.__dict__
        own["exec_fallback_async"] = self.exec_fallback_async
        own["_exec"] = self._exec

    async def exec_async(self, item: Any) -> Any:
        items, who = self.items, asyncio.current_task()
        place = items.begin(item, who)
        if who is not self.runner:
            items.siblings.add(who)
        if place in items.known:
            return items.end(who, items.known[place])
        try:
            return items.end(who, await self.plain_exec(item))
        except Exception as error:
            self.check(error)
            raise

    async def exec_fallback_async(self, item: Any, error: Exception) -> Any:
        try:
            return self.items.end(asyncio.current_task(), await self.plain_fallback(item, error))
        except Exception as failure:
            self.check(failure)
            raise

    async def _exec(self, given: Any) -> Any:
        self.items.open(given)
        self.runner = asyncio.current_task()
        try:
            results = await self.plain_all(given)
        finally:
            if self.items.hit is not None:
                await _ended(self.items.siblings)
        self.items.raise_if_refused()
        self.let_go("exec_fallback_async", "_exec")
        return results

    def check(self, error: Exception) -> None:
        hit = self.recognise(error)
        if hit is not None:
            self.items.refuse(hit)
            # gather hands on the first exception: this one, because it is raised in this very step
            _cancel(self.items.siblings - {asyncio.current_task()})
            raise Refused(hit) from error

    def leave(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError) and self.runner is not None and self.runner.cancelling():
            return  # the run itself is being cancelled
        if isinstance(error, _NOT_OURS):
            return
        hit = self.items.hit or self.hit_in(error)
        if hit is not None:
            raise self.items.refused(hit) from error


def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        if not task.cancelling():  # once only: a second time would cut short how it closes what it had open
            task.cancel()


async def _ended(tasks: set[asyncio.Task[Any]]) -> None:
    """Return when the tasks, cancelled, have ended. Being cancelled itself counts afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while pending := [task for task in tasks if not task.done()]:
        _cancel(pending)
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
