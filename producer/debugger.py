"""`breakpoint()` where many runs share one terminal: one of them at a time has the prompt."""

from __future__ import annotations

import asyncio
import os
import pdb  # noqa: T100 - it is what this file is about
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_turn = threading.RLock()
_busy = 0
_over = False
"""Whether somebody has left with `q`, or there is nobody to ask (the input is at its end)."""


def prompting() -> bool:
    """Whether somebody is at a prompt, so that other output would fall into their typing."""
    return _busy > 0


@contextmanager
def one_prompt(on_quit: Callable[[], None]) -> Iterator[None]:
    """While the block runs, `breakpoint()` opens prompts one after the other.

    `q` calls `on_quit`, from any thread, cancels the run that asked and interrupts the process as Ctrl-C
    does. A debugger that somebody chose (PYTHONBREAKPOINT, an IDE) stays.
    """
    global _over
    _over = False

    def stop_here(*_: Any, **__: Any) -> None:
        _Prompt(on_quit).set_trace(sys._getframe(1))

    ours = sys.breakpointhook is sys.__breakpointhook__ and not os.environ.get("PYTHONBREAKPOINT")
    if ours:
        sys.breakpointhook = stop_here
    try:
        yield
    finally:
        if ours:
            sys.breakpointhook = sys.__breakpointhook__


class _Prompt(pdb.Pdb):
    def __init__(self, on_quit: Callable[[], None]) -> None:
        super().__init__(nosigint=True)
        self._on_quit = on_quit

    def interaction(self, frame: FrameType | None, *rest: Any) -> None:
        global _busy, _over
        with _turn:
            if not _over:
                _busy += 1
                try:
                    super().interaction(frame, *rest)
                finally:
                    _busy -= 1
                if not self.quitting:
                    return
                _over = True
                os.kill(os.getpid(), signal.SIGINT)
            self._on_quit()
            # not BdbQuit: a node would try again, and the item would count as failed
            raise asyncio.CancelledError
