"""How long this machine stood still. A shared host takes its processors away, for seconds at a time, and what
must happen within a second then happens later. A thread notes each pause that nobody asked for; a test adds what
it noted to the time it allows, and on a machine that never stands still that is nothing.
"""

from __future__ import annotations

import threading
import time

TICK_S = 0.01
USUAL_S = 0.05
"""A tick that comes so late is no pause yet."""

_pauses: list[tuple[float, float]] = []  # when each began, seconds, monotonic; how long it was, seconds


def _watch() -> None:
    before = time.monotonic()
    while True:
        time.sleep(TICK_S)
        now = time.monotonic()
        if now - before > TICK_S + USUAL_S:
            _pauses.append((before, now - before))
        before = now


threading.Thread(target=_watch, name="stalls", daemon=True).start()


def slack_s(since: float) -> float:
    """Seconds to allow beside what is promised: twice the pauses since then, as one delays several processes."""
    return 2 * sum(seconds for at, seconds in list(_pauses) if at + seconds > since)
