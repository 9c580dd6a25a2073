"""The values of one limit, checked where they enter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from limiter.errors import LimitsError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
NAME_RULE = "use 1 to 128 letters, digits, '_', '.' or '-'"
HIGHEST = 1_000_000


def checked_name(name: object, what: str = "limit") -> str:
    """`name` as it came, or a `LimitsError` that says which characters may be used.

    >>> checked_name("openai")
    'openai'
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise LimitsError(f"{what} name {name!r} cannot be used: {NAME_RULE}", key=what, value=name)
    return name


def checked_count(value: object, key: str, *, none_ok: bool = False) -> int | None:
    """A whole number from 1 to 1,000,000, or None where that means "no limit"."""
    if value is None and none_ok:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, float) and value.is_integer():
        value, whole = int(value), True
    if not whole or not 1 <= value <= HIGHEST:  # type: ignore[operator]
        instead = " (None means no limit)" if none_ok else ""
        raise LimitsError(
            f"{key}={value!r} cannot hold: use a whole number from 1 to {HIGHEST:,}{instead}",
            key=key,
            value=value,
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def checked_float(value: object, key: str, low: float, high: float) -> float:
    """A finite number with low <= number <= high."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise LimitsError(
            f"{key}={value!r} cannot hold: use a number from {low:g} to {high:g}",
            key=key,
            value=value,
        )
    return float(value)  # type: ignore[arg-type]


def checked_timeout(value: object, key: str = "timeout_s") -> float | None:
    """Seconds above 0, or None where that means "wait"."""
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value > 0:  # type: ignore[operator]
        raise LimitsError(
            f"{key}={value!r} cannot hold: use a number of seconds above 0 (None waits)", key=key, value=value
        )
    return float(value)  # type: ignore[arg-type]


def checked_pacing(value: object, per_minute: object, key: str = "max_per_minute") -> bool:
    """Whether starts are spread evenly. `key` is how the user types the number of starts.

    >>> checked_pacing("even", 60)
    True
    """
    if value not in ("burst", "even"):
        raise LimitsError(
            f"pacing={value!r} cannot hold: use 'burst' (as fast as the minute allows) or 'even' (spread over it)",
            key="pacing",
            value=value,
        )
    if value == "even" and per_minute is None:
        raise LimitsError(
            f"pacing='even' spreads the starts of a minute, and {key}=None sets none: set {key} too",
            key="pacing",
            value=value,
        )
    return value == "even"


@dataclass(frozen=True)
class Limits:
    """One limit: how many at a time, how many starts per window, and how the level adapts.

    Args:
        name: 1 to 128 of `[A-Za-z0-9_.-]`; every process that uses the name shares the limit.
        max_concurrent: slots of the whole fleet, the ceiling of the level.
        max_per_window: starts in any `window_s` seconds, or None for no such limit.
        min_concurrent, initial_concurrent: floor and start of the level (default: fixed at max).
        backoff_factor: the level is multiplied by it once per episode of refusals.
        recovery_threshold, recovery_factor: successes before the level grows, and by how much.
        additive: grow as TCP does instead: one per success, one per level's worth where it was refused.
        even: spread the starts over the window instead of letting them come at once.
        window_s: length of the window, seconds. Flows use 60; tests and benchmarks shorten it.
        lease_s: how long a process keeps its slots without a word, seconds.

    Raises:
        LimitsError: a value cannot hold; the sentence names it as typed.
    """

    name: str
    max_concurrent: int = 5
    max_per_window: int | None = None
    min_concurrent: int | None = None
    initial_concurrent: int | None = None
    backoff_factor: float = 0.5
    recovery_threshold: int = 10
    recovery_factor: float = 1.2
    additive: bool = False
    even: bool = False
    window_s: float = 60.0
    lease_s: float = 15.0

    def __post_init__(self) -> None:
        checked_name(self.name)
        checked_count(self.max_concurrent, "max_concurrent")
        checked_count(self.max_per_window, "max_per_window", none_ok=True)
        checked_count(self.min_concurrent, "min_concurrent", none_ok=True)
        checked_count(self.initial_concurrent, "initial_concurrent", none_ok=True)
        checked_count(self.recovery_threshold, "recovery_threshold")
        checked_float(self.backoff_factor, "backoff_factor", 0.01, 1.0)
        checked_float(self.recovery_factor, "recovery_factor", 1.0, 100.0)
        checked_float(self.window_s, "window_s", 0.1, 86_400.0)
        checked_float(self.lease_s, "lease_s", 0.5, 300.0)
        if not self.floor <= self.start <= self.max_concurrent:
            raise LimitsError(
                f"min_concurrent={self.min_concurrent}, initial_concurrent={self.initial_concurrent} and "
                f"max_concurrent={self.max_concurrent} cannot hold together: use min <= initial <= max",
                key="initial_concurrent",
                value=self.initial_concurrent,
            )

    @property
    def floor(self) -> int:
        """The level never falls below it; equal to the ceiling for a limit that does not adapt."""
        return self.max_concurrent if self.min_concurrent is None else self.min_concurrent

    @property
    def start(self) -> int:
        """The level of a new gate."""
        return self.max_concurrent if self.initial_concurrent is None else self.initial_concurrent

    def as_argument(self) -> str:
        """The values in the order `gate.lua` reads them; times in microseconds.

        >>> Limits("users", 5, 60).as_argument()
        '5 5 5 60 60000000 15000000 0.5 10 1.2 0 0'
        """
        return " ".join(
            (
                str(self.max_concurrent),
                str(self.floor),
                str(self.start),
                str(self.max_per_window or 0),
                str(round(self.window_s * 1e6)),
                str(round(self.lease_s * 1e6)),
                repr(float(self.backoff_factor)),
                str(self.recovery_threshold),
                repr(float(self.recovery_factor)),
                "1" if self.additive else "0",
                "1" if self.even else "0",
            )
        )


FINER = ("lease_s", "backoff_factor", "recovery_threshold", "recovery_factor", "additive", "even")
"""Where `as_argument` has them: after the window."""


def shown_values(argument: str, beside: str = "") -> str:
    """What `as_argument` wrote, for people; of the finer values those that differ from `beside`.

    >>> shown_values(Limits("users", 5, 60, initial_concurrent=2, min_concurrent=1).as_argument())
    'max_concurrent=5, max_per_minute=60, min=1, initial=2'
    >>> shown_values(Limits("users", 5).as_argument(), Limits("users", 5, lease_s=2).as_argument())
    'max_concurrent=5, max_per_minute=none, lease_s=15'
    """
    words = argument.split()
    if len(words) < 10:
        return argument
    window_s = int(words[4]) / 1e6
    per = "max_per_minute" if window_s == 60 else f"starts in {window_s:g} s"
    values = [f"max_concurrent={words[0]}", f"{per}={words[3] if words[3] != '0' else 'none'}"]
    if words[1] != words[0] or words[2] != words[0]:
        values += [f"min={words[1]}", f"initial={words[2]}"]
    for name, ours, theirs in zip(FINER, words[5:], beside.split()[5:], strict=False):
        if ours != theirs:
            values.append(f"{name}={int(ours) / 1e6:g}" if name == "lease_s" else f"{name}={ours}")
    return ", ".join(values)
