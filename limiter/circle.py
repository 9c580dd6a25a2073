"""Two gates that wait for each other: known from what long waits say of themselves, and ended with an error.

A run that is inside one gate and has waited for another for some seconds is counted, per process, in a hash
of the gate it waits for. Where every slot of `a` is held by a run that waits for `b`, and every slot of `b`
by one that waits for `a`, nothing will ever move. A holder that is at work is counted nowhere, so a slow
provider is never taken for a circle. Only circles of two gates are found.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from limiter.errors import WaitCircle
from limiter.held import held_names
from limiter.keys import GateKeys

if TYPE_CHECKING:
    from limiter.process import Process

log = logging.getLogger("pocketfleet.limiter")

AFTER_S = 5.0
"""A wait that is shorter is told to nobody."""
LOOK_S = 2.5
"""How often a process with such waits looks; a circle must be seen twice."""


class _Wait:
    __slots__ = ("circle", "held", "scope", "since", "wanted")

    def __init__(self, wanted: Sequence[str], held: Sequence[str]) -> None:
        self.wanted = wanted
        self.held = held
        self.since = monotonic()
        self.scope = asyncio.timeout(None)
        self.circle: tuple[str, str] | None = None

    def closes(self, held: str, wanted: str) -> bool:
        return held in self.held and wanted in self.wanted

    def end(self, held: str, wanted: str) -> None:
        self.circle = (held, wanted)
        self.scope.reschedule(asyncio.get_running_loop().time())


class Circles:
    """The waits of one process that are made inside a held gate."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waits: list[_Wait] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._told: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watched(self, wanted: Sequence[str]) -> AsyncIterator[None]:
        """Wait for these gates inside the block.

        Raises:
            WaitCircle: what waits in the block closes a circle, so it was ended.
        """
        held = held_names()
        if not held:
            yield
            return
        wait = _Wait(wanted, held)
        self._waits.append(wait)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look(), name="pocketfleet-circles")
        try:
            async with wait.scope:
                yield
        except TimeoutError:
            if wait.circle is None:
                raise
            raise WaitCircle(*wait.circle, monotonic() - wait.since) from None
        finally:
            self._waits.remove(wait)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _look(self) -> None:
        while self._waits:
            await asyncio.sleep(LOOK_S)
            long = [wait for wait in self._waits if monotonic() - wait.since > AFTER_S]
            try:
                await self._say(long)
                for held, wanted in {(h, w) for wait in long for h in wait.held for w in wait.wanted}:
                    await self._check(held, wanted)
            except (RedisError, OSError) as error:
                log.debug("circle.not_looked error=%s", type(error).__name__)

    async def _say(self, waits: list[_Wait]) -> None:
        """Per gate waited for: which gates those who wait are inside of, and how many. Forgotten by itself."""
        rows: dict[str, Counter[str]] = {}
        for wait in waits:
            for wanted in wait.wanted:
                rows.setdefault(wanted, Counter()).update(set(wait.held))
        client, me = self._process.client, self._process.id
        if not rows and not self._told:
            return
        seconds, micros = await client.time()
        until = seconds * 1_000_000 + micros + round(3e6 * LOOK_S)
        async with client.pipeline(transaction=False) as pipe:
            for name in self._told - rows.keys():
                pipe.hdel(GateKeys(name).nested, me)
            for name, counts in rows.items():
                pipe.hset(GateKeys(name).nested, me, json.dumps({"until": until, "held": counts}))
                pipe.pexpire(GateKeys(name).nested, round(3e3 * LOOK_S))
            await pipe.execute()
        self._told = set(rows)

    async def _check(self, held: str, wanted: str) -> None:
        """See whether `held` and `wanted` wait for each other; the second time, end one wait in the fleet."""
        first, second = GateKeys(held), GateKeys(wanted)
        async with self._process.client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hgetall(first.nested)
            pipe.hgetall(second.nested)
            pipe.hget(first.gate, "state")
            pipe.hget(second.gate, "state")
            now, inside_second, inside_first, *states = await pipe.execute()
        now_us = now[0] * 1_000_000 + now[1]
        wait_for_first = _counts(inside_second, wanted, now_us)
        wait_for_second = _counts(inside_first, held, now_us)
        closed = _all_wait(states[0], wait_for_second) and _all_wait(states[1], wait_for_first)
        if not closed:
            del self._seen[held, wanted]
            return
        self._seen[held, wanted] += 1
        victim = max(wait_for_first.keys() | wait_for_second.keys())
        if self._seen[held, wanted] >= 2 and victim == self._process.id:
            self._end_youngest(held, wanted)

    def _end_youngest(self, held: str, wanted: str) -> None:
        for wait in reversed(self._waits):
            if wait.circle is None and wait.closes(held, wanted):
                log.warning("circle.ended held=%s wanted=%s", held, wanted)
                self._seen.clear()
                wait.end(held, wanted)
                return


def _counts(rows: dict[bytes, bytes], held: str, now_us: int) -> dict[str, int]:
    """Per process, how many of its waits for one gate are made inside the gate `held`."""
    found = {}
    for process, text in rows.items():
        row: dict[str, Any] = json.loads(text)
        if row["until"] > now_us and held in row["held"]:
            found[process.decode()] = int(row["held"][held])
    return found


def _all_wait(state: bytes | None, waiting: dict[str, int]) -> bool:
    """Whether the level is what refuses at that gate, and each of its slots is held by one of `waiting`."""
    if state is None:
        return False
    gate = json.loads(state)
    in_use = int(gate["in_use"])
    return 0 < in_use <= sum(waiting.values()) and in_use >= int(gate["level"])
