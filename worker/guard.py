"""One run of a copied node, guarded: a provider's refusal ends the node at once and leaves it.

PocketFlow's nodes retry on every `Exception` and hand the last one to `exec_fallback`. So a refusal is
turned into a `BaseException` right around the node's own `exec`, where neither can get hold of it. Only
attributes of the copy are replaced, and only until its run has ended well; the user's graph stays as it is.

Not reached: the nodes inside a nested flow that runs as one node (PocketFlow copies them itself). A
refusal that leaves such a flow is recognised, but only after its nodes' own retries have called again,
and not if a fallback swallowed it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from threading import get_ident
from typing import Any

from pocketflow import AsyncNode, BatchNode, Flow

from limiter.refusal import RateLimitHit
from worker.codec import CannotTravel, travels

Recognise = Callable[[BaseException], RateLimitHit | None]


class Refused(BaseException):
    """A guarded node was refused. Not an `Exception`, so that nothing on the way swallows it.

    Attributes:
        hit: what was recognised.
        returned: of a batch node, the results of the items that had returned, by position: those that
            can travel (tuples arrive as lists).
        items_digest: of the list in which these positions count; None if it cannot travel.
    """

    def __init__(
        self, hit: RateLimitHit, returned: dict[int, Any] | None = None, items_digest: bytes | None = None
    ) -> None:
        super().__init__(hit, returned, items_digest)
        self.hit = hit
        self.returned = {} if returned is None else returned
        self.items_digest = items_digest

    def __str__(self) -> str:
        return str(self.hit)


def guard(
    node: Any,
    *,
    recognise: Recognise,
    returned: Mapping[int, Any] | None = None,
    items_digest: bytes | None = None,
) -> None:
    """Make the run of `node`, a copy nobody else uses and that runs once, raise `Refused` when refused.

    Wherever in the node that happens: prep, exec, fallback, post. In a batch node the items that had
    returned are remembered; in a parallel one the others are cancelled and awaited before `Refused`
    comes out. (An item that waits before its `exec`, at a gate of a subclass, ends when it gets there.)

    Args:
        recognise: asked about every exception; must not raise.
        returned, items_digest: of the `Refused` that ended an earlier run of this node. Those items are
            not called again if `prep` gives the same list, else all are.
    """
    _kind_of(node.__class__)(node, recognise, returned, items_digest)


@lru_cache(maxsize=1024)
def _kind_of(cls: type) -> type[_Guard]:
    if issubclass(cls, AsyncNode):
        if issubclass(cls, BatchNode):
            return _AsyncBatchGuard
        return _AsyncFlowGuard if issubclass(cls, Flow) else _AsyncGuard
    return _BatchGuard if issubclass(cls, BatchNode) else _Guard


Returned = Mapping[int, Any] | None
_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class _Guard:
    """Stands in for methods of one sync node, under their own names."""

    __slots__ = ("node", "recognise", "plain_exec", "plain_run")

    def __init__(self, node: Any, recognise: Recognise, _: Returned, __: bytes | None) -> None:
        self.node = node
        self.recognise = recognise
        self.plain_exec = node.exec
        self.plain_run = node._run
        own = node.__dict__
        own["exec"] = self.exec
        own["_run"] = self._run

    def exec(self, prep_res: Any) -> Any:
        try:
            return self.plain_exec(prep_res)
        except Exception as error:
            self.check(error)
            raise

    def _run(self, shared: Any) -> Any:
        try:
            action = self.plain_run(shared)
        except BaseException as error:
            self.leave(error)
            raise
        # node and guard hold each other, and would wait for the garbage collector
        own = self.node.__dict__
        del own["exec"], own["_run"]
        return action

    def check(self, error: Exception) -> None:
        """Raise `Refused` if `error` is a refusal."""
        hit = self.recognise(error)
        if hit is not None:
            raise Refused(hit) from error

    def leave(self, error: BaseException) -> None:
        """Raise `Refused` if what leaves the node is a refusal, or a group that holds one."""
        hit = None if isinstance(error, Refused) else self.hit_in(error)
        if hit is not None:
            raise Refused(hit) from error

    def hit_in(self, error: BaseException) -> RateLimitHit | None:
        if isinstance(error, Exception):
            return self.recognise(error)
        if isinstance(error, Refused):
            return error.hit
        if isinstance(error, BaseExceptionGroup):  # as a user's TaskGroup makes one of a Refused
            return next(filter(None, map(self.hit_in, error.exceptions)), None)
        return None

    def __reduce__(self) -> Any:
        # A node that pickles itself, as for a pool of processes, arrives there unguarded.
        return _Unguarded, (self.node,)


class _AsyncGuard(_Guard):
    """The same for an async node."""

    __slots__ = ()

    def __init__(self, node: Any, recognise: Recognise, _: Returned, __: bytes | None) -> None:
        self.node = node
        self.recognise = recognise
        self.plain_exec = node.exec_async
        self.plain_run = node._run_async
        own = node.__dict__
        own["exec_async"] = self.exec_async
        own["_run_async"] = self._run_async

    async def exec_async(self, prep_res: Any) -> Any:
        try:
            return await self.plain_exec(prep_res)
        except Exception as error:
            self.check(error)
            raise

    async def _run_async(self, shared: Any) -> Any:
        try:
            action = await self.plain_run(shared)
        except BaseException as error:
            self.leave(error)
            raise
        own = self.node.__dict__
        del own["exec_async"], own["_run_async"]
        return action


class _AsyncFlowGuard(_AsyncGuard):
    """A nested flow that runs as one node; inside a sync flow an async one is run by `_run`."""

    __slots__ = ()

    def __init__(self, node: Any, recognise: Recognise, returned: Returned, digest: bytes | None) -> None:
        super().__init__(node, recognise, returned, digest)
        _Guard(node, recognise, returned, digest)


class _BatchGuard(_Guard):
    """A sync batch node: its items' results are remembered."""

    __slots__ = ("items", "plain_fallback", "plain_all")

    def __init__(self, node: Any, recognise: Recognise, returned: Returned, digest: bytes | None) -> None:
        super().__init__(node, recognise, returned, digest)
        self.items = _Items(returned, digest)
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
        own = self.node.__dict__
        del own["exec_fallback"], own["_exec"]
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


class _AsyncBatchGuard(_AsyncGuard):
    """The same for an async one, in turn or in parallel."""

    __slots__ = ("items", "plain_fallback", "plain_all", "runner")

    def __init__(self, node: Any, recognise: Recognise, returned: Returned, digest: bytes | None) -> None:
        super().__init__(node, recognise, returned, digest)
        self.items = _Items(returned, digest)
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
        own = self.node.__dict__
        del own["exec_fallback_async"], own["_exec"]
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


class _Items:
    """What is known of the items of one batch node.

    An item's position is found by its identity, so it holds in whatever order the node calls its items;
    an item that is not one of the node's list, or a list that is an iterator, has none.
    """

    __slots__ = ("known", "digest", "list", "places", "calls", "returned", "siblings", "hit")

    def __init__(self, returned: Returned, digest: bytes | None) -> None:
        self.known = dict(returned) if returned and digest is not None else {}
        self.digest = digest
        self.list: tuple[Any, ...] | None = None
        self.places: dict[int, list[int]] = {}
        self.calls: dict[Any, tuple[Any, int | None]] = {}
        self.returned: dict[int, Any] = dict(self.known)
        self.siblings: set[Any] = set()
        self.hit: RateLimitHit | None = None

    def open(self, given: Any) -> None:
        """The list `prep` gave, before its items are called."""
        self.list = tuple(given) if isinstance(given, (list, tuple)) else ()
        if self.known and digest_of(self.list) != self.digest:
            self.known, self.returned = {}, {}
        for place in range(len(self.list) - 1, -1, -1):
            self.places.setdefault(id(self.list[place]), []).append(place)

    def begin(self, item: Any, who: object) -> int | None:
        """The position of the item which `who`, a task or thread, calls now, perhaps once more."""
        self.raise_if_refused()
        call = self.calls.get(who)
        if call is not None and call[0] is item:
            return call[1]
        places = self.places.get(id(item))
        place = places.pop() if places else None
        self.calls[who] = (item, place)
        return place

    def end(self, who: object, result: Any) -> Any:
        """Remember what the item returned that `who` called; the result."""
        _, place = self.calls.pop(who, (None, None))
        if place is not None:
            self.returned[place] = result
        return result

    def refuse(self, hit: RateLimitHit) -> None:
        """Of several refusals the one with the longest `retry_after` counts."""
        if self.hit is None or (hit.retry_after or 0) > (self.hit.retry_after or 0):
            self.hit = hit

    def raise_if_refused(self) -> None:
        """Where one item was refused, no other is called; nor may a node that gathers exceptions go on."""
        if self.hit is not None:
            raise Refused(self.hit)

    def refused(self, hit: RateLimitHit) -> Refused:
        if self.list is None:  # refused in prep: what is known of an earlier run stays known
            return Refused(hit, self.returned, self.digest)
        returned = {place: result for place, result in sorted(self.returned.items()) if _can_travel(result)}
        return Refused(hit, returned, digest_of(self.list))


def digest_of(items: Sequence[Any]) -> bytes | None:
    """16 bytes that are the same for equal lists, None if the list cannot travel."""
    try:
        return blake2b(travels(items), digest_size=16).digest()
    except CannotTravel:
        return None


def _can_travel(result: Any) -> bool:
    try:
        travels(result)
    except CannotTravel:
        return False
    return True


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


class _Unguarded:
    """What a pickled guard becomes: the methods of the node's class."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self.node), name).__get__(self.node)
