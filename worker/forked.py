"""Processes that user code forks, as `multiprocessing` does: they must not speak for the one they come from."""

from __future__ import annotations

import os
import signal
import threading
from functools import cache

from worker import output

OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_forking = threading.local()


@cache
def let_go_in_forks() -> None:
    """From now on a process forked from this one takes signals for itself, and can always print.

    asyncio's handlers write into a pipe that is both processes': a SIGTERM for the child, as `Pool.terminate`
    sends one, would stop this process and not the child. For processes whose signals are ours.
    """
    os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_let_go)


def _hold() -> None:
    """A signal for the child waits until it has let go of our handlers."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, OURS)


def _go_on() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _let_go() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if callable(signal.getsignal(signal.SIGHUP)):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    output.forked()
    _go_on()
