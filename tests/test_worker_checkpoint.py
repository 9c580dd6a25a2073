"""A run that is stopped before each of its nodes and goes on in another copy of the graph ends like any other."""

# PocketFlow's stub calls its classes generic, which they are not at run time.
# mypy: disable-error-code="type-arg, var-annotated, arg-type"

from __future__ import annotations

import asyncio
import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from pocketflow import AsyncFlow, AsyncNode, Node

from pocketfleet import ThrottledAsyncParallelBatchFlow
from tests.test_worker_walk import GRAPH, LEFT, PARAMS, Spec, observed, wired, with_pocketflow
from worker.checkpoint import CannotSave, Checkpoint, Saver, encode_checkpoint, read_checkpoint
from worker.clock import Clock
from worker.registry import ServedFlow
from worker.walk import NodeStep, walk


def saver_of(flow: Any) -> Saver:
    values = {"checkpoint": True, "local_keys": (), "save_entry": lambda key, value: NotImplemented}
    for name, value in values.items():
        if not hasattr(flow, name):
            setattr(flow, name, value)
    return Saver(SimpleNamespace(flow=flow, name="f"))  # type: ignore[arg-type]


class Stopped(BaseException):
    """A worker left; the run's checkpoint as bytes."""

    def __init__(self, saved: bytes) -> None:
        super().__init__()
        self.saved = saved


async def leg(
    flow: Any, params: dict[str, Any], base: dict[str, Any], saved: bytes
) -> tuple[Any, dict[str, Any]]:
    """On from `saved`, in one worker, until the first node after it that can be stopped at."""
    saver, shared, start, first = saver_of(flow), copy.deepcopy(base), None, True
    if saved:
        kept = read_checkpoint(saved)
        assert kept is not None
        start = saver.start_of(kept)
        assert start is not None
        saver.restore(shared, kept)
        params = params if kept.params is None else kept.params

    async def stop(step: NodeStep) -> None:
        nonlocal first
        if not first:
            try:
                written = saver.written(step, base, shared, params if saved == b"" else None)
            except CannotSave:
                return
            raise Stopped(encode_checkpoint(written))
        first = False

    return await walk(
        flow, params, shared, before_node=stop, sync_runner=None, timings=[], start=start
    ), shared


def plain(value: Any) -> Any:
    """With lists for tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(graph=GRAPH, of_flow=PARAMS, params=PARAMS)
def test_any_run_that_is_stopped_before_each_node_ends_like_one_that_is_not(
    graph: tuple[Spec, ...], of_flow: dict[str, int], params: dict[str, int]
) -> None:
    legs = 0

    async def with_stops(flow: Any, given: dict[str, Any], shared: dict[str, Any]) -> Any:
        nonlocal legs
        saved, base = b"", copy.deepcopy(shared)
        while True:
            LEFT.set([10_000])
            fresh = AsyncFlow(start=wired(graph, "n"))
            fresh.set_params(dict(of_flow))
            legs += 1
            try:
                action, shared_then = await leg(fresh, dict(given), base, saved)
            except Stopped as stopped:
                saved = stopped.saved
                continue
            shared.update(shared_then)
            return action

    expected = observed(with_pocketflow, graph, dict(of_flow), dict(params))
    assume("error" not in expected)  # the store of a run that failed is not handed on here
    expected.pop("flow.params")
    found = observed(with_stops, graph, dict(of_flow), dict(params))
    found.pop("flow.params")
    assert plain(found) == plain(expected)


class One(Node):
    pass


class Other(AsyncNode):
    pass


def line(*nodes: Any) -> Any:
    for node, after in itertools.pairwise(nodes):
        node >> after
    return nodes[0]


def flow_of(*nodes: Any, **values: Any) -> ThrottledAsyncParallelBatchFlow:
    return ThrottledAsyncParallelBatchFlow(start=line(*nodes), **values)


def saver(flow: ThrottledAsyncParallelBatchFlow) -> Saver:
    return Saver(ServedFlow("m:f", "m:f", flow.fleet_limits("f", 15.0), flow))


def step_to(flow: Any, node: Any, params: dict[str, Any] | None = None) -> NodeStep:
    node = copy.copy(node)
    node.set_params({} if params is None else params)
    return NodeStep(node, flow.start_node.successors["default"], flow, None)


def test_only_flows_of_more_than_one_node_are_saved_and_only_if_they_want_it() -> None:
    nested = AsyncFlow(start=line(One(), One()))
    assert not saver(flow_of(One())).saves
    assert saver(flow_of(One(), One())).saves
    assert saver(flow_of(nested)).saves
    assert not saver(flow_of(One(), One(), checkpoint=False)).saves


@pytest.mark.parametrize(
    "changed",
    [(Other(), One()), (One(), One(), One()), (One(),), (One(), AsyncFlow(start=One())), (One(), Other())],
)
def test_any_change_of_the_graph_is_noticed(changed: tuple[Any, ...]) -> None:
    before = saver(flow_of(One(), One()))
    same = saver(flow_of(One(), One()))
    kept = Checkpoint((("default",),), graph=before.graph)
    assert same.start_of(kept) is not None
    assert saver(flow_of(*changed)).start_of(kept) is None


def test_an_action_that_leads_elsewhere_is_noticed_too() -> None:
    flows = [flow_of(One(), One()) for _ in range(2)]
    first = flows[1].start_node
    first.next(first.successors["default"], "again")
    assert saver(flows[0]).graph != saver(flows[1]).graph


def test_params_changed_in_place_are_saved_and_the_flows_own_need_not_travel() -> None:
    flow = flow_of(One(), One())
    flow.set_params({"client": object()})
    params = {**flow.params, "n": [1]}
    step = step_to(flow, flow.start_node, params)
    assert saver(flow).written(step, {}, {}, {"n": [1]}).params is None
    params["n"].append(2)
    assert saver(flow).written(step, {}, {}, {"n": [1]}).params == {"n": [1, 2]}
    params["new"] = object()
    with pytest.raises(CannotSave, match="params cannot travel"):
        saver(flow).written(step, {}, {}, {"n": [1]})


def test_local_keys_stay_out_of_checkpoints() -> None:
    flow = flow_of(One(), One(), local_keys=["client"])
    kept = saver(flow).written(step_to(flow, flow.start_node), {}, {"client": object(), "a": 1}, {})
    assert kept.difference == {"=": {"a": 1}}
    bare = flow_of(One(), One())
    with pytest.raises(CannotSave, match="'client' in the shared store cannot travel"):
        saver(bare).written(step_to(bare, bare.start_node), {}, {"client": object(), "a": 1}, {})


def test_what_is_no_checkpoint_is_none() -> None:
    assert read_checkpoint(b"\xc1") is None
    assert read_checkpoint(b"garbage") is None


def test_the_clock_counts_only_between_start_and_stop() -> None:
    async def main() -> tuple[bool, bool]:
        clock = Clock(0.8, asyncio.current_task())
        for _ in range(4):
            clock.start()
            await asyncio.sleep(0.01)
            clock.stop()
            await asyncio.sleep(0.3)
        early = clock.ran_out
        clock.start()
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            pass
        return early, clock.ran_out

    assert asyncio.run(main()) == (False, True)
