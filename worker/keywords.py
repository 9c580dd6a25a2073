"""Class attributes of flows and nodes that may be given as keywords too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def set_keywords(made: object, known: Sequence[str], given: Mapping[str, Any]) -> None:
    """Set what was given as attributes of `made`; None leaves the class attribute as it is.

    Raises:
        TypeError: a keyword is not one of `known`.
    """
    for key, value in given.items():
        if key not in known:
            raise TypeError(f"{type(made).__name__} has no keyword '{key}' (it has: {', '.join(known)})")
        if value is not None:
            setattr(made, key, value)
