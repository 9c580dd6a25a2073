"""`limit("a", "b")`: all or none, in line without holding anything, and fair to those who want one alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis

from limiter.current import current_process
from limiter.errors import AdmissionTimeout, LeaseLost, LimitsError
from limiter.keys import GateKeys
from limiter.limit import limit
from limiter.limits import Limits
from limiter.line import Line
from limiter.permit import Permit, acquire
from limiter.process import Process, open_process
from limiter.together import acquire_together
from tests import fleet, servers
from tests.fleet import until
from tests.test_limiter_permit import (
    FIRST,
    Crowd,
    cancelled_at_random,
    frozen,
    heard,
    held_elsewhere,
    pump_of,
    steps,
)
from tests.test_limiter_permit import (
    in_use as in_use_of,
)

LEASE_S = 3.0  # a machine that stands still for a second ends no block


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    with servers.running("valkey") as url:
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
        monkeypatch.setenv("POCKETFLEET_LEASE_S", str(LEASE_S))
        client = redis.Redis.from_url(url, decode_responses=True)
        yield client
        client.close()


def both(a: int = 1, b: int = 1, **more: Any) -> limit:
    return limit(limit("a", max_concurrent=a), limit("b", max_concurrent=b), **more)


def in_use(server: redis.Redis) -> tuple[int, int]:
    return in_use_of(server, "a"), in_use_of(server, "b")


async def until_in_use(server: redis.Redis, wanted: tuple[int, int]) -> None:
    async with asyncio.timeout(10):
        while in_use(server) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def other_process() -> AsyncIterator[Process]:
    process = await open_process(os.environ["POCKETFLEET_REDIS_URL"], lease_s=LEASE_S)
    try:
        yield process
    finally:
        await process.close()


def pumps_of(process: Process, a: int = 1, b: int = 1) -> list[Any]:
    return [process.pump(Limits("a", a, lease_s=LEASE_S)), process.pump(Limits("b", b, lease_s=LEASE_S))]


def test_a_block_of_two_names_holds_one_permit_of_each(server: redis.Redis) -> None:
    async def main() -> None:
        async with both(2, 3):
            assert in_use(server) == (1, 1)
        await until_in_use(server, (0, 0))
        async with limit("b", "a"):  # both gates have values by now, and names have no order
            assert in_use(server) == (1, 1)

    asyncio.run(main())
    assert in_use(server) == (0, 0)


def test_who_waits_for_the_other_gate_holds_nothing(server: redis.Redis) -> None:
    async def main() -> None:
        async with held_elsewhere("b", max_concurrent=1):
            waits = asyncio.create_task(both().__aenter__())
            await asyncio.sleep(1.5)  # longer than it lets others pass, and than it stands
            assert in_use(server) == (0, 1) and not waits.done()
        async with asyncio.timeout(5):
            await waits
        assert in_use(server) == (1, 1)

    asyncio.run(main())


def test_others_take_a_place_that_is_free_while_the_first_in_line_waits_for_another_gate(
    server: redis.Redis,
) -> None:
    async def main() -> None:
        async with other_process() as process, held_elsewhere("b", max_concurrent=1):
            waits = asyncio.create_task(both().__aenter__())
            await asyncio.sleep(0.1)
            longest, count, began = 0.0, 0, time.monotonic()
            until_s = began + 2.5  # a place is kept for 0.5 s, then for 1 s; later for longer
            while began < until_s:
                (await acquire(pumps_of(process)[0], 10)).release()
                longest, count = max(longest, time.monotonic() - began), count + 1
                await asyncio.sleep(0.05)
                began = time.monotonic()
            assert longest < 2.0 and count > 3, (longest, count)
            assert not waits.done()
            waits.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 3))
def test_cancelled_anywhere_a_block_of_two_names_leaks_nothing(server: redis.Redis, seed: int) -> None:
    rng, crowds = random.Random(seed), {"a": Crowd(), "b": Crowd()}

    async def visit() -> None:
        kind = rng.random()
        names = ["a", "b"] if kind < 0.6 else ["a"] if kind < 0.8 else ["b"]
        block = both(2, 3) if len(names) == 2 else limit(names[0], max_concurrent=2 if names == ["a"] else 3)
        async with block:
            with contextlib.ExitStack() as inside:
                for name in names:
                    inside.enter_context(crowds[name].inside())
                await steps(rng.randrange(20))
                await asyncio.sleep(rng.random() * 0.004)

    async def main() -> None:
        finished = await cancelled_at_random(rng, visit, 200)
        for name in ("a", "b"):
            pump = await pump_of(name)
            await heard(pump)
            assert pump.held == 0
        await until_in_use(server, (0, 0))
        assert any(finished) and not all(finished)
        assert crowds["a"].most <= 2 and crowds["b"].most <= 3
        async with asyncio.timeout(20):
            await asyncio.gather(*(visit() for _ in range(10)))

    asyncio.run(main())
    assert in_use(server) == (0, 0)
    for name in ("a", "b"):
        assert server.zcard(GateKeys(name).leases) == 0, f"the loop's end gives everything back (seed {seed})"


def test_in_a_crowd_that_wants_one_gate_each_who_wants_both_is_served(server: redis.Redis) -> None:
    """Both gates are never free at once unless somebody stands for it."""

    async def main() -> None:
        async with other_process() as one, other_process() as two:
            over = asyncio.Event()

            async def busy(process: Process, which: int) -> int:
                count = 0
                while not over.is_set():
                    permit = await acquire(pumps_of(process)[which])
                    await asyncio.sleep(0.03)
                    permit.release()
                    count += 1
                return count

            crowd = [
                asyncio.create_task(busy(p, which)) for p in (one, two) for which in (0, 1) for _ in "12"
            ]
            await asyncio.sleep(0.3)
            for _ in range(5):
                async with asyncio.timeout(10), both():
                    await asyncio.sleep(0.01)
            over.set()
            counts = await asyncio.gather(*crowd)
            assert min(counts) >= 1, f"those who want one gate are served too: {counts}"

    asyncio.run(main())


def test_three_processes_that_want_both_of_small_gates_do_not_block_each_other(server: redis.Redis) -> None:
    async def main() -> None:
        async with other_process() as one, other_process() as two, other_process() as three:
            crowd = Crowd()

            async def visit(process: Process, order: int) -> None:
                a, b = pumps_of(process)
                for _ in range(15):
                    with_both: Any = await acquire_together(process, [a, b], 20)
                    with crowd.inside():
                        await asyncio.sleep(0.005)
                    for permit in with_both:
                        permit.release()

            began = time.monotonic()
            await asyncio.gather(*(visit(process, i) for i, process in enumerate([one, two, three])))
            assert crowd.entered == 45 and crowd.most == 1
            assert time.monotonic() - began < 20

    asyncio.run(main())


def test_a_holder_of_one_gate_that_wants_the_other_gets_past_who_wants_both(server: redis.Redis) -> None:
    async def main() -> None:
        async with other_process() as process:
            a, b = pumps_of(process)
            held = await acquire(b)
            waits = asyncio.create_task(both().__aenter__())
            await asyncio.sleep(0.4)  # it stands in both lines by now
            async with asyncio.timeout(5):
                inner = await acquire(a)
            assert not waits.done()
            inner.release()
            held.release()
            async with asyncio.timeout(5):
                await waits

    asyncio.run(main())


def test_a_name_without_values_refuses_all_and_a_wait_in_vain_says_by_whom(server: redis.Redis) -> None:
    async def main() -> None:
        with pytest.raises(LimitsError, match="limit 'b' has no values yet"):
            async with limit(limit("a", max_concurrent=1), "b"):
                raise AssertionError("it was admitted")
        async with held_elsewhere("b", max_concurrent=1):
            with pytest.raises(AdmissionTimeout, match=r"'a' and 'b' within 0.3 s \(last .*b: level"):
                async with limit("a", "b", timeout_s=0.3):
                    raise AssertionError("it was admitted")
        async with limit("a", "b", timeout_s=5):
            pass
        await until_in_use(server, (0, 0))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: limit(), "limit\\(\\) has no name"),
        (lambda: limit("a", "b", max_concurrent=3), "numbers belong to one: write them there"),
        (lambda: limit("a", limit("a", max_concurrent=3)), "names one limit twice"),
        (lambda: limit("a", "b b"), "limit name 'b b' cannot be used"),
        (lambda: limit("a", 7), "limit name 7 cannot be used"),
        (lambda: limit("a", max_concurrent=3, pacing="even"), "set max_per_minute too"),
    ],
)
def test_names_and_numbers_that_cannot_hold_are_refused_in_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(LimitsError, match=sentence):
        make()


def test_the_loss_of_one_lease_ends_the_block_and_gives_both_back(server: redis.Redis) -> None:
    async def main() -> None:
        with pytest.raises(LeaseLost):
            async with both(), frozen(server):
                await asyncio.sleep(30)
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        await until_in_use(server, (0, 0))

    asyncio.run(main())


def test_a_reply_that_is_lost_is_asked_for_again_and_grants_once(server: redis.Redis) -> None:
    async def main() -> None:
        async with both(2, 2):
            pass
        process = await current_process()
        joint = process._joints[("a", "b")]
        answer, lost = joint._line.call, 0

        async def call(keys: Any, args: Any) -> Any:
            nonlocal lost
            reply = await answer(keys, args)
            if lost < 2:
                lost += 1
                raise redis.ConnectionError("the reply is lost")
            return reply

        joint._line.call = call  # type: ignore[method-assign]
        async with both(2, 2):
            assert lost == 2
            assert in_use(server) == (1, 1)
        await until_in_use(server, (0, 0))

    asyncio.run(main())


def test_several_sets_of_names_are_served_side_by_side(server: redis.Redis) -> None:
    async def main() -> None:
        numbers = {name: limit(name, max_concurrent=2) for name in "abc"}
        inside: dict[str, Crowd] = {name: Crowd() for name in "abc"}

        async def visit(names: str) -> None:
            async with limit(*(numbers[name] for name in names)), asyncio.timeout(20):
                with contextlib.ExitStack() as stack:
                    for name in names:
                        stack.enter_context(inside[name].inside())
                    await asyncio.sleep(0.005)

        sets = ["ab", "bc", "ca", "abc", "a", "b", "c"] * 8
        async with asyncio.timeout(30):
            await asyncio.gather(*(visit(names) for names in sets))
        assert all(crowd.most <= 2 for crowd in inside.values())
        assert sum(crowd.entered for crowd in inside.values()) == sum(map(len, sets))

    asyncio.run(main())


HOLDER = """
import asyncio, random, sys
from ledger import noted
from pocketfleet import limit

rng, count = random.Random(int(sys.argv[1])), int(sys.argv[2])
numbers = {"a": limit("a", max_concurrent=2), "b": limit("b", max_concurrent=3, max_per_minute=100000)}

async def visit(n):
    names = rng.choice([("a", "b"), ("a", "b"), ("a",), ("b",)])
    async with limit(*(numbers[name] for name in names)):
        with noted(f"{'+'.join(names)}:{n}"):
            await asyncio.sleep(rng.random() * 0.05)

async def main():
    await asyncio.gather(*(visit(n) for n in range(count)))

asyncio.run(main())
"""


def test_three_processes_never_break_either_limit_and_one_may_be_killed() -> None:
    with fleet.site({"holder.py": HOLDER}) as site:
        site.env["POCKETFLEET_LEASE_S"] = str(LEASE_S)
        holders = [site.python("holder.py", str(seed), "60") for seed in range(3)]
        until(lambda: site.ledger.count("end") > 30)
        killed_at = holders[0].kill()
        assert [holder.code() for holder in holders[1:]] == [0, 0]

        dead = holders[0].pid
        steps: dict[str, list[tuple[float, int]]] = {"a": [], "b": []}
        for each in site.ledger.notes():
            for name in each.item.partition(":")[0].split("+"):
                steps[name].append((each.at, 1 if each.word == "start" else -1))
        for item in site.ledger.running(dead):
            for name in item.partition(":")[0].split("+"):
                steps[name].append((killed_at, -1))
        for name, most in (("a", 2), ("b", 3)):
            now = 0
            for _, step in sorted(steps[name]):
                now += step
                assert now <= most, f"{now} inside {name}"
        done = [each for each in site.ledger.notes("end") if each.pid != dead]
        assert len(done) == 120


def test_permit_of_the_first_name_is_what_the_block_gives(server: redis.Redis) -> None:
    async def main() -> None:
        async with both() as permit:
            assert isinstance(permit, Permit) and permit.limit == "a" and permit.attempt > 0

    asyncio.run(main())


def test_an_answer_of_one_gate_that_cannot_be_read_leaks_no_slot_of_the_other(
    server: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("limiter.pump.FAULT_S", 0.01)
    spoiled: list[Any] = []

    def spoil(self: Any, reply: Any, hear: Any = Line.hear) -> None:
        together = isinstance(reply, list) and len(reply) == 2 and isinstance(reply[0], list)
        if together and not spoiled:
            spoiled.append(reply)
            reply = [reply[0], [b"no answer"]]
        hear(self, reply)

    monkeypatch.setattr(Line, "hear", spoil)

    async def main() -> None:
        async with limit(limit("a", max_concurrent=2), limit("b", max_concurrent=2)):
            assert in_use(server) == (1, 1)
        for pump in (await pump_of("a"), await pump_of("b")):
            await heard(pump)
            assert pump.held == 0
        assert in_use(server) == (0, 0)

    asyncio.run(main())
    assert spoiled and [each.message.split()[0] for each in caplog.records] == ["pump.fault"]


def test_a_gate_that_was_left_is_called_again_in_time_while_a_block_of_two_names_holds_it(
    server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETFLEET_LEASE_S", "3")
    monkeypatch.setattr("limiter.pump.IDLE_S", 0.02)

    async def main() -> None:
        async with limit("b", max_concurrent=1):
            pass
        pump = await pump_of("b")
        async with asyncio.timeout(20):
            while pump._line._wire is not None:  # noqa: ASYNC110 - nothing tells that it sleeps for ever
                await asyncio.sleep(0.01)
            await steps(20)
            async with limit(limit("a", max_concurrent=1), limit("b", max_concurrent=1)):
                before = pump.calls._seq
                while pump.calls._seq == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    asyncio.run(main())
