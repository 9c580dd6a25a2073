"""An event loop of our own in a thread, for `with limit()` in code that has none."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from limiter.held import waits

T = TypeVar("T")
END_S = 5.0
"""Seconds the loop may take at the end of the process to give everything back."""


def run(work: Coroutine[Any, Any, T], undo: Callable[[T], None]) -> T:
    """What `work` returns, run on the background loop while the calling thread waits.

    Any exception that ends the wait, as Ctrl-C in the main thread, cancels the work; if it had its result
    by then, `undo` gets it, on the loop. A run that is stopped leaves the wait with `CancelledError`.
    """
    wait = _Wait(_loop(), work, undo)
    of_run = waits.get()
    if of_run is not None:
        of_run.add(wait.leave)
    try:
        return wait.result()
    except BaseException:
        wait.leave()
        raise
    finally:
        if of_run is not None:
            of_run.remove(wait.leave)


def call(act: Callable[[], None]) -> None:
    """Run `act` on the background loop, soon."""
    _loop().call_soon_threadsafe(act)


class _Wait(Generic[T]):
    """One piece of work. Its end and the leaving of the wait both happen on the loop, so neither is missed."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], undo: Callable[[T], None]
    ) -> None:
        self._loop = loop
        self._work = work
        self._undo = undo
        self._over = threading.Event()
        self._left = False
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._start)  # in a copy of the caller's context

    def result(self) -> T:
        self._over.wait()
        if self._task is None or self._left:
            raise asyncio.CancelledError("the run was stopped while it waited for a limit")
        return self._task.result()

    def leave(self) -> None:
        """Nobody wants the result any more. From any thread."""
        self._left = True
        self._over.set()
        try:
            self._loop.call_soon_threadsafe(self._drop)
        except RuntimeError:
            pass  # the loop has ended, and gave everything back

    def _start(self) -> None:
        if self._left:
            self._work.close()
            return
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(lambda _: self._over.set())

    def _drop(self) -> None:
        task = self._task
        if task is None:
            return
        if not task.done():
            task.cancel()
            task.add_done_callback(self._give_back)
        else:
            self._give_back(task)

    def _give_back(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._undo(task.result())


class _Background:
    """The thread, its loop, and their end with the process."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._end: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="pocketfleet-limits", daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._end.wait()  # then asyncio.run cancels what is left, and the pumps give everything back

    def end(self) -> None:
        if self.loop is None or self._end is None or not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(END_S)


_background: _Background | None = None
_starting = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    global _background
    with _starting:
        if _background is None:
            _background = _Background()
        loop = _background.loop
    assert loop is not None
    return loop


def end() -> None:
    """End the loop, if there is one, and give everything back; the next use starts another."""
    global _background
    with _starting:
        ending, _background = _background, None
    if ending is not None:
        ending.end()


def _forget() -> None:
    """A child made by fork has none of its parent's threads."""
    global _background, _starting
    _background, _starting = None, threading.Lock()


atexit.register(end)
os.register_at_fork(after_in_child=_forget)
