"""Which workers live: each says so in a key of its own that expires with its silence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.keys import ROOT, WORKERS, worker_key
from limiter.process import Process
from worker.aliveness import born, pid_space, surely_dead
from worker.registry import ServedFlow
from worker.run import HOST


def health_key(host: str = HOST) -> str:
    """arq's health line, one per host: `arq --check` looks there."""
    return f"{ROOT}health:{host}"


class WorkerInfo(msgspec.Struct):
    """What one living worker says of itself. Times are seconds since 1970.

    Attributes:
        limits: of all its flows, each once; `under`: the limit of each flow, which an older worker does not say.
        space, born: where its pid holds, and when the process started there; see `aliveness.py`.
    """

    process: str
    host: str
    pid: int
    flows: list[str]
    limits: list[str]
    running: int
    version: str
    started: float
    space: str = ""
    born: int = 0
    under: dict[str, str] = {}

    def serves(self, flow: str, limit: str) -> bool:
        """Whether it takes the jobs of a flow that wait under a limit."""
        if self.under:
            return self.under.get(flow) == limit
        return flow in self.flows and limit in self.limits


_infos = msgspec.json.Decoder(WorkerInfo)


def our_version() -> str:
    try:
        return version("pocketfleet")
    except PackageNotFoundError:
        return "unknown"


class Presence:
    """Announces one worker every two thirds of a lease; silent for two leases, it is forgotten."""

    def __init__(self, process: Process, served: list[ServedFlow], running: Callable[[], int]) -> None:
        self._client = process.client
        self._every_s = process.lease_s * 2 / 3
        self._running = running
        self._said = 0
        self._info = WorkerInfo(
            process=process.id,
            host=HOST,
            pid=os.getpid(),
            flows=[each.name for each in served],
            limits=sorted({each.limits.name for each in served}),
            running=0,
            version=our_version(),
            started=time.time(),
            space=pid_space(),
            born=born(os.getpid()),
            under={each.name: each.limits.name for each in served},
        )

    async def announce(self) -> None:
        """Until cancelled. Redis being away does not end it."""
        while True:
            with contextlib.suppress(RedisError, OSError):
                await self._say()
            await asyncio.sleep(self._every_s)

    async def _say(self) -> None:
        self._info.running = self._running()
        lifetime_ms = round(self._every_s * 3000)
        data = msgspec.json.encode(self._info)
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.set(worker_key(self._info.process), data, px=lifetime_ms)
            pipe.zadd(WORKERS, {self._info.process: time.time() + lifetime_ms / 1000})
            if self._said % 10 == 0:
                pipe.pexpire(WORKERS, 20 * lifetime_ms)
            pipe.set(health_key(), f"j_ongoing={self._info.running}", px=lifetime_ms)
            await pipe.execute()
        self._said += 1

    async def leave(self) -> None:
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._client.delete(worker_key(self._info.process))
                await self._client.zrem(WORKERS, self._info.process)


async def living_workers(client: Redis) -> list[WorkerInfo]:
    """Every worker that was heard within two leases, oldest first; not those seen to be dead from here."""
    names: list[Any] = await client.zrange(WORKERS, 0, -1)
    if not names:
        return []
    found = await client.mget([worker_key(name.decode(errors="replace")) for name in names])
    gone = [name for name, data in zip(names, found, strict=True) if data is None]
    if gone:
        await client.zrem(WORKERS, *gone)
    infos = [_readable(data) for data in found if data]
    living = (info for info in infos if info and not surely_dead(info.space, info.pid, info.born))
    return sorted(living, key=lambda info: info.started)


def _readable(data: bytes) -> WorkerInfo | None:
    """What a worker wrote; None for what none of ours would write."""
    try:
        return _infos.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
