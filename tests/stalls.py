"""How long this machine stood still. A shared host takes its processors away, for seconds at a time, and what
must happen within a second then happens later, and a process that stood still for a lease has lost it. A thread
on each processor notes every pause that nobody asked for; on a machine that never stands still there is none.
"""

from __future__ import annotations

import os
import threading
import time

TICK_S = 0.02
USUAL_S = 0.08
"""A tick that comes so late is no pause yet."""

_pauses: list[tuple[float, float]] = []  # when each began, seconds, monotonic; how long it was, seconds


def _watch(processor: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {processor})  # of this thread alone
    before = time.monotonic()
    while True:
        time.sleep(TICK_S)
        now = time.monotonic()
        if now - before > TICK_S + USUAL_S:
            _pauses.append((before, now - before))
        before = now


for _processor in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]:
    threading.Thread(target=_watch, args=(_processor,), name="stalls", daemon=True).start()


def slack_s(since: float) -> float:
    """Seconds to allow beside what is promised: twice the pauses since then, as one delays several processes."""
    return 2 * sum(seconds for at, seconds in list(_pauses) if at + seconds > since)


def frozen(since: float, for_s: float) -> int:
    """How often since then a processor stood still for longer than that: as a process under SIGSTOP does."""
    return sum(seconds > for_s for at, seconds in list(_pauses) if at + seconds > since)
