"""What a refused node raises instead of what its own retries and fallback could swallow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from limiter.refusal import RateLimitHit

Recognise = Callable[[BaseException], RateLimitHit | None]
"""Says whether an error is a refusal of the protected API, and which."""


class Refused(BaseException):
    """A guarded node was refused. Not an `Exception`, so that nothing on the way swallows it.

    Attributes:
        hit: what was recognised.
        returned: of a batch node, the results of the items that had returned, by position: those that
            can travel (tuples arrive as lists).
        items_digest: of the list in which these positions count; None if it cannot travel.
    """

    def __init__(
        self, hit: RateLimitHit, returned: dict[int, Any] | None = None, items_digest: bytes | None = None
    ) -> None:
        super().__init__(hit, returned, items_digest)
        self.hit = hit
        self.returned = {} if returned is None else returned
        self.items_digest = items_digest

    def __str__(self) -> str:
        return str(self.hit)
