"""The output file: one JSON line per item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import msgspec

from producer.errors import InputError
from producer.follow import Ended
from worker.difference import changed


class LineFile:
    """Writes outcomes as they come: index, params, status, action, changed, error, attempts, nodes, host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("wb")
        except OSError as error:
            raise InputError(
                f"--output {path} cannot be written: {error.strerror}", source=str(path)
            ) from None

    def write(self, ended: Ended, params: dict[str, Any]) -> None:
        self._file.write(line_of(ended, params) + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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
        "attempts": outcome.attempts,
        "nodes": outcome.nodes,
        "host": outcome.host,
        "seconds": round(outcome.ended - outcome.started, 3),
    }
    try:
        return msgspec.json.encode(record)
    except (TypeError, ValueError):
        return json.dumps(msgspec.to_builtins(record, str_keys=True), default=repr).encode()
