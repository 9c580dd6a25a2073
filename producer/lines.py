"""The output file: one JSON line per item."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from producer.errors import InputError
from producer.follow import Ended
from worker.difference import changed


class LineFile:
    """Writes outcomes as they come: index, params, status, action, changed, error, attempts, notes, nodes, host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path, "wb")

    def write(self, ended: Ended, params: dict[str, Any]) -> None:
        self._file.write(line_of(ended, params) + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def check_writable(path: Path) -> None:
    """Refuse a path that could not be written, before anything is enqueued; what stands there stays.

    Raises:
        InputError: names the path and why.
    """
    new = not os.path.exists(path)  # Path.exists may raise
    _opened(path, "ab").close()
    if new:
        path.unlink()


def _opened(path: Path, mode: str) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return cast(IO[bytes], path.open(mode))
    except OSError as error:
        raise InputError(f"--output {path} cannot be written: {error.strerror}", source=str(path)) from None


def line_of(ended: Ended, params: dict[str, Any]) -> bytes:
    """One item's line, without the newline."""
    outcome = ended.outcome
    record = {
        "index": ended.index,
        "params": params,
        "status": outcome.status,
        "action": outcome.action,
        "changed": changed(outcome.difference or {}),
        "error": outcome.failure,
        "left_behind": outcome.left_behind,
        "notes": outcome.notes,
        "attempts": outcome.attempts,
        "nodes": outcome.nodes,
        "host": outcome.host,
        "seconds": round(outcome.ended - outcome.started, 3),
    }
    try:
        return msgspec.json.encode(record)
    except (TypeError, ValueError):
        return json.dumps(msgspec.to_builtins(record, str_keys=True), default=repr).encode()
