"""Gates that wait for each other: known from what long waits say of themselves, and ended with an error.

A run that is inside one gate and has waited for another for some seconds is noted, per process, in a hash
of the gate it waits for. Where every slot of `a` is held by a run that waits for `b`, every slot of `b` by
one that waits for `c`, and so on round to `a`, nothing will ever move. A holder that is at work is noted
nowhere, so a slow provider is never taken for a circle.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
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
MOST_GATES = 64
"""A look goes no further than about so many gates."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What a row or a state raises that was poisoned: it says nothing. Rows are forgotten, a state is mended by calls."""

Gates = tuple[str, ...]
Inside = dict[str, dict[str, set[int]]]
"""Of the waits for one gate: process -> gate they are inside of -> their numbers."""


class _Wait:
    __slots__ = ("circle", "held", "number", "scope", "since", "wanted")
    _numbers = itertools.count()

    def __init__(self, wanted: Sequence[str], held: Sequence[str]) -> None:
        self.number = next(self._numbers)
        self.wanted = wanted
        self.held = held
        self.since = monotonic()
        self.scope = asyncio.timeout(None)
        self.circle: Gates = ()

    def step_of(self, circle: Gates) -> int | None:
        """Where in the circle it is: inside that gate, waiting for the next."""
        for step, held in enumerate(circle):
            if held in self.held and circle[(step + 1) % len(circle)] in self.wanted:
                return step
        return None

    def end(self, circle: Gates) -> None:
        """`circle` as this wait sees it: it is inside the first gate and waits for the second."""
        self.circle = circle
        self.scope.reschedule(asyncio.get_running_loop().time())


class Circles:
    """The waits of one process that are made inside a held gate."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waits: list[_Wait] = []
        self._seen: Counter[Gates] = Counter()
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
            if not wait.circle:
                raise
            raise WaitCircle(wait.circle, monotonic() - wait.since) from None
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
                await self._check({held for wait in long for held in wait.held})
            except (RedisError, OSError) as error:
                log.debug("circle.not_looked error=%s", type(error).__name__)

    async def _say(self, waits: list[_Wait]) -> None:
        """Per gate waited for: which gates those who wait are inside of, and who. Forgotten by itself."""
        rows: dict[str, dict[str, list[int]]] = {}
        for wait in waits:
            for wanted in wait.wanted:
                for held in set(wait.held):
                    rows.setdefault(wanted, {}).setdefault(held, []).append(wait.number)
        client, me = self._process.client, self._process.id
        if not rows and not self._told:
            return
        seconds, micros = await client.time()
        until = seconds * 1_000_000 + micros + round(3e6 * LOOK_S)
        async with client.pipeline(transaction=False) as pipe:
            for name in self._told - rows.keys():
                pipe.hdel(GateKeys(name).nested, me)
            for name, inside in rows.items():
                pipe.hset(GateKeys(name).nested, me, json.dumps({"until": until, "inside": inside}))
                pipe.pexpire(GateKeys(name).nested, round(3e3 * LOOK_S))
            await pipe.execute()
        self._told = set(rows)

    async def _check(self, held: set[str]) -> None:
        """See whether these gates are in a circle; the second time, end one wait in the fleet."""
        waits, full = await self._trace(held)
        circle = find_circle(waits, full)
        self._seen = Counter({circle: self._seen[circle] + 1} if circle else {})
        if not circle or self._seen[circle] < 2:
            return
        pairs = zip(circle, (*circle[1:], circle[0]), strict=True)
        victim = max(
            process for held, wanted in pairs for process, row in waits[wanted].items() if held in row
        )
        if victim == self._process.id:
            self._end_youngest(circle)

    async def _trace(self, held: set[str]) -> tuple[dict[str, Inside], dict[str, int]]:
        """The long waits for these gates, for the gates which those who wait are inside of, and so on; and of
        the gates whose level is what refuses, how many slots are in use."""
        waits: dict[str, Inside] = {}
        full: dict[str, int] = {}
        ask = sorted(held)
        while ask and len(waits) < MOST_GATES:
            async with self._process.client.pipeline(transaction=False) as pipe:
                pipe.time()
                for name in ask:
                    pipe.hgetall(GateKeys(name).nested)
                    pipe.hget(GateKeys(name).gate, "state")
                (seconds, micros), *found = await pipe.execute()
            for name, rows, state in zip(ask, found[::2], found[1::2], strict=True):
                waits[name] = _read(rows, seconds * 1_000_000 + micros)
                in_use = _in_use(state)
                if in_use:
                    full[name] = in_use
            known = {gate for name in ask for row in waits[name].values() for gate in row}
            ask = sorted(known - waits.keys())
        return waits, full

    def _end_youngest(self, circle: Gates) -> None:
        for wait in reversed(self._waits):
            step = wait.step_of(circle)
            if not wait.circle and step is not None:
                log.warning("circle.ended gates=%s", ",".join(circle))
                self._seen.clear()
                wait.end((*circle[step:], *circle[:step]))
                return


def find_circle(waits: dict[str, Inside], full: dict[str, int]) -> Gates:
    """Gates each of which is held, in all its slots, by what waits for the next; () if there are none.

    Args:
        waits: per gate, the waits for it.
        full: slots in use of the gates that give nothing before one is free.

    >>> three = {"b": {"p": {"a": {1}}}, "c": {"p": {"b": {2}}}, "a": {"q": {"c": {1}}}}
    >>> find_circle(three, {"a": 1, "b": 1, "c": 1}), find_circle(three, {"a": 1, "b": 2, "c": 1})
    (('a', 'b', 'c'), ())
    """
    stuck, ring = set(full), set[str]()
    while stuck != ring:  # whoever waits for a gate that will move is not stuck
        ring = stuck
        stuck = {name for name in ring if full[name] <= len(_waiting_inside(name, ring, waits))}
    path: list[str] = []
    at = min(ring, default="")
    while at and at not in path:
        path.append(at)
        at = min(gate for gate in ring if _waiting_inside(at, (gate,), waits))
    return tuple(path[path.index(at) :]) if path else ()


def _waiting_inside(held: str, wanted: Iterable[str], waits: dict[str, Inside]) -> set[tuple[str, int]]:
    """Waits for any of these gates by runs that hold that one; each counts once."""
    return {
        (process, number)
        for gate in wanted
        for process, row in waits.get(gate, {}).items()
        for number in row.get(held, ())
    }


def _read(rows: dict[bytes, bytes], now_us: int) -> Inside:
    found = {}
    for process, text in rows.items():
        with contextlib.suppress(*UNREADABLE):
            row: dict[str, Any] = json.loads(text)
            if row["until"] > now_us:
                inside = {held: set(numbers) for held, numbers in row.get("inside", {}).items()}
                found[process.decode()] = inside
    return found


def _in_use(state: bytes | None) -> int:
    """Slots in use where the level is what refuses; else 0."""
    with contextlib.suppress(*UNREADABLE):
        gate = json.loads(state) if state else {"in_use": 0, "level": 1}
        return int(gate["in_use"]) if gate["in_use"] >= int(gate["level"]) else 0
    return 0
