"""A Redis that lost its data: what a process had claimed is still recorded when it ends."""

from __future__ import annotations

import asyncio

import redis.asyncio

from limiter.keys import GateKeys
from limiter.limits import Limits
from limiter.process import open_process
from limiter.script import script
from limiter.sync import Claimed, Entry
from producer.enqueue import ENQUEUE
from tests import servers

KEYS = GateKeys("L")


class Crew:
    """Takes jobs and keeps them."""

    flows = ("f",)

    def __init__(self) -> None:
        self.jobs: list[Claimed] = []
        self.full = asyncio.Event()

    def room(self) -> int:
        return 2 - len(self.jobs)

    def take(self, jobs: list[Claimed], start_by: float, stamp: int) -> None:
        self.jobs += jobs
        if len(self.jobs) == 2:
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
