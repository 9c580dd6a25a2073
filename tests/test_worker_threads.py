"""The thread of one run: what it keeps from call to call, and how it ends."""

from __future__ import annotations

import asyncio
import functools
import gc
import sqlite3
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar, Token
from typing import Any

import pytest

from worker.threads import RunThread, carry

USER: ContextVar[str] = ContextVar("USER")


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The async test as one that pytest runs by itself."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@asynccontextmanager
async def run_thread() -> AsyncIterator[RunThread]:
    thread = RunThread("run b1:7")
    try:
        yield thread
    finally:
        await asyncio.wait_for(thread.wait_ended(), 5)


def raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@in_a_loop
async def test_calls_share_one_named_daemon_thread() -> None:
    async with run_thread() as thread:
        first = await thread.call(threading.current_thread)
        second = await thread.call(threading.current_thread)
    assert first is second is not threading.current_thread()
    assert (first.name, first.daemon) == ("run b1:7", True)


@in_a_loop
async def test_thread_that_is_never_called_is_never_started() -> None:
    before = threading.active_count()
    async with run_thread() as thread:
        assert threading.active_count() == before
        assert not thread.busy


@in_a_loop
async def test_thread_ends_with_its_run() -> None:
    async with run_thread() as thread:
        its_thread = await thread.call(threading.current_thread)
    its_thread.join(5)
    assert not its_thread.is_alive()


@in_a_loop
async def test_thread_locals_and_a_sqlite_connection_work_from_call_to_call() -> None:
    local = threading.local()

    def open_it() -> sqlite3.Connection:
        local.open = sqlite3.connect(":memory:")
        return local.open  # type: ignore[no-any-return]

    def use_and_close_it() -> int:
        found: int = local.open.execute("select 7").fetchone()[0]
        local.open.close()
        return found

    async with run_thread() as thread:
        await thread.call(open_it)
        assert await thread.call(use_and_close_it) == 7


@in_a_loop
async def test_context_variables_travel_both_ways() -> None:
    async with run_thread() as thread:
        USER.set("task")
        assert await thread.call(USER.get) == "task"
        await thread.call(USER.set, "thread")
        assert USER.get() == "thread"
        USER.set("task again")
        assert await thread.call(USER.get) == "task again"


@in_a_loop
async def test_variable_set_by_a_call_that_raised_is_kept() -> None:
    def set_and_fail() -> None:
        USER.set("before the error")
        raise ValueError

    async with run_thread() as thread:
        with pytest.raises(ValueError):
            await thread.call(set_and_fail)
        assert USER.get() == "before the error"


@in_a_loop
async def test_token_of_one_call_is_reset_by_a_later_one_and_unset_in_the_task() -> None:
    async with run_thread() as thread:
        token: Token[str] = await thread.call(USER.set, "inside")
        assert USER.get() == "inside"
        await thread.call(USER.reset, token)
        assert USER.get(None) is None
        assert await thread.call(USER.get, None) is None


@in_a_loop
async def test_variable_reset_in_the_task_is_unset_in_the_thread() -> None:
    async with run_thread() as thread:
        token = USER.set("inside")
        assert await thread.call(USER.get) == "inside"
        USER.reset(token)
        assert await thread.call(USER.get, None) is None


@in_a_loop
async def test_runs_do_not_see_each_others_variables() -> None:
    async def run(name: str) -> str:
        async with run_thread() as thread:
            await thread.call(USER.set, name)
            await asyncio.sleep(0)
            return str(await thread.call(USER.get))

    assert await asyncio.gather(*map(run, "abcde")) == list("abcde")


def test_carry_leaves_variables_the_source_never_had() -> None:
    def main() -> None:
        USER.set("mine")
        carry(Context(), {})
        assert USER.get() == "mine"

    Context().run(main)


@in_a_loop
@pytest.mark.parametrize(
    "error",
    [ValueError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()],
    ids=lambda e: type(e).__name__,
)
async def test_what_a_call_raises_arrives_and_the_thread_lives_on(error: BaseException) -> None:
    async with run_thread() as thread:
        with pytest.raises(type(error)) as caught:
            await thread.call(raiser(error))
        assert caught.value is error
        assert await thread.call(lambda: "alive") == "alive"


@in_a_loop
async def test_stop_iteration_arrives_as_runtime_error() -> None:
    async with run_thread() as thread:
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await asyncio.wait_for(thread.call(next, iter(())), 5)
        assert isinstance(caught.value.__cause__, StopIteration)


@in_a_loop
async def test_cancelled_call_raises_at_once_and_the_thread_stays_busy_until_it_ends() -> None:
    began, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow() -> None:
        USER.set("too late")
        loop.call_soon_threadsafe(began.set)
        go_on.wait(5)
        raise ValueError("nobody hears this")

    thread = RunThread()
    task = asyncio.create_task(thread.call(slow))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)

    assert thread.busy
    waiting = asyncio.create_task(thread.wait_ended())
    await asyncio.sleep(0.01)
    assert not waiting.done()

    go_on.set()
    await asyncio.wait_for(waiting, 5)
    assert not thread.busy
    assert USER.get(None) is None


@in_a_loop
async def test_thread_is_busy_until_its_task_has_taken_what_the_call_returned() -> None:
    """Whoever asks in between, to hand the run back, must not have the node run again elsewhere."""
    ended = threading.Event()
    async with run_thread() as thread:
        task = asyncio.create_task(thread.call(ended.set))
        await asyncio.sleep(0)
        assert ended.wait(5)
        time.sleep(0.05)  # noqa: ASYNC251 - the thread is through, and the loop has heard nothing yet
        assert thread.busy
        await task
        assert not thread.busy


@in_a_loop
async def test_call_cancelled_before_the_thread_took_it_never_runs() -> None:
    ran: list[int] = []
    go_on = threading.Event()
    async with run_thread() as thread:
        first = asyncio.create_task(thread.call(go_on.wait, 5))
        second = asyncio.create_task(thread.call(ran.append, 1))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert await first
    assert ran == []
    assert not thread.busy


@in_a_loop
async def test_cancelled_wait_can_be_asked_again() -> None:
    go_on = threading.Event()
    thread = RunThread()
    call = asyncio.create_task(thread.call(go_on.wait, 5))
    await asyncio.sleep(0.01)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(thread.wait_ended(), 0.01)
    go_on.set()
    await asyncio.wait_for(thread.wait_ended(), 5)
    assert await call


@in_a_loop
async def test_closed_thread_takes_no_call() -> None:
    thread = RunThread("run b1:7")
    thread.close()
    with pytest.raises(RuntimeError, match="'run b1:7' is closed"):
        await thread.call(print)


def test_call_that_outlives_the_loop_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    go_on = threading.Event()
    thread = RunThread()
    threads: list[threading.Thread] = []

    async def main() -> None:
        began = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow() -> None:
            threads.append(threading.current_thread())
            loop.call_soon_threadsafe(began.set)
            go_on.wait(5)
            raise ValueError("nobody hears this")

        call = asyncio.create_task(thread.call(slow))
        await began.wait()
        call.cancel()

    asyncio.run(main())
    thread.close()
    go_on.set()
    threads[0].join(5)
    assert not threads[0].is_alive()
    assert not thread.busy
    gc.collect()
    assert capfd.readouterr() == ("", "")


@in_a_loop
async def test_waiting_thread_keeps_nothing_of_the_last_call_alive() -> None:
    class Store(dict[str, Any]):
        pass

    async with run_thread() as thread:
        store = Store()
        gone = weakref.ref(store)
        await thread.call(len, store)
        del store
        await thread.call(len, ())
        assert gone() is None


@in_a_loop
async def test_hundred_runs_have_hundred_threads_at_once() -> None:
    at_once = threading.Barrier(100)

    async def run() -> None:
        async with run_thread() as thread:
            await thread.call(at_once.wait, 10)

    await asyncio.gather(*(run() for _ in range(100)))
