"""A thread that belongs to one run: its sync code runs there, so that the loop stays free."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextvars import Context, ContextVar, Token, copy_context
from typing import Any

Unsets = dict[ContextVar[Any], Token[Any]]


class RunThread:
    """Runs the sync code of one run, call after call, in one thread and one context.

    The thread starts at the first call; a run that makes none costs nothing. Thread-locals and
    objects bound to their thread (a SQLite connection) go on working from call to call, and so do
    context variables, in both directions between the calls and the task that awaits them. Not
    promised: a `contextvars.Token` made in the task cannot be reset in the thread, nor the other
    way round, because the two contexts are copies of each other.

    One task uses it. Whoever makes it must `close` it, and count the run's slot until
    `wait_ended` returns. The thread is a daemon: it does not keep the process alive.
    """

    __slots__ = ("name", "_awaiting", "_calls", "_closed", "_context", "_ended", "_last", "_unsets")

    def __init__(self, name: str = "run") -> None:
        self.name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closed = False
        self._awaiting = 0
        self._context: Context | None = None
        self._ended: asyncio.Future[None] | None = None
        self._last: _Call | None = None
        self._unsets: Unsets = {}

    @property
    def busy(self) -> bool:
        """Whether a call is still running (or about to), also when nobody awaits it any more, or has ended and
        its task has yet to take what it returned."""
        return self._awaiting > 0 or (self._last is not None and not self._last.ended)

    async def call(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """What `function(*args)` returns or raises, run in the thread.

        Raises whatever it raises, `SystemExit` and `KeyboardInterrupt` included; `StopIteration`
        arrives as `RuntimeError`, as from any coroutine. A cancelled `call` raises at once, while
        the function goes on to its end: see `busy` and `wait_ended`.
        """
        if self._closed:
            raise RuntimeError(f"thread '{self.name}' is closed: its run has ended, so start a new run")
        context = self._started()
        call = self._last = _Call(function, args, asyncio.get_running_loop())
        self._calls.put(call)
        self._awaiting += 1
        try:
            await call.over
        except BaseException:
            call.wanted = False
            raise
        finally:
            self._awaiting -= 1
        carry(context, self._unsets)
        return call.outcome()

    def close(self) -> None:
        """Take no more calls; the thread ends once the one in progress has ended."""
        if not self._closed:
            self._closed = True
            self._calls.put(None)

    async def wait_ended(self) -> None:
        """Close, and return when the thread has left the last call. Cancelling it changes nothing."""
        self.close()
        if self._ended is not None:
            await asyncio.shield(self._ended)

    def _started(self) -> Context:
        """The thread's context, after making sure that there is a thread."""
        if self._context is None:
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()
            # Empty: everything in it was carried there, so everything can be unset again.
            context = Context()
            work = (self._calls, context, loop, ended)
            threading.Thread(target=_work, args=work, name=self.name, daemon=True).start()
            self._context, self._ended = context, ended
        return self._context


class _Call:
    """One call on its way through the thread.

    The result travels here and not in the future: a future refuses StopIteration, and prints
    about an exception that nobody fetched because the run was cancelled.
    """

    __slots__ = ("function", "args", "given", "loop", "over", "wanted", "ended", "value", "error")

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.function = function
        self.args = args
        self.given = copy_context()
        self.loop = loop
        self.over: asyncio.Future[None] = loop.create_future()
        self.wanted = True
        self.ended = False
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self, context: Context, unsets: Unsets) -> None:
        if self.wanted:
            try:
                context.run(carry, self.given, unsets)
                self.value = context.run(self.function, *self.args)
            except BaseException as error:
                self.error = error
        self.ended = True
        _tell(self.loop, self.over)

    def outcome(self) -> Any:
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            self.error = None  # error -> its traceback -> this frame -> error would be a cycle


def _work(
    calls: queue.SimpleQueue[_Call | None],
    context: Context,
    loop: asyncio.AbstractEventLoop,
    ended: asyncio.Future[None],
) -> None:
    """The thread's life: call after call until told to end."""
    unsets: Unsets = {}
    while (call := calls.get()) is not None:
        call.run(context, unsets)
        del call  # while it waits it must not keep a run's store alive
    _tell(loop, ended)


def _tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(_resolve, future)
    except RuntimeError:
        pass  # the loop is closed: nobody waits any more


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def carry(source: Context, unsets: Unsets) -> None:
    """Give the current context the variables of `source`.

    `unsets` remembers how to unset what was set by an earlier carry, for variables that `source`
    has lost since. Two contexts and copying, rather than one context for task and thread: a
    context can be entered only once at a time, so a task cancelled while its thread is inside
    could not be stepped and would hang.
    """
    here = copy_context()
    for var, value in source.items():
        if var not in here:
            unsets[var] = var.set(value)
        elif here[var] is not value:
            var.set(value)
    for var in [var for var in unsets if var not in source]:
        token = unsets.pop(var)
        if var in here:
            var.reset(token)
