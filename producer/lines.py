"""What a line of the output tells, as JSON or as a row of CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

import msgspec

from producer.follow import Ended
from worker.difference import changed

COLUMNS = (
    "index",
    "status",
    "retry",
    "action",
    "params",
    "changed",
    "error_type",
    "error_message",
    "error_node",
    "error_trace",
    "attempts",
    "nodes",
    "left_behind",
    "notes",
    "host",
    "seconds",
)


def record_of(ended: Ended, params: dict[str, Any] | None) -> dict[str, Any]:
    """What a line tells of an attempt; `params` None where no spool is at hand."""
    outcome = ended.outcome
    return {
        "index": ended.index,
        "params": params,
        "status": outcome.status,
        "retry": max(0, ended.retry),
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


def json_line(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON; keys that JSON has not are spelled: `"null"`, `"true"`, base64, digits."""
    return _rendered(record, lambda record: _json(record) + b"\n")


def csv_line(record: dict[str, Any]) -> bytes:
    """The same as a CSV row: text as it is, everything else as JSON, line breaks as \\n."""
    return _rendered(record, _csv_line)


def _rendered(record: dict[str, Any], rendered: Callable[[dict[str, Any]], bytes]) -> bytes:
    """The line of a record; where that cannot be, one without what the user's code gave, which says so."""
    try:
        return rendered(record)
    except Exception as error:  # whatever one item gave, the batch goes on
        said = f"params, action and changed cannot be written here: {type(error).__name__}: {error!s:.200}"
        bare: dict[str, Any] = {"params": None, "action": None, "changed": {}}
        return rendered({**record, **bare, "notes": [*record["notes"], said]})


def _csv_line(record: dict[str, Any]) -> bytes:
    error = record["error"]
    cells = {**record, **{f"error_{key}": getattr(error, key, "") for key in _ERROR}}
    return _row([_cell(cells[column]) for column in COLUMNS])


_ERROR = ("type", "message", "node", "trace")


def _cell(value: Any) -> Any:
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
    return value if isinstance(value, (int, float)) else _json(value).decode()


def _row(cells: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


HEADER = _row(COLUMNS)
"""The first line of a CSV."""


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError):
        plain = _spelled(msgspec.to_builtins(value, enc_hook=repr))
        return json.dumps(plain, default=repr, separators=(",", ":")).encode()


def _spelled(value: Any) -> Any:
    """The value with text for keys, as `msgspec.json` spells those that it takes.

    >>> _spelled({None: [{True: 1, 2: float("nan")}]})
    {'null': [{'true': 1, '2': None}]}
    """
    if isinstance(value, dict):
        return {_key(key): _spelled(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(key: Any) -> str:
    return json.dumps(key) if key is None or isinstance(key, bool) else str(key)
