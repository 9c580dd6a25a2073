"""`limit()`: nothing leaks however it is cancelled, the lease is kept or its loss is told, hosts share it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import fakeredis
import pytest
import redis

from limiter.current import current_process
from limiter.errors import AdmissionTimeout, LeaseLost, LimitClosed, LimitsError
from limiter.keys import GateKeys
from limiter.limit import limit
from limiter.limits import Limits
from limiter.loops import of_loop
from limiter.permit import acquire
from limiter.process import Process
from limiter.pump import Pump
from limiter.slots import Slots
from limiter.sync import Entry
from limiter.together import acquire_together
from tests import fleet, servers
from tests.fleet import Site, until
from tests.stalls import slack_s

FIRST = int(os.environ.get("POCKETFLEET_SEED", "1"))
LEASE_S = 1.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """A client of the server that `limit()` uses."""
    with servers.running("valkey") as url:
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
        client = redis.Redis.from_url(url, decode_responses=True)
        yield client
        client.close()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a second, for what happens when one ends; else a machine that stands still would end blocks."""
    monkeypatch.setenv("POCKETFLEET_LEASE_S", str(LEASE_S))


@pytest.fixture
def site() -> Iterator[Site]:
    with fleet.site({"holder.py": HOLDER}) as site:
        yield site


def in_use(server: redis.Redis, name: str) -> int:
    state: Any = server.hget(GateKeys(name).gate, "state")
    return int(json.loads(state or "{}").get("in_use", 0))


async def pump_of(name: str) -> Pump:
    return (await current_process()).pumps[name]


async def heard(pump: Pump) -> None:
    """Until the gate has answered a call that was composed after this moment."""
    await pump.contact()  # of a call that may have been in flight
    await pump.contact()


@contextlib.asynccontextmanager
async def held_elsewhere(*names: Any, **numbers: Any) -> AsyncIterator[None]:
    """Another task of this process is inside the block."""
    entered, leave = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with limit(*names, **numbers):
            entered.set()
            await leave.wait()

    task = asyncio.create_task(hold())
    await entered.wait()
    try:
        yield
    finally:
        leave.set()
        await task


class Crowd:
    """How many are inside at a time, and how many ever were."""

    def __init__(self) -> None:
        self.now = self.most = self.entered = 0

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        self.now += 1
        self.entered += 1
        self.most = max(self.most, self.now)
        try:
            yield
        finally:
            self.now -= 1


async def steps(count: int) -> None:
    """Give way to everything else `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def cancelled_at_random(rng: random.Random, visit: Callable[[], Any], count: int) -> list[bool]:
    """Start `count` visits; cancel two of three after a random number of steps of the loop, or a few ms.

    Returns which of them got to their end.
    """

    async def one() -> bool:
        task = asyncio.create_task(visit())
        if rng.random() < 0.67:
            if rng.random() < 0.5:
                await steps(rng.randrange(60))
            else:
                await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
        await asyncio.wait([task])
        return not task.cancelled()

    return list(await asyncio.gather(*(one() for _ in range(count))))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 4))
def test_cancelled_anywhere_a_block_leaks_nothing(server: redis.Redis, seed: int) -> None:
    rng, crowd = random.Random(seed), Crowd()

    async def visit() -> None:
        async with limit("api", max_concurrent=3, max_per_minute=100_000):
            with crowd.inside():
                await steps(rng.randrange(20))
                await asyncio.sleep(rng.random() * 0.004)

    async def main() -> None:
        # the first ones are cancelled while the process is still being opened
        finished = await cancelled_at_random(rng, visit, 300)
        pump = await pump_of("api")
        await heard(pump)
        assert pump.held == 0
        assert in_use(server, "api") == 0
        assert any(finished) and not all(finished)
        assert crowd.most <= 3
        async with asyncio.timeout(20):
            await asyncio.gather(*(visit() for _ in range(6)))

    asyncio.run(main())
    assert server.zcard(GateKeys("api").leases) == 0, f"the loop's end gives everything back (seed {seed})"
    assert in_use(server, "api") == 0


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 4))
def test_cancelled_anywhere_a_wait_leaks_nothing_on_fakeredis(seed: int) -> None:
    rng, crowd = random.Random(seed), Crowd()
    fake = fakeredis.FakeServer(version=(7,))

    async def visit(pump: Pump) -> None:
        permit = await acquire(pump)
        try:
            with crowd.inside():
                await steps(rng.randrange(20))
        finally:
            permit.release()

    async def main() -> None:
        clients = [fakeredis.FakeAsyncRedis(server=fake) for _ in range(2)]
        process = Process(*clients, lease_s=LEASE_S)
        await process.start()
        pump = process.pump(Limits("api", 3, lease_s=LEASE_S))
        finished = await cancelled_at_random(rng, lambda: visit(pump), 120)
        await heard(pump)
        assert pump.held == 0
        state: Any = await clients[0].hget(GateKeys("api").gate, "state")  # type: ignore[misc]
        assert json.loads(state)["in_use"] == 0
        assert any(finished) and not all(finished)
        assert crowd.most <= 3
        await process.close()

    asyncio.run(main())


def test_a_start_of_a_cancelled_wait_is_not_spent(server: redis.Redis) -> None:
    async def main() -> None:
        async def visit() -> None:
            async with limit("api", max_concurrent=100, max_per_minute=5):
                pass

        async with held_elsewhere("api", max_concurrent=100, max_per_minute=5):
            waiting = [asyncio.create_task(visit()) for _ in range(4)]
            pump = await pump_of("api")
            while pump.held < 5:
                for task in waiting:
                    task.cancel()
                await asyncio.sleep(0)
                if all(task.done() for task in waiting):
                    break
            await asyncio.wait(waiting)
        await heard(pump)
        assert pump.answer is not None
        assert pump.answer.used == 1

    asyncio.run(main())


def test_the_end_of_the_loop_gives_everything_back(server: redis.Redis) -> None:
    async def hold(entered: asyncio.Event) -> None:
        async with limit("api", max_concurrent=2):
            entered.set()
            await asyncio.Event().wait()

    async def main() -> None:
        events = [asyncio.Event() for _ in range(2)]
        held = [asyncio.create_task(hold(event)) for event in events]
        waits = asyncio.create_task(hold(asyncio.Event()))
        await asyncio.gather(*(event.wait() for event in events))
        assert in_use(server, "api") == 2
        assert not waits.done() and len(held) == 2

    asyncio.run(main())
    assert in_use(server, "api") == 0
    assert server.zcard(GateKeys("api").leases) == 0


@pytest.mark.parametrize("names", [("api",), ("new",), ("api", "new")])
def test_a_cleanup_that_asks_while_the_loop_ends_is_refused_in_a_sentence(
    server: redis.Redis, names: tuple[str, ...]
) -> None:
    told: list[Exception] = []
    tasks = []

    async def work(pump: Pump) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            while not pump.over:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.002)
            try:
                async with asyncio.timeout(5), limit(*(limit(name, max_concurrent=1) for name in names)):
                    pass
            except Exception as error:
                told.append(error)

    async def main() -> None:
        async with limit("api", max_concurrent=1):
            tasks.append(asyncio.create_task(work(await pump_of("api"))))

    asyncio.run(main())
    assert [type(error) for error in told] == [LimitClosed]
    assert "this event loop is ending" in str(told[0])
    assert server.zcard(GateKeys("api").leases) == 0 == server.zcard(GateKeys("new").leases)


def test_nothing_of_a_loop_is_kept_once_it_has_ended(server: redis.Redis) -> None:
    api, seen = limit("api", max_concurrent=1), list[weakref.ref[Process]]()

    async def main() -> None:
        async with api:
            seen.append(weakref.ref(await current_process()))

    for _ in range(3):
        asyncio.run(main())
    assert len(of_loop) == 0

    def gone() -> bool:
        gc.collect()
        return [ref() for ref in seen] == [None] * 3

    until(gone, "the renewal threads have ended")


def test_connections_of_limits_that_nobody_uses_are_given_back(
    server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.pump.IDLE_S", 0.02)

    async def main() -> None:
        await current_process()
        before = len(server.client_list())
        users = [limit(f"user-{number}", max_concurrent=1) for number in range(4)]
        for _ in range(2):
            for user in users:
                async with user as permit:
                    assert in_use(server, permit.limit) == 1
            async with limit(*users[:2]):
                assert in_use(server, "user-0") == in_use(server, "user-1") == 1
                assert len(server.client_list()) > before
            await asyncio.to_thread(until, lambda: len(server.client_list()) == before)

    asyncio.run(main())


def test_after_a_process_was_closed_its_loop_may_open_another(server: redis.Redis) -> None:
    async def main() -> None:
        for _ in range(2):
            async with limit("api", max_concurrent=1, timeout_s=20):
                pass
            await (await current_process()).close()

    asyncio.run(main())


def test_nobody_waits_for_a_pump_that_has_left() -> None:
    async def go() -> None:
        clients = [fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(version=(7,))) for _ in range(2)]
        process = Process(*clients)
        pump = process.pump(Limits("l", 1))
        (await acquire(pump)).release()
        await process.close()
        async with asyncio.timeout(5):
            for wait in (acquire(pump), pump.contact(), pump.save(Entry("{l}:b:0", 1, 1, "save"))):
                with pytest.raises(LimitClosed, match="limit 'l' cannot be taken here any more"):
                    await wait
            with pytest.raises(LimitClosed):
                await acquire_together(process, [pump])
            with pytest.raises(LimitClosed):
                process.pump(Limits("another", 1))

    asyncio.run(go())


def test_a_fault_of_ours_is_told_and_the_pump_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("limiter.pump.FAULT_S", 0.01)

    async def go() -> None:
        clients = [fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(version=(7,))) for _ in range(2)]
        process = Process(*clients)
        pump = process.pump(Limits("l", 1))
        held = await acquire(pump)
        answer, said = pump._line.call, list[list[str]]()

        async def nonsense(keys: Any, args: list[Any]) -> Any:
            said.append([entry for entry in map(str, args) if entry == "{l}:b:0"])
            await answer(keys, args)
            if len(said) == 1:
                return [b"no answer"]
            pump._line.call = answer  # type: ignore[method-assign]
            return await answer(keys, args)

        pump._line.call = nonsense  # type: ignore[method-assign]
        pump.settle(Entry("{l}:b:0", 1, 1, "completed", b"out"))
        await asyncio.wait_for(pump.contact(), 5)
        assert said == [["{l}:b:0"], ["{l}:b:0"]], "what was in the call without an answer is said again"
        held.release()
        (await asyncio.wait_for(acquire(pump), 5)).release()
        await heard(pump)
        assert pump.answer is not None and pump.answer.in_use == 0
        await process.close()

    asyncio.run(go())
    faults = [record for record in caplog.records if record.message.startswith("pump.fault")]
    assert [fault.message for fault in faults] == ["pump.fault limit=l"] and faults[0].exc_info


def test_a_caller_that_is_not_admitted_in_time_is_told_why(server: redis.Redis) -> None:
    async def main() -> None:
        async with held_elsewhere("api", max_concurrent=1):
            with pytest.raises(AdmissionTimeout) as caught:
                async with limit("api", max_concurrent=1, timeout_s=0.2):
                    raise AssertionError("it was admitted")
        assert str(caught.value) == "no permit for 'api' within 0.2 s (last refused by level)"
        assert (caught.value.limit, caught.value.timeout_s, caught.value.refused_by) == ("api", 0.2, "level")
        async with limit("api", max_concurrent=1, timeout_s=20):
            pass
        pump = await pump_of("api")
        await heard(pump)
        assert pump.held == 0 == in_use(server, "api")

    asyncio.run(main())


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), True, "5"])
def test_a_timeout_that_cannot_hold_is_refused_in_a_sentence(timeout_s: Any) -> None:
    with pytest.raises(LimitsError) as refused:
        limit("api", max_concurrent=1, timeout_s=timeout_s)
    sentence = f"timeout_s={timeout_s!r} cannot hold: use a number of seconds above 0 (None waits)"
    assert (str(refused.value), refused.value.key) == (sentence, "timeout_s")


def test_a_name_without_numbers_uses_those_of_its_gate_or_says_what_is_missing(server: redis.Redis) -> None:
    async def main() -> None:
        with pytest.raises(LimitsError, match="limit 'api' has no values yet"):
            async with limit("api"):
                raise AssertionError("it was admitted")
        async with held_elsewhere("api", max_concurrent=1):
            with pytest.raises(AdmissionTimeout):
                async with limit("api", timeout_s=0.1):
                    raise AssertionError("it was admitted")

    asyncio.run(main())


@contextlib.asynccontextmanager
async def frozen(server: redis.Redis) -> AsyncIterator[None]:
    """The server answers nobody while the block runs."""
    pid = server.info("server")["process_id"]  # type: ignore[index]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_block_ends_when_the_server_is_silent_for_a_lease(server: redis.Redis, brief: None) -> None:
    async def main() -> None:
        with pytest.raises(LeaseLost, match="the lease on 'api' ran out"):
            async with limit("api", max_concurrent=1), frozen(server):
                await asyncio.sleep(30)
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0, "the cancellation was ours and is over"
        async with limit("api", max_concurrent=1, timeout_s=20):
            assert in_use(server, "api") == 1
        pump = await pump_of("api")
        await heard(pump)
        assert pump.held == 0 == in_use(server, "api")

    asyncio.run(main())


def test_a_lease_that_is_made_shorter_meanwhile_is_watched_to_its_new_end() -> None:
    async def go() -> None:
        slots = Slots()
        permit = slots.new_permit(None, 1, 0, 0.0)  # type: ignore[arg-type]
        for seconds in (300.0, 0.02):
            slots.lease_until = time.monotonic() + seconds
            slots.watch_lease()
        async with asyncio.timeout(20):
            while not permit.lost:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        assert not slots.safe

    asyncio.run(go())


@pytest.mark.parametrize("by_name", [True, False])
def test_a_limit_whose_lease_is_shorter_than_ours_is_held_safely(by_name: bool) -> None:
    """By its name alone, or by a process that has not heard yet of the shorter lease."""

    async def go() -> tuple[bool, bool]:
        server = fakeredis.FakeServer(version=(7,))
        ours, theirs = (
            Process(*(fakeredis.FakeAsyncRedis(server=server) for _ in range(2)), lease_s=lease_s)
            for lease_s in (15.0, 2.0)
        )
        pump = ours.pump("api" if by_name else Limits("api", 2))
        if not by_name:
            (await acquire(pump)).release()
        (await acquire(theirs.pump(Limits("api", 2, lease_s=2.0)))).release()
        permit = await acquire(pump)
        await heard(pump)
        await asyncio.sleep(0.1)  # the lease is watched
        found = pump.safe, permit.lost
        await ours.close()
        await theirs.close()
        return found

    assert asyncio.run(go()) == (True, False)


def test_a_block_that_is_cancelled_by_others_too_stays_cancelled(server: redis.Redis) -> None:
    async def block(entered: asyncio.Event) -> None:
        async with limit("api", max_concurrent=1):
            entered.set()
            try:
                await asyncio.sleep(30)
            finally:
                await asyncio.sleep(0.01)

    async def main() -> None:
        entered = asyncio.Event()
        task = asyncio.create_task(block(entered))
        await entered.wait()
        (permit,) = (await pump_of("api")).slots._permits
        permit.lose()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())


HOLDER = """
import asyncio, sys, time
from ledger import note, noted
from pocketfleet import LeaseLost, limit

how, count, most, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

async def visit(n):
    async with limit("api", max_concurrent=most):
        with noted(f"{how}{n}"):
            if how == "blocks":
                time.sleep(seconds)
            else:
                await asyncio.sleep(seconds)

async def main():
    try:
        await asyncio.gather(*(visit(n) for n in range(count)))
    except LeaseLost:
        note("lost")

asyncio.run(main())
"""


def test_two_processes_share_a_limit(site: Site) -> None:
    holders = [site.python("holder.py", name, "20", "3", "0.05") for name in ("a", "b")]

    assert [holder.code() for holder in holders] == [0, 0]
    assert site.ledger.count("end") == 40
    assert site.ledger.peak() == 3
    assert {each.pid for each in site.ledger.notes()} == {holder.pid for holder in holders}
    with site.client() as client:
        assert in_use(client, "api") == 0


def test_slots_of_a_killed_process_come_back_within_a_lease(site: Site) -> None:
    site.env["POCKETFLEET_LEASE_S"] = "2"
    doomed = site.python("holder.py", "a", "3", "3", "60")
    until(lambda: site.ledger.count("start") == 3)
    other = site.python("holder.py", "b", "3", "3", "0.01")
    with site.client() as client:
        until(lambda: client.zcard(GateKeys("api").tickets), "the other one waits")

    killed_at = doomed.kill()

    assert other.code() == 0
    mine = [each for each in site.ledger.notes("start") if each.pid == other.pid]
    assert len(mine) == 3
    assert mine[0].at - killed_at < 2 + 1.5 + slack_s(killed_at)
    assert site.ledger.peak({doomed.pid: killed_at}) == 3


def test_a_blocked_loop_keeps_its_lease(site: Site) -> None:
    site.env["POCKETFLEET_LEASE_S"] = "2"
    blocks = site.python("holder.py", "blocks", "1", "1", "5")
    until(lambda: site.ledger.count("start") == 1)
    other = site.python("holder.py", "b", "1", "1", "0.01")

    assert [blocks.code(), other.code()] == [0, 0]
    assert [each.word for each in site.ledger.notes()] == ["start", "end", "start", "end"]
    assert site.ledger.peak() == 1


def test_a_loop_that_is_blocked_beyond_the_stall_limit_counts_as_dead(site: Site) -> None:
    site.env["POCKETFLEET_LEASE_S"] = str(LEASE_S)
    blocks = site.python("holder.py", "blocks", "1", "1", "30", POCKETFLEET_STALL_LIMIT_S=1)
    until(lambda: site.ledger.count("start") == 1)
    other = site.python("holder.py", "b", "1", "1", "0.01")

    assert other.code(timeout_s=20) == 0, "it did not wait for the end of the block"
    blocks.kill()


def test_after_a_data_loss_what_is_held_still_counts(server: redis.Redis, brief: None) -> None:
    async def main() -> None:
        here, there = await current_process(), await another_process()
        limits = Limits("api", 4, lease_s=LEASE_S)
        pumps = [here.pump(limits), there.pump(limits)]
        held = [await acquire(pump) for pump in (*pumps, *pumps)]

        server.flushall()
        lost_at = time.monotonic()
        waiting = [asyncio.create_task(acquire(pump)) for pump in pumps]
        done, _ = await asyncio.wait(waiting, timeout=2 * LEASE_S)
        assert not done, "all four are still held"
        assert in_use(server, "api") == 4

        held.pop().release()
        done, _ = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        assert time.monotonic() - lost_at >= LEASE_S
        assert in_use(server, "api") == 4
        held.pop().release()
        held += [await task for task in waiting]
        for permit in held:
            permit.release()
        for pump in pumps:
            await heard(pump)
        assert in_use(server, "api") == 0
        await there.close()

    asyncio.run(main())


async def another_process() -> Process:
    from limiter.process import open_process

    return await open_process(os.environ["POCKETFLEET_REDIS_URL"], lease_s=LEASE_S)


def test_a_pump_cancelled_in_the_middle_of_a_call_sends_its_outcomes_once_more() -> None:
    async def go() -> list[list[str]]:
        clients = [fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(version=(7,))) for _ in range(2)]
        process = Process(*clients, lease_s=LEASE_S)
        pump = Pump(process, Limits("l", 1))
        sent: list[list[str]] = []
        answer = pump._line.call
        stuck = asyncio.Event()

        async def call(keys: Any, args: list[Any]) -> Any:
            sent.append([entry for entry in map(str, args) if entry == "{l}:b:0"])
            if len(sent) == 2:  # the reply of the call that carries the outcome never comes
                stuck.set()
                await asyncio.Event().wait()
            return await answer(keys, args)

        pump._line.call = call  # type: ignore[method-assign]
        serving = asyncio.create_task(pump.serve())
        permit = await acquire(pump)
        pump.settle(Entry("{l}:b:0", 1, 1, "completed", b"out"))
        await stuck.wait()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert permit.attempt
        for client in clients:
            await client.aclose()
        return sent

    assert asyncio.run(go()) == [[], ["{l}:b:0"], ["{l}:b:0"]]


def test_one_half_of_a_crowd_runs_while_the_other_half_is_asked_for() -> None:
    async def go() -> tuple[list[int], list[int]]:
        clients = [fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(version=(7,))) for _ in range(2)]
        process = Process(*clients, lease_s=LEASE_S)
        pump = Pump(process, Limits("l", 1000))
        asked: list[int] = []
        running_then: list[int] = []
        answer = pump._line.call
        blocks = 0

        async def call(keys: Any, args: list[Any]) -> Any:
            asked.append(args[4])
            began = blocks
            reply = await answer(keys, args)
            await asyncio.sleep(0.01)
            running_then.append(blocks - began)
            return reply

        async def block() -> None:
            nonlocal blocks
            permit = await acquire(pump)
            blocks += 1
            permit.release()

        pump._line.call = call  # type: ignore[method-assign]
        waiting = [asyncio.create_task(block()) for _ in range(64)]
        await asyncio.sleep(0)
        serving = asyncio.create_task(pump.serve())
        await asyncio.gather(*waiting)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for client in clients:
            await client.aclose()
        return asked, running_then

    asked, running_then = asyncio.run(go())
    assert asked[:2] == [32, 32]
    assert running_then[:2] == [0, 32]  # those of the first answer, during the second call
