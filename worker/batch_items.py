"""What is known of the items of one batch node: which were called, and what they returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from limiter.refusal import RateLimitHit
from worker.codec import CannotTravel, travels
from worker.refused import Refused

Returned = Mapping[int, Any] | None
"""Results of an earlier run of the node, by the items' positions."""


class BatchItems:
    """The items of one run of a batch node.

    An item's position is found by its identity, so it holds in whatever order the node calls its items;
    an item that is not one of the node's list, or a list that is an iterator, has none.
    """

    __slots__ = ("known", "digest", "list", "places", "calls", "returned", "siblings", "hit")

    def __init__(self, returned: Returned, digest: bytes | None) -> None:
        self.known = dict(returned) if returned and digest is not None else {}
        self.digest = digest
        self.list: tuple[Any, ...] | None = None
        self.places: dict[int, list[int]] = {}
        self.calls: dict[Any, tuple[Any, int | None]] = {}
        self.returned: dict[int, Any] = dict(self.known)
        self.siblings: set[Any] = set()
        self.hit: RateLimitHit | None = None

    def open(self, given: Any) -> None:
        """The list `prep` gave, before its items are called."""
        self.list = tuple(given) if isinstance(given, (list, tuple)) else ()
        if self.known and digest_of(self.list) != self.digest:
            self.known, self.returned = {}, {}
        for place in range(len(self.list) - 1, -1, -1):
            self.places.setdefault(id(self.list[place]), []).append(place)

    def begin(self, item: Any, who: object) -> int | None:
        """The position of the item which `who`, a task or thread, calls now, perhaps once more."""
        self.raise_if_refused()
        call = self.calls.get(who)
        if call is not None and call[0] is item:
            return call[1]
        places = self.places.get(id(item))
        place = places.pop() if places else None
        self.calls[who] = (item, place)
        return place

    def end(self, who: object, result: Any) -> Any:
        """Remember what the item returned that `who` called; the result."""
        _, place = self.calls.pop(who, (None, None))
        if place is not None:
            self.returned[place] = result
        return result

    def refuse(self, hit: RateLimitHit) -> None:
        """Of several refusals the one with the longest `retry_after` counts."""
        if self.hit is None or (hit.retry_after or 0) > (self.hit.retry_after or 0):
            self.hit = hit

    def raise_if_refused(self) -> None:
        """Where one item was refused, no other is called; nor may a node that gathers exceptions go on."""
        if self.hit is not None:
            raise Refused(self.hit)

    def refused(self, hit: RateLimitHit) -> Refused:
        if self.list is None:  # refused in prep: what is known of an earlier run stays known
            return Refused(hit, self.returned, self.digest)
        returned = {place: result for place, result in sorted(self.returned.items()) if _can_travel(result)}
        return Refused(hit, returned, digest_of(self.list))


def digest_of(items: Sequence[Any]) -> bytes | None:
    """16 bytes that are the same for equal lists, None if the list cannot travel."""
    try:
        return blake2b(travels(items), digest_size=16).digest()
    except CannotTravel:
        return None


def _can_travel(result: Any) -> bool:
    try:
        travels(result)
    except CannotTravel:
        return False
    return True
