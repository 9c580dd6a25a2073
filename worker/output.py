"""Prints and logs of users' nodes: each line says which item it comes from."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

from worker.run import item


class ItemPrefix:
    """A text stream that puts `[batch:index] ` in front of each line written during a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started: dict[str, bool] = {}

    def write(self, text: str) -> int:
        tag = item.get()
        if not tag:
            return self._stream.write(text)
        mid_line = self._started.get(tag, False)
        lines = text.splitlines(keepends=True)
        marked = "".join(
            line if mid_line and number == 0 else f"[{tag}] {line}" for number, line in enumerate(lines)
        )
        self._started.pop(tag, None)
        if lines and not lines[-1].endswith("\n"):
            self._started[tag] = True
        self._stream.write(marked)
        if marked.endswith("\n"):
            self._stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prefix_items(log_level: str) -> None:
    """Prefix stdout and stderr, and show log lines from `log_level` on."""
    if not isinstance(sys.stdout, ItemPrefix):
        sys.stdout = ItemPrefix(sys.stdout)
        sys.stderr = ItemPrefix(sys.stderr)
    logging.basicConfig(level=log_level, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(log_level)
    logging.getLogger("arq").setLevel(logging.WARNING)
