"""How long a batch still takes: by its rate so far, or by the starts that the limit per minute lets it make."""

from __future__ import annotations

from limiter.view import GateView


def seconds_left(left: int, rate: float, gate: GateView | None) -> float | None:
    """Seconds until `left` items have ended; None where nobody can know yet.

    While the window is full it decides alone: a mean rate is high after a burst of starts and low before
    the next one. Runs of other batches under the same limit count as this one's.

    Args:
        left: items that have not ended.
        rate: items that ended a second, on average; 0 = none has ended yet.
        gate: of the limit, just now.
    """
    by_rate = left / rate if rate > 0 else None
    if gate is None or not gate.max_per_window:
        return by_rate
    by_window = last_start_s(left - min(left, gate.in_use), gate)
    if gate.used >= gate.max_per_window:
        return by_window
    return max(by_rate, by_window) if by_rate is not None else None


def last_start_s(starts: int, gate: GateView) -> float:
    """Seconds until so many more starts have been made, if nothing but the window holds them back.

    A start is free again one window after it was made. Between the oldest and the newest start of the
    window the others are taken to be spread evenly.
    """
    rate = gate.max_per_window
    free = rate - gate.used if rate else starts
    if not rate or starts <= free:
        return 0.0
    windows, place = divmod(starts - free - 1, rate)
    if place >= gate.used:
        return (windows + 1) * gate.window_s
    spread_s = gate.last_freed_s - gate.first_freed_s
    step_s = spread_s / (gate.used - 1) if gate.used > 1 else 0.0
    return windows * gate.window_s + gate.first_freed_s + place * step_s
