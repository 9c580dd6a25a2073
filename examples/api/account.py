"""The API's own account of its clients: kept apart from the fleet, so that it can contradict it.

Nothing here reads a clock or a socket: the time is passed in (seconds on any clock that only goes
forward), and a connection is any object.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROFILE, ORDERS = "profile", "orders"
BUSY_RETRY_S = 1.0


class Account:
    """What was asked of the API, how much of it at once, and what was refused.

    A *start* is a request that was let in; a refused one burns none. A *flow* starts with each
    profile request, refused or not. A *user is in progress* from the arrival of its profile request
    until its orders request is answered, one of the two is refused, or the connection of its last
    request breaks; it counts once, however many flows run for it. A client that closes its
    connection between the two requests is therefore taken for gone.

    Args:
        concurrent: requests at the same time; 0 means no limit.
        per_window: starts in any `window_s` seconds; 0 means no limit.
        window_s: two starts exactly this far apart are not in one window.
    """

    def __init__(self, *, concurrent: int = 0, per_window: int = 0, window_s: float = 60.0) -> None:
        self.concurrent = concurrent
        self.per_window = per_window
        self.running = 0
        self._users: dict[str, object] = {}
        self._starts = Window(window_s)
        self._flow_starts = Window(window_s)
        self.reset()

    def reset(self) -> None:
        """Forget what is over, the window's starts too; what runs now stays and is the first peak."""
        self.served = self.refused = self.broken = 0
        self.peak_running = self.running
        self.peak_users = len(self._users)
        self.flows: Counter[str] = Counter()
        self._starts.clear()
        self._flow_starts.clear()

    def arrive(self, now: float, user: str, step: str, connection: object) -> float:
        """Let a request in and return 0.0, or refuse it and return the seconds until it may come again."""
        self._users[user] = connection
        self.peak_users = max(self.peak_users, len(self._users))
        if step == PROFILE:
            self.flows[user] += 1
            self._flow_starts.add(now)
        wait_s = self._wait(now)
        if wait_s > 0:
            self.refused += 1
            self._end(user, connection)
            return wait_s
        self._starts.add(now)
        self.running += 1
        self.peak_running = max(self.peak_running, self.running)
        return 0.0

    def leave(self, user: str, step: str, connection: object, *, answered: bool) -> None:
        """A request that was let in is over: its answer was sent, or its connection broke before."""
        self.running -= 1
        if answered:
            self.served += 1
        else:
            self.broken += 1
        if step == ORDERS or not answered:
            self._end(user, connection)

    def drop_broken(self, is_broken: Callable[[Any], bool]) -> None:
        """End every user the connection of whose last request is broken."""
        for user in [user for user, connection in self._users.items() if is_broken(connection)]:
            del self._users[user]

    def report(self) -> dict[str, Any]:
        """The account as `GET /account` shows it."""
        return {
            "running": self.running,
            "peak_running": self.peak_running,
            "served": self.served,
            "refused": self.refused,
            "broken": self.broken,
            "most_starts": self._starts.most,
            "users": len(self._users),
            "peak_users": self.peak_users,
            "flows_started": self.flows.total(),
            "most_flow_starts": self._flow_starts.most,
            "flows": dict(self.flows),
            "limits": {
                "concurrent": self.concurrent,
                "per_window": self.per_window,
                "window_s": self._starts.length_s,
            },
        }

    def _wait(self, now: float) -> float:
        busy = bool(self.concurrent) and self.running >= self.concurrent
        window_s = self._starts.wait(now, self.per_window) if self.per_window else 0.0
        return max(window_s, BUSY_RETRY_S if busy else 0.0)

    def _end(self, user: str, connection: object) -> None:
        # Another run of the same user may have begun over another connection: that one goes on.
        if self._users.get(user) is connection:
            del self._users[user]


@dataclass
class Window:
    """A sliding window of start times, and the most it ever held."""

    length_s: float

    def __post_init__(self) -> None:
        self.most = 0
        self._times: deque[float] = deque()

    def add(self, now: float) -> None:
        self._trim(now)
        self._times.append(now)
        self.most = max(self.most, len(self._times))

    def wait(self, now: float, limit: int) -> float:
        """Seconds until one more start would not be the `limit + 1`-th; 0.0 if there is room.

        >>> window = Window(60.0)
        >>> window.add(0.0)
        >>> window.wait(59.5, 1), window.wait(60.0, 1)
        (0.5, 0.0)
        """
        self._trim(now)
        if len(self._times) < limit:
            return 0.0
        return self._times[-limit] + self.length_s - now

    def clear(self) -> None:
        self.most = 0
        self._times.clear()

    def _trim(self, now: float) -> None:
        while self._times and self._times[0] + self.length_s <= now:
            self._times.popleft()
