"""What a gate has to tell people: logged once."""

from __future__ import annotations

import logging

from limiter.limits import shown_values

log = logging.getLogger("pocketfleet.limiter")


class Notes:
    """The notes one gate's answers brought so far."""

    def __init__(self, limit: str) -> None:
        self._limit = limit
        self._logged: set[str] = set()

    def hear(self, note: str, our_values: str) -> None:
        """Log the note of an answer, unless it was; `our_values`: of the limit, as the calls bring them."""
        if note in self._logged:
            return
        what, _, rest = note.partition("=")
        if what == "repaired":  # not remembered: a second time is news again
            log.warning("gate.repaired limit=%s what=%s", self._limit, rest)
            return
        self._logged.add(note)
        their_values = rest.replace(",", " ")
        log.warning(
            "limit.two_values limit=%s ours=(%s) theirs=(%s) in_force=%s",
            self._limit,
            shown_values(our_values, their_values),
            shown_values(their_values, our_values),
            "ours, we started later" if what == "older" else "theirs, they started later",
        )
