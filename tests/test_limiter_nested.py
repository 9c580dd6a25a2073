"""`limit()` inside other limits, in child tasks and in threads: what is refused, who learns, who is let go."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from limiter import background, circle
from limiter import limit as limit_module
from limiter.current import current_process
from limiter.errors import AdmissionTimeout, HeldAlready, LeaseLost, LimitsError, WaitCircle
from limiter.keys import GateKeys
from limiter.limit import limit
from limiter.refusal import RateLimitHit
from tests import fleet
from tests.fleet import until
from tests.test_limiter_permit import Crowd, brief, heard, held_elsewhere, in_use, pump_of, server

__all__ = ["brief", "server"]


@pytest.fixture(autouse=True)
def _no_loop_outlives_its_server(server: redis.Redis) -> Iterator[None]:
    yield
    background.end()


# what a run holds already ------------------------------------------------------------------------


def test_a_gate_that_is_held_is_refused_at_once_to_its_holder_and_its_children(server: redis.Redis) -> None:
    async def take() -> None:
        async with limit("api", max_concurrent=5):
            pass

    def take_in_thread() -> None:
        with limit("api", max_concurrent=5):
            pass

    async def main() -> None:
        async with limit("api", max_concurrent=5):
            for inner in (take(), asyncio.create_task(take()), asyncio.to_thread(take_in_thread)):
                with pytest.raises(HeldAlready, match="this run holds 'api' already") as refused:
                    await inner
                assert refused.value.limit == "api"
            with pytest.raises(HeldAlready):
                async with limit("other", "api"):
                    pass
            async with limit("other", max_concurrent=1):
                assert in_use(server, "api") == in_use(server, "other") == 1
        await asyncio.gather(take(), take())  # siblings may, each once
        await take()

    asyncio.run(main())


def test_a_child_that_outlives_the_block_may_take_its_gate(server: redis.Redis) -> None:
    async def main() -> None:
        left = asyncio.Event()

        async def child() -> None:
            await left.wait()
            async with limit("api", max_concurrent=1):
                pass

        async with limit("api", max_concurrent=1):
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
        left.set()
        await task

    asyncio.run(main())


def test_one_object_serves_many_tasks_and_threads_at_a_time(server: redis.Redis) -> None:
    api, crowd = limit("api", max_concurrent=3), Crowd()

    def work(_: int) -> None:
        with api, crowd.inside():
            time.sleep(0.01)

    async def task() -> None:
        async with api:
            with crowd.inside():
                await asyncio.sleep(0.01)

    async def main() -> None:
        with ThreadPoolExecutor(5) as pool:
            threads = [asyncio.get_running_loop().run_in_executor(pool, work, n) for n in range(20)]
            await asyncio.gather(*threads, *(task() for _ in range(20)))

    asyncio.run(main())
    assert crowd.entered == 40 and crowd.most <= 3
    until(lambda: in_use(server, "api") == 0)


def test_blocks_of_one_object_that_end_in_other_threads_each_give_one_slot_back(server: redis.Redis) -> None:
    """As a web framework does: a dependency is entered in one copy of the context and left in another."""
    api = limit("api", max_concurrent=3)

    async def main() -> None:
        for _ in range(3):
            await asyncio.to_thread(api.__enter__)
        for still in (2, 1, 0):
            await asyncio.to_thread(api.__exit__, None, None, None)
            await asyncio.to_thread(until, lambda still=still: in_use(server, "api") == still)
        await asyncio.to_thread(api.__exit__, None, None, None)  # one too many gives nothing back

    asyncio.run(main())
    with api:
        assert in_use(server, "api") == 1


def test_generators_that_other_tasks_close_each_give_their_slot_back(server: redis.Redis) -> None:
    api = limit("api", max_concurrent=3)

    async def pages() -> AsyncGenerator[int, None]:
        async with api:
            yield 1

    async def work(leave: asyncio.Event) -> None:
        async with api:
            await leave.wait()

    async def main() -> None:
        leave = asyncio.Event()
        worker = asyncio.create_task(work(leave))
        for _ in range(2):
            both = pages(), pages()
            for each in both:
                await asyncio.create_task(anext(each))  # type: ignore[arg-type]
            pump = await pump_of("api")
            assert pump.held == 3
            for each in both:
                await asyncio.create_task(each.aclose())  # type: ignore[arg-type]
            await heard(pump)
            assert in_use(server, "api") == pump.held == 1
        leave.set()
        await worker
        await heard(pump)
        assert in_use(server, "api") == pump.held == 0

    asyncio.run(main())


def test_one_object_gives_each_thread_the_values_for_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    api, made, inner = limit("api", max_concurrent=1), limit_module._limits, list[float]()

    def lease_of(lease_s: float) -> float:
        values: Any = api._values_of(SimpleNamespace(lease_s=lease_s))  # type: ignore[arg-type]
        return float(values[0].lease_s)

    def slow(*args: Any) -> Any:
        if not inner:
            inner.append(0.0)
            inner[0] = lease_of(2.0)  # another thread asks in the middle
        return made(*args)

    monkeypatch.setattr(limit_module, "_limits", slow)
    assert lease_of(2.0) == inner[0] == 2.0
    assert [lease_of(each) for each in (15.0, 2.0, 15.0)] == [15.0, 2.0, 15.0]


@pytest.mark.parametrize("other", [{"max_concurrent": 4}, {"max_concurrent": 3, "max_per_minute": 5}])
def test_two_values_for_one_name_are_refused_also_between_loops(server: redis.Redis, other: Any) -> None:
    def in_thread() -> None:
        with limit("api", **other):
            raise AssertionError("it was admitted")

    async def main() -> None:
        async with limit("api", max_concurrent=3):
            pass
        with pytest.raises(
            LimitsError, match="limit 'api' is used with two different values in this process"
        ):
            async with limit("api", **other):
                pass
        with pytest.raises(LimitsError, match="two different values"):
            await asyncio.to_thread(in_thread)

    asyncio.run(main())


# who learns of a refusal --------------------------------------------------------------------------


async def cuts_of(server: redis.Redis, name: str) -> tuple[bool, bool]:
    """Whether the gate has been cut, and paused."""
    pump = await pump_of(name)
    await heard(pump)
    state: Any = json.loads(server.hget(GateKeys(name).gate, "state"))  # type: ignore[arg-type]
    return state["cut"] > 0, state["pause"] > state["last"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refusal_is_told_to_the_innermost_gate_once(server: redis.Redis, wrapped: bool) -> None:
    async def main() -> None:
        hits: list[float] = []
        with pytest.raises((RateLimitHit, RuntimeError)):
            async with limit("outer", max_concurrent=2):
                try:
                    async with limit("inner", max_concurrent=2):
                        pump = await pump_of("inner")
                        refuse = pump.refuse
                        pump.refuse = lambda *of: (hits.append(of[1]), refuse(*of))  # type: ignore
                        raise RateLimitHit("slow down", retry_after=30)
                except RateLimitHit as hit:
                    if wrapped:
                        raise RuntimeError("it failed") from hit
                    raise
        assert await cuts_of(server, "inner") == (True, True)
        assert await cuts_of(server, "outer") == (False, False)
        assert hits == [30]

    asyncio.run(main())


def test_a_refusal_outside_the_inner_block_is_told_to_the_outer_gate(server: redis.Redis) -> None:
    class TooMany(Exception):
        status_code = 429

    async def main() -> None:
        with pytest.raises(TooMany):
            async with limit("outer", max_concurrent=2):
                async with limit("inner", max_concurrent=2):
                    pass
                raise TooMany
        assert await cuts_of(server, "outer") == (True, False)
        assert await cuts_of(server, "inner") == (False, False)

    asyncio.run(main())


def test_other_errors_and_cancels_teach_nothing(server: redis.Redis) -> None:
    async def main() -> None:
        for error in (ValueError("429"), asyncio.CancelledError()):
            with pytest.raises(type(error)):
                async with limit("api", max_concurrent=2):
                    raise error
        assert await cuts_of(server, "api") == (False, False)

    asyncio.run(main())


# in threads ---------------------------------------------------------------------------------------


def test_a_plain_program_without_a_loop_waits_and_gives_back(server: redis.Redis) -> None:
    crowd = Crowd()

    def work(n: int) -> None:
        with limit("api", max_concurrent=2), crowd.inside():
            time.sleep(0.01)
            if n == 3:
                raise KeyboardInterrupt

    with limit("api", max_concurrent=2) as permit:
        assert permit.attempt > 0 and in_use(server, "api") == 1
    with pytest.raises(KeyboardInterrupt):
        work(3)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [n for n in range(30) if n != 3]))
    assert crowd.entered == 30 and crowd.most <= 2
    until(lambda: in_use(server, "api") == 0)


def test_on_a_thread_that_runs_a_loop_it_is_refused_and_names_async_with(server: redis.Redis) -> None:
    async def main() -> None:
        block = limit("api", max_concurrent=1)
        with pytest.raises(LimitsError, match=r"write `async with limit\('api'\)`"), block:
            pass

    asyncio.run(main())


def test_a_thread_is_told_when_it_is_not_admitted_in_time_or_holds_the_gate(server: redis.Redis) -> None:
    def elsewhere() -> None:
        block = limit("api", max_concurrent=1, timeout_s=0.2)
        with pytest.raises(AdmissionTimeout, match=r"within 0\.2 s"), block:
            pass

    with limit("api", max_concurrent=1):
        with pytest.raises(HeldAlready), limit("api"):
            pass
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    until(lambda: in_use(server, "api") == 0)


def test_ctrl_c_in_a_wait_leaves_nothing_behind(server: redis.Redis) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with limit("api", max_concurrent=1):
            entered.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), limit("api", max_concurrent=1):
        raise AssertionError("it was admitted")
    leave.set()
    holder.join()
    with limit("api", max_concurrent=1, timeout_s=5):
        pass
    until(lambda: in_use(server, "api") == 0)


def test_a_result_that_comes_as_the_wait_is_left_is_given_back() -> None:
    """Whatever the order of the two: the work is cancelled, or its result is undone."""
    undone: list[int] = []
    given = 0

    async def work(steps: int) -> int:
        nonlocal given
        for _ in range(steps):
            await asyncio.sleep(0)
        given += 1
        return steps

    for steps in range(30):
        wait = background._Wait(background._loop(), work(steps), undone.append)
        if steps % 3:
            time.sleep(0.0001 * (steps % 5))
        wait.leave()
    until(lambda: len(undone) == given, timeout_s=5)


def test_a_lost_lease_is_told_to_a_thread_at_its_end(server: redis.Redis, brief: None) -> None:
    with pytest.raises(LeaseLost, match="the lease on 'api' ran out"), limit("api", max_concurrent=1):
        pid: Any = server.info("server")["process_id"]  # type: ignore[index]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)


SYNC = """
import sys
from ledger import noted
from pocketfleet import limit

for n in range(int(sys.argv[1])):
    with limit("api", max_concurrent=1, max_per_minute=1000):
        with noted(n):
            pass
if len(sys.argv) > 2:
    limit("api").__enter__()  # and the program ends without leaving it
"""


def test_plain_sync_programs_share_the_limit_and_leave_nothing_when_they_end() -> None:
    with fleet.site({"sync.py": SYNC}) as site:
        programs = [site.python("sync.py", "15", *more) for more in ([], [], ["held"])]
        assert [program.code() for program in programs] == [0, 0, 0], programs[2].output()
        assert site.ledger.count("end") == 45 and site.ledger.peak() == 1
        with site.client() as client:
            assert in_use(client, "api") == 0
            assert client.zcard("pocketfleet:{api}:leases") == 0


# circles ------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circle, "AFTER_S", 0.3)
    monkeypatch.setattr(circle, "LOOK_S", 0.2)


async def crossed(first: str, second: str, all_inside: threading.Barrier, *, works_s: float = 0.0) -> str:
    """Hold one gate, and when all hold theirs ask for the other; what became of it."""
    async with limit(first, max_concurrent=1):
        await asyncio.to_thread(all_inside.wait, 10)
        if works_s:
            await asyncio.sleep(works_s)
            return "worked"
        try:
            async with limit(second, max_concurrent=1):
                return "both"
        except WaitCircle as error:
            assert {error.held, error.wanted} == {"a", "b"}
            assert f"every slot of '{error.held}'" in str(error) and f"limit('{error.held}'" in str(error)
            return "circle"


def test_of_two_runs_that_wait_for_each_other_one_is_ended(server: redis.Redis, impatient: None) -> None:
    async def main() -> None:
        both = threading.Barrier(2)
        async with asyncio.timeout(15):
            ends = await asyncio.gather(crossed("a", "b", both), crossed("b", "a", both))
        assert sorted(ends) == ["both", "circle"], ends

    asyncio.run(main())


def test_of_runs_that_wait_round_three_gates_one_is_ended_and_told_all_three(
    server: redis.Redis, impatient: None
) -> None:
    """A gate beside the circle, with a slot whose holder works, belongs to no circle."""
    told: list[WaitCircle] = []
    all_inside = threading.Barrier(4)

    async def step(first: str, second: str, slots: int = 1) -> str:
        async with limit(first, max_concurrent=slots):
            await asyncio.to_thread(all_inside.wait, 10)
            try:
                async with limit(second, max_concurrent=1):
                    return "both"
            except WaitCircle as error:
                told.append(error)
                return "circle"

    async def main() -> None:
        async with asyncio.timeout(15):
            ends = await asyncio.gather(
                step("a", "b"), step("b", "c"), step("c", "a"), step("d", "a", slots=2)
            )
        assert sorted(ends) == ["both", "both", "both", "circle"], ends
        (error,) = told
        held, wanted, last = error.gates
        assert (error.held, error.wanted) == (held, wanted)
        assert error.gates in [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")]
        assert f"every slot of '{held}' is held by a run that waits for '{wanted}'" in str(error)
        assert f"and every slot of '{last}' by one that waits for '{held}'" in str(error)
        assert f"limit('{held}', '{wanted}', '{last}')" in str(error)

    asyncio.run(main())


@pytest.mark.parametrize(
    "poison", [b"text", b"[]", b"7", b"{}", b'{"until":"x"}', b'{"until":1e99,"inside":[]}', b"\xff"]
)
def test_a_row_or_a_state_that_cannot_be_read_says_nothing_in_a_look_for_circles(poison: bytes) -> None:
    row = json.dumps({"until": 9, "inside": {"a": [1]}}).encode()
    assert circle._read({b"p": poison, b"q": row, b"\xff": row}, 5) == {"q": {"a": {1}}}
    assert circle._in_use(poison) == 0


def test_a_state_with_numbers_that_are_none_says_nothing_in_a_look_for_circles() -> None:
    for number in ("NaN", "Infinity", '"x"', "null"):
        assert circle._in_use(f'{{"in_use":2,"level":{number}}}'.encode()) == 0
    assert circle._in_use(b'{"in_use":Infinity,"level":1}') == 0
    assert circle._in_use(b'{"in_use":2,"level":2.5}') == 2


def test_a_wait_for_two_gates_at_once_counts_for_one_slot() -> None:
    """Of two slots of `a` one is held by what waits for `b` and `c` together, the other by what is at work."""
    waits = {"b": {"p": {"a": {1}}}, "c": {"p": {"a": {1}}}, "a": {"p": {"b": {2}, "c": {3}}}}
    assert circle.find_circle(waits, {"a": 2, "b": 1, "c": 1}) == ()
    assert circle.find_circle(waits, {"a": 1, "b": 1, "c": 1}) == ("a", "b")


def test_a_circle_between_threads_and_tasks_is_ended_too(server: redis.Redis, impatient: None) -> None:
    """Two processes as far as the gates are concerned: the loop's, and that of the threads."""
    both = threading.Barrier(2)

    def in_thread() -> str:
        with limit("b", max_concurrent=1):
            both.wait(10)
            try:
                with limit("a", max_concurrent=1):
                    return "both"
            except WaitCircle:
                return "circle"

    async def main() -> None:
        async with asyncio.timeout(15):
            ends = await asyncio.gather(crossed("a", "b", both), asyncio.to_thread(in_thread))
        assert sorted(ends) == ["both", "circle"], ends

    asyncio.run(main())


def test_a_holder_that_works_for_long_is_no_circle(server: redis.Redis, impatient: None) -> None:
    async def main() -> None:
        both = threading.Barrier(2)
        async with asyncio.timeout(15):
            ends = await asyncio.gather(crossed("a", "b", both), crossed("b", "a", both, works_s=2.5))
        assert sorted(ends) == ["both", "worked"], ends

    asyncio.run(main())


def test_a_wait_inside_a_gate_may_still_time_out_by_itself(server: redis.Redis, impatient: None) -> None:
    async def main() -> None:
        async with held_elsewhere("b", max_concurrent=1), limit("a", max_concurrent=1):
            with pytest.raises(AdmissionTimeout):
                async with limit("b", timeout_s=0.8):
                    pass
        process = await current_process()
        assert process.pumps["a"].held == 0

    asyncio.run(main())


def test_a_plain_thread_holds_nothing_of_its_starter(server: redis.Redis) -> None:
    """It has a context of its own, so it may take what its starter holds, and waits like anybody else."""
    outcome: list[str] = []

    def other(act: Callable[[], None]) -> None:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()

    def take() -> None:
        with limit("api", max_concurrent=2):
            outcome.append("taken")

    with limit("api", max_concurrent=2):
        other(take)
        other(lambda: contextvars.Context().run(take))
    assert outcome == ["taken", "taken"]
