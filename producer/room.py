"""Room in Redis for what a producer sends: near its memory limit the producer waits while workers drain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from limiter.keys import GateKeys
from limiter.view import read_gate
from producer.aside import aside
from producer.errors import ProducerError
from producer.facts import count_of
from producer.memory import Memory, read_memory
from producer.spool import Spool
from producer.texts import duration, size_text
from producer.who_runs import unserved

LOOK_EVERY_S = 1.0
FIRST_HOLD_S, LONGEST_HOLD_S = 0.05, 1.0
STILL_S, SAY_EVERY_S = 10.0, 60.0
PATIENCE_S = 600.0
DIP = 0.005
"""Share of the limit by which memory has to fall to count as a movement."""

T = TypeVar("T")


class RoomError(ProducerError):
    """Redis is full and nothing made room. Carries `batch`; what was enqueued stays, and its id goes on."""

    exit_code = 3

    def __init__(self, sentence: str, batch: str) -> None:
        super().__init__(sentence)
        self.batch = batch


class Room:
    """Lets one batch's enqueue go on as long as Redis has room, and waits where it has none.

    It looks at Redis' memory before `FULL` of the limit can be reached: after half of what was free at the
    last look, and once a second. Without a limit it looks once.

    Args:
        patience_s: raise after that long in which nothing moved: memory did not fall, no item of the flow's
            queue ended, and no worker of the flow was at work or paused.
        note: hears what it waits for, in words for a progress line, and '' when it goes on; None: `say` hears
            it at most once a minute.
        say: hears a sentence when nothing moves, at most once a minute.
        target: where workers find the flow, to say how one is started.
    """

    def __init__(
        self,
        client: Redis,
        spool: Spool,
        *,
        patience_s: float = PATIENCE_S,
        note: Callable[[str], None] | None = None,
        say: Callable[[str], None] = aside,
        target: str = "",
    ) -> None:
        self._client = client
        self._spool = spool
        self._patience_s = patience_s
        self._note = note or self._at_times
        self._say = say
        self._target = target or spool.flow
        self._turn = asyncio.Lock()
        self._unlimited = False
        self._free = 0.0
        self._look_at = self._say_at = self._note_at = 0.0
        self._still: _Still | None = None

    def must_look(self, size: int) -> bool:
        """Whether `take` looks at Redis: whoever has calls under way lets them arrive first."""
        return not self._unlimited and (size > self._free or monotonic() >= self._look_at)

    async def take(self, size: int) -> None:
        """Come back once about `size` bytes more may be sent.

        Raises:
            RoomError: nothing has moved for `patience_s`.
        """
        if self.must_look(size):
            async with self._turn:
                memory = await read_memory(self._client)
                if memory.room < size:
                    memory = await self._hold(size)
                self._look_at = monotonic() + LOOK_EVERY_S
                self._free, self._unlimited = memory.room / 2, not memory.limit
        self._free -= size

    async def through(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the call returns; one that Redis refuses for want of memory is made again when there is room.

        Raises:
            RoomError: nothing has moved for `patience_s`.
        """
        while True:
            try:
                answer = await call()
            except OutOfMemoryError:
                self._unlimited = False
                async with self._turn:
                    await self._hold(0)
            else:
                self._still = None
                return answer

    # --- waiting -----------------------------------------------------------------------------------

    async def _hold(self, size: int) -> Memory:
        """Until there is room for so many bytes. Not at once: what was refused is not asked again in the same moment."""
        pause_s, memory = FIRST_HOLD_S, await read_memory(self._client)
        try:
            while True:
                self._note(_words(memory))
                await self._heed(memory)
                await asyncio.sleep(pause_s)
                memory = await read_memory(self._client)
                if memory.room > size:
                    return memory
                pause_s = min(2 * pause_s, LONGEST_HOLD_S)
        finally:
            self._note("")

    async def _heed(self, memory: Memory) -> None:
        """Say it where nothing moves, and give up where that lasts."""
        now = monotonic()
        missing = await unserved(self._client, self._spool.flow, self._spool.limit, self._target)
        waiting, left = await self._waiting()
        if self._still is None:
            self._still = _Still(now, memory.used, waiting, left)
        at_work = not missing and memory.share < 1 and await self._goes_on()
        still_s = self._still.since(now, memory, waiting, left, at_work=at_work)
        if still_s > self._patience_s:
            raise RoomError(self._given_up(memory, missing, still_s, left), self._spool.batch)
        if still_s >= STILL_S and now >= self._say_at:
            self._say_at = now + SAY_EVERY_S
            self._say(f"{_fact(memory)}, and nothing has made room for {duration(still_s)}: {_mend(missing)}")

    def _at_times(self, text: str) -> None:
        if text and monotonic() >= self._note_at:
            self._note_at = monotonic() + SAY_EVERY_S
            self._say(text)

    async def _waiting(self) -> tuple[int, int]:
        """Items of the flow that wait or run, and those of this batch among them."""
        keys = GateKeys(self._spool.limit)
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.zcard(keys.queue(self._spool.flow))
            pipe.hget(keys.batch(self._spool.batch), "left")
            waiting, left = await pipe.execute()
        return int(waiting), count_of(left)

    async def _goes_on(self) -> bool:
        """Whether runs are at work, or paused: what somebody paused goes on when they say so."""
        gate = await read_gate(self._client, self._spool.limit)
        return gate is not None and (gate.in_use > 0 or gate.paused_for_s > 0)

    def _given_up(self, memory: Memory, missing: str, still_s: float, left: int) -> str:
        return (
            f"{_fact(memory)}, and nothing has made room for {duration(still_s)}: {_mend(missing)}. "
            f"{left:,} items of batch {self._spool.batch} are in the queue; enqueueing it again under "
            "its id adds what is missing"
        )


@dataclass
class _Still:
    """The least of everything that falls while workers drain, and when something last fell."""

    moved_at: float
    used: int
    waiting: int
    left: int

    def since(self, now: float, memory: Memory, waiting: int, left: int, *, at_work: bool) -> float:
        """Seconds since something moved."""
        dipped = memory.used < self.used - DIP * memory.limit
        if dipped or waiting < self.waiting or left < self.left or at_work:
            self.moved_at = now
            self.used = min(self.used, memory.used)
        self.waiting, self.left = min(self.waiting, waiting), min(self.left, left)
        return now - self.moved_at


def _words(memory: Memory) -> str:
    return f"waits for memory in Redis: {_used(memory)}" if memory.limit else "waits for memory in Redis"


def _fact(memory: Memory) -> str:
    return f"Redis is full ({_used(memory)})" if memory.limit else "Redis is full"


def _used(memory: Memory) -> str:
    """
    >>> _used(Memory(94_000_000, 100_000_000))
    '94 % of 100.0 MB used'
    """
    return f"{100 * memory.share:.0f} % of {size_text(memory.limit)} used"


def _mend(missing: str) -> str:
    more = "raise its maxmemory or free memory there"
    return f"{missing}; or {more}" if missing else more
