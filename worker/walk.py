"""One flow run: walk a copy of the node graph, exactly as PocketFlow does, but node by node."""

from __future__ import annotations

import copy
import copyreg
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any, Literal, NamedTuple

from pocketflow import AsyncFlow, AsyncNode, BaseNode, Flow

Path = tuple[tuple[Any, ...], ...]
BeforeNode = Callable[["NodeStep"], Awaitable[None]]
SyncRunner = Callable[..., Awaitable[Any]]


class Level(NamedTuple):
    """Of a nested flow that is being walked: the params of its nodes, and what its prep returned."""

    params: dict[str, Any]
    prepared: Any


class Start(NamedTuple):
    """Where a stopped run goes on.

    Attributes:
        path: `NodeStep.path` of the node to begin with.
        levels: `NodeStep.levels` of it, outermost first.
        after: `(action,)` if the nested flow at the end of the path has only its post left.
    """

    path: Path
    levels: Sequence[Level] = ()
    after: tuple[Any] | None = None

    def inside(self) -> Start | None:
        """The same for the nested flow at the path's first level; None if it begins anew."""
        if len(self.path) == 1 and self.after is None:
            return None
        return Start(self.path[1:], self.levels, self.after)


def walk(
    flow: Any,
    params: dict[str, Any],
    shared: Any,
    *,
    before_node: BeforeNode,
    sync_runner: SyncRunner | None,
    timings: list[tuple[str, float]],
    start: Start | None = None,
) -> Awaitable[Any]:
    """Run the graph of `flow` once with `params`; return the last action.

    Calls, in the order and with the arguments of `AsyncFlow._orch_async(shared, {**flow.params,
    **params})`, the nodes' own methods, whatever version of PocketFlow they come from. Of `flow`
    only `start_node`, `params` and `get_next_node` are used. Nodes are copied, so runs can walk
    one graph at the same time. Whatever a node raises comes out unchanged.

    A nested Flow or AsyncFlow is walked node by node too. One that overrides `_run`, `_orch` or
    their async forms, as PocketFlow's batch flows do, runs as one node: inside it nothing is
    announced, and the sync nodes of an async one run on the loop.

    Args:
        before_node: awaited before each `NodeStep`, the only place between two nodes. It may wait,
            write a checkpoint (`step.path` is where to go on), remember the step as the one in
            which the run is, or raise to end the run.
        sync_runner: awaited as `sync_runner(function, shared, ...)` for what is not async, such
            as `RunThread.call`; None runs it on the loop, as PocketFlow does.
        start: where to begin, as a stopped run goes on; None is the graph's start.
        timings: gets class name and seconds of each node that ended, also of one that raised.
    """
    walker = _Walker(shared, before_node, sync_runner or _inline, timings)
    return walker.graph(flow, {**flow.params, **params}, None, True, start)


class NodeStep:
    """What is about to run: a whole node, or the `prep` or `post` of a nested flow.

    Attributes:
        node: the copy that will run, its params set.
        origin: the node of the user's graph that it is a copy of.
        flow: the flow whose graph it stands in.
        parent: the step of that flow, None at the top level.
        part: "node", or for a nested flow that is walked node by node "prep" or "post".
        prepared: of a nested flow, what its prep returned.
        action: of its post, the last action of its graph.
    """

    __slots__ = ("node", "origin", "flow", "parent", "part", "prepared", "action")

    def __init__(
        self,
        node: Any,
        origin: Any,
        flow: Any,
        parent: NodeStep | None,
        part: Literal["node", "prep", "post"] = "node",
        prepared: Any = None,
        action: Any = None,
    ) -> None:
        self.node = node
        self.origin = origin
        self.flow = flow
        self.parent = parent
        self.part = part
        self.prepared = prepared
        self.action = action

    @property
    def name(self) -> str:
        """The name of the node's class."""
        return type(self.node).__name__

    @property
    def path(self) -> Path | None:
        """Where the node stands: per level of nesting the actions that lead to it from the start.

        The shortest way, so a loop does not lengthen it, and the same in every process that has
        the same graph. None for a node that no successor leads to (a `get_next_node` made it).
        """
        above = () if self.parent is None else self.parent.path
        way = way_to(self.origin, self.flow.start_node)
        return None if above is None or way is None else (*above, way)

    @property
    def levels(self) -> list[Level]:
        """Of each nested flow that the node stands in, outermost first; before a post of it, too."""
        found = [Level({}, self.prepared)] if self.part == "post" else []
        step = self
        while step.parent is not None:
            found.append(Level(step.node.params, step.parent.prepared))
            step = step.parent
        return found[::-1]

    @property
    def params(self) -> dict[str, Any]:
        """The run's params, as its nodes changed them in place."""
        step = self
        while step.parent is not None:
            step = step.parent
        return step.node.params  # type: ignore[no-any-return]


def way_to(node: Any, start: Any) -> tuple[Any, ...] | None:
    """The fewest actions that lead from `start` to `node`, None if none do; () for `start`."""
    line: deque[tuple[Any, tuple[Any, ...]]] = deque([(start, ())])
    seen = {id(start)}
    while line:
        here, way = line.popleft()
        if here is node:
            return way
        for action, after in here.successors.items():
            if after is not None and id(after) not in seen:
                seen.add(id(after))
                line.append((after, (*way, action)))
    return None


def copied(node: Any) -> Any:
    """What `copy.copy` gives, in a third of the time for a class that leaves copying to Python."""
    cls = node.__class__
    if not _copies_as_object(cls):
        return copy.copy(node)
    fresh = object.__new__(cls)
    fresh.__dict__.update(node.__dict__)
    return fresh


@lru_cache(maxsize=1024)
def _copies_as_object(cls: type) -> bool:
    if cls in copyreg.dispatch_table or any(base.__dict__.get("__slots__") for base in cls.__mro__):
        return False
    if any(
        hasattr(cls, name) for name in ("__copy__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
    ):
        return False
    own = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
    return all(getattr(cls, name, None) is getattr(object, name, None) for name in own)


class _Walker:
    """What stays the same during one run."""

    __slots__ = ("shared", "before_node", "sync_runner", "timings")

    def __init__(
        self,
        shared: Any,
        before_node: BeforeNode,
        sync_runner: SyncRunner,
        timings: list[tuple[str, float]],
    ) -> None:
        self.shared = shared
        self.before_node = before_node
        self.sync_runner = sync_runner
        self.timings = timings

    async def graph(
        self, flow: Any, params: dict[str, Any], parent: NodeStep | None, is_async: bool, start: Start | None
    ) -> Any:
        """From the flow's start to its end. In a sync flow (`is_async` false) nothing is awaited
        by PocketFlow: an AsyncNode in it raises, and an AsyncFlow in it runs as a sync one."""
        origin, action = flow.start_node, None
        for way in start.path[0] if start else ():
            origin = origin.successors[way]
        node = copied(origin)
        while node:
            node.set_params(params)
            step = NodeStep(node, origin, flow, parent)
            awaited = is_async and isinstance(node, AsyncNode)
            if isinstance(node, Flow) and _is_plain(node, awaited):
                action = await self.nested(step, awaited, start.inside() if start else None)
            else:
                action = await self.whole(step, awaited)
            start = None
            origin = flow.get_next_node(node, action)
            node = copied(origin) if origin else None
        return action

    async def whole(self, step: NodeStep, awaited: bool) -> Any:
        """One node, prep to post."""
        node = step.node
        await self.before_node(step)
        began = perf_counter()
        try:
            if awaited:
                return await node._run_async(self.shared)
            return await self.sync_runner(node._run, self.shared)
        finally:
            self.timings.append((type(node).__name__, perf_counter() - began))

    async def nested(self, step: NodeStep, awaited: bool, start: Start | None) -> Any:
        """A nested flow: its prep, its graph, its post, whose answer is the action."""
        flow = step.node
        if start is None:
            step.prepared = await self.prep(step, awaited)
            action = await self.graph(flow, {**flow.params}, step, awaited, None)
        else:
            params, step.prepared = start.levels[0]
            if start.path:
                inner = start._replace(levels=start.levels[1:])
                action = await self.graph(flow, params, step, awaited, inner)
            else:
                action = start.after[0] if start.after else None
        return await self.post(step, awaited, action)

    async def prep(self, step: NodeStep, awaited: bool) -> Any:
        flow = step.node
        if _is_own(*_prep_of(flow, awaited)):
            return None
        await self.before_node(NodeStep(flow, step.origin, step.flow, step.parent, "prep"))
        if awaited:
            return await flow.prep_async(self.shared)
        return await self.sync_runner(flow.prep, self.shared)

    async def post(self, step: NodeStep, awaited: bool, action: Any) -> Any:
        flow, prepared = step.node, step.prepared
        if _is_own(flow.post_async, AsyncFlow.post_async) if awaited else _is_own(flow.post, Flow.post):
            return action
        after = NodeStep(flow, step.origin, step.flow, step.parent, "post", prepared, action)
        await self.before_node(after)
        if awaited:
            return await flow.post_async(self.shared, prepared, action)
        return await self.sync_runner(flow.post, self.shared, prepared, action)


def _is_plain(flow: Any, awaited: bool) -> bool:
    """Whether PocketFlow's own code would run this nested flow's graph once, from start to end."""
    if awaited:
        return _is_own(flow._run_async, AsyncFlow._run_async) and _is_own(
            flow._orch_async, AsyncFlow._orch_async
        )
    return _is_own(flow._run, Flow._run) and _is_own(flow._orch, Flow._orch)


def _prep_of(flow: Any, awaited: bool) -> tuple[Any, Any]:
    """A flow's prep, and PocketFlow's."""
    return (flow.prep_async, AsyncNode.prep_async) if awaited else (flow.prep, BaseNode.prep)


def _is_own(method: Any, original: Any) -> bool:
    """Whether a bound method is PocketFlow's, overridden neither by a class nor on the object."""
    return getattr(method, "__func__", None) is original


async def _inline(function: Callable[..., Any], /, *args: Any) -> Any:
    return function(*args)
