"""The claim "an arq job": our enqueue, our worker, and arq's own `Job` that reads along at every stage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis
from arq.jobs import (
    Job,
    JobResult,
    JobStatus,
    ResultNotFound,
    SerializationError,
    deserialize_job,
    serialize_job,
)
from pocketflow import AsyncNode

from limiter.keys import GateKeys
from limiter.process import open_process
from limiter.script import script
from limiter.sync import SYNC, Answer, Call, Entry, read_answer
from producer.batch import as_async, write_spool
from producer.enqueue import enqueue
from producer.flows import ThrottledAsyncParallelBatchFlow
from producer.follow import Ended, outcomes
from tests import servers
from worker import codec
from worker.contract import decode_job, encode_job, job_id, payload_key, queue_key
from worker.fleet_worker import FleetWorker
from worker.registry import named
from worker.run import HOST
from worker.store import Bases

NAME = "contract"
PARKED = 2**52


class Step(AsyncNode):  # type: ignore[type-arg]
    """Runs until `go` is set, if it is told to wait."""

    began: asyncio.Event
    go: asyncio.Event

    began_at: float

    async def exec_async(self, prep_res: Any) -> None:
        type(self).began_at = time.time()
        self.began.set()
        if self.params.get("waits"):
            await self.go.wait()
        if self.params.get("fails"):
            raise ValueError("unlucky user")

    async def post_async(self, shared: Any, prep_res: Any, exec_res: Any) -> str:
        return "done"


class Scene:
    """A server, a flow of one step, arq's client."""

    def __init__(self, url: str, data_dir: Path, keep_result_s: float) -> None:
        self.url = url
        self.data_dir = data_dir
        self.arq = ArqRedis.from_url(url)
        self.flow = ThrottledAsyncParallelBatchFlow(Step(), name=NAME, keep_result_s=keep_result_s)
        self.served = named(self.flow, "contract:flow", 15.0)
        Step.began, Step.go = asyncio.Event(), asyncio.Event()

    async def enqueue(self, *items: dict[str, Any]) -> list[Job]:
        source = as_async(list(items), "items")
        spool = await write_spool(
            self.data_dir, "b", self.served, source, bytes, max_bytes=1000, where="items", first=None
        )
        await enqueue(self.arq, spool)
        return [self.job(index) for index in range(len(items))]

    def job(self, index: int) -> Job:
        return Job(job_id(NAME, "b", index), self.arq, queue_key(NAME, NAME), codec.decode)

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[None]:
        process = await open_process(self.url)
        worker = FleetWorker(process, [self.served], max_jobs=10, drain_s=5)
        running = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            worker.stop()
            await running
            await process.close()

    async def ended(self, count: int) -> list[Ended]:
        found: list[Ended] = []
        async with asyncio.timeout(20):
            async for some in outcomes(self.arq, NAME, "b"):
                found += some
                if len(found) >= count:
                    break
        return found

    async def call(
        self, seq: int, *entries: Entry, jobs: int = 0, held: int = 0, leave: bool = False
    ) -> Answer:
        """One call of a process that is nothing but its calls."""
        limits = self.served.limits.as_argument()
        call = Call("p", seq, held, 0, jobs, limits=limits, leave=leave, flows=[NAME], entries=list(entries))
        return read_answer(await script(self.arq, SYNC)(keys=GateKeys(NAME).all, args=call.argv()))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with servers.running("valkey") as url:
        yield url


@contextlib.asynccontextmanager
async def opened(url: str, data_dir: Path, keep_result_s: float = 60.0) -> AsyncIterator[Scene]:
    scene = Scene(url, data_dir, keep_result_s)
    await scene.arq.flushall()
    try:
        yield scene
    finally:
        await scene.arq.aclose()


async def gone(job: Job) -> None:
    while await job.status() is not JobStatus.not_found:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def no_result_yet(job: Job) -> bool:
    try:
        await job.result(timeout=0.05, poll_delay=0.02)
    except TimeoutError:
        return True
    return False


def test_a_job_is_queued_then_in_progress_then_complete(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            params = {"waits": True, "user": "ü", "n": [1, 2.5, None]}
            assert await scene.job(0).status() is JobStatus.not_found
            assert await scene.job(0).info() is None
            (job,) = await scene.enqueue(params)

            assert await job.status() is JobStatus.queued
            info = await job.info()
            assert info is not None
            assert (info.function, tuple(info.args), info.kwargs) == (NAME, (params,), {})
            assert abs(info.enqueue_time.timestamp() - time.time()) < 60
            assert info.score is not None and 0 < info.score < 1_000_000
            assert await no_result_yet(job)

            async with scene.worker():
                async with asyncio.timeout(20):
                    await Step.began.wait()
                assert await job.status() is JobStatus.in_progress
                info = await job.info()
                assert info is not None and tuple(info.args) == (params,) and info.score is not None
                assert info.score > PARKED, "arq's result() goes on waiting while it stands in the queue"
                assert await no_result_yet(job)
                waiting = asyncio.create_task(job.result(timeout=20, poll_delay=0.02))
                Step.go.set()
                assert await waiting == "done"

            assert await job.status() is JobStatus.complete
            result = await job.info()
            assert isinstance(result, JobResult)
            assert (result.success, result.result, result.function) == (True, "done", NAME)
            assert tuple(result.args) == (params,)
            assert (result.queue_name, result.job_id) == (queue_key(NAME, NAME), job.job_id)
            assert result.enqueue_time <= result.start_time <= result.finish_time
            assert result.score is None

    asyncio.run(main())


def test_a_failed_run_is_raised_with_its_text(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            (job,) = await scene.enqueue({"fails": True})
            async with scene.worker():
                with pytest.raises(SerializationError, match=r"^ValueError: unlucky user$"):
                    await job.result(timeout=20, poll_delay=0.02)
            info = await job.result_info()
            assert info is not None and not info.success
            assert await job.status() is JobStatus.complete

    asyncio.run(main())


def test_a_refused_run_is_deferred_until_it_is_due(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            (job,) = await scene.enqueue({"n": 1})
            (claimed,) = (await scene.call(1, jobs=1)).jobs
            assert await job.status() is JobStatus.in_progress

            refused_at = time.time()
            await scene.call(2, Entry(claimed.id, claimed.attempt, 1, "refuse", 1_500_000))

            assert await job.status() is JobStatus.deferred
            info = await job.info()
            assert info is not None and info.score == PARKED and tuple(info.args) == ({"n": 1},)
            assert await no_result_yet(job)
            await scene.call(3, leave=True)
            async with scene.worker():
                assert await job.result(timeout=20, poll_delay=0.02) == "done"
                (ended,) = await scene.ended(1)
            assert ended.outcome.attempts == {"tries": 1, "refusals": 1}
            assert ended.outcome.started - refused_at >= 1.5

    asyncio.run(main())


def test_a_job_that_is_handed_back_is_queued_again(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            first, second = await scene.enqueue({"n": 0}, {"n": 1})
            claims = (await scene.call(1, jobs=2)).jobs
            places = [Entry(each.id, each.attempt, 1, "hand") for each in claims]
            await scene.call(2, *places, leave=True)

            assert [await job.status() for job in (first, second)] == [JobStatus.queued] * 2
            infos = [await job.info() for job in (first, second)]
            assert [info.score for info in infos if info] == [1, 1001], "each at its own place"

    asyncio.run(main())


def test_a_result_goes_when_its_time_is_over(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path, keep_result_s=0.5) as scene:
            (job,) = await scene.enqueue({"n": 1})
            async with scene.worker():
                assert await job.result(timeout=20, poll_delay=0.02) == "done"
                async with asyncio.timeout(20):
                    await gone(job)
            with pytest.raises(ResultNotFound):
                await job.result()

    asyncio.run(main())


def test_without_keep_result_s_the_outcome_is_in_the_stream_alone(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path, keep_result_s=0) as scene:
            job, _ = await scene.enqueue({"n": 1}, {"fails": True})
            async with scene.worker():
                ended = await scene.ended(2)
            assert sorted(each.outcome.status for each in ended) == ["completed", "failed"]
            assert await job.status() is JobStatus.not_found
            with pytest.raises(ResultNotFound):
                await job.result()

    asyncio.run(main())


def test_nothing_is_left_but_what_has_a_lifetime(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            jobs = await scene.enqueue(*({"n": n, "fails": n % 5 == 0} for n in range(25)))
            async with scene.worker():
                await scene.ended(25)

            keys = GateKeys(NAME)
            left = {key.decode() async for key in scene.arq.scan_iter()}
            arq = {key for key in left if key.startswith("arq:")}
            assert arq == {"arq:result:" + job.job_id for job in jobs}
            of_batch = {keys.batch("b"), keys.done("b"), keys.out("b")}
            of_gate = {keys.gate, keys.flows}
            of_all = {"pocketfleet:batches", "pocketfleet:health:" + HOST}
            assert left - arq - {keys.samples} == of_batch | of_gate | of_all
            for key in left - of_all:
                assert await scene.arq.pttl(key) > 0, key
            gate = await scene.arq.hgetall(keys.gate)
            assert json.loads(gate[b"state"])["in_use"] == 0
            assert not [field for field in gate if field[:2] in (b"p:", b"a:")], "no process is left"

    asyncio.run(main())


def test_our_payload_is_arqs_own_record_in_msgpack() -> None:
    params = {"user": "ü", "tags": ["a", 1, 2.5, None, True, b"x"]}
    ours = encode_job(NAME, params, 1_700_000_000_123)

    assert ours == serialize_job(NAME, (params,), {}, None, 1_700_000_000_123, serializer=codec.encode)
    theirs = deserialize_job(ours, deserializer=codec.decode)
    assert (theirs.function, tuple(theirs.args), theirs.kwargs) == (NAME, (params,), {})
    assert theirs.job_try is None
    assert theirs.enqueue_time.timestamp() == 1_700_000_000.123
    assert decode_job(ours).params == params


def test_what_stands_in_the_queue_is_what_encode_job_makes(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            (job,) = await scene.enqueue({"user": "ü", "n": 1})
            payload = await scene.arq.get(payload_key(job.job_id))
            assert payload is not None
            found = decode_job(payload)
            assert payload == encode_job(NAME, {"user": "ü", "n": 1}, found.enqueue_ms)

    asyncio.run(main())


def test_a_run_that_waits_for_its_batchs_store_does_not_start_late(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Bases._fetch

    async def slow(self: Bases, limit: str, batch: str) -> bytes:
        await asyncio.sleep(1.0)  # the slack is 60 s / 240
        return await fetch(self, limit, batch)

    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            scene.flow.max_flows_per_minute = 10
            scene.served = named(scene.flow, "contract:flow", 15.0)
            await scene.enqueue({"n": 1})
            async with scene.worker():
                (ended,) = await scene.ended(1)
                stamps = await scene.arq.lrange(GateKeys(NAME).starts, 0, -1)
            assert ended.outcome.status == "completed" and ended.outcome.attempts == {}
            assert len(stamps) == 1, "the start that was not used came back"
            assert Step.began_at <= int(stamps[0]) / 1e6, "the latest moment its run may start"

    monkeypatch.setattr(Bases, "_fetch", slow)
    asyncio.run(main())


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def test_a_planted_pickle_is_refused_and_never_run(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url, tmp_path) as scene:
            first, _ = await scene.enqueue({"n": 0}, {"n": 1})
            bomb: dict[str, Any] = {"t": None, "f": NAME, "a": (Bomb(tmp_path / "proof"),), "k": {}, "et": 0}
            await scene.arq.set(payload_key(first.job_id), pickle.dumps(bomb))
            async with scene.worker():
                ended = sorted(await scene.ended(2), key=lambda each: each.index)

            assert [each.outcome.status for each in ended] == ["failed", "completed"]
            failure = ended[0].outcome.failure
            assert failure is not None and failure.type == "CorruptJob"
            assert not (tmp_path / "proof").exists()

    asyncio.run(main())
