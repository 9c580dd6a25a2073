"""What the current run holds: the gates it is inside, the innermost last.

Kept in a context variable, so that it is known in child tasks and in the threads of the run's sync nodes.
What a task inherited counts only as long as it is really held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

from limiter.errors import HeldAlready
from limiter.permit import Permit


class Holding:
    """Some gates that a run holds, from `hold` to `let_go`.

    Attributes:
        names: of the gates.
        by: who holds them, to tell blocks apart.
        permits: of the gates, where they are permits of `limit()`.
        outer: what the run held before.
        active: not let go yet.
    """

    __slots__ = ("active", "by", "names", "outer", "permits")

    def __init__(
        self, names: Sequence[str], by: object, permits: Sequence[Permit], outer: Holding | None
    ) -> None:
        self.names = names
        self.by = by
        self.permits = permits
        self.outer = outer
        self.active = True


_innermost: ContextVar[Holding | None] = ContextVar("pocketfleet_held", default=None)


def hold(names: Sequence[str], by: object, permits: Sequence[Permit] = ()) -> Holding:
    """From now on the current run holds these gates."""
    holding = Holding(names, by, permits, _innermost.get())
    _innermost.set(holding)
    return holding


def let_go(holding: Holding) -> None:
    """It holds them no more. Any task or thread may say so."""
    holding.active = False
    each = _innermost.get()
    if each is holding:
        _innermost.set(holding.outer)
        return
    while each is not None:
        if each.outer is holding:
            each.outer = holding.outer
            return
        each = each.outer


def held_by(by: object) -> Holding | None:
    """The innermost block of the current run that belongs to `by`."""
    each = _innermost.get()
    while each is not None and not (each.by is by and each.active):
        each = each.outer
    return each


def is_inside() -> bool:
    """Whether the current run holds any gate (or did, a moment ago)."""
    return _innermost.get() is not None


def held_names() -> list[str]:
    """Every gate the current run holds, the outermost first."""
    each, names = _innermost.get(), list[str]()
    while each is not None:
        if each.active:
            names[:0] = each.names
        each = each.outer
    return names


def refuse_held(names: Sequence[str]) -> None:
    """Raise `HeldAlready` if the current run holds one of these gates."""
    if not is_inside():
        return
    held = held_names()
    for name in names:
        if name in held:
            raise HeldAlready(name)


class Waits:
    """The waits of one run's threads, so that a run which is stopped leaves them."""

    def __init__(self) -> None:
        self._leave: set[Callable[[], None]] = set()
        self._stopped = False

    def add(self, leave: Callable[[], None]) -> None:
        """`leave` ends the wait, from any thread; at once if the run was stopped already."""
        self._leave.add(leave)
        if self._stopped:
            leave()

    def remove(self, leave: Callable[[], None]) -> None:
        self._leave.discard(leave)

    def stop(self) -> None:
        self._stopped = True
        for leave in list(self._leave):
            leave()


waits: ContextVar[Waits | None] = ContextVar("pocketfleet_waits", default=None)
"""Those of the current run, where somebody may stop it."""
