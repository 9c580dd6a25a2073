"""Prints and logs of users' nodes: each line says which item it comes from."""

from __future__ import annotations

import contextlib
import contextvars
import io
import logging
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any, TextIO

from limiter.printable import plain, printable

item: contextvars.ContextVar[str] = contextvars.ContextVar("pocketfleet_item", default="")
"""Batch item of the run that is speaking, for prefixes of prints and logs."""


class Place:
    """Where one or more streams write to.

    Attributes:
        line: whose line is out there and unfinished; '' if nobody goes on with it, None if there is none.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.line: str | None = None


class ItemPrefix:
    """A text stream that puts `[batch:index] ` in front of each line written during a run.

    Runs write at the same time, so a line goes out when it is whole, or when it is flushed; what somebody else
    writes behind a line that was flushed unfinished begins a new one. Lines of `batch` are marked `[item index] `.
    What a terminal would obey (colours too) goes out of none.
    """

    def __init__(self, stream: TextIO, batch: str = "", place: Place | None = None) -> None:
        self._stream = stream
        self.batch = batch
        self.place = place or Place()
        self._begun: dict[str, list[str]] = {}  # tag -> text not yet out

    def write(self, text: str) -> int:
        tag = item.get()
        with self.place.turn:
            if not tag:
                shown = plain(text)
                self._put(self._new_line(tag) + shown if shown else "")
                return len(text)
            first, *more = text.split("\n")
            self._begun.setdefault(tag, []).append(first)
            if more:
                *lines, rest = self._held(tag), *more
                marks = [self._begin(tag)] + [self._mark(tag)] * (len(lines) - 1)
                self._put("".join(f"{mark}{plain(line)}\n" for mark, line in zip(marks, lines, strict=True)))
                self.place.line = None
                self._put_out()
                if rest:
                    self._begun[tag] = [rest]
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Put out what the run that calls has not ended with a newline; outside of runs, of all of them."""
        tag = item.get()
        with self.place.turn:
            for each in [tag] if tag else list(self._begun):
                if held := self._held(each):
                    self._put(self._begin(each) + plain(held))
                    self.place.line = tag
            self._put_out()

    def close(self) -> None:
        """The process's own stream stays open: other runs print too."""
        self.flush()

    def has_begun(self, tag: str) -> bool:
        """Whether the run has not ended its last line with a newline. Another thread may put it out meanwhile."""
        return tag in self._begun or self.place.line == tag

    def end(self, tag: str) -> None:
        """The run is over: put out what it has not ended with a newline, as a line of its own."""
        with self.place.turn:
            held = self._held(tag)
            if held or self.place.line == tag:
                self._put(self._begin(tag) + plain(held) + "\n")
                self.place.line = None
                self._put_out()

    def _held(self, tag: str) -> str:
        return "".join(self._begun.pop(tag, ()))

    def _begin(self, tag: str) -> str:
        """What stands before the run's next words: nothing where it goes on with its line."""
        return "" if self.place.line == tag else self._new_line(tag) + self._mark(tag)

    def _new_line(self, tag: str) -> str:
        others, self.place.line = self.place.line not in (None, tag), None
        return "\n" if others else ""

    def forked(self) -> None:
        """In a process that was forked: nobody else is at it there, and what others have begun is not its own."""
        self.place.turn = threading.RLock()
        self._begun.clear()

    def _put(self, text: str) -> None:
        # whoever listened was killed, the log's disk is full: no run and no worker fails for that
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def _put_out(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def _mark(self, tag: str) -> str:
        batch, _, index = tag.rpartition(":")
        return f"[item {index}] " if batch == self.batch else f"[{tag}] "

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_prefixed: list[ItemPrefix] = []


def end_lines() -> None:
    """The run that calls is over: what it has not ended with a newline goes out."""
    tag = item.get()
    for stream in _prefixed:
        if stream.has_begun(tag):
            with contextlib.suppress(OSError, ValueError):  # a full disk, a closed stream
                stream.end(tag)


def forked() -> None:
    """A process that was forked from this one begins."""
    for stream in _prefixed:
        stream.forked()


class _OneLine(logging.Formatter):
    """Our own news in one line each, whatever names and texts from elsewhere hold; users' lines as they are.

    asyncio's debug mode shows the traceback of every connection that breaks: here the error alone, since our
    own line says what it means.
    """

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if record.name == "asyncio" and record.levelno == logging.DEBUG and isinstance(error, OSError):
            shown = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None})
            shown.msg, shown.args = f"{record.getMessage()}: {error}", ()
            return super().format(shown)
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.name.startswith("pocketfleet"):
            record.message = printable(record.message, 2000)
        return super().formatMessage(record)


LINE_A_REQUEST = ("httpx", "httpx2", "google_genai.models")
"""Libraries that write a line at INFO for every request: thousands here. A level that a user's code sets holds."""


def prefix_streams(batch: str = "") -> None:
    """Prefix stdout and stderr. Before users' modules are imported: a log handler keeps the stream it finds."""
    out = _prefixing(sys.stdout, batch, None)
    err = _prefixing(sys.stderr, batch, out.place if _same_place(sys.stdout, sys.stderr) else None)
    sys.stdout, sys.stderr = _prefixed[:] = out, err


def _prefixing(stream: Any, batch: str, place: Place | None) -> ItemPrefix:
    if isinstance(stream, ItemPrefix):
        stream.batch = batch
        return stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # no run fails for a letter that the locale has not
    return ItemPrefix(stream or open(os.devnull, "w"), batch, place)  # None where it was closed


def _same_place(one: Any, other: Any) -> bool:
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False


def prefix_items(log_level: str, batch: str = "") -> None:
    """Prefix stdout and stderr, and show log lines from `log_level` on.

    In the process of a `run` (which gives its `batch`) our own news stays unsaid.
    """
    prefix_streams(batch)
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(_OneLine("%(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=log_level, handlers=[shown])
    logging.getLogger().setLevel(log_level)
    logging.getLogger("arq").setLevel(logging.WARNING)
    for logger in map(logging.getLogger, LINE_A_REQUEST):
        if log_level == "INFO" and logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
    if batch and log_level != "DEBUG":
        logging.getLogger("pocketfleet").setLevel(logging.WARNING)
