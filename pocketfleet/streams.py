"""The standard streams of a command: there always, and its words to people never end its work."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any


def stand() -> None:
    """Open what the caller closed (`2>&-`), lest the next file take its number, and let stderr lose its reader."""
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if 0 in closed:
        sys.stdin = os.fdopen(0, closefd=False)
    if 1 in closed:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if 2 in closed or type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = _heedless(2)


class Heedless(io.FileIO):
    """A file that drops what it cannot write: its terminal is gone, its reader has left, its disk is full."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            while (written := super().write(data)) is None:  # another process has made it non-blocking
                select.select([], [self], [])
            return written
        return len(data)


def _heedless(number: int) -> io.TextIOWrapper:
    encoding = getattr(sys.stderr, "encoding", None)
    raw = io.BufferedWriter(Heedless(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
