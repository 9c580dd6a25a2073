"""`breakpoint()` where many runs share one terminal: one of them at a time has the prompt."""

from __future__ import annotations

import os
import pdb  # noqa: T100 - it is what this file is about
import signal
import sys
import threading
from collections.abc import Iterator
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
def one_prompt() -> Iterator[None]:
    """While the block runs, `breakpoint()` opens prompts one after the other; `q` stops the whole run.

    A debugger that somebody chose (PYTHONBREAKPOINT, an IDE) stays.
    """
    global _over
    _over = False
    ours = sys.breakpointhook is sys.__breakpointhook__ and not os.environ.get("PYTHONBREAKPOINT")
    if ours:
        sys.breakpointhook = _stop_here
    try:
        yield
    finally:
        if ours:
            sys.breakpointhook = sys.__breakpointhook__


def _stop_here(*_: Any, **__: Any) -> None:
    _Prompt().set_trace(sys._getframe(1))


class _Prompt(pdb.Pdb):
    def interaction(self, frame: FrameType | None, *rest: Any) -> None:
        global _busy, _over
        with _turn:
            if _over:
                self.set_quit()
                return
            _busy += 1
            try:
                super().interaction(frame, *rest)
            finally:
                _busy -= 1
            if self.quitting:
                _over = True
                os.kill(os.getpid(), signal.SIGINT)
