"""The terminal that a process was started from is closed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


def on_hangup(stop: Callable[[], object]) -> None:
    """Call it at the first SIGHUP (a shell may pass on a second one), unless we are to outlive it, as by `nohup`."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
        return
    loop = asyncio.get_running_loop()

    def once() -> None:
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        stop()

    loop.add_signal_handler(signal.SIGHUP, once)
