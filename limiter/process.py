"""What one event loop has open at Redis: an id, a client, its wake-ups, a pump per limit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from limiter.circle import Circles
from limiter.client import ANSWER_S, open_client, open_pubsub_client, open_sync_client
from limiter.control import may_be_poison
from limiter.errors import LimitClosed
from limiter.limits import Limits
from limiter.line import Line
from limiter.loops import refuse_other_values, two_values
from limiter.pump import Pump
from limiter.renewal import Renewal
from limiter.sync import Abort, Grant
from limiter.together import Joint
from limiter.trouble import Trouble
from limiter.wake import WakeCalls

log = logging.getLogger("pocketfleet.limiter")


def new_process_id() -> str:
    """Host, pid and a random part: new with every start and every fork."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:60] or "host"
    return f"{host}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


class Process:
    """Serves every limit that one event loop uses. Make one with `open_process`, end it with `close`."""

    def __init__(
        self,
        client: AsyncRedis,
        wake_client: AsyncRedis,
        *,
        renewal_client: Redis | None = None,
        lease_s: float = 15.0,
        stall_limit_s: float = 300.0,
    ) -> None:
        self.id = new_process_id()
        self.client = client
        self.lease_s = lease_s
        self.pumps: dict[str, Pump] = {}
        self.circles = Circles(self)
        self._joints: dict[tuple[str, ...], Joint] = {}
        self._wake_client = wake_client
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._calls = WakeCalls(wake_client, self.id, self._ring, self._ask_all)
        self._renewal = None
        if renewal_client is not None:
            self._renewal = Renewal(self, renewal_client, lease_s, stall_limit_s)
        self._closers: list[Callable[[], object]] = []
        self._guard: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe, so that no wake-up of the first call is missed."""
        self._tasks.append(asyncio.create_task(self._calls.listen(), name="pocketfleet-wake"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self._calls.ready.wait()
        if self._renewal is not None:
            self._renewal.start()

    def pump(self, limits: Limits | str) -> Pump:
        """The pump of a limit; two different values for one name are refused, and any new name once closed."""
        name = limits if isinstance(limits, str) else limits.name
        pump = self.pumps.get(name)
        if pump is None:
            if self.closed:
                raise LimitClosed(name)
            if isinstance(limits, Limits):
                refuse_other_values(self, limits)
            pump = self.pumps[name] = Pump(self, limits)
            self._tasks.append(asyncio.create_task(pump.serve(), name=f"pocketfleet-pump-{name}"))
        elif pump.limits is not limits and isinstance(limits, Limits) and pump.limits != limits:
            if pump.limits is not None:
                raise two_values(pump.limits, limits)
            refuse_other_values(self, limits)
            pump.adopt(limits)
        return pump

    def joint(self, pumps: Sequence[Pump]) -> Joint:
        """Who waits here for these gates at once; `pumps` in order of their names."""
        names = tuple([pump.name for pump in pumps])
        joint = self._joints.get(names)
        if joint is None:
            joint = self._joints[names] = Joint(self, pumps)
            for pump in pumps:
                pump.joints.append(joint)
        return joint

    async def ask(
        self, line: Line, keys: Sequence[str], args: Sequence[Any], mend: Callable[[], Awaitable[bool]]
    ) -> tuple[Any, float]:
        """Send a call until it is answered; a gate answers a repeated number as the first time.

        `mend` is awaited when the script met what it cannot read.

        Returns the reply and when it was asked for, monotonic seconds.

        Raises:
            ResponseError: a gate has no values, or the gates lie in different slots; nothing was noted.
        """
        pause_s, trouble = 0.05, None
        while True:
            sent = monotonic()
            try:
                reply = await line.call(keys, args)
                if trouble is not None:
                    trouble.over()
                return reply, sent
            except (RedisError, OSError) as error:
                if isinstance(error, ResponseError) and str(error).startswith(("NOLIMITS", "CROSSSLOT")):
                    raise
                poisoned = isinstance(error, ResponseError) and may_be_poison(error)
                if not (poisoned and await mend()):
                    trouble = trouble or Trouble(keys[0])
                    trouble.met(error)
                if isinstance(error, ReadOnlyError):
                    await self.reconnect()
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 2)

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold a reference to a task that lives as long as the loop."""
        self._guard = task

    def on_close(self, close: Callable[[], object]) -> None:
        """Run `close` after everything was given back."""
        self._closers.append(close)

    async def close(self) -> None:
        """Give everything back and let go of Redis."""
        self.closed = True
        for pump in self.pumps.values():
            pump.closing = True
            pump.kick()
        pumps = [task for task in self._tasks if task.get_name() != "pocketfleet-wake"]
        if pumps:
            _, late = await asyncio.wait(pumps, timeout=5.0)
            for task in late:
                task.cancel()
        await self._let_go()

    async def _let_go(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._renewal is not None:
            self._renewal.stop()
        self.circles.stop()
        for joint in self._joints.values():
            await joint.close()
        for client in (self.client, self._wake_client):
            with contextlib.suppress(Exception):
                await client.aclose()
        while self._closers:
            self._closers.pop()()

    def _ring(self, limit: str, what: float | Grant | Abort) -> None:
        pump = self.pumps.get(limit)
        if pump is None:
            return
        if isinstance(what, Grant):
            pump.granted(what)
        elif isinstance(what, Abort):
            pump.abort(what)
        else:
            pump.wake(what)

    def _ask_all(self) -> None:
        for pump in self.pumps.values():
            if pump.calls.joined:
                pump.kick()

    def call_soon(self, act: Callable[[], None]) -> None:
        """Run `act` on the loop, from any thread."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(act)

    async def reconnect(self) -> None:
        """We are connected to what was the primary: whoever answers at the address now may be the new one."""
        self._calls.reconnect()
        with contextlib.suppress(Exception):
            await self.client.connection_pool.disconnect(inuse_connections=False)


async def open_process(url: str, *, lease_s: float = 15.0, stall_limit_s: float = 300.0) -> Process:
    """A process at the Redis behind `url`, with its renewal thread running."""
    process = Process(
        open_client(url, answer_s=min(ANSWER_S, lease_s / 3)),
        open_pubsub_client(url),
        renewal_client=open_sync_client(url, answer_s=min(2.0, lease_s * 2 / 15)),
        lease_s=lease_s,
        stall_limit_s=stall_limit_s,
    )
    await process.start()
    return process
