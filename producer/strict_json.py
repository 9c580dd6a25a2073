"""JSON as people type it, strictly: no NaN, no key twice, no number or depth that would not arrive."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


class NotJson(ValueError):
    """Why a text is not JSON; `ours` says that plain JSON parsers would take it."""

    def __init__(self, reason: str, line: int = 0, column: int = 0, *, ours: bool = False) -> None:
        super().__init__(reason)
        self.line = line
        self.column = column
        self.ours = ours


def read_json(text: str) -> Any:
    """The value of a text.

    Raises:
        NotJson: it is none, or plain parsers would each make something else of it.
    """
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as fault:
        raise NotJson(fault.msg[:1].lower() + fault.msg[1:], fault.lineno, fault.colno) from None
    except RecursionError:
        raise NotJson("the JSON is nested too deep; flatten it", ours=True) from None
    except NotJson:
        raise
    except ValueError:  # Python refuses to read an int of more than 4,300 digits
        raise NotJson("a number has too many digits; write it as text", ours=True) from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _refuse_constant(text)
    return number


def _refuse_constant(text: str) -> NoReturn:
    raise NotJson(f"{text:.40} is not a finite number; use null or text", ours=True)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotJson(f"the key {twin!r:.80} stands twice in one object; keep one", ours=True)
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse_constant)
