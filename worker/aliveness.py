"""Whether a process that said so still lives, as far as this one can know.

A process id means something only within one boot of one kernel and one namespace of ids: a container
often has the name of a host and ids of its own. So every process says where its id holds, and who looks
from anywhere else does not judge. Linux only; elsewhere nobody is judged.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

PROC = Path("/proc")
DEAD_STATES = ("Z", "X")


@cache
def pid_space() -> str:
    """Where this process's id and start time hold: boot, namespace of ids, of time. '' where unknown."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
        ids = os.readlink(PROC / "self/ns/pid")
    except (OSError, UnicodeDecodeError):
        return ""
    try:
        clock = os.readlink(PROC / "self/ns/time")
    except OSError:  # older kernels have one for all
        clock = ""
    return f"{boot} {ids} {clock}".strip()


def born(pid: int) -> int:
    """When a process started, in ticks of its kernel; 0 where that cannot be read, or it has ended."""
    state, ticks = _stat(pid)
    return 0 if state in DEAD_STATES else ticks


def surely_dead(space: str, pid: int, born_then: int) -> bool:
    """Whether the process that had this id and start time in `space` has ended. False in any doubt."""
    if not space or space != pid_space() or pid <= 0 or not born_then:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's, and there
    state, ticks = _stat(pid)
    return state in DEAD_STATES or (ticks > 0 and ticks != born_then)


def _stat(pid: int) -> tuple[str, int]:
    """State and start time from /proc; ('', 0) where they cannot be read."""
    try:
        # The name stands in brackets and may hold anything, brackets too.
        words = (PROC / f"{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return words[0].decode("ascii"), int(words[19])
    except (OSError, ValueError, IndexError):
        return "", 0
