"""What is shown of a gate is what its next caller would find."""

from __future__ import annotations

import asyncio
import time

import fakeredis

from limiter.keys import GateKeys
from limiter.limits import Limits
from limiter.script import source
from limiter.sync import SYNC, Call
from limiter.view import GateView, read_gate

LIMITS = Limits("L", 5)


def view_after(calls: dict[float, Call]) -> GateView:
    """The gate as it is shown after these calls, made so many seconds ago."""
    server, keys = fakeredis.FakeServer(), GateKeys("L")
    client = fakeredis.FakeRedis(server=server)
    for ago_s, call in calls.items():
        call_at = round((time.time() - ago_s) * 1e6)
        argv = call.argv()
        client.eval(source(SYNC), len(keys.all), *keys.all, argv[0], call_at, *argv[2:])
    view = asyncio.run(read_gate(fakeredis.FakeAsyncRedis(server=server), "L"))
    assert view is not None
    return view


def ask(process: str, permits: int) -> Call:
    return Call(process, 1, permits=permits, limits=LIMITS.as_argument())


def test_slots_of_a_process_whose_lease_has_ended_are_not_shown_as_in_use() -> None:
    view = view_after({15.5: ask("dead", 2), 15.2: ask("dead too", 1), 8: ask("alive", 1)})
    assert (view.in_use, view.processes, view.served) == (1, 1, True)


def test_a_fleet_that_is_gone_serves_nobody() -> None:
    view = view_after({40: ask("dead", 2), 35: ask("dead too", 3)})
    assert (view.in_use, view.processes, view.served) == (0, 0, False)


def test_slots_of_living_processes_are_in_use() -> None:
    view = view_after({3: ask("a", 2), 1: ask("b", 9)})
    assert (view.in_use, view.processes) == (5, 2)
