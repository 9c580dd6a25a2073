"""What happened in a process since its last call to the gate."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from limiter.sync import MOST, Call, Entry

MOST_BYTES = 256 * 1024
"""Outcomes and checkpoints of one call, bytes; nothing but an entry that is larger by itself exceeds it."""


class News:
    """Gathers entries, returned starts, successes, refusals and resets; `put_into` moves them into a call."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self._returned: dict[int, int] = {}
        self._late = self._reset = False
        self._successes = self._refused = self._pause_us = 0

    def __bool__(self) -> bool:
        return bool(self.entries or self._returned)

    @property
    def keeps(self) -> bool:
        """Whether the gate has yet to hear of a run that goes on."""
        return bool(self.entries) and self.entries[0].what == "keep"

    def add(self, entries: Iterable[Entry]) -> None:
        self.entries.extend(entries)

    def add_first(self, entries: Iterable[Entry]) -> None:
        """Entries that must be heard before all others."""
        self.entries.extendleft(reversed([*entries]))

    def return_start(self, stamp: int, *, late: bool) -> None:
        """A start was not used: its place in the window comes back. `late`: the call took too long."""
        self._late = self._late or late
        if stamp:
            self._returned[stamp] = self._returned.get(stamp, 0) + 1

    def succeed(self) -> None:
        self._successes += 1

    def refuse(self, attempt: int, pause_s: float) -> None:
        self._refused = max(self._refused, attempt)
        self._pause_us = max(self._pause_us, round(pause_s * 1e6))

    def reset_level(self) -> None:
        """Somebody asks for the level to go back to its initial value."""
        self._reset = True

    def put_into(self, call: Call) -> None:
        """Fill the call, up to its bounds; what does not fit stays for the next one."""
        size = 0
        while self.entries and len(call.entries) < MOST:
            entry = self.entries[0]
            size += len(entry.arg) if isinstance(entry.arg, bytes) else 8
            if size > MOST_BYTES and call.entries:
                break
            call.entries.append(self.entries.popleft())
            if entry.heard is not None:
                call.heard.append(entry)
        call.returned = self._returned_text()
        call.successes, call.refused, call.pause_us = self._successes, self._refused, self._pause_us
        call.reset, self._reset = self._reset, False
        self._successes = self._refused = self._pause_us = 0

    def put_back(self, call: Call) -> None:
        """The call was not noted: all of it is news again."""
        self.add_first(call.entries)
        self._successes += call.successes
        self._refused, self._pause_us = max(self._refused, call.refused), max(self._pause_us, call.pause_us)
        self._reset = self._reset or call.reset
        self._late = self._late or call.returned.startswith("late")
        numbers = [int(word) for word in call.returned.removeprefix("late").split()]
        for stamp, count in zip(numbers[::2], numbers[1::2], strict=True):
            self._returned[stamp] = self._returned.get(stamp, 0) + count

    def _returned_text(self) -> str:
        text = " ".join(f"{stamp} {count}" for stamp, count in self._returned.items())
        text = f"late {text}" if self._late and text else text
        self._returned.clear()
        self._late = False
        return text
