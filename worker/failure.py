"""An exception in plain text: it can always be stored and read, whatever the exception does."""

from __future__ import annotations

import traceback

from worker.contract import Failure

MOST_TEXT = 2_000
MOST_TRACE = 4_000


def failure_of(error: BaseException, node: str) -> Failure:
    """Type, message, node and a short trace of `error`, also where it cannot be printed."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return Failure(
        type=_clean(name, 200), message=_message(error), node=_clean(node, 200), trace=_trace(error)
    )


def _message(error: BaseException) -> str:
    try:
        return _clean(str(error), MOST_TEXT)
    except BaseException as unprintable:
        return f"(its text cannot be made: {type(unprintable).__name__})"


def _trace(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error, limit=-8))
    except BaseException:
        return ""
    return _clean(text if len(text) <= MOST_TRACE else "…" + text[-MOST_TRACE:], MOST_TRACE + 1)


def _clean(text: str, most: int) -> str:
    """At most `most` characters that can be encoded."""
    return text[:most].encode("utf-8", "backslashreplace").decode()
