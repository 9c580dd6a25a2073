"""A refused node ends at once: no retry, no fallback, and batch items that returned are remembered."""

# mypy: disable-error-code="type-arg, override"

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from pocketflow import (
    AsyncBatchFlow,
    AsyncBatchNode,
    AsyncNode,
    AsyncParallelBatchNode,
    BatchFlow,
    BatchNode,
    Node,
)

from limiter.refusal import RateLimitHit, recognised
from worker.codec import decode, encode
from worker.guard import Refused, digest_of, guard
from worker.threads import RunThread

Shared = dict[str, Any]
PARTS = ["prep", "exec", "exec_fallback", "post"]


def guarded(node: Any, **resumed: Any) -> Any:
    """A copy as the worker makes it."""
    node = copy.copy(node)
    node.set_params({})
    guard(node, recognise=recognised, **resumed)
    return node


def run(node: Any, shared: Shared | None = None) -> Any:
    store: Shared = {} if shared is None else shared
    if not isinstance(node, AsyncNode):
        return node._run(store)

    async def main() -> Any:
        before = asyncio.all_tasks()
        try:
            return await node._run_async(store)
        finally:
            assert asyncio.all_tasks() == before, "a sibling is still running"

    return asyncio.run(asyncio.wait_for(main(), 10))


def refused(node: Any, shared: Shared | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        run(node, shared)
    return caught.value


class Script:
    """What a node's parts do: raise what is listed for them, else what PocketFlow's would do."""

    def __init__(self, **raises: BaseException) -> None:
        super().__init__(max_retries=3, wait=0)  # type: ignore[call-arg]
        self.raises = raises
        self.seen: list[str] = []

    def said(self, part: str) -> None:
        self.seen.append(part)
        if part in self.raises:
            raise self.raises[part]


class SyncNode(Script, Node):
    def prep(self, shared: Shared) -> Any:
        self.said("prep")

    def exec(self, prep_res: Any) -> Any:
        self.said("exec")
        return "result"

    def exec_fallback(self, prep_res: Any, exc: Exception) -> Any:
        self.said("exec_fallback")
        return "fallback"

    def post(self, shared: Shared, prep_res: Any, exec_res: Any) -> Any:
        self.said("post")
        return exec_res


class AwaitingNode(Script, AsyncNode):
    async def prep_async(self, shared: Shared) -> Any:
        self.said("prep")

    async def exec_async(self, prep_res: Any) -> Any:
        self.said("exec")
        return "result"

    async def exec_fallback_async(self, prep_res: Any, exc: Exception) -> Any:
        self.said("exec_fallback")
        return "fallback"

    async def post_async(self, shared: Shared, prep_res: Any, exec_res: Any) -> Any:
        self.said("post")
        return exec_res


KINDS = [SyncNode, AwaitingNode]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_refusal_in_any_part_leaves_the_node(kind: Any, part: str) -> None:
    hit = RateLimitHit("slow down", retry_after=2)
    raises: dict[str, Exception] = {part: hit}
    if part == "exec_fallback":
        raises["exec"] = ValueError("bad")
    node = kind(**raises)
    error = refused(guarded(node))
    assert error.hit is hit
    assert (error.returned, error.items_digest) == ({}, None)
    assert node.seen.count(part) == 1
    assert node.seen[-1] == part
    assert str(error) == "slow down"


@pytest.mark.parametrize("kind", KINDS)
def test_other_errors_are_retried_and_fall_back_as_ever(kind: Any) -> None:
    node = kind(exec=ValueError("bad"))
    assert run(guarded(node)) == "fallback"
    assert node.seen == ["prep", *["exec"] * 3, "exec_fallback", "post"]
    with pytest.raises(ValueError, match="worse"):
        run(guarded(kind(exec=ValueError("bad"), exec_fallback=ValueError("worse"))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_passes_through(kind: Any, error: type[BaseException]) -> None:
    with pytest.raises(error):
        run(guarded(kind(exec=error())))


@pytest.mark.parametrize("kind", KINDS)
def test_refusal_behind_another_error_counts(kind: Any) -> None:
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = RateLimitHit(retry_after=1)
    node = kind(exec=wrapped)
    assert refused(guarded(node)).hit.retry_after == 1
    assert node.seen == ["prep", "exec"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_copy_is_touched_and_only_until_it_ran(kind: Any) -> None:
    node = kind()
    before = set(vars(node))
    with_guard = guarded(node)
    assert set(vars(node)) == before < set(vars(with_guard))
    assert run(with_guard) == "result"
    assert set(vars(with_guard)) - {"cur_retry"} == before


@pytest.mark.parametrize("kind", KINDS)
def test_copy_that_ran_is_freed_without_the_garbage_collector(kind: Any) -> None:
    node = guarded(kind())
    run(node)
    gone = weakref.ref(node)
    gc.disable()
    try:
        del node
        assert gone() is None
    finally:
        gc.enable()


class FansOut(AsyncNode):
    async def exec_async(self, given: Any) -> Any:
        if given is not None:
            return self.params["n"]
        copies = [copy.copy(self), copy.copy(self), copy.deepcopy(self)]
        for number, each in enumerate(copies):
            each.set_params({"n": number})
        return await asyncio.gather(*(each.exec_async("an item") for each in copies))

    async def post_async(self, shared: Shared, prep_res: Any, exec_res: Any) -> Any:
        return exec_res


def test_copy_that_a_node_makes_of_itself_calls_its_own_methods() -> None:
    assert run(guarded(FansOut())) == [0, 1, 2]


class PicklesItself(AwaitingNode):
    async def exec_async(self, prep_res: Any) -> Any:
        there = pickle.loads(pickle.dumps(self))
        return await there.work()

    async def work(self) -> Any:
        return await AwaitingNode.exec_async(self, None), type(self).__name__


def test_node_that_pickles_itself_arrives_unguarded() -> None:
    assert run(guarded(PicklesItself())) == ("result", "PicklesItself")
    node = guarded(SyncNode())
    again = pickle.loads(pickle.dumps(node))
    assert run(again) == "result"
    assert node.seen == []


class Again:
    def prep(self, shared: Shared) -> list[int]:
        return [1, 2]

    def post(self, shared: Shared, prep_res: Any, exec_res: Any) -> Any:
        shared["times"] = shared.get("times", 0) + 1
        return self.run(shared) if shared["times"] < 3 else "enough"  # type: ignore[attr-defined]


class AgainAsync:
    async def prep_async(self, shared: Shared) -> list[int]:
        return [1, 2]

    async def post_async(self, shared: Shared, prep_res: Any, exec_res: Any) -> Any:
        shared["times"] = shared.get("times", 0) + 1
        return await self.run_async(shared) if shared["times"] < 3 else "enough"  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Node, BatchNode, AsyncNode, AsyncBatchNode, AsyncParallelBatchNode])
def test_node_may_run_itself_again(kind: Any) -> None:
    node = type("Self", (AgainAsync if issubclass(kind, AsyncNode) else Again, kind), {})()
    shared: Shared = {}
    assert run(guarded(node), shared) == "enough"
    assert shared == {"times": 3}


def test_refusal_leaves_the_thread_of_a_run_as_it_is() -> None:
    async def main() -> None:
        thread = RunThread()
        try:
            with pytest.raises(Refused, match="slow down"):
                await thread.call(guarded(SyncNode(exec=RateLimitHit("slow down")))._run, {})
            assert await thread.call(threading.current_thread) is not threading.main_thread()
        finally:
            await thread.wait_ended()

    asyncio.run(main())


# Batch nodes. Each item is a script: a value to return, or an exception to raise.


class Batch(Script):
    """Calls are noted; an item is [number, result], and the numbers in `refuse` are refused."""

    def __init__(self, *results: Any, refuse: tuple[int, ...] = (), **raises: BaseException) -> None:
        super().__init__(**raises)
        self.results = results
        self.refuse = refuse
        self.called: list[int] = []

    def given(self, shared: Shared) -> Any:
        self.said("prep")
        return [[number, result] for number, result in enumerate(self.results)]

    def called_with(self, item: Any) -> Any:
        number, result = item
        self.called.append(number)
        if number in self.refuse:
            raise RateLimitHit(f"item {number}", retry_after=number)
        if result == "bad":
            raise ValueError("bad")
        return result

    def posted(self, shared: Shared, exec_res: Any) -> None:
        self.said("post")
        shared["results"] = exec_res


class SyncBatch(Batch, BatchNode):
    def prep(self, shared: Shared) -> Any:
        return self.given(shared)

    def exec(self, prep_res: Any) -> Any:
        return self.called_with(prep_res)

    def exec_fallback(self, prep_res: Any, exc: Exception) -> Any:
        self.said("exec_fallback")
        return "fallback"

    def post(self, shared: Shared, prep_res: Any, exec_res: Any) -> Any:
        self.posted(shared, exec_res)


class AwaitingBatch(Batch):
    async def prep_async(self, shared: Shared) -> Any:
        return self.given(shared)

    async def exec_async(self, prep_res: Any) -> Any:
        await asyncio.sleep(0)
        return self.called_with(prep_res)

    async def exec_fallback_async(self, prep_res: Any, exc: Exception) -> Any:
        self.said("exec_fallback")
        return "fallback"

    async def post_async(self, shared: Shared, prep_res: Any, exec_res: Any) -> Any:
        self.posted(shared, exec_res)


class InTurn(AwaitingBatch, AsyncBatchNode): ...


class Parallel(AwaitingBatch, AsyncParallelBatchNode): ...


BATCHES = [SyncBatch, InTurn, Parallel]


@pytest.mark.parametrize("kind", BATCHES)
def test_batch_without_a_refusal_is_as_ever(kind: Any) -> None:
    node, shared = kind("a", "bad", "c"), Shared()
    copied = guarded(node)
    run(copied, shared)
    assert shared["results"] == ["a", "fallback", "c"]
    assert sorted(node.called) == [0, 1, 1, 1, 2]
    assert set(vars(copied)) - {"cur_retry"} == set(vars(node))


@pytest.mark.parametrize("kind", BATCHES)
def test_items_that_returned_are_remembered_and_not_called_again(kind: Any) -> None:
    node = kind("a", "bad", "c", "d", refuse=(3,))
    error = refused(guarded(node))
    assert error.hit.retry_after == 3
    assert error.returned == {0: "a", 2: "c"} | ({} if kind is Parallel else {1: "fallback"})

    again, shared = kind("a", "bad", "c", "d"), Shared()
    travelled = decode(encode(error.returned))
    run(guarded(again, returned=travelled, items_digest=error.items_digest), shared)
    assert shared["results"] == ["a", "fallback", "c", "d"]
    assert set(again.called) == ({1, 3} if kind is Parallel else {3})


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("part", ["prep", "post"])
def test_results_survive_a_refusal_before_or_after_the_items(kind: Any, part: str) -> None:
    known: dict[str, Any] = {"returned": {0: "known"}, "items_digest": digest_of([[0, "a"], [1, "b"]])}
    error = refused(guarded(kind("a", "b", **{part: RateLimitHit()}), **known))
    assert error.returned == {0: "known"} | ({1: "b"} if part == "post" else {})
    assert error.items_digest == known["items_digest"]


@pytest.mark.parametrize("kind", BATCHES)
def test_results_of_another_list_are_not_used(kind: Any) -> None:
    node, shared = kind("a", "b"), Shared()
    run(guarded(node, returned={0: "old"}, items_digest=digest_of([[0, "x"], [1, "b"]])), shared)
    assert (shared["results"], sorted(node.called)) == (["a", "b"], [0, 1])
    run(guarded(node, returned={0: "old"}), shared)
    assert shared["results"] == ["a", "b"]


@pytest.mark.parametrize("kind", BATCHES)
def test_refusal_in_a_fallback_ends_the_batch(kind: Any) -> None:
    node = kind("a", "bad", "c", exec_fallback=RateLimitHit("in the fallback"))
    error = refused(guarded(node))
    assert str(error) == "in the fallback"
    assert error.returned == {0: "a"} | ({2: "c"} if kind is Parallel else {})
    assert "post" not in node.seen


@pytest.mark.parametrize("kind", BATCHES)
def test_results_that_cannot_travel_are_left_out(kind: Any) -> None:
    error = refused(guarded(kind({1, 2}, (1, 2), "c", refuse=(2,))))
    assert error.returned == {1: (1, 2)}
    assert error.items_digest is None  # the items hold the set too


class Iterating(InTurn):
    async def prep_async(self, shared: Shared) -> Any:
        def items() -> Iterator[Any]:
            for item in [[0, "a"], [1, "b"]]:
                self.seen.append(f"made {item[0]}")
                yield item

        return items()


def test_items_of_an_iterator_are_taken_one_by_one_and_not_remembered() -> None:
    node = Iterating(refuse=(0,))
    error = refused(guarded(node))
    assert (node.seen, error.returned) == (["made 0"], {})
    assert refused(guarded(Iterating(refuse=(1,)))).returned == {}


class Equal(Parallel):
    """All items are one and the same object, and they end in the opposite order."""

    async def prep_async(self, shared: Shared) -> Any:
        return ["same"] * 4

    async def exec_async(self, prep_res: Any) -> Any:
        self.called.append(0)
        number = len(self.called)
        await asyncio.sleep(0.02 / number)
        if number in self.refuse:
            raise RateLimitHit
        return number


def test_equal_items_have_a_result_each() -> None:
    error = refused(guarded(Equal(refuse=(1,))))
    assert error.returned == {1: 2, 2: 3, 3: 4}
    shared = Shared()
    run(guarded(Equal(), returned=error.returned, items_digest=error.items_digest), shared)
    assert sorted(shared["results"]) == [1, 2, 3, 4]


class Slow(Parallel):
    """Items that run, that wait between two tries, and one that is refused at once."""

    def __init__(self) -> None:
        super().__init__()
        self.wait = 5
        self.cancelled, self.may_end = asyncio.Event(), asyncio.Event()
        self.ended: list[str] = []

    async def prep_async(self, shared: Shared) -> Any:
        return ["done", "runs", "tries again", "refused", "not begun"]

    async def exec_async(self, prep_res: Any) -> Any:
        self.said(prep_res)
        if prep_res == "done":
            return "result"
        if prep_res == "tries again":
            raise ValueError
        if prep_res == "refused":
            raise RateLimitHit
        try:
            await asyncio.sleep(5)
        finally:
            self.cancelled.set()
            await self.may_end.wait()  # closing its connection
            self.ended.append(prep_res)


def test_siblings_of_a_refused_item_are_cancelled_and_awaited() -> None:
    async def main() -> None:
        node, before = Slow(), asyncio.all_tasks()
        task = asyncio.ensure_future(guarded(node)._run_async({}))
        await node.cancelled.wait()
        await asyncio.sleep(0.02)
        assert not task.done()
        node.may_end.set()
        with pytest.raises(Refused) as caught:
            await task
        assert node.seen == ["done", "runs", "tries again", "refused"]
        assert node.ended == ["runs"]
        assert caught.value.returned == {0: "result"}
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(main(), 4))


def test_run_that_is_cancelled_while_its_siblings_end_is_cancelled_when_they_have() -> None:
    async def main() -> None:
        node = Slow()
        task = asyncio.ensure_future(guarded(node)._run_async({}))
        await node.cancelled.wait()
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
        node.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert node.ended == ["runs"]

    asyncio.run(asyncio.wait_for(main(), 4))


class Stubborn(Parallel):
    """Item 1 turns its cancellation into an error, item 2 into a result, item 3 is refused meanwhile."""

    async def exec_async(self, prep_res: Any) -> Any:
        number = prep_res[0]
        self.called.append(number)
        if number == 0:
            await asyncio.sleep(0.01)
            raise RateLimitHit(retry_after=1)
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            if number == 1:
                raise ValueError from None
            if number == 2:
                return "late"
            raise RateLimitHit(retry_after=30) from None


def test_siblings_that_resist_call_no_more_and_what_they_say_counts() -> None:
    node = Stubborn("a", "b", "c", "d")
    error = refused(guarded(node))
    assert sorted(node.called) == [0, 1, 2, 3]
    assert error.hit.retry_after == 30
    assert error.returned == {2: "late"}


def test_cancelled_batch_is_no_refusal() -> None:
    async def main() -> None:
        node = InTurn("a")
        task = asyncio.ensure_future(guarded(node)._run_async({}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


class Collecting(Parallel):
    """Gathers exceptions as results, behind a gate of its own, as users' subclasses do."""

    async def _exec(self, items: Any) -> Any:
        gate = asyncio.Semaphore(1)

        async def one(item: Any) -> Any:
            async with gate:
                return await AsyncNode._exec(self, item)

        return await asyncio.gather(*map(one, reversed(items)), return_exceptions=True)


def test_refusal_is_not_lost_among_gathered_exceptions() -> None:
    node = Collecting("a", "b", "c", refuse=(1,))
    error = refused(guarded(node))
    assert (node.called, error.returned) == ([2, 1], {2: "c"})
    assert "post" not in node.seen


class Grouping(Parallel):
    async def _exec(self, items: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(AsyncNode._exec(self, item)) for item in items]
        return [task.result() for task in tasks]


class GroupingNode(AwaitingNode):
    async def _exec(self, prep_res: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            return await group.create_task(super()._exec(prep_res))


def test_refusal_is_found_in_the_group_of_a_users_task_group() -> None:
    assert refused(guarded(Grouping("a", "b", refuse=(1,)))).hit.retry_after == 1
    assert str(refused(guarded(GroupingNode(exec=RateLimitHit("grouped"))))) == "grouped"


@pytest.mark.parametrize("kind", [SyncNode, SyncBatch])
def test_flow_that_runs_as_one_node_is_refused_when_a_refusal_leaves_it(kind: Any) -> None:
    inner = kind(exec=RateLimitHit("deep")) if kind is SyncNode else kind("a", refuse=(0,))
    inner.raises["exec_fallback"] = RateLimitHit("deep")

    class Inner(BatchFlow):
        def prep(self, shared: Shared) -> Any:
            return [{}]

    error = refused(guarded(Inner(start=inner)))
    assert str(error) == "deep"


def test_async_flow_that_runs_as_one_node_is_refused_in_either_way_to_run_it() -> None:
    class Inner(AsyncBatchFlow):
        async def prep_async(self, shared: Shared) -> Any:
            return [{}]

        def prep(self, shared: Shared) -> Any:
            return [{}]

    inner = SyncNode(exec=ValueError("bad"), exec_fallback=RateLimitHit("deep"))
    assert str(refused(guarded(Inner(start=inner)))) == "deep"
    with pytest.raises(Refused, match="deep"):
        guarded(Inner(start=inner))._run({})


def test_refused_can_be_pickled() -> None:
    error = Refused(RateLimitHit("slow down", 2), {0: "a"}, b"digest")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.hit.retry_after, again.returned) == ("slow down", 2, {0: "a"})
    assert again.items_digest == b"digest"


def time_of(node: Any, *, with_guard: bool) -> float:
    async def main() -> float:
        began = time.perf_counter()
        for _ in range(500):
            one = copy.copy(node)
            if with_guard:
                guard(one, recognise=recognised)
            await one._run_async({})
        return time.perf_counter() - began

    return asyncio.run(main())


def test_guard_costs_little_where_nothing_is_refused() -> None:
    """About 1.5 us, which is half of what copying and running an empty node costs."""
    node: Any = AsyncNode()
    assert min(time_of(node, with_guard=True) / time_of(node, with_guard=False) for _ in range(10)) < 2
