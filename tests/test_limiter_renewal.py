"""When the thread renews a lease: as often as it must, whatever the event loop does, and no oftener."""

from __future__ import annotations

import asyncio

import fakeredis
import pytest

from limiter.limits import Limits
from limiter.process import Process
from limiter.pump import Pump
from limiter.renewal import Renewal

LEASE_S, MARGIN_S, STALL_S = 15.0, 2.0, 300.0
TICK_S = LEASE_S / 15


def renewal_of(*, held: int, due_s: float, lease_s: float = LEASE_S) -> tuple[Renewal, Pump]:
    """Of a pump that was answered at second 0: call again after `due_s`."""

    async def made() -> tuple[Renewal, Pump]:
        process = Process(fakeredis.FakeAsyncRedis(), fakeredis.FakeAsyncRedis())
        pump = Pump(process, Limits("l", 5, lease_s=lease_s))
        pump.calls.joined, pump.slots.held, pump.alarm.due = True, held, due_s
        pump.slots.lease_until = lease_s - pump.margin_s
        return Renewal(process, fakeredis.FakeRedis(), LEASE_S, STALL_S), pump

    return asyncio.run(made())


def renewed_at(renewal: Renewal, pump: Pump, until_s: float, *, answers: bool = True) -> list[float]:
    """The seconds at which the thread renews while the loop says nothing."""
    seconds = [tick * TICK_S for tick in range(1, round(until_s / TICK_S) + 1)]
    found = []
    for now in seconds:
        if renewal._is_due(pump, now):
            found.append(now)
            if answers:
                pump.slots.lease_until = max(pump.slots.lease_until, now + LEASE_S - pump.margin_s)
    return found


def test_a_blocked_loop_that_holds_something_is_renewed_every_half_lease() -> None:
    renewal, pump = renewal_of(held=1, due_s=5.0)
    assert renewed_at(renewal, pump, 30) == [7, 14, 21, 28]


def test_a_renewal_without_an_answer_is_tried_again_at_the_next_tick() -> None:
    renewal, pump = renewal_of(held=1, due_s=5.0)
    assert renewed_at(renewal, pump, 12, answers=False) == [7, 8, 9, 10, 11, 12]


def test_a_loop_stuck_beyond_the_stall_limit_is_renewed_no_more() -> None:
    renewal, pump = renewal_of(held=1, due_s=5.0)
    assert max(renewed_at(renewal, pump, STALL_S + 30)) < STALL_S


def test_a_waiter_that_was_told_to_call_in_a_lease_is_left_alone_until_then() -> None:
    renewal, pump = renewal_of(held=0, due_s=LEASE_S)
    assert renewed_at(renewal, pump, 20) == [15]


def test_one_that_got_a_permit_while_it_was_told_to_call_in_a_lease_keeps_it() -> None:
    renewal, pump = renewal_of(held=1, due_s=LEASE_S)
    assert renewed_at(renewal, pump, 12) == [7]


def test_a_shorter_lease_of_the_limit_is_renewed_at_every_tick() -> None:
    renewal, pump = renewal_of(held=1, due_s=1.0, lease_s=3.0)
    assert renewed_at(renewal, pump, 9, answers=False) == [7, 8, 9]


@pytest.mark.parametrize(("joined", "spoke_at"), [(False, 0.0), (True, 4.0)])
def test_one_that_left_or_spoke_of_late_is_not_renewed(joined: bool, spoke_at: float) -> None:
    renewal, pump = renewal_of(held=1, due_s=5.0)
    pump.calls.joined, pump.calls.spoke_at = joined, spoke_at
    pump.slots.lease_until = -1.0
    assert renewed_at(renewal, pump, 10) == []


def test_a_loop_that_was_closed_is_renewed_no_more() -> None:
    async def made() -> Renewal:
        process = Process(fakeredis.FakeAsyncRedis(), fakeredis.FakeAsyncRedis())
        renewal = Renewal(process, fakeredis.FakeRedis(), 0.15, STALL_S)
        renewal.start()
        return renewal

    renewal = asyncio.run(made())
    renewal._thread.join(10)
    assert not renewal._thread.is_alive()
