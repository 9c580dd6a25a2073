"""Guards of nodes with one `exec`: they stand in for methods of a copied node, under their own names."""

from __future__ import annotations

from functools import lru_cache
from types import MethodType
from typing import Any

from limiter.refusal import RateLimitHit
from worker.batch_items import Returned
from worker.refused import Recognise, Refused


class Guard:
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
        if _copies_its_dict(node.__class__):
            own["__getstate__"] = self.state

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
        self.let_go("exec", "_run")
        return action

    def let_go(self, *methods: str) -> None:
        """Node and guard hold each other, and would wait for the garbage collector. A node that ran itself again
        inside its run has been let go of already."""
        for name in (*methods, "__getstate__"):
            self.node.__dict__.pop(name, None)

    def state(self) -> dict[str, Any]:
        """What a copy of the node, which it may make in its run, takes along: not its guard, which would call the
        methods of the node itself."""
        return {name: value for name, value in self.node.__dict__.items() if not _is_guards(value)}

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


class AsyncGuard(Guard):
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
        if _copies_its_dict(node.__class__):
            own["__getstate__"] = self.state

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
        self.let_go("exec_async", "_run_async")
        return action


class AsyncFlowGuard(AsyncGuard):
    """A nested flow that runs as one node; inside a sync flow an async one is run by `_run`."""

    __slots__ = ()

    def __init__(self, node: Any, recognise: Recognise, returned: Returned, digest: bytes | None) -> None:
        super().__init__(node, recognise, returned, digest)
        Guard(node, recognise, returned, digest)


@lru_cache(maxsize=1024)
def _copies_its_dict(cls: type) -> bool:
    return cls.__getstate__ is object.__getstate__  # type: ignore[comparison-overlap, attr-defined, unused-ignore]


def _is_guards(value: Any) -> bool:
    return type(value) is MethodType and isinstance(value.__self__, Guard)


class _Unguarded:
    """What a pickled guard becomes: the methods of the node's class."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self.node), name).__get__(self.node)
