"""A Redis that lost its data: what a process had claimed is still recorded when it ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import fakeredis
import redis.asyncio

from limiter.keys import GateKeys
from limiter.limits import Limits
from limiter.permit import acquire
from limiter.process import Process, open_process
from limiter.script import script
from limiter.sync import Claimed, Entry
from producer.enqueue import ENQUEUE
from tests import servers

KEYS = GateKeys("L")


class Crew:
    """Takes jobs and keeps them."""

    flows = ("f",)

    def __init__(self, places: int = 2) -> None:
        self.jobs: list[Claimed] = []
        self.places = places
        self.full = asyncio.Event()

    def room(self) -> int:
        return self.places - len(self.jobs)

    def take(self, jobs: list[Claimed], start_by: float, stamp: int) -> None:
        self.jobs += jobs
        if len(self.jobs) == self.places:
            self.full.set()

    def unheard(self) -> None:
        raise AssertionError("the gate noted nothing")

    def lost(self, job: str) -> None:
        raise AssertionError(f"{job} was lost")

    def abort(self, job: str) -> None:
        raise AssertionError(f"{job} was cancelled")


def test_runs_that_all_end_just_after_the_loss_are_recorded() -> None:
    async def go(url: str) -> None:
        client = redis.asyncio.Redis.from_url(url)
        process, crew = await open_process(url, lease_s=1.0), Crew()
        pump = process.pump(Limits("L", 2, lease_s=1.0))
        pump.employ(crew)
        args = ["", "", "b", "f", 1000, 0, "", 0, b"zero", 1, b"one"]
        assert await script(client, ENQUEUE)(keys=KEYS.all, args=args) == [2, 0, 0]
        async with asyncio.timeout(10):
            await crew.full.wait()
            await pump.contact()
            await client.flushall()
            for job in crew.jobs:
                pump.settle(Entry(job.id, job.attempt, 1, "completed", b"out"))
            await pump.contact()
        rows = await client.xrange(KEYS.out("b"))
        assert [row[b"i"] for _, row in rows] == [b"0", b"1"]
        await process.close()
        await client.aclose()

    with servers.running("valkey") as url:
        asyncio.run(go(url))


def test_a_holder_without_values_of_its_own_does_not_ask_without_pause_for_what_was_lost() -> None:
    async def go() -> int:
        server = fakeredis.FakeServer(version=(7,))
        giver, process = (
            Process(*(fakeredis.FakeAsyncRedis(server=server) for _ in range(2))) for _ in range(2)
        )
        (await acquire(giver.pump(Limits("L", 1)))).release()
        pump = process.pump("L")
        await acquire(pump)
        await giver.close()
        await process.client.flushall()
        answer, asked = pump._line.call, 0
        heard = asyncio.Event()

        async def call(keys: Any, args: Any) -> Any:
            nonlocal asked
            asked += 1
            heard.set()
            return await answer(keys, args)

        pump._line.call = call  # type: ignore[method-assign]
        pump.alarm.due = 0.0  # a heartbeat
        pump.kick()
        await asyncio.wait_for(heard.wait(), 5)
        await asyncio.sleep(0.2)
        await process.close()
        return asked

    assert asyncio.run(go()) <= 3, "and its last word"


def test_a_late_word_of_an_attempt_that_was_lost_leaves_the_newer_one_its_slot() -> None:
    """Its run was lost and would not end, and this process has claimed the job again meanwhile."""

    async def go() -> None:
        server = fakeredis.FakeServer(version=(7,))
        client = fakeredis.FakeAsyncRedis(server=server)
        process = Process(*(fakeredis.FakeAsyncRedis(server=server) for _ in range(2)))
        pump, crew = process.pump(Limits("L", 2)), Crew()
        pump.employ(crew)
        args = ["", "", "b", "f", 1000, 0, "", 0, b"zero", 1, b"one"]
        assert await script(client, ENQUEUE)(keys=KEYS.all, args=args) == [2, 0, 0]
        async with asyncio.timeout(10):
            await crew.full.wait()
            job, lost = crew.jobs[0], crew.jobs[0].attempt - 100
            pump.settle(Entry(job.id, lost, 1, "completed", b"late"))
            await pump.save(Entry(job.id, lost, 1, "save", b"late"))
        assert pump.held == 2 and job.id in pump.slots.claims
        pump.settle(Entry(job.id, job.attempt, 1, "completed", b"out"))
        assert pump.held == 1
        await process.close()
        await client.aclose()

    asyncio.run(go())


def test_a_process_that_says_again_what_it_runs_claims_none_of_it_anew() -> None:
    """More than one call can say: what has yet to be said stands in the queue meanwhile."""

    async def go(url: str) -> None:
        client = redis.asyncio.Redis.from_url(url)
        ours, theirs = await open_process(url), await open_process(url)
        pump, crew = ours.pump(Limits("L", 2000)), Crew(1500)
        pump.employ(crew)
        items = [word for index in range(1500) for word in (index, b"item")]
        assert await script(client, ENQUEUE)(keys=KEYS.all, args=["", "", "b", "f", 1000, 0, "", *items])
        async with asyncio.timeout(60):
            while not crew.full.is_set():
                await pump.contact()
            # the other finds its lease over, and gives the jobs back
            state = json.loads(await client.hget(KEYS.gate, "state"))
            await client.hset(KEYS.gate, "state", json.dumps(state | {"reap_at": 0}))
            await client.zadd(KEYS.leases, {ours.id: 1})
            await theirs.pump(Limits("L", 2000)).contact()
            crew.places = 1900
            await pump.contact()
            await pump.contact()
        assert pump.held == len(pump.slots.claims) == len(crew.jobs) == 1500
        await ours.close()
        await theirs.close()
        await client.aclose()

    with servers.running("valkey") as url:
        asyncio.run(go(url))
