"""Locks on files. The kernel takes them back when their process dies, however it dies.

A child made by fork shares its parent's lock; one that runs another program has none, unless the
file is passed on to it by name.
"""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    AVAILABLE = False
else:
    AVAILABLE = True


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def take(fd: int) -> bool:
    """Lock it for ourselves alone, also where we share it already; False if another process has it."""
    return _taken(fd, fcntl.LOCK_EX)


def share(fd: int) -> bool:
    """Lock it together with others; False if one of them has it alone."""
    return _taken(fd, fcntl.LOCK_SH)


def give_back(fd: int) -> None:
    """Unlock and close. Said aloud, because a child forked meanwhile would keep the lock alive."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _taken(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
