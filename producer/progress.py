"""The live picture of a batch: one line that says how far it is and what holds it back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from redis.exceptions import RedisError
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from limiter.printable import plain
from limiter.view import GateView, read_gate
from producer.aside import aside
from producer.debugger import prompting
from producer.eta import seconds_left
from producer.texts import duration
from worker.presence import living_workers

if TYPE_CHECKING:
    from redis.asyncio import Redis

EVERY_S = 0.25
PLAIN_EVERY_S = 5.0
BARS = ((110, 24), (80, 14), (60, 8))
"""Width of the terminal from which on the bar has that many cells; narrower ones have none."""

Part = tuple[int, str, str]
"""Rank (the highest is left out first where the line is too narrow), text, style."""


class Progress:
    """Counts of a batch, shown while it runs: live on a terminal, a line every five seconds elsewhere.

    Lines given to `say` appear above it.

    Args:
        shown: False says only what `say` is given.
        live: False never takes the terminal, so that a debugger can have it.
        workers: how many worker processes are being started for this batch.

    Attributes:
        before: how many of those that it counts had ended before it began; they tell nothing of the rate.
    """

    def __init__(
        self,
        flow: str,
        limit: str,
        total: int,
        *,
        shown: bool = True,
        live: bool = True,
        workers: int = 0,
    ) -> None:
        self._flow = flow
        self._limit = limit
        self.total = total
        self.completed = 0
        self.failed = 0
        self.sent = 0
        self.before = 0
        self.gate: GateView | None = None
        self.workers: int | None = None
        self.trouble = ""
        self.awaited = ""
        self.on_enqueued: Callable[[], None] = lambda: None
        self._coming = workers
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._shown = shown
        self._may_live = live
        self._live: Live | None = None
        self._started = self._plain_at = time.monotonic()
        self._working_since: float | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def done(self) -> int:
        return self.completed + self.failed

    def say(self, text: str) -> None:
        """A line above the progress line, without what a terminal would obey."""
        if self._live is None:
            aside(plain(text))
            return
        with suppress(OSError):  # as `aside` does
            self._console.print(Text(plain(text)))

    def count(self, completed: bool) -> None:
        self._working_since = self._working_since or time.monotonic()
        if completed:
            self.completed += 1
        else:
            self.failed += 1

    def counted(self, completed: int, failed: int) -> None:
        """So many have ended by now."""
        if completed + failed:
            self._working_since = self._working_since or time.monotonic()
        self.completed, self.failed = completed, failed

    def enqueued(self, items: int) -> None:
        self.sent = items
        self.on_enqueued()

    def wait_for(self, what: str) -> None:
        """What the enqueue waits for, in words; '' = nothing."""
        self.awaited = what

    def start(self, client: Redis) -> None:
        if self._shown and self._may_live and self._console.is_terminal:
            self._live = Live(
                console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        self._watch = asyncio.create_task(self._keep_looking(client))

    async def stop(self) -> None:
        """The last picture stays on the terminal."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._live is not None:
            self._draw()
            with suppress(OSError):
                self._live.stop()
            self._live = None

    async def _keep_looking(self, client: Redis) -> None:
        while not self._stopping:  # a cancel alone can be lost in a call to Redis on Python 3.11
            try:
                self.gate = await read_gate(client, self._limit)
                workers = await living_workers(client)
                self.workers = sum(each.serves(self._flow, self._limit) for each in workers)
                self._working_since = self._working_since or (time.monotonic() if self.workers else None)
                self.trouble = ""
            except (RedisError, OSError) as error:
                self.trouble = f"Redis does not answer ({type(error).__name__})"
            self._draw()
            await asyncio.sleep(EVERY_S if self._live else 1.0)

    def _draw(self) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.update(self.picture(self._console.width - 1), refresh=True)
        elif self._shown and not prompting() and time.monotonic() - self._plain_at >= PLAIN_EVERY_S:
            self._plain_at = time.monotonic()
            aside(self.line())

    def line(self) -> str:
        """Such as `users:flow 40/100, 5 running, 4 workers, 2.5/s, 24 s left; level: 5 of 5 at a time`."""
        held = self.held_back()
        counts = ", ".join(text for _, text, _ in self._counts())
        return f"{self._flow} {counts}" + (f"; {held}" if held else "")

    def picture(self, width: int) -> Text:
        """The same in one line of a terminal, at most `width` cells wide, with a bar."""
        counts, held = self._counts(), self.held_back()
        over = f"· {held}" if held else ""
        bar = next((cells for least, cells in BARS if width >= least), 0)
        room = width - cell_len(self._flow) - 2 - (bar + 2 if bar else 0) - cell_len(over)
        while len(counts) > 1 and sum(cell_len(text) + 2 for _, text, _ in counts) > room:
            counts.remove(max(counts))
        text = Text(self._flow, style="bold", no_wrap=True, overflow="crop")
        text.append("  ")
        if bar:
            full = bar * self.done // self.total if self.total else bar
            text.append("━" * full, style="not bold green")
            text.append("─" * (bar - full) + "  ", style="not bold dim")
        for _, shown, style in counts:
            text.append(shown + "  ", style=f"not bold {style}")
        text.append(over, style="not bold yellow" if self._stuck() else "not bold dim")
        text.truncate(width, overflow="ellipsis")
        return text

    def _counts(self) -> list[Part]:
        """What there is to count, in the order in which it is shown."""
        parts: list[Part] = [(0, f"{self.done}/{self.total}", "")]
        if self.failed:
            parts.append((1, f"{self.failed} failed", "red"))
        if self.sent < self.total:
            parts.append((2, f"{self.sent} enqueued", ""))
        if self.gate is not None and self.done < self.total:
            parts.append((4, f"{self.gate.in_use} running", ""))
        if self.workers and self.done < self.total:
            parts.append((6, f"{self.workers} worker{'' if self.workers == 1 else 's'}", ""))
        return parts + self._speed()

    def _speed(self) -> list[Part]:
        now, gained = time.monotonic(), max(0, self.done - self.before)
        since = self._working_since
        rate = gained / max(0.001, now - since) if since is not None else 0.0
        shown: list[Part] = [(5, f"{rate:.1f}/s", "")] if gained else []
        left_s = seconds_left(self.total - self.done, rate, self.gate) if self.done < self.total else None
        time_: Part = (
            3,
            duration(now - self._started) if left_s is None else f"{duration(left_s)} left",
            "",
        )
        return [*shown, time_]

    def held_back(self) -> str:
        """What keeps the batch from going faster, in words; never '' before its end."""
        if self.done >= self.total:
            return ""
        if self.trouble:
            return self.trouble
        if not self.workers:
            return "; ".join(filter(None, (self._unserved(), self.awaited)))
        if self.awaited:
            return self.awaited
        gate = self.gate.holds_back() if self.gate is not None else ""
        if gate:
            return gate
        left = self.total - self.done
        if self.gate is not None and self.sent >= self.total and left <= self.gate.in_use:
            return "the last one runs" if left == 1 else f"the last {left} run"
        return "as fast as the workers go"

    def _unserved(self) -> str:
        if self._coming and not self.done:
            return f"{self._coming} worker{'' if self._coming == 1 else 's'} start"
        return "starts" if self.workers is None else f"no worker serves {self._flow}"

    def _stuck(self) -> bool:
        """Whether somebody should look: nothing goes on by itself."""
        return bool(self.trouble) or (self.workers == 0 and not self._coming)
