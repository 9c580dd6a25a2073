"""Bytes on the wire: msgpack both ways, never pickle. Nothing read from Redis is executed."""

from __future__ import annotations

from typing import Any

import msgspec

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()

encode = _encoder.encode
"""Any msgpack value to bytes. Raises TypeError, OverflowError, RecursionError or ValueError."""


def decode(data: bytes) -> Any:
    """Bytes to plain values (dict, list, str, bytes, int, float, bool, None)."""
    return _decoder.decode(data)


class CannotTravel(Exception):
    """A value that would not come back as it was sent. Carries `path` and the reason in words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}" if path else reason)
        self.path = path
        self.reason = reason


def travels(value: Any) -> bytes:
    """`value` encoded, after making sure that it comes back equal and of the same types.

    Tuples are the one exception: they arrive as lists.

    Raises:
        CannotTravel: with the path of the first entry that would not, such as `'user'['tags'][2]`.
    """
    blame(value, "", 0)
    try:
        data = encode(value)
    except (TypeError, OverflowError, RecursionError, ValueError, AttributeError):
        raise CannotTravel("", "cannot be encoded") from None
    try:
        back = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise CannotTravel("", "cannot be decoded again") from None
    if not same(value, back):
        raise CannotTravel("", "would not come back as it is")
    return data


_SCALARS = (str, int, float, bool, bytes, type(None))


def same(sent: Any, back: Any) -> bool:
    """Equal and of the same types all the way down; a tuple may come back as a list."""
    kind = type(sent)
    if kind is tuple:
        kind = list
    if kind is not type(back):
        return False
    if kind is dict:
        if len(sent) != len(back):
            return False
        for key, item in sent.items():
            if type(key) not in _SCALARS or key not in back or not same(item, back[key]):
                return False
        # 1, 1.0 and True are one key to Python, so the types of the keys are compared too
        return all(type(a) is type(b) for a, b in zip(sent, back, strict=True))
    if kind is list:
        return len(sent) == len(back) and all(map(same, sent, back))
    return bool(sent == back)


DEPTH = 100


def blame(value: Any, path: str, depth: int) -> None:
    """Raise `CannotTravel` for the first entry of `value` that cannot travel; return if all can."""
    if depth > DEPTH:
        raise CannotTravel(path, f"is nested deeper than {DEPTH} levels")
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) not in _SCALARS:
                raise CannotTravel(path, f"has the key {key!r:.80}, a {type(key).__name__}; use text keys")
            if type(key) is str and not _is_text(key):
                raise CannotTravel(
                    path, f"has the key {key!r:.80}, which holds a lone surrogate; use text keys"
                )
            blame(item, f"{path}[{key!r}]" if path else repr(key), depth + 1)
    elif kind in (list, tuple):
        for place, item in enumerate(value):
            blame(item, f"{path}[{place}]", depth + 1)
    elif kind in (set, frozenset):
        raise CannotTravel(path, f"is a {kind.__name__}, which would arrive as a list; pass a list")
    elif kind is float and value != value:
        raise CannotTravel(path, "is NaN, which is not equal to itself; pass None")
    elif kind is int and not -(2**63) <= value < 2**64:
        raise CannotTravel(path, "is an integer past 64 bits; pass it as text")
    elif kind is str:
        if not _is_text(value):
            raise CannotTravel(path, "holds a lone surrogate, which is not text")
    elif kind not in _SCALARS:
        raise CannotTravel(
            path,
            f"is a {kind.__name__}, which cannot travel; pass plain values (text, numbers, lists, dicts)",
        )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
