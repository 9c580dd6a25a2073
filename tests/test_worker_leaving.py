"""A run that is stopped leaves nothing behind, neither while its large outcome is on its way to Redis nor before its
start; one that is handed back keeps what it has done."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from pocketflow import AsyncNode
from redis.asyncio import Redis

from limiter.keys import GateKeys
from limiter.process import open_process
from limiter.sync import Entry
from producer.batch import as_async, write_spool
from producer.cancel import cancel
from producer.enqueue import enqueue
from producer.flows import ThrottledAsyncParallelBatchFlow
from tests import servers
from worker.fleet_worker import FleetWorker
from worker.record import LARGE
from worker.registry import ServedFlow, named

NAME = "leaving"
KEYS = GateKeys(NAME)


class Big(AsyncNode):  # type: ignore[type-arg]
    async def post_async(self, shared: Any, prep_res: Any, exec_res: Any) -> None:
        shared["big"] = "x" * LARGE


class Paid(AsyncNode):  # type: ignore[type-arg]
    """Writes as much as its params say."""

    async def post_async(self, shared: Any, prep_res: Any, exec_res: Any) -> None:
        shared["paid"] = "x" * self.params["size"]
        times["paid"] += 1


class Last(AsyncNode):  # type: ignore[type-arg]
    async def post_async(self, shared: Any, prep_res: Any, exec_res: Any) -> None:
        del shared["paid"]


def two_nodes() -> AsyncNode[Any, Any]:
    first = Paid()
    first >> Last()
    return first


def served(start: AsyncNode[Any, Any]) -> ServedFlow:
    flow = ThrottledAsyncParallelBatchFlow(start, name=NAME, max_flows_per_minute=60)
    return named(flow, "leaving:flow", 15.0)


SERVED, PAID = served(Big()), served(two_nodes())
times: Counter[str] = Counter()


class SlowToStore:
    """The worker's client; what it is told to set it sets when it may, also when nobody waits for it any more."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self.begun, self.may = asyncio.Event(), asyncio.Event()

    async def set(self, *args: Any, **given: Any) -> Any:
        self.sent = asyncio.create_task(self._set(*args, **given))
        return await asyncio.shield(self.sent)

    async def _set(self, *args: Any, **given: Any) -> None:
        self.begun.set()
        await self.may.wait()
        await self._client.set(*args, **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with servers.running("valkey") as url:
        yield url


@contextlib.asynccontextmanager
async def serving(
    url: str, flow: ServedFlow = SERVED, *, anew: bool = True
) -> AsyncIterator[tuple[FleetWorker, SlowToStore]]:
    process = await open_process(url)
    if anew:
        await process.client.flushall()
    worker = FleetWorker(process, [flow], max_jobs=10, drain_s=5)
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(20):
        while not worker.crews:  # noqa: ASYNC110
            await asyncio.sleep(0)
        slow = SlowToStore(process.client)
        worker.crews[0].client = cast(Any, slow)
        yield worker, slow
        worker.stop()
        await running
        await process.close()


async def enqueue_one(slow: SlowToStore, data_dir: Path, **params: Any) -> None:
    source = as_async([params], "items")
    spool = await write_spool(data_dir, "b", SERVED, source, bytes, max_bytes=1000, where="items", first=None)
    await enqueue(cast(Redis, slow), spool)


@contextlib.asynccontextmanager
async def storing(url: str, data_dir: Path) -> AsyncIterator[tuple[FleetWorker, SlowToStore]]:
    """A worker that has begun to store the outcome of its one run."""
    async with serving(url) as (worker, slow):
        await enqueue_one(slow, data_dir)
        await slow.begun.wait()
        yield worker, slow


async def over(worker: FleetWorker) -> None:
    while worker.running:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def stopped_at_once(worker: FleetWorker) -> None:
    worker.stop(at_once=True)
    while not all(run.ending for run in worker.crews[0].runs.values()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def ended(client: Any) -> list[bytes]:
    while not await client.xlen(KEYS.out("b")):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return [row[b"s"] for _, row in await client.xrange(KEYS.out("b"))]


async def blobs(slow: SlowToStore) -> list[bytes]:
    await slow.sent
    return [key async for key in slow.scan_iter(KEYS.root + "blob:*")]


def test_a_cancelled_batch_gets_its_slot_back(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with storing(url, tmp_path) as (worker, slow):
            pump = worker.crews[0].pump
            assert pump.held == 1
            assert (await cancel(cast(Redis, slow), NAME, NAME, "b", 1)).running == 1
            while not all(run.ending for run in worker.crews[0].runs.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            slow.may.set()
            await over(worker)

            assert pump.held == 0
            assert not await blobs(slow)
            await pump.contact()
            await pump.contact()
            assert pump.answer is not None and pump.answer.in_use == 0
            rows = await slow.xrange(KEYS.out("b"))
            assert [row[b"s"] for _, row in rows] == [b"aborted"]

    asyncio.run(main())


def test_a_run_that_is_no_longer_ours_leaves_nothing(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with storing(url, tmp_path) as (worker, slow):
            pump, (job,) = worker.crews[0].pump, worker.crews[0].runs
            pump.slots.end(
                job, pump.slots.claims[job].attempt
            )  # as the pump does with a claim that the gate refused
            worker.crews[0].lost(job)
            slow.may.set()
            await over(worker)

            assert pump.held == 0
            assert not await blobs(slow)

    asyncio.run(main())


def test_a_run_that_is_told_to_leave_with_its_outcome_on_its_way_has_ended(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with storing(url, tmp_path) as (worker, slow):
            await stopped_at_once(worker)
            slow.may.set()
            await over(worker)

            assert worker.crews[0].pump.held == 0
            assert await ended(slow) == [b"completed"]
            assert await slow.zcard(KEYS.queue(NAME)) == 0

    asyncio.run(main())


def test_a_large_checkpoint_that_is_on_its_way_goes_back_with_its_run(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        times.clear()
        async with serving(url, PAID) as (worker, slow):
            await enqueue_one(slow, tmp_path, size=LARGE)
            await slow.begun.wait()
            await stopped_at_once(worker)
            slow.may.set()
            await over(worker)
        async with serving(url, PAID, anew=False) as (_, slow):
            slow.may.set()
            assert await ended(slow) == [b"completed"]
            assert times["paid"] == 1

    asyncio.run(main())


def test_a_small_checkpoint_that_is_on_its_way_goes_back_with_its_run(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        times.clear()
        async with serving(url, PAID) as (worker, slow):
            crew, save = worker.crews[0], worker.crews[0].pump.save

            def save_and_leave(entry: Entry) -> asyncio.Future[None]:
                (run,) = crew.runs.values()
                asyncio.get_running_loop().call_soon(run.stop, "hand")  # before any answer can have come
                worker.stop(at_once=True)
                return save(entry)

            crew.pump.save = save_and_leave  # type: ignore[method-assign]
            await enqueue_one(slow, tmp_path, size=1)
            await worker.stopped.wait()
            assert not worker.running and not await slow.xlen(KEYS.out("b"))
        async with serving(url, PAID, anew=False) as (_, slow):
            slow.may.set()
            assert await ended(slow) == [b"completed"]
            assert times["paid"] == 1

    asyncio.run(main())


def test_a_job_that_arrives_after_the_stop_goes_back_without_a_start(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(url) as (worker, slow):
            crew, ask = worker.crews[0], worker.crews[0].room

            def room() -> int:
                asked = ask()
                worker.stop()
                return asked

            await crew.pump.contact()
            crew.room = room  # type: ignore[method-assign]
            await enqueue_one(slow, tmp_path)
            await worker.stopped.wait()
            for _ in range(2):  # the answer to the call in flight, and to the next, which gives the job back
                await crew.pump.contact()

            assert not slow.begun.is_set()
            assert await slow.zcard(KEYS.queue(NAME)) == 1
            assert crew.pump.answer is not None
            assert (crew.pump.answer.in_use, crew.pump.answer.used) == (0, 0)

    asyncio.run(main())
