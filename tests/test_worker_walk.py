"""The walk does what PocketFlow does: random graphs run by both, then its own promises one by one."""

# PocketFlow's stub calls its classes generic, which they are not at run time.
# mypy: disable-error-code="type-arg, var-annotated, arg-type"

from __future__ import annotations

import asyncio
import copy
import functools
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pocketflow import (
    AsyncBatchFlow,
    AsyncBatchNode,
    AsyncFlow,
    AsyncNode,
    AsyncParallelBatchFlow,
    AsyncParallelBatchNode,
    BatchFlow,
    BatchNode,
    Flow,
    Node,
)

from worker.threads import RunThread
from worker.walk import NodeStep, copied, walk, way_to

Timings = list[tuple[str, float]]
SEEN: ContextVar[int] = ContextVar("SEEN", default=0)
LEFT: ContextVar[list[int]] = ContextVar("LEFT")
STEPS = 40


@dataclass(frozen=True)
class Spec:
    """One node of a random graph; `graph` is set for flows."""

    kind: str
    actions: tuple[str | None, ...]
    wires: tuple[tuple[str, int], ...]
    retries: int = 1
    failures: int = 0
    error: type[Exception] = ValueError
    fallback: bool = False
    items: int = 1
    writes_params: bool = False
    graph: tuple[Spec, ...] = ()


def note(node: Any, shared: dict[str, Any], what: str, *values: Any) -> None:
    """What happened, with which params, and how far the run's context variable has counted."""
    SEEN.set(SEEN.get() + 1)
    shared["trace"].append((node.place, what, dict(node.params), SEEN.get(), *values))


def begin(node: Any, shared: dict[str, Any]) -> Any:
    note(node, shared, "prep")
    if node.spec.writes_params:
        node.params["written_by"] = node.place
    if node.spec.graph and "Batch" not in node.spec.kind:
        return {"prepared": node.place}
    if "Batch" not in node.spec.kind:
        return (shared, 0)
    if "Flow" in node.spec.kind:
        return [{"item": i} for i in range(node.spec.items)]
    return [(shared, i) for i in range(node.spec.items)]


def act(node: Any, prepared: Any) -> Any:
    shared, item = prepared
    note(node, shared, "exec", item)
    failed = shared["failed"].setdefault(node.place, 0)
    if failed < node.spec.failures:
        shared["failed"][node.place] += 1
        raise node.spec.error(node.place, failed)
    return (node.place, item)


def fall_back(node: Any, prepared: Any, error: Exception) -> Any:
    note(node, prepared[0], "fallback", repr(error))
    if node.spec.fallback:
        return "fell back"
    raise error


def finish(node: Any, shared: dict[str, Any], prepared: Any, result: Any) -> Any:
    note(node, shared, "post", result, *([prepared] if node.spec.graph else []))
    visit = shared["visits"].get(node.place, 0)
    shared["visits"][node.place] = visit + 1
    return node.spec.actions[visit % len(node.spec.actions)]


class Counted:
    """Ends random graphs that loop for ever."""

    def set_params(self, params: Any) -> None:
        left = LEFT.get()
        left[0] -= 1
        if left[0] < 0:
            raise KeyError("a loop without end")
        super().set_params(params)  # type: ignore[misc]


class SyncParts:
    def prep(self, shared: Any) -> Any:
        return begin(self, shared)

    def exec(self, prepared: Any) -> Any:
        return act(self, prepared)

    def exec_fallback(self, prepared: Any, error: Exception) -> Any:
        return fall_back(self, prepared, error)

    def post(self, shared: Any, prepared: Any, result: Any) -> Any:
        return finish(self, shared, prepared, result)


class AsyncParts:
    async def prep_async(self, shared: Any) -> Any:
        return begin(self, shared)

    async def exec_async(self, prepared: Any) -> Any:
        await asyncio.sleep(0)
        return act(self, prepared)

    async def exec_fallback_async(self, prepared: Any, error: Exception) -> Any:
        return fall_back(self, prepared, error)

    async def post_async(self, shared: Any, prepared: Any, result: Any) -> Any:
        return finish(self, shared, prepared, result)


class OwnOrch:
    def _orch(self, shared: Any, params: Any = None) -> Any:
        note(self, shared, "own _orch")
        return super()._orch(shared, params)  # type: ignore[misc]


class OwnOrchAsync:
    async def _orch_async(self, shared: Any, params: Any = None) -> Any:
        note(self, shared, "own _orch_async")
        return await super()._orch_async(shared, params)  # type: ignore[misc]


class OwnNext:
    def get_next_node(self, node: Any, action: Any) -> Any:
        return super().get_next_node(node, "default" if action == "a" else action)  # type: ignore[misc]


def kind(name: str, *bases: type) -> tuple[str, type]:
    return name, type(name, (Counted, *bases), {})


LEAVES = dict(
    [
        kind("Node", SyncParts, Node),
        kind("BatchNode", SyncParts, BatchNode),
        kind("AsyncNode", AsyncParts, AsyncNode),
        kind("AsyncBatchNode", AsyncParts, AsyncBatchNode),
        kind("AsyncParallelBatchNode", AsyncParts, AsyncParallelBatchNode),
        kind("SyncAndAsyncNode", SyncParts, AsyncParts, AsyncNode),
    ]
)
FLOWS = dict(
    [
        kind("PlainFlow", Flow),
        kind("PlainAsyncFlow", AsyncFlow),
        kind("Flow", SyncParts, Flow),
        kind("AsyncFlow", AsyncParts, AsyncFlow),
        kind("SyncAndAsyncFlow", SyncParts, AsyncParts, AsyncFlow),
        kind("OwnOrchFlow", OwnOrch, SyncParts, Flow),
        kind("OwnOrchAsyncFlow", OwnOrchAsync, AsyncParts, AsyncFlow),
        kind("OwnNextFlow", OwnNext, SyncParts, Flow),
        kind("OwnNextAsyncFlow", OwnNext, AsyncParts, AsyncFlow),
        kind("BatchFlow", SyncParts, BatchFlow),
        kind("AsyncBatchFlow", AsyncParts, AsyncBatchFlow),
        kind("AsyncParallelBatchFlow", AsyncParts, AsyncParallelBatchFlow),
    ]
)


def build(spec: Spec, place: str) -> Any:
    """A fresh node, its inner graph wired."""
    if spec.graph:
        node = FLOWS[spec.kind](start=wired(spec.graph, place))
    else:
        node = LEAVES[spec.kind](max_retries=spec.retries)
    node.spec, node.place = spec, place
    return node


def wired(graph: tuple[Spec, ...], place: str) -> Any:
    """The start of a fresh graph."""
    nodes = [build(spec, f"{place}.{i}") for i, spec in enumerate(graph)]
    for node, spec in zip(nodes, graph, strict=True):
        for action, to in dict(spec.wires).items():
            node.next(nodes[to % len(nodes)], action)
    return nodes[0]


ACTIONS = st.sampled_from([None, "default", "a", "b", "unknown"])
WIRES = st.lists(st.tuples(st.sampled_from(["default", "a", "b"]), st.integers(0, 3)), max_size=3).map(tuple)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "actions": st.lists(ACTIONS, min_size=1, max_size=3).map(tuple),
    "wires": WIRES,
    "items": st.integers(0, 3),
    "writes_params": st.booleans(),
}
LEAF = st.builds(
    Spec,
    kind=st.sampled_from(sorted(LEAVES)),
    retries=st.integers(0, 3),
    failures=st.sampled_from([0, 0, 0, 1, 2]),
    error=st.sampled_from([ValueError, StopIteration]),
    fallback=st.booleans(),
    **COMMON,
)


def flow_of(children: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
    graph = st.lists(children, min_size=1, max_size=3).map(tuple)
    return st.builds(Spec, kind=st.sampled_from(sorted(FLOWS)), graph=graph, **COMMON)


GRAPH = st.lists(st.recursive(LEAF, flow_of, max_leaves=6), min_size=1, max_size=4).map(tuple)
PARAMS = st.dictionaries(st.sampled_from(["user", "item", "n"]), st.integers(0, 3), max_size=2)


async def unfenced(_: NodeStep) -> None:
    pass


async def with_pocketflow(flow: Any, params: dict[str, Any], shared: dict[str, Any]) -> Any:
    return await flow._orch_async(shared, {**flow.params, **params})


async def inline(flow: Any, params: dict[str, Any], shared: dict[str, Any]) -> Any:
    return await walk(flow, params, shared, before_node=unfenced, sync_runner=None, timings=[])


async def in_thread(flow: Any, params: dict[str, Any], shared: dict[str, Any]) -> Any:
    thread = RunThread()
    try:
        return await walk(flow, params, shared, before_node=unfenced, sync_runner=thread.call, timings=[])
    finally:
        thread.close()


Runner = Callable[[Any, dict[str, Any], dict[str, Any]], Awaitable[Any]]


def observed(
    run: Runner, graph: tuple[Spec, ...], of_flow: dict[str, int], params: dict[str, int]
) -> dict[str, Any]:
    """All that can be seen of one run of a fresh copy of the graph."""
    flow = AsyncFlow(start=wired(graph, "n"))
    flow.set_params(of_flow)
    LEFT.set([STEPS])
    shared: dict[str, Any] = {"trace": [], "failed": {}, "visits": {}}
    seen: dict[str, Any] = {"flow.params": flow.params}

    async def main() -> None:
        try:
            seen["action"] = await run(flow, params, shared)
        except Exception as error:
            seen["error"] = (type(error), error.args, repr(error.__cause__))
        # Now: after an error the other items of a parallel batch go on for as long as the loop turns.
        seen["shared"], seen["context"] = copy.deepcopy(shared), SEEN.get()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
    seen["warnings"] = [(w.category, str(w.message)) for w in caught]
    return seen


@pytest.mark.parametrize("ours", [inline, in_thread])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=GRAPH, of_flow=PARAMS, params=PARAMS)
def test_any_graph_runs_as_pocketflow_runs_it(
    ours: Runner, graph: tuple[Spec, ...], of_flow: dict[str, int], params: dict[str, int]
) -> None:
    expected = observed(with_pocketflow, graph, dict(of_flow), dict(params))
    assert observed(ours, graph, dict(of_flow), dict(params)) == expected


# ---- promises of its own


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The async test as one that pytest runs by itself."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class Step(AsyncNode):
    """Appends its class's name to shared["ran"] and answers `says`."""

    def __init__(self, says: str | None = None) -> None:
        super().__init__()
        self.says = says

    async def post_async(self, shared: Any, prepared: Any, result: Any) -> str | None:
        shared.setdefault("ran", []).append(type(self).__name__)
        return self.says


class SyncStep(Node):
    def post(self, shared: Any, prepared: Any, result: Any) -> None:
        shared.setdefault("threads", []).append(threading.current_thread())


class Profile(Step):
    pass


class Orders(Step):
    pass


class Check(Step):
    pass


class Review(AsyncFlow):
    async def prep_async(self, shared: Any) -> str:
        return "prepared"

    async def post_async(self, shared: Any, prepared: Any, result: Any) -> str:
        shared["review"] = (prepared, result)
        return "done"


def user_graph() -> tuple[Any, Any, Any, Any]:
    """profile -fetch_orders-> orders -> review(check), orders -again-> profile."""
    profile, orders, check = Profile("fetch_orders"), Orders(), Check("checked")
    review = Review(start=check)
    profile - "fetch_orders" >> orders >> review
    orders - "again" >> profile
    return profile, orders, review, check


async def steps_of(flow: Any, shared: dict[str, Any]) -> list[NodeStep]:
    steps: list[NodeStep] = []

    async def before_node(step: NodeStep) -> None:
        steps.append(step)

    await walk(flow, {}, shared, before_node=before_node, sync_runner=None, timings=[])
    return steps


@in_a_loop
async def test_each_step_is_announced_with_its_path_before_it_runs() -> None:
    shared: dict[str, Any] = {}
    steps = await steps_of(AsyncFlow(start=user_graph()[0]), shared)

    way = ("fetch_orders", "default")
    assert [(s.name, s.part, s.path) for s in steps] == [
        ("Profile", "node", ((),)),
        ("Orders", "node", (("fetch_orders",),)),
        ("Review", "prep", (way,)),
        ("Check", "node", (way, ())),
        ("Review", "post", (way,)),
    ]
    assert shared["review"] == ("prepared", "checked")


@in_a_loop
async def test_plain_nested_flows_own_nothing_to_announce() -> None:
    steps = await steps_of(AsyncFlow(start=Flow(start=SyncStep())), {})
    assert [(s.name, s.part, s.path) for s in steps] == [("SyncStep", "node", ((), ()))]


@in_a_loop
@pytest.mark.parametrize("name", ["_run_async", "_orch_async"])
async def test_flow_overridden_on_the_object_runs_as_one_node(name: str) -> None:
    nested = AsyncFlow(start=Profile())

    async def own(shared: Any, params: Any = None) -> str:
        return "own"

    setattr(nested, name, own)
    shared: dict[str, Any] = {}
    steps = await steps_of(AsyncFlow(start=nested), shared)
    assert [(s.name, s.path) for s in steps] == [("AsyncFlow", ((),))]
    assert "ran" not in shared


@in_a_loop
async def test_batch_flow_runs_as_one_node() -> None:
    steps = await steps_of(AsyncFlow(start=AsyncParallelBatchFlow(start=Profile())), {})
    assert [s.name for s in steps] == ["AsyncParallelBatchFlow"]


@in_a_loop
async def test_fence_that_raises_starts_no_next_node() -> None:
    class LeaseGone(Exception):
        pass

    async def before_node(step: NodeStep) -> None:
        if step.name == "Orders":
            raise LeaseGone

    shared: dict[str, Any] = {}
    with pytest.raises(LeaseGone):
        await walk(
            AsyncFlow(start=user_graph()[0]),
            {},
            shared,
            before_node=before_node,
            sync_runner=None,
            timings=[],
        )
    assert shared["ran"] == ["Profile"]


@in_a_loop
async def test_path_leads_back_to_the_node_in_another_copy_of_the_graph() -> None:
    profile, orders, review, _ = user_graph()
    assert way_to(profile, profile) == ()
    assert way_to(orders, profile) == ("fetch_orders",)
    assert way_to(review, profile) == ("fetch_orders", "default")


@in_a_loop
async def test_path_of_a_node_that_no_successor_leads_to_is_none() -> None:
    stray = Orders()

    class Detour(AsyncFlow):
        def get_next_node(self, node: Any, action: Any) -> Any:
            return stray if isinstance(node, Profile) else None

    steps = await steps_of(Detour(start=Profile()), {})
    assert [(s.name, s.path) for s in steps] == [("Profile", ((),)), ("Orders", None)]


@in_a_loop
async def test_timings_name_each_node_that_ended_also_the_one_that_raised() -> None:
    class Broken(AsyncNode):
        async def exec_async(self, _: Any) -> None:
            raise ValueError("no such user")

    profile = Profile()
    profile >> Broken()
    timings: Timings = []
    with pytest.raises(ValueError, match="no such user"):
        await walk(AsyncFlow(start=profile), {}, {}, before_node=unfenced, sync_runner=None, timings=timings)
    assert [name for name, _ in timings] == ["Profile", "Broken"]
    assert all(seconds >= 0 for _, seconds in timings)


@in_a_loop
async def test_runs_at_the_same_time_share_no_params() -> None:
    class Slow(AsyncNode):
        async def exec_async(self, _: Any) -> None:
            await asyncio.sleep(0.001)

        async def post_async(self, shared: Any, prepared: Any, result: Any) -> None:
            shared.setdefault("params", []).append(dict(self.params))

    start, second = Slow(), Slow()
    start >> second
    flow = AsyncFlow(start=start)
    flow.set_params({"tenant": "t", "user": 0})
    stores: list[dict[str, Any]] = [{} for _ in range(20)]

    await asyncio.gather(*(inline(flow, {"user": i}, store) for i, store in enumerate(stores)))

    assert [s["params"] for s in stores] == [[{"tenant": "t", "user": i}] * 2 for i in range(20)]
    assert start.params == second.params == {}
    assert flow.params == {"tenant": "t", "user": 0}


@in_a_loop
async def test_sync_parts_of_one_run_share_one_thread_that_is_not_the_loops() -> None:
    class Outer(Flow):
        def prep(self, shared: Any) -> None:
            shared["threads"].append(threading.current_thread())

        def post(self, shared: Any, prepared: Any, result: Any) -> None:
            shared["threads"].append(threading.current_thread())

    start = SyncStep()
    start >> Step() >> Outer(start=SyncStep())
    shared: dict[str, Any] = {}
    await in_thread(AsyncFlow(start=start), {}, shared)
    assert len(shared["threads"]) == 4
    assert len(set(shared["threads"])) == 1
    assert shared["threads"][0] is not threading.current_thread()


@in_a_loop
async def test_flow_without_a_start_node_ends_at_once() -> None:
    assert await inline(AsyncFlow(), {}, {}) is None


class Plain(AsyncNode):
    pass


class CopiesItself(AsyncNode):
    def __copy__(self) -> CopiesItself:
        fresh = CopiesItself()
        fresh.__dict__.update(self.__dict__, mark="copied by itself")
        return fresh


class LeavesOut(AsyncNode):
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "client"}


class Slotted(AsyncNode):
    __slots__ = ("client",)


class Reduced(AsyncNode):
    def __reduce__(self) -> tuple[Any, ...]:
        return Reduced, (), {"client": "reduced"}


@pytest.mark.parametrize("kind", [Plain, CopiesItself, LeavesOut, Slotted, Reduced])
def test_a_node_is_copied_as_pocketflow_copies_it(kind: type[AsyncNode]) -> None:
    def seen(node: Any) -> Any:
        return type(node), node.__dict__, getattr(node, "client", None)

    node: Any = kind()
    node.client = ["open"]
    fresh, expected = copied(node), copy.copy(node)
    assert fresh is not node
    assert seen(fresh) == seen(expected)
    assert getattr(fresh, "client", None) is getattr(expected, "client", None) or kind is Reduced
