"""The check of each param dict: what a worker gets has to be equal to what was given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from producer.errors import ParamsError
from worker import codec

MAX_PARAMS_BYTES = 262_144

_SCALARS = frozenset((str, int, float, bool, bytes, type(None)))
_TEXT = frozenset((str,))


def checked_params(
    index: int, value: object, max_bytes: int = MAX_PARAMS_BYTES, where: str = "prep_async"
) -> bytes:
    """One param dict, encoded, after making sure that it arrives equal and of the same types.

    Tuples are the exception: they arrive as lists. `where` names the source in the sentence.

    Raises:
        ParamsError: with the item's index and the path of the first entry that cannot travel.
    """
    if type(value) is not dict:
        problem = f" is of type {type(value).__name__}, not dict; pass one dict of params per item"
        raise _refused(index, where, problem)
    encoded = _plain_encoded(value) or _compared(index, value, where)
    if len(encoded) > max_bytes:
        sizes = f"takes {len(encoded):,} bytes encoded, {max_bytes:,} are allowed"
        problem = f" {sizes}; pass a path or a key to the data"
        raise _refused(index, where, problem)
    return encoded


def _plain_encoded(params: dict[Any, Any]) -> bytes | None:
    """The encoded dict if its types alone show that it comes back as it is, else None."""
    if not _all_text(params) or not _plain(params.values(), codec.DEPTH):
        return None
    try:
        return codec.encode(params)
    except (ValueError, OverflowError):  # a lone surrogate or an int past 64 bits: `_compared` names it
        return None


def _plain(entries: Iterable[Any], depth: int) -> bool:
    for entry in entries:
        kind = type(entry)
        if kind in _SCALARS:
            if kind is float and math.isnan(entry):
                return False
        elif kind is dict:
            if depth == 0 or not _all_text(entry) or not _plain(entry.values(), depth - 1):
                return False
        elif (kind is not list and kind is not tuple) or depth == 0 or not _plain(entry, depth - 1):
            return False
    return True


def _all_text(keys: Iterable[Any]) -> bool:
    return _TEXT.issuperset(map(type, keys))


def _compared(index: int, params: dict[Any, Any], where: str) -> bytes:
    for key in params:
        if type(key) is not str:
            problem = f": the key {key!r:.80} is of type {type(key).__name__}, not str; use text keys"
            raise _refused(index, where, problem)
    try:
        codec.blame(params, "", 0)  # bounds the depth before anything recurses
        return codec.travels(params)
    except codec.CannotTravel as fault:
        path = fault.path if len(fault.path) <= 120 else f"{fault.path[:80]} ... {fault.path[-35:]}"
        raise _refused(index, where, f": {path or 'it'} {fault.reason}", fault.path) from None


def _refused(index: int, where: str, problem: str, path: str = "") -> ParamsError:
    return ParamsError(f"item {index} of {where}{problem}. Nothing was enqueued.", index=index, path=path)
