"""The one call to the gate, typed: what a process says (`Call`) and what it hears (`Answer`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

SYNC = Path(__file__).with_name("sync.lua")
TOGETHER = Path(__file__).with_name("together.lua")
RENEW = Path(__file__).with_name("renew.lua")
MOST = 1000
"""Entries and jobs of one call, each."""

OK, UNKNOWN, STALE = 0, 1, -1


class Entry(msgspec.Struct):
    """One claimed job's news: how it ended, or that it goes back, or that it still runs.

    `what`: a status of an ended run (`arg` = encoded outcome), `blob:<status>`, `result:<ms>`,
    `save` (`arg` = checkpoint), `save-beside` (`arg` = key it stands under), `refuse` or `wait` (`arg` =
    delay in us), `back`, `hand`, `died` or `keep`, as in `sync.lua`. `heard` is resolved when the gate has it.
    """

    job: str
    attempt: int
    flow: int
    what: str
    arg: bytes | int | str = ""
    heard: asyncio.Future[None] | None = None


class Claimed(msgspec.Struct):
    """A job taken off the queue together with its permit."""

    id: str
    attempt: int
    deaths: int
    refusals: int
    hand_backs: int
    saved: bytes
    payload: bytes


class Call(msgspec.Struct):
    """One numbered call. Sent again unchanged until it is answered."""

    process: str
    seq: int
    held: int = 0
    permits: int = 0
    jobs: int = 0
    birth: int = 0
    started: int = 0
    limits: str = ""
    override: str = ""
    successes: int = 0
    counted_under: int = 0
    refused: int = 0
    pause_us: int = 0
    returned: str = ""
    leave: bool = False
    reset: bool = False
    stand: bool = False
    last_grant: int = 0
    flows: Sequence[str] = ()
    entries: list[Entry] = []
    heard: list[Entry] = []
    """Those of the entries somebody waits for."""

    def argv(self, now_us: int | None = None) -> list[Any]:
        """ARGV of `sync.lua`; `now_us` only in tests."""
        args: list[Any] = [
            self.process,
            "" if now_us is None else now_us,
            self.seq,
            self.held,
            self.permits,
            min(self.jobs, MOST),
            self.birth,
            self.started,
            self.limits,
            self.override,
            self.successes,
            self.counted_under,
            self.refused,
            self.pause_us,
            self.returned,
            1 if self.leave else 0,
            1 if self.reset else 0,
            1 if self.stand else 0,
            self.last_grant,
            len(self.flows),
            *self.flows,
        ]
        for entry in self.entries:
            args += (entry.job, entry.attempt, entry.flow, entry.what, entry.arg)
        return args


class Answer(msgspec.Struct):
    """What the gate said. Times are microseconds of Redis' clock unless named `_s`."""

    status: int
    permits: int
    wait_s: float
    now: int
    birth: int
    started: int
    cut: int
    level: float
    in_use: int
    used: int
    stamp: int
    slack_s: float
    lease_s: float
    reason: str
    attempt: int
    note: str
    override: str
    refused: list[str]
    jobs: list[Claimed]
    together: int = 0
    stands: bool = False


class Grant(msgspec.Struct):
    """Permits that the gate gave a waiting process inside its wake message.

    It belongs to the process's call number `seq`: it is void once a later call was made, which says what is
    held without it. `attempt` is the number of the last of the `count` permits.
    """

    seq: int
    count: int
    attempt: int
    stamp: int
    slack_s: float
    now: int


class Abort(msgspec.Struct, frozen=True):
    """The batch of a claim was cancelled: its run is to end. Another attempt of the job stays as it is."""

    attempt: int
    job: str


def read_wake(message: bytes) -> tuple[str, float | Grant | Abort]:
    """A wake message: the limit, and in how many seconds to call, what is granted, or which run is to end.

    >>> read_wake(b"users 1500000")
    ('users', 1.5)
    >>> read_wake(b"users grant 7 2 1000000900 0 250000 1000000000")
    ('users', Grant(seq=7, count=2, attempt=1000000900, stamp=0, slack_s=0.25, now=1000000000))
    >>> read_wake(b"users abort 1000000900 {users}:b:7")
    ('users', Abort(attempt=1000000900, job='{users}:b:7'))
    """
    limit, *words = message.decode().split(" ")
    if words[0] == "abort":
        return limit, Abort(int(words[1]), words[2])
    if words[0] != "grant":
        return limit, int(words[0]) / 1e6
    seq, count, attempt, stamp, slack, now = map(int, words[1:])
    return limit, Grant(seq, count, attempt, stamp, slack / 1e6, now)


def read_answer(reply: Sequence[Any]) -> Answer:
    """Decode the reply of `sync.lua` (bytes, as redis-py gives it). Bytes that are no text are shown as such."""
    head = _text(reply[0]).split(" ")
    if head[0] == "-1":
        return Answer(STALE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, "-", 0, "", "", [], [])
    jobs = [
        Claimed(
            _text(reply[i]),
            int(reply[i + 1]),
            int(reply[i + 2]),
            int(reply[i + 3]),
            int(reply[i + 4]),
            reply[i + 5],
            reply[i + 6],
        )
        for i in range(3, len(reply), 7)
    ]
    return Answer(
        status=int(head[0]),
        permits=int(head[1]),
        wait_s=int(head[2]) / 1e6,
        now=int(head[3]),
        birth=int(head[4]),
        started=int(head[5]),
        cut=int(head[6]),
        level=float(head[7]),
        in_use=int(head[8]),
        used=int(head[9]),
        stamp=int(head[10]),
        slack_s=int(head[11]) / 1e6,
        lease_s=int(head[12]) / 1e6,
        reason=head[13],
        attempt=int(head[14]),
        note=head[-1][1:] if head[-1][0] == "!" else "",
        override=_text(reply[1]),
        refused=_text(reply[2]).split(),
        jobs=jobs,
        together=int(head[15]),
        stands=head[16] == "1",
    )


def _text(words: bytes) -> str:
    return words.decode(errors="replace")


def together_argv(
    calls: Sequence[Call], wanted: int, *, singles_first: bool, keep_us: int, now_us: int | None = None
) -> list[Any]:
    """ARGV of `together.lua` for one call per gate."""
    args: list[Any] = [len(calls), wanted, 1 if singles_first else 0, keep_us]
    for call in calls:
        own = call.argv(now_us)
        args += (len(own), *own)
    return args
