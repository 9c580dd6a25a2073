"""What the services were asked, kept apart from the fleet, so that it can contradict it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any


class Account:
    """The calls of one pipeline, step by step, and how many of its keys were in progress at once.

    A *key* (a document, an address, a request) is in progress from its first call until its last step is
    answered, a call of it is refused, or a connection of it breaks. It counts once, however many calls
    it makes.

    Args:
        last: the steps after which a key is done.
        at_once: the most calls of a step at the same time; the next one is refused. A step that is not
            named has no limit.
    """

    def __init__(self, last: Collection[str], at_once: Mapping[str, int] | None = None) -> None:
        self._last = frozenset(last)
        self._at_once = dict(at_once or {})
        self._steps: dict[str, Step] = {}
        self._keys: set[str] = set()
        self._most_keys = 0

    def arrive(self, step: str, key: str) -> bool:
        """A call comes in; whether it is served. One that is not must not `leave`."""
        calls = self._steps.setdefault(step, Step())
        self._keys.add(key)
        self._most_keys = max(self._most_keys, len(self._keys))
        if calls.running >= self._at_once.get(step, calls.running + 1):
            calls.refused += 1
            self._keys.discard(key)
            return False
        calls.running += 1
        calls.most_at_once = max(calls.most_at_once, calls.running)
        return True

    def leave(self, step: str, key: str, *, answered: bool) -> None:
        """A call that was served is over: its answer was sent, or its connection broke before."""
        calls = self._steps[step]
        calls.running -= 1
        if answered:
            calls.answered[key] += 1
        else:
            calls.broken += 1
        if step in self._last or not answered:
            self._keys.discard(key)

    def report(self) -> dict[str, Any]:
        """The account as `GET /account` shows it."""
        return {
            "in_progress": len(self._keys),
            "most_in_progress": self._most_keys,
            "steps": {name: step.report() for name, step in self._steps.items()},
        }


class Step:
    """The calls of one step."""

    def __init__(self) -> None:
        self.running = self.most_at_once = self.refused = self.broken = 0
        self.answered: Counter[str] = Counter()

    def report(self) -> dict[str, Any]:
        return {
            "most_at_once": self.most_at_once,
            "refused": self.refused,
            "broken": self.broken,
            "answered": dict(self.answered),
        }
