"""Variables that look like our settings and are read by nobody: most often a name that was mistyped."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable

from limiter.address import PREFIX
from limiter.printable import printable

ABOVE = (
    *("FLOWS", "MAX_JOBS", "DRAIN_S", "BURST", "LOG_LEVEL", "MAX_PARAM_BYTES", "KEEP_S"),
    "MEMORY_PATIENCE_S",
)
"""Settings of the rooms above, which a process that only uses `limit()` does not load."""
OURS = ("LIFELINE", "SEED", "SOAK")
"""What processes and tests of ours tell each other."""
_ORCHESTRATOR = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP|SCTP)|$)")
"""What Kubernetes puts into every container for a service whose name begins like ours."""

_told = False


def tell_once(names: Iterable[str], known: Iterable[str]) -> None:
    """One line on standard error, once per process, for the variables among `names` that are no setting.

    Args:
        names: all variables there are, in any case; values are never looked at.
        known: the settings that are read, without their prefix.
    """
    global _told
    if not _told and (sentence := unread(names, known)):
        _told = True
        print(f"pocketfleet: {sentence}", file=sys.stderr, flush=True)


def unread(names: Iterable[str], known: Iterable[str]) -> str:
    """
    >>> unread(["POCKETFLEET_REDIS_UR", "HOME", "POCKETFLEET_REDIS_PORT_6379_TCP_ADDR"], ["REDIS_URL"])
    'POCKETFLEET_REDIS_UR is no setting and is not read: did you mean POCKETFLEET_REDIS_URL?'
    """
    settings = {*(name.upper() for name in known), *ABOVE}
    ours = {name.upper().removeprefix(PREFIX) for name in names if name.upper().startswith(PREFIX)}
    odd = sorted(name for name in ours - settings - {*OURS} if not _ORCHESTRATOR.search(name))
    if not odd:
        return ""
    close = [PREFIX + each for name in odd for each in difflib.get_close_matches(name, settings, 1, 0.6)]
    listed = ", ".join(PREFIX + printable(name, 60) for name in odd[:5])
    listed += f" and {len(odd) - 5} more" if len(odd) > 5 else ""
    verbs = "are no settings and are" if len(odd) > 1 else "is no setting and is"
    mend = f"did you mean {' and '.join(dict.fromkeys(close))}?" if close else "see the README's table"
    return f"{listed} {verbs} not read: {mend}"
