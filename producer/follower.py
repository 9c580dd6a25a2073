"""Following a batch to its end: what its journal holds, then what comes, and what Redis has lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import islice
from time import monotonic
from typing import Literal

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.keys import GateKeys
from producer.facts import Facts, read_facts
from producer.follow import BLOCK_MS, MOST_RETRIES, Ended, gather_s, read
from producer.journal import Journal
from worker.contract import job_id

LOOK_IDLE_S, LOOK_BUSY_S = 2.0, 5.0
TOGETHER = 1_000

End = Literal["", "ended", "cancelled", "lost", "stopped"]
RECHECK_S = 10.0


class Follower:
    """Outcomes of one batch, each once. Only the holder of the batch's lock has a journal to give.

    Args:
        client: of its own: a read that waits for outcomes occupies it.
        journal: what was received before; without it the stream is read from its start and the batch
            ends when Redis says that nothing of it is left.
        lease_s: processes may say again what they run for that long after Redis has lost its data.
        say: hears in a sentence that items are lost.
        grows: whether the caller still enqueues items; until then none is missed, and the batch ends only
            where it is cancelled or each item has an outcome. What is missing after that is lost. None: somebody
            else enqueues.

    Attributes:
        end: how it ended, once `news` has: every item has an outcome, the batch was cancelled, items were
            lost, or whoever enqueued it stopped before all of it was in the queue.
        lost: indexes of items that Redis has lost, ascending; empty where nobody can name them.
        facts: what Redis last said of the batch.
    """

    def __init__(
        self,
        client: Redis,
        limit: str,
        flow: str,
        batch: str,
        *,
        journal: Journal | None = None,
        lease_s: float = 15.0,
        say: Callable[[str], None] = lambda text: None,
        grows: Callable[[], bool] | None = None,
    ) -> None:
        self._client = client
        self._enqueues = grows is not None
        self._grows = grows or (lambda: False)
        self._limit = limit
        self._flow = flow
        self._batch = batch
        self._journal = journal
        self._lease_s = lease_s
        self._say = say
        self._position = journal.position if journal is not None else "0-0"
        self._epoch = journal.epoch if journal is not None else ""
        self._seen: set[tuple[int, int]] = set()
        self._look_at = 0.0
        self._doubt_since: float | None = None
        self._drained = self._read_again = False
        self.end: End = ""
        self.lost: list[int] = []
        self.facts: Facts | None = None

    async def news(self) -> AsyncIterator[list[Ended]]:
        """Outcomes in lists as they come; an empty one at least every two seconds. Ends with the batch."""
        if self._journal is not None:
            kept = self._journal.latest()
            while some := list(islice(kept, TOGETHER)):
                yield some
        came_at = monotonic()
        while not self._over():
            found = await self._read()
            before, came_at = came_at, monotonic()
            fresh = self._take(found)
            yield fresh
            if monotonic() >= self._look_at:
                await self._look()
                self._look_at = monotonic() + (LOOK_BUSY_S if found else LOOK_IDLE_S)
            if found:
                await asyncio.sleep(gather_s(len(found), came_at - before, self._pending()))

    def _pending(self) -> int:
        """Items that have not ended, as far as anybody here knows."""
        if self._journal is not None:
            return self._journal.pending
        return self.facts.left if self.facts is not None else 0

    async def _read(self) -> list[Ended]:
        # nothing of it is left: what stands in the stream is all there is, and needs no waiting for
        block_ms = None if self._nothing_left() else BLOCK_MS
        try:
            found = await read(self._client, self._limit, self._batch, self._position, block_ms)
        except (RedisError, OSError):
            await asyncio.sleep(0.5)
            return []
        if found:
            self._position = found[-1].position
        self._drained = not found and self.facts is not None and self.facts.over
        return found

    def _take(self, found: list[Ended]) -> list[Ended]:
        if self._journal is not None:
            if self._read_again:  # of before: what has no number of its retry may be of an earlier one
                found = [each for each in found if each.retry >= 0 or not self._journal.retry(each.index)]
            fresh = self._journal.take(found)
            gone = {each.index for each in fresh}.intersection(self.lost)
            if gone:
                self.lost = [index for index in self.lost if index not in gone]
            return fresh
        fresh = []
        for each in found:
            if (each.index, each.retry) not in self._seen:
                self._seen.add((each.index, each.retry))
                fresh.append(each)
        return fresh

    # --- the end ------------------------------------------------------------------------------------

    def _nothing_left(self) -> bool:
        over = self.facts is not None and self.facts.over
        return over and self._doubt_since is None and not self._grows()

    def _over(self) -> bool:
        pending = self._journal.pending if self._journal is not None else None
        if pending == 0:
            self.end = "ended"
        elif pending is not None and pending == len(self.lost):
            self.end = "lost"
        elif self._drained and self.facts is not None:
            if self.facts.cancelled:
                self.end = "cancelled"
            elif pending is None and not self.facts.missing:
                self.end = "ended"
        return self.end != ""

    async def _look(self) -> None:
        """Whether Redis still knows the batch as it was told of it."""
        try:
            facts = await read_facts(self._client, self._limit, self._batch)
        except (RedisError, OSError):
            return
        if facts != self.facts:
            self._drained = False  # there may be outcomes that came since the last read
        self.facts = facts
        if self._journal is not None:
            await asyncio.to_thread(self._journal.sync)
        if self._journal is None and facts is not None and not self._epoch:
            self._epoch = facts.epoch
        if self._grows():
            return
        forgotten = facts is None or not facts.epoch or facts.epoch != self._epoch
        if not forgotten and facts is not None and (facts.cancelled or not self._lacks(facts)):
            self._doubt_since = None
            return
        # processes say again what they run, and what they finish is recorded: wait for that
        if self._doubt_since is None:
            self._doubt_since = monotonic()
        elif monotonic() - self._doubt_since > self._lease_s + LOOK_IDLE_S:
            if self._journal is not None and not self._read_again:
                # an outcome that its journal had no use for when it came: of an item appended elsewhere
                self._read_again, self._drained, self._position = True, False, "0-0"
            elif forgotten or self._enqueues or (facts is not None and facts.enqueued):
                await self._name_lost()
            else:
                self.end = "stopped"

    def _lacks(self, facts: Facts) -> bool:
        """Whether items are nowhere although all of them were enqueued."""
        if facts.enqueued and facts.missing:
            return True
        unended = facts.missing if self._journal is None else self._journal.pending
        return facts.over and self._drained and unended > 0

    async def _name_lost(self) -> None:
        if self._journal is None:
            self.end = "lost"
            return
        try:
            found = lost_items(
                self._client,
                self._limit,
                self._flow,
                self._batch,
                self._journal.unended(),
                done_too=self._drained,  # an outcome that is in no stream is lost as well
            )
            lost = [index async for index in found]
        except (RedisError, OSError):
            return
        self._doubt_since = monotonic() - self._lease_s - LOOK_IDLE_S + RECHECK_S
        if lost != self.lost:
            self.lost = lost
            self._say(f"Redis has lost {named(lost)} of batch {self._batch}; {mend(self._batch)}")


async def catch_up(client: Redis, limit: str, batch: str, journal: Journal) -> Facts | None:
    """Write down every outcome that stands in the stream by now, and every retry that was asked for, from
    whatever host; returns the facts of the batch.

    A Redis that does not know the batch as the journal does has nothing to add.
    """
    facts = await read_facts(client, limit, batch)
    if facts is None or not facts.epoch:
        return facts
    if not journal.epoch:
        journal.begin(facts.epoch)
    position = journal.position
    while journal.epoch == facts.epoch:
        found = await read(client, limit, batch, position, None)
        if not found:
            break
        journal.take(found)
        position = found[-1].position
    if journal.epoch == facts.epoch:
        asked = await client.hgetall(GateKeys(limit).retries(batch))  # type: ignore[misc]
        journal.learn(
            (int(index), int(number))
            for index, number in asked.items()
            if index.isdigit() and number.isdigit() and int(number) <= MOST_RETRIES
        )
    return facts


async def lost_items(
    client: Redis, limit: str, flow: str, batch: str, indexes: Iterable[int], *, done_too: bool = False
) -> AsyncIterator[int]:
    """Those of `indexes` that neither wait nor run nor are done (or are, with `done_too`), as Redis knows them."""
    keys, left = GateKeys(limit), iter(indexes)
    while some := list(islice(left, TOGETHER)):
        # the queue first: an item that leaves it in between has its done bit by then
        scores = await client.zmscore(keys.queue(flow), [job_id(limit, batch, index) for index in some])
        asked = [word for index in some for word in ("GET", "u1", index)]
        done = await client.execute_command("BITFIELD", keys.done(batch), *asked)  # type: ignore[no-untyped-call]
        for index, score, bit in zip(some, scores, done, strict=True):
            if score is None and (done_too or not bit):
                yield index


def ranges(indexes: Iterable[int]) -> Iterator[str]:
    """Consecutive indexes together.

    >>> list(ranges([1, 2, 3, 7, 9, 10]))
    ['1-3', '7', '9-10']
    """
    first = last = -1
    for index in indexes:
        if index == last + 1 and first >= 0:
            last = index
            continue
        if first >= 0:
            yield str(first) if first == last else f"{first}-{last}"
        first = last = index
    if first >= 0:
        yield str(first) if first == last else f"{first}-{last}"


SHOWN_RANGES = 20


def named(indexes: list[int]) -> str:
    """Items for people, as many as fit a line.

    >>> named([4]), named([1, 2, 3])
    ('item 4', '3 items (1-3)')
    """
    if len(indexes) == 1:
        return f"item {indexes[0]}"
    shown = list(islice(ranges(indexes), SHOWN_RANGES + 1))
    more = ", ..." if len(shown) > SHOWN_RANGES else ""
    return f"{len(indexes)} items ({', '.join(shown[:SHOWN_RANGES])}{more})"


def mend(batch: str) -> str:
    """How to have lost items run again."""
    return f"enqueue again what has no outcome: pocketfleet batch lost {batch} --resubmit"
