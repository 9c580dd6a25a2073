"""An independent ledger of one gate, and the pumps that drive it; time is passed in, nothing sleeps.

`Gate` calls the scripts on a server and collects the wake messages. `Ledger` is told every call and every
reply: it predicts what a gate has to answer from the calls alone (never from the script's own counters)
and raises `AssertionError` on the first broken promise. `Pump` keeps what one process holds and wants.
Order of tickets and the slack are taken from the reply and only bounded.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from msgspec.structs import replace
from servers import client_of

import producer
from limiter.control import CONTROL
from limiter.keys import GateKeys, wake_channel
from limiter.limits import Limits
from limiter.script import sync_script
from limiter.sync import RENEW, SYNC, Abort, Answer, Call, Entry, Grant, read_answer, read_wake

ENQUEUE = Path(producer.__file__).with_name("enqueue.lua")
CANCELLED = b"cancelled"
"""What tests let the cancel script record of a run."""
CANCEL = Path(producer.__file__).with_name("cancel.lua")
T0 = 10**15
"""A birth of a gate in tests, us: as many digits as a real one."""
PARKED = 2**52
GRACE_US = 200_000
IDLE_US = 300_000_000
WEEK_MS = 604_800_000
ENDED = ("completed", "failed", "aborted", "quarantined", "lost")
FOREVER = math.inf


def job_id(limit: str, batch: str, index: int) -> str:
    return f"{{{limit}}}:{batch}:{index}"


class Gate:
    """The scripts of one limit on one server, with the time passed in and the messages collected."""

    def __init__(self, client: Any, limit: str = "L", *, fake: bool = False) -> None:
        self.client = client
        self.limit = limit
        self.keys = GateKeys(limit)
        self._sync = sync_script(client, SYNC)
        self._renew = sync_script(client, RENEW)
        self._enqueue = sync_script(client, ENQUEUE)
        self._control = sync_script(client, CONTROL)
        self._requests = itertools.count()
        self._cancel = sync_script(client, CANCEL)
        self.fake = fake
        self._pubsub = client.pubsub()
        self._listening: set[str] = set()
        self.listen("nobody")
        self.heard: list[tuple[str, int]] = []
        """Wake messages not yet taken: process, us to wait."""
        self.granted: list[tuple[str, Grant]] = []
        """Grants in wake messages, not yet taken by the ledger."""
        self.aborts: list[tuple[str, int, str]] = []
        """Messages that end a run: process, attempt, job."""
        self.collect()

    def listen(self, process: str) -> None:
        """Hear what is said to a process; one that nobody hears at counts as gone."""
        if process not in self._listening:
            self._listening.add(process)
            self._pubsub.subscribe(wake_channel(process))

    def deafen(self, process: str) -> None:
        """That process is gone."""
        self._listening.discard(process)
        self._pubsub.unsubscribe(wake_channel(process))
        deadline = time.monotonic() + 10
        while dict(self.client.pubsub_numsub(wake_channel(process)))[wake_channel(process).encode()]:
            assert time.monotonic() < deadline, "the server does not hear of it"
            time.sleep(0.001)

    def sync(self, call: Call, now: int) -> list[Any]:
        self.listen(call.process)
        reply: list[Any] = self._sync(keys=self.keys.all, args=call.argv(now))
        self.collect()
        return reply

    def renew(self, process: str, now: int) -> int:
        return int(self._renew(keys=self.keys.all, args=[process, now]))

    def enqueue(
        self,
        now: int,
        batch: str,
        flow: str,
        items: dict[int, bytes],
        spacing: float = 1000,
        retry: int = 0,
        before: str = "",
    ) -> list[int]:
        pairs: list[Any] = list(itertools.chain.from_iterable(items.items()))
        reply: list[int] = self._enqueue(
            keys=self.keys.all, args=["", now, batch, flow, spacing, retry, before, *pairs]
        )
        self.collect()
        return reply

    def cancel(self, now: int, batch: str, flow: str, first: int, count: int, what: str) -> list[int]:
        args = ["", now, batch, flow, first, count, what, CANCELLED]
        reply: list[int] = self._cancel(keys=self.keys.all, args=args)
        self.collect()
        return reply

    def control(self, now: int, act: str, first: Any = "", second: Any = "", request: str = "") -> list[Any]:
        args = ["", now, act, "ana", request or f"r{next(self._requests)}", first, second]
        reply: list[Any] = self._control(keys=self.keys.all, args=args)
        self.collect()
        return reply

    def events(self) -> list[tuple[str, str, str]]:
        """The trail: what, from, to."""
        rows: Any = self.client.xrange(self.keys.events)
        return [(r[b"what"].decode(), r[b"from"].decode(), r[b"to"].decode()) for _, r in rows]

    def take_messages(self) -> list[tuple[str, int]]:
        taken, self.heard = self.heard, []
        return taken

    def take_grants(self) -> list[tuple[str, Grant]]:
        taken, self.granted = self.granted, []
        return taken

    def close(self) -> None:
        self._pubsub.close()

    def collect(self) -> None:
        """What was published is read up to the answer of a ping, so none is late."""
        if not self.fake:
            self._pubsub.ping("end")
        while True:
            message = self._pubsub.get_message(timeout=0 if self.fake else 5)
            if message is None or message["type"] == "pong":
                return
            if message["type"] == "message":
                limit, what = read_wake(message["data"])
                if limit != self.limit:
                    continue
                process = message["channel"].decode().rpartition(":")[2]
                if isinstance(what, Grant):
                    self.granted.append((process, what))
                elif isinstance(what, Abort):
                    self.aborts.append((process, what.attempt, what.job))
                else:
                    self.heard.append((process, round(what * 1e6)))


@contextmanager
def server_of(kind: str) -> Iterator[redis.Redis]:
    with client_of(kind) as client:
        yield client


@contextmanager
def gate_on(client: redis.Redis, kind: str) -> Iterator[Gate]:
    """A gate on an empty server; at the end every key must have the lifetime that `keys.py` says."""
    client.flushall()
    gate = Gate(client, fake=kind == "fakeredis")
    try:
        yield gate
        faults = lifetime_faults(gate)
        assert not faults, faults
    finally:
        gate.close()


def lifetime_faults(gate: Gate) -> list[str]:
    """Keys without the lifetime that `limiter/keys.py` promises."""
    keys, faults = gate.keys, []
    endless = (keys.queue(""), keys.later, keys.jobs, keys.override, "arq:job:", "arq:in-progress:")
    endless += (keys.root + "saved", keys.root + "kept:")
    of_batch = tuple(keys.of_batch(""))
    for raw in gate.client.keys("*"):
        name = raw.decode()
        if name.startswith(endless):
            continue
        lives: int = gate.client.pttl(name)
        if lives == -1 and name.startswith(of_batch):
            left = gate.client.hget(keys.batch(name.rpartition(":")[2]), "left")
            if left is not None and int(left) > 0:
                continue
        if not 0 < lives <= WEEK_MS:
            faults.append(f"{name} lives {lives} ms")
    return faults


# the ledger ------------------------------------------------------------------------------------


@dataclass
class Item:
    """One param dict in Redis, as the calls so far leave it."""

    id: str
    flow: str
    batch: str
    index: int
    payload: bytes | None
    place: int
    state: str = "waiting"
    owner: str = ""
    due: int = 0
    recorded: bool = False
    attempt: int = 0
    deaths: int = 0
    refusals: int = 0
    hand_backs: int = 0
    saved: bytes = b""
    beside: bool = False
    """Whether the checkpoint stands under a key of its own."""


@dataclass
class Batch:
    next: float | None = None
    counted: bool = False
    cancelled: bool = False
    retries: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    outcomes: list[tuple[int, int, str, bytes]] = field(default_factory=list)


@dataclass
class Member:
    """A process that the gate knows."""

    held: int = 0
    seq: int = 0
    ends: int = 0
    extended: bool = False
    waits: bool = False
    wanted: int = 0
    """Permits it waits for, as it last said."""
    stands: bool = False
    """Whether it waits here for other gates too."""
    idle: tuple[str, ...] = ()
    pushed: list[Grant] = field(default_factory=list)
    """What wake messages granted it since its last call."""
    raw: list[Any] = field(default_factory=list)


class Ledger:
    """What is true of one gate, from the calls alone; judges every reply."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.limit = gate.limit
        self.highest = 0
        self.starts: list[tuple[int, int]] = []
        """Grants: when, and the latest moment at which it may start."""
        self.pushed: list[tuple[str, Grant]] = []
        """Grants that the last call's wake messages carried to others."""
        self.counts: dict[str, int] = dict.fromkeys(
            (
                "calls",
                "grants",
                "reaped",
                "stalls",
                "adopted",
                "named",
                "cuts",
                "unknown",
                "repeated",
                "stale",
                "pushed",
                "void",
            ),
            0,
        )
        self.flush()

    def flush(self) -> None:
        """Redis lost everything."""
        self.birth = self.last = self.attempt = self.place = 0
        self.stored: dict[str, bytes] = {}
        self.cold = False
        self.members: dict[str, Member] = {}
        self.items: dict[str, Item] = {}
        self.batches: dict[str, Batch] = {}
        self.config_from = 0
        self.limits: list[float] = []
        self.level = self.ceiling = 0.0
        self.cut = self.oks = self.quiet = self.pause = 0
        self.known_bad = self.cuts_in_a_row = self.halted = 0
        self.rounds = 0.0
        self.stamps: list[int] = []
        self.admitted = 0
        self.word = self.kept = ""
        """What the operator said: as the gate has it, and the key that outlives the gate."""
        self.slack = self.slack_at = 0
        self.due = 0
        """With even pacing: when the next start is due."""
        self.reserved: tuple[str, int] = ("", 0)
        """For whom a place is kept free, and until when."""
        self.withheld = 0
        """Places of the call that is judged that are kept for others."""
        self.paced: list[tuple[int, int]] = []
        """With even pacing: when each start that stands was granted, and its stamp."""

    # what is asked of it

    def said(self, at: int) -> int | None:
        """One of the first four words of the operator: max, rate, pause, when."""
        words = self.word.split()
        return int(words[at]) if words and words[at] != "-" else None

    @property
    def top(self) -> int:
        """The ceiling of the level: the operator's, else the limit's own."""
        return self.said(0) or int(self.limits[0])

    @property
    def logged(self) -> bool:
        """Starts are written down while a rate holds, also one that the operator has lifted."""
        return bool(self.rate or self.limits[3])

    def closed_until(self) -> int:
        return max(self.pause, self.opens(), self.said(2) or 0)

    @property
    def lease(self) -> int:
        return int(self.limits[5])

    @property
    def rate(self) -> int:
        lifted = self.said(1)
        return int(self.limits[3]) if lifted is None else lifted

    @property
    def window(self) -> int:
        return int(self.limits[4])

    @property
    def even(self) -> bool:
        return bool(self.limits[10]) and self.rate > 0

    def interval(self) -> int:
        """us between two starts of an even pace: as many as the window counts, slack included."""
        return -(-(self.window + self.slack) // self.rate)

    def starts_due(self, now: int) -> int:
        """How many starts the pace allows now, one after another."""
        count, due = 0, max(self.due, now - self.window // 1200)
        while due <= now:
            count, due = count + 1, due + self.interval()
        return count

    def in_use(self) -> int:
        return sum(member.held for member in self.members.values())

    def used(self, now: int) -> int:
        return sum(stamp > now - self.window for stamp in self.stamps) if self.logged else 0

    def opens(self) -> int:
        return self.birth + max(self.lease, self.window if self.rate else 0) if self.cold else 0

    def waiting(self, flows: tuple[str, ...]) -> list[Item]:
        found = [item for item in self.items.values() if item.state == "waiting" and item.flow in flows]
        return sorted(found, key=lambda item: (item.place, item.id))

    def free(self, now: int) -> int:
        if now < self.closed_until():
            return 0
        free = math.floor(self.level) - self.in_use()
        if self.even:
            free = min(free, self.starts_due(now))
        return min(free, self.rate - self.used(now)) if self.rate else free

    # the scripts

    def renew(self, process: str, now: int, reply: int) -> None:
        if not self.birth:
            assert reply == 0
            return
        now = self._clock(now, process)
        member = self.members.get(process)
        if member is None:
            assert reply == 0, "a process the gate does not know was renewed"
            return
        member.extended = False
        member.ends = max(member.ends, now + self.lease)
        assert reply == member.ends - now

    def control(self, now: int, act: str, first: Any, second: Any, reply: list[Any]) -> None:
        """An operator's command; what it says beyond the first four words is taken from the reply."""
        if self.birth:
            now = self._clock(now, "")
        before = self.word = self.word if self.birth else self.kept
        words = (before.split() or ["-", "-", "-"])[:3]
        level = before.split()[9] if before else "-"
        overridden = words[0] != "-"
        if act == "set":
            words[:2] = [str(first or words[0]), str(second if second != "" else words[1])]
        elif act == "clear":
            if overridden and self.birth and self.level >= self.ceiling:
                own = self.limits[0]
                self.level = min(own, own if level == "top" else max(float(level), self.level))
                self.ceiling = own
            words[:2] = ["-", "-"]
        elif act == "pause":
            words[2] = str(PARKED if first == "" else min(PARKED, now + int(first)))
        elif act == "resume":
            words[2] = "-"
            self.pause = min(self.pause, now)
        elif act == "reset":
            if self.birth:
                self._reset_level()
            return
        told = reply[2].decode().split(" ")
        assert told[:3] == words, (act, told, words)
        assert int(told[3]) > int((before.split() or ["-", "-", "-", "-1"])[3]), "an older word"
        self.word = self.kept = reply[2].decode()

    def _initial(self) -> float:
        top, bottom, initial = self.ceiling, self.limits[1], self.limits[2]
        if initial >= self.limits[0]:
            return top
        return max(min(bottom, top), min(initial, top))

    def enqueue(
        self,
        now: int,
        batch: str,
        flow: str,
        items: dict[int, bytes],
        spacing: float,
        reply: list[int],
        retry: int = 0,
    ) -> None:
        if self.birth and now - self.last > self.lease / 10:  # else it leaves the time to those that admit
            self._clock(now, "")
        record = self.batches.setdefault(batch, Batch())
        if record.cancelled:
            assert reply == [0, 0, 1], "a cancelled batch was enqueued"
            return
        place = max(self.place, 1 if record.next is None else record.next)
        added = dealt = 0
        for index, payload in items.items():
            if record.retries.get(index, 0) >= retry if retry else index in record.done:
                dealt += 1
                continue
            if retry:
                record.retries[index] = retry
                record.done.discard(index)
            name = job_id(self.limit, batch, index)
            if name not in self.items:
                self.items[name] = Item(name, flow, batch, index, payload, int(f"{place:.0f}"))
                added += 1
            elif self.items[name].payload is None:
                self.items[name].payload = payload
            place += spacing
        if added:
            record.next, record.counted = int(f"{place:.0f}"), True
        assert reply == [added, dealt, 0], (reply, added, dealt)

    def cancel(self, now: int, batch: str, first: int, count: int, what: str, reply: list[int]) -> None:
        """Waiting items are gone, or those that never began; with 'all' what runs is ended too."""
        if self.birth:
            self._clock(now, "")
        record = self.batches.setdefault(batch, Batch())
        record.cancelled = record.cancelled or (what != "fresh" and record.counted)
        waiting = running = 0
        for index in range(first, first + count):
            item = self.items.get(job_id(self.limit, batch, index))
            if item is None or (item.recorded and what == "fresh"):
                continue
            if item.state == "claimed" and what != "all":
                continue
            del self.items[item.id]
            if item.state == "claimed":
                running += 1
                record.done.add(index)
                record.outcomes.append((index, item.attempt, "aborted", CANCELLED))
            else:
                waiting += 1
        left = sum(item.batch == batch for item in self.items.values())
        assert reply[:2] == [waiting, running], (reply, waiting, running)
        assert reply[2] == left or not record.counted, (reply, left)

    def is_new(self, call: Call) -> bool:
        """Whether the call is not one that was answered before."""
        member = self.members.get(call.process)
        return member is None or call.seq > member.seq

    def sync(self, call: Call, now: int, raw: list[Any], *, together: int | None = None) -> Answer:
        """Judge one reply and take over what it changed. `together`: permits wanted with another gate's."""
        self.counts["calls"] += 1
        self.pushed = []
        me, member = call.process, self.members.get(call.process)
        if member and call.seq < member.seq:
            assert raw == [b"-1"], "a late duplicate was not refused as stale"
            self.counts["stale"] += 1
            return read_answer(raw)
        now = self._clock(now, me)
        if member and call.seq == member.seq:
            same = [member.raw[0], self.word.encode(), *member.raw[2:]]  # the operator's word is today's
            assert raw == same, f"same seq, other answer:\n{raw}\n{same}"
            member.extended, member.ends = False, now + self.lease
            self.counts["repeated"] += 1
            return read_answer(raw)
        answer = read_answer(raw)
        self._open_gate(call, now)
        self._reap(me, now)
        known = me in self.members
        unknown = not known and call.seq > 1 and call.held > 0
        if not known:  # it may be a repetition of what was heard before the record went
            call = replace(call, returned="", successes=0)
        member = self.members.setdefault(me, Member())
        member.extended = False
        before = self.in_use()
        refused = self._settle(call, member, now)
        self.put_off = sum(e.what == "refuse" and e.job not in refused for e in call.entries)
        assert answer.refused == refused, f"named {answer.refused}, should be {refused}"
        assert answer.status == int(unknown), (answer.status, unknown)
        self.counts["unknown"] += unknown
        member.held = call.held
        for item in self.items.values():
            if call.leave and item.state == "claimed" and item.owner == me:
                item.state = "waiting"
        self._adapt(call, before, now)
        void = self._take_back(call, member)
        self._return_stamps(call, void, now)
        self._release_due(now)
        self._find_kept(call, together is not None, now)
        self._grants(call, member, answer, unknown, now, several=together is not None)
        if together is not None:
            self._take_over_kept(call, answer, together, now)
        self._pushes(call, round(answer.slack_s * 1e6), now)
        self._header(answer, now)
        member.seq, member.raw = call.seq, raw
        member.ends = now + round(answer.lease_s * 1e6)
        assert call.leave or 0.8 * self.lease <= member.ends - now, "told a lease that is nearly over"
        if call.leave:
            del self.members[me]
        return answer

    # one step each

    def _clock(self, now: int, me: str) -> int:
        now = max(now, self.last)
        gap = now - self.last
        if self.birth and gap > 0.6 * self.lease:
            for name, member in self.members.items():
                if name != me and member.ends >= self.last and not member.extended:
                    member.extended = True
                    member.ends = max(member.ends, min(member.ends + gap, now + self.lease))
                    self.counts["stalls"] += 1
        self.last = now
        return now

    def _open_gate(self, call: Call, now: int) -> None:
        if not self.birth:
            self.birth = self.attempt = now
            self.place = 1
            self.word = self.kept
        if call.override and int(call.override.split()[3]) > (-1 if not self.word else self.said(3) or 0):
            self.word = self.kept = call.override
        if call.birth not in (0, self.birth) and self.birth > 1:
            self.cold = True
        started = call.started or now
        if call.limits and started > self.config_from:
            self.limits = [float(word) for word in call.limits.split()]
            self.config_from = started
            self.paced = []
        ceiling = float(self.top)
        last, self.ceiling = self.ceiling, ceiling
        self.level = self.level or self._initial()
        self.ceiling = last
        if self.ceiling and self.level >= self.ceiling:
            self.level = ceiling
        self.level = max(min(self.limits[1], ceiling), min(self.level, ceiling))
        self.ceiling = ceiling
        if now >= self.opens():
            self.cold = False

    def _reap(self, me: str, now: int) -> None:
        for name in [n for n, m in self.members.items() if n != me and m.ends < now]:
            del self.members[name]
            self.counts["reaped"] += 1
            for item in self.items.values():
                if item.state == "claimed" and item.owner == name:
                    item.state, item.deaths = "waiting", item.deaths + 1

    def _settle(self, call: Call, member: Member, now: int) -> list[str]:
        return [e.job for e in call.entries if not self._settle_entry(call, e, now)]

    def _settle_entry(self, call: Call, entry: Entry, now: int) -> bool:
        item = self.items.get(entry.job)
        if item is None or not item.recorded:
            item = self._adopted(call, entry, item, now)
            if item is not None and entry.what.startswith("save"):
                item.state, item.owner = "claimed", call.process
        if item is None or item.attempt != entry.attempt:
            self.counts["named"] += 1
            return False
        status = entry.what.removeprefix("blob:")
        if status in ENDED:
            batch = self.batches[item.batch]
            batch.done.add(item.index)
            outcome = entry.arg if isinstance(entry.arg, bytes) else str(entry.arg).encode()
            batch.outcomes.append((item.index, item.attempt, status, outcome))
            del self.items[item.id]
        elif entry.what == "refuse":
            item.state, item.refusals = "delayed", item.refusals + 1
            item.due = max(now + int(entry.arg), self.pause)
        elif entry.what == "wait":
            item.state, item.due = "delayed", now + int(entry.arg)
        elif entry.what == "keep":
            item.state, item.owner = "claimed", call.process
        elif entry.what == "save":
            item.saved, item.beside = bytes(entry.arg), False  # type: ignore[arg-type]
        elif entry.what == "save-beside":
            stored = self.stored.pop(str(entry.arg), None)
            if stored is not None:
                item.saved, item.beside = stored, True
        else:
            item.state = "waiting"
            item.hand_backs += entry.what == "hand"
            item.deaths += entry.what == "died"
        return True

    def store(self, key: str, data: bytes) -> None:
        """A process stores a checkpoint that is too large for a call, for a week."""
        self.gate.client.set(key, data, px=WEEK_MS)
        self.stored[key] = data

    def _adopted(self, call: Call, entry: Entry, item: Item | None, now: int) -> Item | None:
        name, index = entry.job.split(":")[1], int(entry.job.split(":")[2])
        batch = self.batches.setdefault(name, Batch())
        if now >= self.opens() or entry.what == "back" or index in batch.done:
            return None
        payload = item.payload if item else None
        adopted = Item(entry.job, call.flows[entry.flow - 1], name, index, payload, self.place)
        adopted.recorded, adopted.attempt = True, entry.attempt
        self.items[entry.job] = adopted
        self.counts["adopted"] += 1
        return adopted

    def _adapt(self, call: Call, in_use: int, now: int) -> None:
        if call.pause_us:
            self.pause = max(self.pause, now + call.pause_us)
        top = float(self.top)
        bottom = min(self.limits[1], top)
        if not in_use and self.admitted and now - self.admitted >= max(IDLE_US, self.window):
            self._reset_level()
        if call.refused and (call.refused > self.cut or now - self.quiet > 30_000_000):
            self._cut(bottom, top, now)
        else:
            self._unfit(max(1, self.put_off) if call.refused else 0)
            if call.successes and call.counted_under == self.cut:
                self.quiet, self.cuts_in_a_row, self.halted = now, 0, 0
                if in_use >= math.floor(self.level) and self.level < top:
                    self._grow(call.successes, top)
        if call.reset:
            self._reset_level()

    def _reset_level(self) -> None:
        self.level = self._initial()
        self.oks = self.known_bad = self.cuts_in_a_row = self.halted = 0
        self.rounds = 0.0

    def _cut(self, bottom: float, top: float, now: int) -> None:
        """Once per episode; each further one without a success between goes twice as deep, at most to half."""
        backoff = self.limits[6]
        deeper = backoff ** (2**self.cuts_in_a_row)
        if self.put_off and self.cuts_in_a_row and bottom < top and self.level == bottom:
            self.halted = min(max(2 * self.halted, 1_000_000), 16_000_000)
            self.pause = max(self.pause, now + self.halted)
        self.known_bad, self.rounds = math.floor(self.level), 0.0
        self.level = max(bottom, self.level * max(deeper, min(0.5, backoff)))
        self.cut, self.oks, self.quiet = self.attempt, 0, now
        self.cuts_in_a_row = min(self.cuts_in_a_row + 1, 10)
        self.counts["cuts"] += 1
        self._unfit(max(0, self.put_off - 1))

    def _unfit(self, more: int) -> None:
        """So many more were refused in the spell: as many fewer fit, but surely what the cut has left."""
        for _ in range(more):
            if self.known_bad - 1 > math.floor(self.level):
                self.known_bad -= 1

    def _grow(self, successes: int, top: float) -> None:
        """By the rule of the limit, but not to what was refused before enough rounds of successes came."""
        backoff, threshold, factor, additive = self.limits[6:10]
        self.oks += successes
        self.rounds += successes / self.level
        wanted = self.level
        if additive and 0 <= self.level - self.known_bad < 1:
            wanted += successes / self.level
        elif additive:
            wanted += successes
        elif self.oks >= threshold:
            wanted = max(wanted + 1, wanted * factor)
        if self.level < self.known_bad <= wanted:
            wanted = float(self.known_bad)
            if self.rounds < (2 + 4 * (1 - backoff) if additive else 6):
                wanted = max(self.level, wanted - 0.01)
        if wanted != self.level:
            self.level, self.oks = min(top, wanted), 0

    def _take_back(self, call: Call, member: Member) -> int:
        """Grants that the process had not heard of when it composed the call are void, and no starts."""
        void = [grant for grant in member.pushed if grant.attempt > call.last_grant]
        member.pushed = []
        for grant in void:
            for _ in range(grant.count):
                self.starts.remove((grant.now, grant.stamp or grant.now))
                if grant.stamp in self.stamps:
                    self.stamps.remove(grant.stamp)
            self.paced = [each for each in self.paced if each[1] != grant.stamp]
        self.counts["void"] += len(void)
        return sum(grant.count for grant in void)

    def _return_stamps(self, call: Call, void: int, now: int) -> None:
        least = max(self.window // 240, 10_000)
        before = max(least, max(least, self.slack) - (now - self.slack_at) / 16)
        words = [int(word) for word in call.returned.split() if word.isdigit()]
        for stamp, count in zip(words[::2], words[1::2], strict=True):
            for _ in range(min(count, self.stamps.count(stamp))):
                self.stamps.remove(stamp)
                self.paced = [each for each in self.paced if each[1] != stamp]
        if (words or void) and self.even:
            last = self.stamps[-1] - math.floor(before) + self.interval() if self.stamps else 0
            self.due = min(self.due, last)
        late = call.returned.startswith("late")
        self.slack = math.floor(min(5_000_000, before * 2) if late else before)
        self.slack_at = now
        if self.even:
            self.due = min(self.due, now + self.interval())
        if self.logged:
            self.stamps = [stamp for stamp in self.stamps if stamp > now - self.window]

    def _release_due(self, now: int) -> None:
        for item in self.items.values():
            if item.state == "delayed" and item.due <= now:
                item.state = "waiting"

    def _find_kept(self, call: Call, several: bool, now: int) -> None:
        """A kept place ends with its time, its process, or a call of that for several gates, or for none."""
        name, until = self.reserved
        mine = name == call.process and (several or not call.stand)
        if mine or now >= until or name not in self.members:
            self.reserved = ("", 0)
        self.withheld = int(bool(self.reserved[0]))

    def _take_over_kept(self, call: Call, answer: Answer, together: int, now: int) -> None:
        """Whose turn it was only the script knows; a place is kept where one is free and another gate refuses."""
        state = json.loads(self.gate.client.hget(self.gate.keys.gate, "state"))  # type: ignore[arg-type]
        number = int(self.gate.client.hget(self.gate.keys.gate, f"p:{call.process}").split()[0])  # type: ignore
        if int(state["kept_for"]) == number and now < state["kept_until"]:
            assert not self.reserved[0] and not answer.stands and answer.together < together
            assert self.free(now) >= 1, "a place is kept where none is free"
            self.reserved = (call.process, int(state["kept_until"]))
            self.withheld = 1

    def _grants(
        self, call: Call, member: Member, answer: Answer, unknown: bool, now: int, *, several: bool = False
    ) -> None:
        flows = tuple(call.flows)
        free, line = max(0, self.free(now) - self.withheld), self.waiting(flows)
        given = answer.permits + len(answer.jobs)
        assert given <= free, f"{given} granted, {free} free"
        assert answer.permits - answer.together <= call.permits and len(answer.jobs) <= call.jobs
        assert not (unknown or call.leave) or given == 0, "one that is unknown or leaves was admitted"
        self.attempt += answer.permits
        taken = self._claims(call, answer, line)
        wanted_permits = 0 if unknown else call.permits
        wanted_jobs = 0 if unknown else call.jobs
        could = min(free, wanted_permits + min(wanted_jobs, len(line)))
        others = any(m.waits for name, m in self.members.items() if name != call.process)
        if not others and not call.leave and not several:
            taken_all = answer.permits + taken
            assert taken_all == could, f"nobody else waits, and {taken_all} of {could} were given"
        left = len(line) > taken
        alone = answer.permits - answer.together
        member.stands = answer.stands or call.stand
        member.waits = member.stands or alone < wanted_permits or (left and taken < wanted_jobs)
        # one that was refused jobs as well has to call for them: permits alone would not do
        member.wanted = 0 if left and wanted_jobs else call.permits - alone
        member.idle = flows if not left and len(answer.jobs) < wanted_jobs and not call.leave else ()
        member.held += given
        self.counts["grants"] += given
        if given:
            self.admitted = now
        if given and self.logged:
            slack = round(answer.slack_s * 1e6)
            assert answer.stamp == now + slack
            assert not self.stamps or self.stamps[-1] <= answer.stamp, "stamps out of order"
            self.stamps += [answer.stamp] * given
        if given and self.even:
            self._pace(given, now, answer.stamp)
        if given:
            self.starts += [(now, answer.stamp or now)] * given
        assert not given or not self.rate or self.used(now) <= self.rate

    def _pushes(self, call: Call, slack: int, now: int) -> None:
        """Grants to others: to who waits for permits, of what is free, up to a fair share."""
        self.pushed = self.gate.take_grants()
        busy = sum(m.held > 0 or m.waits for name, m in self.members.items() if name != call.process)
        for name, grant in self.pushed:
            member = self.members[name]
            assert name != call.process and member.waits, f"{name} was granted what it does not wait for"
            assert not member.stands, f"{name} waits for another gate too, and was granted this one alone"
            assert 0 < grant.count <= member.wanted, f"{grant.count} pushed, {member.wanted} wanted"
            assert grant.count <= self.free(now) - self.withheld, (
                f"{grant.count} pushed, {self.free(now)} free"
            )
            share = math.ceil(math.floor(self.level) / max(1, busy))
            assert member.held + grant.count <= share, f"{name} was pushed beyond its fair share"
            assert (grant.seq, grant.now) == (member.seq, now)
            self.attempt += grant.count
            assert grant.attempt == self.attempt
            latest = now + slack if self.logged else 0
            assert (grant.stamp, round(grant.slack_s * 1e6)) == (latest, slack)
            self.admitted = now
            if self.logged:
                self.stamps += [latest] * grant.count
            if self.even:
                self._pace(grant.count, now, latest)
            self.starts += [(now, latest or now)] * grant.count
            member.held += grant.count
            member.wanted -= grant.count
            member.waits = member.wanted > 0
            member.pushed.append(grant)
            self.counts["pushed"] += grant.count

    def _pace(self, given: int, now: int, stamp: int) -> None:
        """Each start is due an interval after the one before; lateness is made up for within a bound."""
        catch_up = self.window // 1200
        self.paced = (self.paced + [(now, stamp)] * given)[-60:]
        least = (self.window + max(self.window // 240, 10_000)) / self.rate
        for after, (at, _) in enumerate(reversed(self.paced)):
            assert after <= (now - at + catch_up) / least + 1e-6, f"{after + 1} starts in {now - at} us"
        for _ in range(given):
            self.due = max(self.due, now - catch_up) + self.interval()

    def _claims(self, call: Call, answer: Answer, line: list[Item]) -> int:
        """Check that the lowest places were taken; returns how many, those without payload included."""
        lost = [item.id for item in line[: call.jobs] if item.payload is None and self._gone(item)]
        chosen = line[: len(answer.jobs) + len(lost)]
        told = {job.id: job for job in answer.jobs}
        assert {item.id for item in chosen} == told.keys() | set(lost), "not the lowest places"
        assert list(told) == [item.id for item in chosen if item.id in told], "not in order of places"
        for item in chosen:
            self.attempt += 1
            self.place = max(self.place, item.place)
            if item.id in lost:
                self.batches[item.batch].outcomes.append((item.index, self.attempt, "lost", b""))
                del self.items[item.id]
                continue
            job = told[item.id]
            assert job.attempt == self.attempt > self.highest, "an attempt number came again"
            counts = (job.deaths, job.refusals, job.hand_backs, job.payload)
            assert counts == (item.deaths, item.refusals, item.hand_backs, item.payload), counts
            assert job.saved == (b"beside" if item.beside else item.saved), "not the latest checkpoint"
            item.state, item.owner, item.recorded = "claimed", call.process, True
            item.attempt = self.highest = job.attempt
        return len(chosen)

    def _gone(self, item: Item) -> bool:
        return self.gate.client.zscore(self.gate.keys.queue(item.flow), item.id) is None

    def _header(self, answer: Answer, now: int) -> None:
        assert (answer.now, answer.birth, answer.cut) == (now, self.birth, self.cut)
        assert answer.override == self.word, (answer.override, self.word)
        assert answer.level == self.level, (answer.level, self.level)
        assert min(self.limits[1], self.top) <= answer.level <= self.top
        assert answer.in_use == self.in_use(), f"in_use {answer.in_use}, held {self.in_use()}"
        assert answer.used == self.used(now), (answer.used, self.used(now))
        assert answer.attempt <= self.attempt
        assert 0 <= answer.wait_s * 1e6 <= math.ceil(self.lease / 3), answer.wait_s
        assert answer.slack_s <= 5 or answer.slack_s * 1e6 <= self.window / 240

    # the whole state

    def compare(self) -> None:
        """The whole of Redis against the ledger: each job in exactly one state, nothing else there."""
        client, keys = self.gate.client, self.gate.keys
        known = {k.decode(): v.decode() for k, v in client.hgetall(keys.gate).items()}
        records = {k[2:]: v.split(" ") for k, v in known.items() if k.startswith("p:")}
        assert records.keys() == self.members.keys()
        assert {n: int(r[1]) for n, r in records.items()} == {n: m.held for n, m in self.members.items()}
        state = json.loads(known.get("state", "{}"))
        assert state.get("in_use", 0) == self.in_use()
        leases = {n.decode(): int(s) for n, s in client.zrange(keys.leases, 0, -1, withscores=True)}
        ends = {n: m.ends for n, m in self.members.items()}
        assert leases == ends, f"lease ends {leases.items() ^ ends.items()} at {self.last}"
        tickets = {n.decode() for n in client.zrange(keys.tickets, 0, -1)}
        assert tickets == {n for n, m in self.members.items() if m.waits}, tickets
        assert [int(s) for s in client.lrange(keys.starts, 0, -1)] == self.stamps
        self._compare_jobs({n: int(r[0]) for n, r in records.items()})
        self._compare_batches()

    def _compare_jobs(self, numbers: dict[str, int]) -> None:
        client, keys = self.gate.client, self.gate.keys

        def score(item: Item) -> int:
            claimed = PARKED + numbers[item.owner] if item.state == "claimed" else PARKED
            return item.place if item.state == "waiting" else claimed

        there: dict[str, int] = {}
        for flow in {item.flow for item in self.items.values()} | {"f", "g"}:
            rows: Any = client.zrange(keys.queue(flow), 0, -1, withscores=True)
            there |= {f"{flow} {name.decode()}": int(there_at) for name, there_at in rows}
        assert there == {f"{i.flow} {i.id}": score(i) for i in self.items.values()}
        later: Any = client.zrange(keys.later, 0, -1, withscores=True)
        due = {i.id: i.due for i in self.items.values() if i.state == "delayed"}
        assert {name.decode(): int(there_at) for name, there_at in later} == due
        jobs: Any = client.hgetall(keys.jobs)
        records = {
            i.id: f"{i.attempt} {i.place} {i.deaths} {i.refusals} {i.hand_backs} "
            f"{2 if i.beside else 1} {i.flow}"
            for i in self.items.values()
            if i.recorded
        }
        saved: Any = client.hgetall(keys.root + "saved")
        inline = {i.id: i.saved for i in self.items.values() if i.saved and not i.beside}
        assert {name.decode(): data for name, data in saved.items()} == inline
        kept = {k.decode(): client.get(k) for k in client.keys(keys.root + "kept:*")}
        beside = {keys.kept(i.batch, i.index): i.saved for i in self.items.values() if i.beside}
        assert kept == beside | self.stored
        assert {k.decode(): v.decode() for k, v in jobs.items()} == records
        payloads = {k.decode()[8:] for k in client.keys("arq:job:*")}
        assert payloads == {i.id for i in self.items.values() if i.payload is not None}
        running = {k.decode()[16:] for k in client.keys("arq:in-progress:*")}
        assert running == {i.id for i in self.items.values() if i.state == "claimed"}

    def _compare_batches(self) -> None:
        client, keys = self.gate.client, self.gate.keys
        for name, batch in self.batches.items():
            rows: Any = client.xrange(keys.out(name))
            told = [(int(r[b"i"]), int(r[b"t"]), r[b"s"].decode(), r[b"o"]) for _, r in rows]
            assert told == batch.outcomes
            bits: Any = client.get(keys.done(name)) or b""
            done = {8 * i + b for i, byte in enumerate(bits) for b in range(8) if byte >> (7 - b) & 1}
            assert done == batch.done
            left: Any = client.hget(keys.batch(name), "left")
            open_items = sum(item.batch == name for item in self.items.values())
            assert left is None or int(left) == open_items, f"batch {name}: left {left}, really {open_items}"


def busiest_window(starts: list[int], window: int) -> int:
    """The most starts in any half-open window of that length."""
    starts = sorted(starts)
    first = most = 0
    for i, start in enumerate(starts):
        while starts[first] <= start - window:
            first += 1
        most = max(most, i - first + 1)
    return most


# a process -------------------------------------------------------------------------------------


@dataclass
class Pump:
    """What one process holds and wants, and the call it would send now."""

    name: str
    flows: tuple[str, ...] = ()
    room: int = 0
    limits: Limits = field(default_factory=lambda: Limits("L"))
    seq: int = 0
    birth: int = 0
    started: int = 0
    cut: int = 0
    override: str = ""
    last_start: int = 0
    last_grant: int = 0
    runs: dict[str, int] = field(default_factory=dict)
    """Jobs that run here, with their attempts."""
    permits: int = 0
    wanted: int = 0
    news: list[Entry] = field(default_factory=list)
    successes: int = 0
    refused: int = 0
    pause_us: int = 0
    returned: str = ""
    unknown: bool = False
    ids: dict[str, str] = field(default_factory=dict)
    """Flow of each job, the first word of its payload in these tests."""

    @property
    def held(self) -> int:
        return len(self.runs) + self.permits

    def call(self, now: int, *, leave: bool = False) -> Call:
        """The next call; what happened since the last one is in it and forgotten here."""
        self.seq += 1
        entries = self.news
        if self.unknown:
            entries = entries + [self.entry(job, "keep") for job in self.runs]
        remembers = self.held > 0 or now - self.last_start < self.limits.window_s * 1e6
        call = Call(
            self.name,
            self.seq,
            held=self.held,
            permits=0 if leave else self.wanted,
            jobs=0 if leave else max(0, self.room - len(self.runs)),
            birth=self.birth if remembers else 0,
            started=self.started,
            limits=self.limits.as_argument(),
            override=self.override,
            successes=self.successes,
            counted_under=self.cut,
            refused=self.refused,
            pause_us=self.pause_us,
            returned=self.returned,
            leave=leave,
            last_grant=self.last_grant,
            flows=self.flows,
            entries=entries,
        )
        self.news, self.successes, self.refused, self.pause_us, self.returned = [], 0, 0, 0, ""
        return call

    def entry(self, job: str, what: str, arg: bytes | int | str = "") -> Entry:
        flow = self.ids.get(job, self.flows[0])
        return Entry(job, self.runs[job], self.flows.index(flow) + 1, what, arg)

    def end(self, job: str, what: str = "completed", arg: bytes | int | str = b"out") -> None:
        """That run ended, or goes back."""
        self.news.append(self.entry(job, what, arg))
        del self.runs[job]

    def hear(self, call: Call, answer: Answer) -> list[str]:
        """Take over an answer; returns the runs that were lost to another attempt."""
        self.unknown = answer.status == 1
        kept = {e.job for e in call.entries if e.what == "keep"}
        lost = sorted({job for job in answer.refused if job in kept and job in self.runs})
        for job in lost:
            del self.runs[job]
        self.birth, self.started, self.cut = answer.birth, answer.started, answer.cut
        self.override = answer.override
        self.permits += answer.permits
        self.wanted -= answer.permits
        for taken in answer.jobs:
            self.runs[taken.id] = taken.attempt
            self.ids[taken.id] = taken.payload.split(b" ")[0].decode()
        if answer.permits or answer.jobs:
            self.last_start = answer.now
        return lost

    def take(self, grant: Grant) -> bool:
        """A grant in a wake message; void once another call was composed."""
        if grant.seq != self.seq:
            return False
        self.permits += grant.count
        self.wanted -= grant.count
        self.last_start, self.last_grant = grant.now, grant.attempt
        return True


# a fleet in virtual time -----------------------------------------------------------------------

Plan = Callable[[str, int], tuple[int, str, int | str]]
"""What becomes of a run (its job, how often it was refused): us it takes, how it ends, argument."""


class Fleet:
    """Pumps with timers and wake messages, event by event; never idle with work and room for long.

    Args:
        bound_us: how long something may be free while a living process could take it.
        deaf: every wake message is lost.
        plan, permit_us: how long runs and permits last.
    """

    LATENCY_US = 300

    def __init__(
        self, gate: Gate, pumps: list[Pump], plan: Plan, *, permit_us: int = 50_000, deaf: bool = False,
        bound_us: int = GRACE_US + 2_000,
    ) -> None:  # fmt: skip
        self.gate, self.ledger, self.pumps = gate, Ledger(gate), pumps
        self.plan, self.permit_us, self.deaf, self.bound_us = plan, permit_us, deaf, bound_us
        self.now = self.since = T0
        self.stuck_since: float = FOREVER
        self.gone: set[int] = set()
        self.alarm: dict[int, int] = {}
        self.events: list[tuple[int, int, str, tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.granted: list[tuple[int, str, str]] = []
        """Every grant: when, the process, the job ('' = a permit)."""
        self.ends = 0
        for who in range(len(pumps)):
            self.ring(who, T0)

    # what tests say

    def at(self, after_us: int, what: str, *data: Any) -> None:
        """Plan `enqueue`, `want`, `die`, `leave`, `pause`, `control` for `after_us` after the beginning."""
        self._push(T0 + after_us, what, data)

    def run(self, for_us: int, most_calls: int = 20_000) -> None:
        """Until that time is over, or nothing waits and runs any more."""
        until = T0 + for_us
        while self.events and self.events[0][0] <= until:
            when, _, what, data = heapq.heappop(self.events)
            self._judge(when)
            self.now = max(self.now, when)
            before = len(self.granted)
            getattr(self, f"_{what}")(*data)
            ready = self._ready_at()
            fresh = len(self.granted) > before
            due = fresh or ready > self.now
            self.stuck_since = ready if due else min(self.stuck_since, ready)
            assert self.ledger.counts["calls"] < most_calls, "the fleet polls"
            if self._is_done():
                return
        assert not self.ledger.items, f"not done after {for_us / 1e6} s: {list(self.ledger.items)[:5]}"

    # liveness

    def _judge(self, until: int) -> None:
        idle = until - self.stuck_since
        assert idle <= self.bound_us, (
            f"work, room and a process to take it, and nothing happens for {idle / 1e6:.3f} s "
            f"from {(self.stuck_since - T0) / 1e6:.6f} s"
        )

    def _ready_at(self) -> float:
        """From when on something is free and a living process could take it, if nobody calls before."""
        ledger = self.ledger
        if not ledger.limits or math.floor(ledger.level) - ledger.in_use() <= 0:
            return FOREVER
        room = ledger.closed_until()
        if ledger.rate and ledger.used(self.now) >= ledger.rate:
            room = max(room, ledger.stamps[len(ledger.stamps) - ledger.rate] + ledger.window)
        if ledger.even:
            room = max(room, ledger.due)
        work = min(
            (self._work_at(who) for who in range(len(self.pumps)) if who not in self.gone), default=FOREVER
        )
        return max(room, work, self.now)

    def _work_at(self, who: int) -> float:
        pump = self.pumps[who]
        if pump.wanted > 0:
            return 0
        if len(pump.runs) >= pump.room:
            return FOREVER
        mine = [item for item in self.ledger.items.values() if item.flow in pump.flows]
        due = [item.due for item in mine if item.state == "delayed"]
        return 0 if any(item.state == "waiting" for item in mine) else min(due, default=FOREVER)

    def _is_done(self) -> bool:
        planned = any(
            what in ("enqueue", "want", "leave", "die", "pause", "control") for _, _, what, _ in self.events
        )
        living = [pump for who, pump in enumerate(self.pumps) if who not in self.gone]
        return not planned and not self.ledger.items and not any(p.held or p.wanted for p in living)

    # events

    def _push(self, when: int, what: str, data: tuple[Any, ...]) -> None:
        heapq.heappush(self.events, (when, next(self.order), what, data))

    def ring(self, who: int, when: int) -> None:
        self.alarm[who] = when
        self._push(when, "timer", (who, when))

    def _timer(self, who: int, when: int) -> None:
        if self.alarm[who] == when and who not in self.gone:
            self._call(who)

    def _wake(self, who: int, wait_us: int) -> None:
        if self.now + wait_us < self.alarm[who]:
            self.ring(who, self.now + wait_us)

    def _call(self, who: int, leave: bool = False) -> None:
        pump = self.pumps[who]
        call = pump.call(self.now, leave=leave)
        answer = self.ledger.sync(call, self.now, self.gate.sync(call, self.now))
        pump.hear(call, answer)
        for job in answer.jobs:
            self.granted.append((self.now, pump.name, job.id))
            takes, what, arg = self.plan(job.id, job.refusals)
            self._push(self.now + takes, "end", (who, job.id, job.attempt, what, arg))
        for _ in range(answer.permits):
            self.granted.append((self.now, pump.name, ""))
            self._push(self.now + self.permit_us, "release", (who,))
        self.ring(who, self.now if answer.status == 1 else self.now + round(answer.wait_s * 1e6))
        self._deliver()

    def _deliver(self) -> None:
        names = {pump.name: who for who, pump in enumerate(self.pumps)}
        for name, wait_us in self.gate.take_messages():
            if not self.deaf:
                self._push(self.now + self.LATENCY_US, "wake", (names[name], wait_us))
        for name, grant in self.ledger.pushed:
            if not self.deaf:
                self._push(self.now + self.LATENCY_US, "take", (names[name], grant))
        self.ledger.pushed = []

    def _take(self, who: int, grant: Grant) -> None:
        if who not in self.gone and self.pumps[who].take(grant):
            for _ in range(grant.count):
                self.granted.append((self.now, self.pumps[who].name, ""))
                self._push(self.now + self.permit_us, "release", (who,))

    def _end(self, who: int, job: str, attempt: int, what: str, arg: int | str) -> None:
        pump = self.pumps[who]
        if who in self.gone or pump.runs.get(job) != attempt:
            return
        if what == "refuse":
            pump.refused = max(pump.refused, attempt)
        else:
            pump.successes += 1
            self.ends += 1
        pump.end(job, what, arg)
        self._call(who)

    def _release(self, who: int) -> None:
        if who not in self.gone:
            self.pumps[who].permits -= 1
            self._call(who)

    def _want(self, who: int, count: int) -> None:
        if who not in self.gone:
            self.pumps[who].wanted += count
            self._call(who)

    def _pause(self, who: int, pause_us: int) -> None:
        self.pumps[who].pause_us = pause_us
        self._call(who)

    def _control(self, act: str, first: Any = "", second: Any = "") -> None:
        reply = self.gate.control(self.now, act, first, second)
        self.ledger.control(self.now, act, first, second, reply)
        self._deliver()

    def _die(self, who: int) -> None:
        self.gone.add(who)
        if who % 2:  # its connection is closed; that of one whose host is gone is not
            self.gate.deafen(self.pumps[who].name)

    def _leave(self, who: int) -> None:
        """A drain: what runs is handed back, permits are released, in one last call."""
        pump = self.pumps[who]
        for job in list(pump.runs):
            pump.end(job, "hand", "")
        pump.permits = pump.wanted = 0
        self._call(who, leave=True)
        self.gone.add(who)

    def _enqueue(self, batch: str, flow: str, count: int, spacing: float = 1000) -> None:
        known = [i.index for i in self.ledger.items.values() if i.batch == batch]
        known += self.ledger.batches.get(batch, Batch()).done
        first = max(known, default=-1) + 1
        items = {i: f"{flow} {i}".encode() for i in range(first, first + count)}
        reply = self.gate.enqueue(self.now, batch, flow, items, spacing)
        self.ledger.enqueue(self.now, batch, flow, items, spacing, reply)
        self._deliver()
