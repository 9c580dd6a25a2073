"""Permits that come inside a wake message: no call is needed, and none is ever counted twice or too little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from time import monotonic
from typing import Any

import fakeredis
import pytest
from redis.asyncio import Redis

from limiter.keys import GateKeys
from limiter.limits import Limits
from limiter.permit import Permit, acquire
from limiter.process import Process
from limiter.pump import Pump
from limiter.sync import Grant
from tests import servers

ONE = Limits("api", 1)
RATED = Limits("api", 1, 1000, window_s=60)

Story = Callable[[Process, Process, Redis], Awaitable[None]]


@pytest.fixture(params=["fakeredis", "valkey"])
def play(request: pytest.FixtureRequest) -> Iterator[Callable[[Story], None]]:
    """Run a story of two processes at one server."""
    if request.param == "fakeredis":
        server = fakeredis.FakeServer(version=(7,))

        def client() -> Redis:
            return fakeredis.FakeAsyncRedis(server=server)

        yield lambda story: asyncio.run(_played(story, client))
        return
    with servers.running("valkey") as url:
        yield lambda story: asyncio.run(_played(story, lambda: Redis.from_url(url)))


async def _played(story: Story, client: Callable[[], Redis]) -> None:
    first, second, judge = Process(client(), client()), Process(client(), client()), client()
    await first.start()
    await second.start()
    try:
        async with asyncio.timeout(20):
            await story(first, second, judge)
    finally:
        await first.close()
        await second.close()
        await judge.aclose()


async def in_use(judge: Redis) -> int:
    state: Any = await judge.hget(GateKeys("api").gate, "state")  # type: ignore[misc]
    return int(json.loads(state)["in_use"])


async def in_line(pump: Pump) -> asyncio.Task[Permit]:
    """A task that waits for a permit, and the gate knows."""
    waiting = asyncio.create_task(acquire(pump))
    await asyncio.sleep(0)
    await pump.contact()
    await pump.contact()
    assert not waiting.done()
    return waiting


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.002)


def test_a_freed_slot_reaches_the_waiter_without_a_call_of_its_process(play: Callable[[Story], None]) -> None:
    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(ONE), b.pump(ONE)
        held = await acquire(mine)
        waiting = await in_line(theirs)
        calls = theirs.calls._seq
        held.release()
        permit = await waiting
        assert theirs.calls._seq == calls, "it was granted in the wake message"
        assert await in_use(judge) == theirs.held == 1
        permit.release()
        await theirs.contact()
        assert await in_use(judge) == theirs.held == 0

    play(story)


def test_a_grant_for_an_earlier_call_is_void(play: Callable[[Story], None]) -> None:
    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(ONE), b.pump(ONE)
        held = await acquire(mine)
        waiting = await in_line(theirs)
        late: list[Any] = []
        theirs.granted = late.append  # type: ignore[method-assign]
        held.release()
        await until(lambda: bool(late))
        assert await in_use(judge) == 1
        del theirs.granted  # type: ignore[method-assign]
        other = asyncio.create_task(acquire(theirs))
        await asyncio.wait_for(theirs.contact(), 5)  # the next call says that nothing is held
        granted = [task for task in (waiting, other) if task.done()]
        before = theirs.held
        theirs.granted(late[0])
        assert theirs.held == before == len(granted) <= 1
        await until(lambda: waiting.done() or other.done())
        assert await in_use(judge) == theirs.held == 1
        other.cancel()
        waiting.cancel()

    play(story)


def test_a_grant_that_overtakes_the_answer_before_it_waits_for_it(play: Callable[[Story], None]) -> None:
    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(ONE), b.pump(ONE)
        held = await acquire(mine)
        send = theirs._line.call

        async def slow(*args: Any) -> Any:
            reply = await send(*args)
            held.release()
            await until(lambda: bool(theirs.calls._early))
            return reply

        theirs._line.call = slow  # type: ignore[method-assign]
        permit = await acquire(theirs)
        theirs._line.call = send  # type: ignore[method-assign]
        assert await in_use(judge) == theirs.held == 1
        permit.release()

    play(story)


def test_the_same_grant_heard_twice_counts_once(play: Callable[[Story], None]) -> None:
    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(ONE), b.pump(ONE)
        held = await acquire(mine)
        waiting = await in_line(theirs)
        take, heard = theirs.granted, []

        def twice(grant: Grant) -> None:
            heard.append(grant)
            take(grant)
            take(grant)

        theirs.granted = twice  # type: ignore[method-assign]
        held.release()
        await waiting
        assert heard
        assert await in_use(judge) == theirs.held == 1

    play(story)


def test_a_grant_that_no_lease_covers_is_not_taken_over(play: Callable[[Story], None]) -> None:
    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(ONE), b.pump(ONE)
        held = await acquire(mine)
        waiting = await in_line(theirs)
        theirs.slots.lease_until = 0.0
        theirs.kick = lambda: None  # type: ignore[method-assign]
        seq, before = theirs.calls._seq, theirs.calls._last_grant
        heard: list[Grant] = []
        take = theirs.granted
        theirs.granted = lambda grant: (heard.append(grant), take(grant))  # type: ignore[method-assign, assign, func-returns-value]
        held.release()
        await until(lambda: bool(heard))
        assert theirs.calls._seq == seq and theirs.calls._last_grant == before
        del theirs.kick  # type: ignore[method-assign]
        theirs.kick()
        await until(waiting.done)
        assert await in_use(judge) == theirs.held == 1

    play(story)


def test_a_grant_heard_too_late_gives_its_start_back(play: Callable[[Story], None]) -> None:
    """Its stamp in the window says by when it may start: later, somebody else may have that place."""

    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(RATED), b.pump(RATED)
        held = await acquire(mine)
        waiting = await in_line(theirs)
        late: list[Any] = []
        theirs.granted = late.append  # type: ignore[method-assign]
        held.release()
        await until(lambda: bool(late))
        await asyncio.sleep(late[0].slack_s + 0.05)
        del theirs.granted  # type: ignore[method-assign]
        theirs.granted(late[0])
        permit = await waiting
        assert permit.stamp > late[0].stamp, "not that grant, a new one"
        assert monotonic() <= permit.start_by
        stamps: Any = await judge.lrange(GateKeys("api").starts, 0, -1)  # type: ignore[misc]
        assert str(late[0].stamp).encode() not in stamps
        assert await in_use(judge) == theirs.held == 1

    play(story)


def test_waiters_the_gate_has_not_heard_of_are_made_known_after_a_grant(
    play: Callable[[Story], None],
) -> None:
    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(ONE), b.pump(ONE)
        held = await acquire(mine)
        waiting = await in_line(theirs)
        more = [asyncio.create_task(acquire(theirs)) for _ in range(3)]
        await asyncio.sleep(0.05)
        held.release()
        permit = await waiting
        for each in more:
            permit.release()
            permit = await each
        permit.release()
        await theirs.contact()
        assert await in_use(judge) == theirs.held == 0

    play(story)


def test_a_hint_that_comes_during_a_call_holds_beside_its_answer(play: Callable[[Story], None]) -> None:
    async def story(a: Process, b: Process, judge: Redis) -> None:
        mine, theirs = a.pump(ONE), b.pump(ONE)
        held = await acquire(mine)
        waiting = await in_line(theirs)
        send = theirs._line.call

        async def slow(*args: Any) -> Any:
            reply = await send(*args)
            theirs.wake(0.5)
            theirs.wake(0.9)
            return reply

        theirs._line.call = slow  # type: ignore[method-assign]
        await theirs.contact()
        assert theirs.answer is not None and theirs.answer.wait_s > 1
        assert theirs.alarm.due <= monotonic() + 0.5
        theirs._line.call = send  # type: ignore[method-assign]
        await theirs.contact()
        assert theirs.alarm.due > theirs.calls.spoke_at + 1, (
            "a hint from before the call is over with its answer"
        )
        held.release()
        (await waiting).release()

    play(story)
