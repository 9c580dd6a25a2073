"""Words beside the work."""

from __future__ import annotations

import contextlib
import sys


def aside(text: str) -> None:
    """Say it on standard error; where that takes no more, as a terminal that was closed, nothing comes of it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
