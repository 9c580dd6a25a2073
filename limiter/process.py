"""What one event loop has open at Redis: an id, a client, its wake-ups, a pump per limit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import uuid
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from time import monotonic
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from limiter.circle import Circles
from limiter.client import ANSWER_S, open_client, open_pubsub_client, open_sync_client
from limiter.connect import find_redis
from limiter.control import may_be_poison
from limiter.errors import LimitsError
from limiter.limits import Limits
from limiter.line import Line
from limiter.pump import Pump
from limiter.renewal import Renewal
from limiter.settings import FleetSettings, load
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
        """The pump of a limit; two different values for one name are refused."""
        name = limits if isinstance(limits, str) else limits.name
        pump = self.pumps.get(name)
        if pump is None:
            if isinstance(limits, Limits):
                _refuse_other_values(self, limits)
            pump = self.pumps[name] = Pump(self, limits)
            self._tasks.append(asyncio.create_task(pump.serve(), name=f"pocketfleet-pump-{name}"))
        elif pump.limits is not limits and isinstance(limits, Limits) and pump.limits != limits:
            if pump.limits is not None:
                raise _two_values(pump.limits, limits)
            _refuse_other_values(self, limits)
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
        pause_s, trouble = 0.05, Trouble(keys[0])
        while True:
            sent = monotonic()
            try:
                reply = await line.call(keys, args)
                trouble.over()
                return reply, sent
            except (RedisError, OSError) as error:
                if isinstance(error, ResponseError) and str(error).startswith(("NOLIMITS", "CROSSSLOT")):
                    raise
                poisoned = isinstance(error, ResponseError) and may_be_poison(error)
                if not (poisoned and await mend()):
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


def _two_values(one: Limits, other: Limits) -> LimitsError:
    """Names what differs as it is typed for `limit()`."""
    differs = [each.name for each in fields(Limits) if getattr(one, each.name) != getattr(other, each.name)]

    def shown(limits: Limits) -> str:
        return ", ".join(f"{TYPED.get(key, key)}={getattr(limits, key)}" for key in differs)

    return LimitsError(
        f"limit '{one.name}' is used with two different values in this process: {shown(one)} and "
        f"{shown(other)}; use one",
        key="limit",
        value=one.name,
    )


TYPED = {"max_per_window": "max_per_minute"}


def _refuse_other_values(process: Process, limits: Limits) -> None:
    """The loops of one process must agree too, that of `with limit()` among them."""
    for loop, opening in list(_of_loop.items()):
        if loop.is_closed() or not opening.done() or opening.cancelled() or opening.exception():
            continue
        pump = opening.result().pumps.get(limits.name)
        if opening.result() is not process and pump and pump.limits not in (None, limits):
            assert pump.limits is not None
            raise _two_values(pump.limits, limits)


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


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Future[Process]] = (
    weakref.WeakKeyDictionary()
)
_recent: tuple[asyncio.AbstractEventLoop, Process] | None = None  # what `open_already` last found


def _forget_all() -> None:
    global _recent
    _of_loop.clear()
    _recent = None


os.register_at_fork(after_in_child=_forget_all)


async def current_process(settings: FleetSettings | None = None) -> Process:
    """The process of the running loop, opened at its first use and closed with the loop.

    Joins the Redis of POCKETFLEET_REDIS_URL, or the embedded server, which it starts if none answers.
    """
    loop = asyncio.get_running_loop()
    opening = _of_loop.get(loop)
    if opening is None:
        opening = loop.create_task(_open_default(settings or load(FleetSettings)))
        _of_loop[loop] = opening
        opening.add_done_callback(lambda task: _forget_failed(loop, task))
    return await asyncio.shield(opening)


def adopt(process: Process) -> None:
    """Make it the process of the running loop, unless that has one: `limit()` then shares its pumps."""
    loop = asyncio.get_running_loop()
    if loop not in _of_loop:
        opened: asyncio.Future[Process] = loop.create_future()
        opened.set_result(process)
        _of_loop[loop] = opened
        process.on_close(lambda: _of_loop.pop(loop, None))


def open_already(loop: asyncio.AbstractEventLoop) -> Process | None:
    """The process of the running `loop` if it is open: what `current_process` gives, without a wait."""
    global _recent
    recent = _recent
    if recent is not None and recent[0] is loop and not recent[1].closed:
        return recent[1]
    opening = _of_loop.get(loop)
    if opening is None or not opening.done() or opening.cancelled() or opening.exception() is not None:
        return None
    _recent = (loop, opening.result())
    return opening.result()


def _forget_failed(loop: asyncio.AbstractEventLoop, task: asyncio.Future[Process]) -> None:
    if task.cancelled() or task.exception() is not None:
        _of_loop.pop(loop, None)


async def _open_default(settings: FleetSettings) -> Process:
    place = await asyncio.to_thread(find_redis, settings, start=True)
    process = await open_process(place.url, lease_s=settings.lease_s, stall_limit_s=settings.stall_limit_s)
    process.on_close(place.close)
    guard = asyncio.create_task(_close_with_loop(process), name="pocketfleet-guard")
    process.keep(guard)
    return process


async def _close_with_loop(process: Process) -> None:
    """`asyncio.run` cancels every task at its end: that is the moment to give everything back."""
    try:
        await asyncio.Event().wait()
    finally:
        await process.close()
