"""The live picture of a batch: one line that says how far it is and what holds it back."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING

from redis.exceptions import RedisError
from rich.console import Console
from rich.live import Live
from rich.text import Text

from limiter.view import GateView, read_gate
from worker.presence import living_workers

if TYPE_CHECKING:
    from redis.asyncio import Redis

EVERY_S = 0.25
PLAIN_EVERY_S = 5.0


class Progress:
    """Counts of a batch, shown while it runs: live on a terminal, a line every five seconds elsewhere.

    Lines given to `say` appear above it.
    """

    def __init__(self, flow: str, limit: str, total: int, *, shown: bool = True) -> None:
        self._flow = flow
        self._limit = limit
        self.total = total
        self.completed = 0
        self.failed = 0
        self.stage = "enqueues"
        self.sent = 0
        self.gate: GateView | None = None
        self.workers: int | None = None
        self.trouble = ""
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._shown = shown
        self._live: Live | None = None
        self._started = time.monotonic()
        self._first_outcome_at: float | None = None
        self._plain_at = self._started
        self._watch: asyncio.Task[None] | None = None

    @property
    def done(self) -> int:
        return self.completed + self.failed

    def say(self, text: str) -> None:
        """A line above the progress line."""
        if self._live is not None:
            self._console.print(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)

    def count(self, completed: bool) -> None:
        self._first_outcome_at = self._first_outcome_at or time.monotonic()
        if completed:
            self.completed += 1
        else:
            self.failed += 1

    def start(self, client: Redis) -> None:
        if self._shown and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._watch = asyncio.create_task(self._keep_looking(client))

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        self._draw()
        if self._live is not None:
            self._live.stop()
            self._live = None

    async def _keep_looking(self, client: Redis) -> None:
        while True:
            try:
                self.gate = await read_gate(client, self._limit)
                serving = [info for info in await living_workers(client) if self._flow in info.flows]
                self.workers = len(serving)
                self.trouble = ""
            except (RedisError, OSError) as error:
                self.trouble = f"Redis does not answer ({type(error).__name__})"
            self._draw()
            await asyncio.sleep(EVERY_S if self._live else 1.0)

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(Text(self.line()), refresh=True)
        elif self._shown and time.monotonic() - self._plain_at >= PLAIN_EVERY_S:
            self._plain_at = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Such as `users:flow 40/100 ━━━━────── 5 running 4 workers 2.5/s 24 s left · level: 5 of 5 at a time`."""
        parts = [f"{self._flow} {self.done}/{self.total}", _bar(self.done, self.total)]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.sent < self.total:
            parts.append(f"{self.sent} enqueued")
        if self.gate is not None:
            parts.append(f"{self.gate.in_use} running")
        if self.workers is not None:
            parts.append(f"{self.workers} worker{'' if self.workers == 1 else 's'}")
        parts += self._speed()
        held = self.held_back()
        return "  ".join(parts) + (f"  · {held}" if held else "")

    def _speed(self) -> list[str]:
        elapsed = time.monotonic() - self._started
        if not self.done or self._first_outcome_at is None:
            return [f"{elapsed:.0f} s"]
        rate = self.done / max(0.001, elapsed)
        if self.done >= self.total:
            return [f"{rate:.1f}/s", f"{elapsed:.1f} s"]
        return [f"{rate:.1f}/s", f"{_duration((self.total - self.done) / rate)} left"]

    def held_back(self) -> str:
        """What keeps the batch from going faster, in words."""
        if self.done >= self.total:
            return ""
        if self.trouble:
            return self.trouble
        if self.workers == 0:
            return f"no worker serves {self._flow}"
        return self.gate.holds_back() if self.gate is not None else ""


def _bar(done: int, total: int, width: int = 20) -> str:
    """
    >>> _bar(1, 2, 4)
    '━━──'
    """
    full = width * done // total if total else width
    return "━" * full + "─" * (width - full)


def _duration(seconds: float) -> str:
    """
    >>> _duration(42), _duration(600), _duration(90000)
    ('42 s', '10 min', '25.0 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
