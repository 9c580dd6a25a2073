"""Faults of Redis and of the way to it: processes stay alive, say so, hold the limits, and go on by themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from limiter.keys import GateKeys
from tests import faults
from tests.faults import LIMIT, Rig, during
from tests.fleet import until
from tests.proxy import Every
from tests.stalls import slack_s

KEYS = GateKeys(LIMIT)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Rig]:
    """One fleet for all cases here: each finds it as the one before has left it, healthy."""
    with faults.rig() as here:
        yield here


def test_without_a_fault_every_item_runs_once_and_the_fleet_is_busy(fleet: Rig) -> None:
    fleet.begin(300)
    fleet.judge(trouble=False)
    starts = [each.at for each in fleet.notes.notes("start")]
    # 100 starts in 2 s are the bound: the last of 300 may not start before 4 s
    slack = slack_s(starts[0])
    assert 3.9 < starts[-1] - starts[0] < 20 + slack
    assert max(b - a for a, b in pairwise(starts)) < 2.5 + slack


@pytest.mark.parametrize("for_s", [5.0, pytest.param(15.0, marks=pytest.mark.long)])
def test_frozen_redis_breaks_no_limit(fleet: Rig, for_s: float) -> None:
    fleet.begin(150)
    fleet.reach(40)
    fleet.server.freeze(for_s)
    fleet.judge(trouble=True)


@pytest.mark.long
def test_paused_clients_and_a_busy_server_break_no_limit(fleet: Rig) -> None:
    fleet.begin(140)
    fleet.reach(30)
    fleet.server.ask("CLIENT", "PAUSE", 2500, "ALL")
    fleet.reach(70)
    fleet.server.ask("DEBUG", "SLEEP", 2.5)
    fleet.judge()


@pytest.mark.parametrize("for_s", [3.0, pytest.param(20.0, marks=pytest.mark.long)])
def test_killed_connections_cost_nothing(fleet: Rig, for_s: float) -> None:
    fleet.begin(160 if for_s < 5 else 900)
    fleet.reach(20)
    during(lambda: fleet.server.ask("CLIENT", "KILL", "TYPE", "normal"), for_s, 0.1)
    during(lambda: fleet.server.ask("CLIENT", "KILL", "TYPE", "pubsub"), 0.5, 0.1)
    fleet.judge()


def test_half_open_connections_are_noticed_before_a_lease_ends(fleet: Rig) -> None:
    fleet.begin(160)
    fleet.reach(20)
    assert fleet.door.half_open() >= 2 * len(fleet.workers), "they are connected"
    fleet.reach(60)
    during(fleet.door.half_open, 2.0, 1.0)
    fleet.judge()


def test_flushed_scripts_load_themselves_again(fleet: Rig) -> None:
    fleet.begin(140)
    fleet.reach(20)
    for _ in range(200):
        fleet.server.ask("SCRIPT", "FLUSH")
        time.sleep(0.005)
    fleet.judge()


@pytest.mark.parametrize("fate", [pytest.param("request", marks=pytest.mark.long), "reply", "silence"])
def test_lost_requests_and_replies_of_every_script_change_nothing(fleet: Rig, fate: str) -> None:
    share = 0.05 if fate == "silence" else 0.1  # a silent one takes until the time-out
    fleet.door.lost.clear()
    fleet.door.rule = Every(fates=(fate,), share=share, seed=faults.seed())  # type: ignore[arg-type]
    try:
        fleet.begin(150)
        fleet.reach(120)
    finally:
        fleet.door.rule = None
    fleet.judge()
    assert fleet.door.lost.get(fate, 0) >= (1 if fate == "silence" else 3), fleet.door.lost


def test_restart_with_an_append_only_file_loses_nothing(fleet: Rig) -> None:
    fleet.begin(120)
    fleet.reach(40)
    fleet.server.kill()
    time.sleep(1.0)
    fleet.server.restart()
    fleet.judge(trouble=True)


def test_restart_while_every_running_node_ends_records_each_once(fleet: Rig) -> None:
    fleet.begin(5, s=1.0)
    until(lambda: fleet.notes.count("start") == 5, "all run")
    fleet.server.kill()
    fleet.reach(5)
    time.sleep(0.5)
    fleet.server.restart()
    fleet.judge(trouble=True)


def test_full_redis_is_waited_for_and_loses_nothing(fleet: Rig) -> None:
    fleet.begin(120)
    fleet.reach(40)
    fleet.server.ask("CONFIG", "SET", "maxmemory", "1mb", "maxmemory-policy", "noeviction")
    time.sleep(3.0)
    count = fleet.notes.count("start")
    time.sleep(0.5)
    assert fleet.notes.count("start") == count, "fails closed: nothing is admitted"
    fleet.server.ask("CONFIG", "SET", "maxmemory", "0")
    fleet.judge(trouble=True)
    assert all("raise maxmemory" in fleet.said(worker) for worker in fleet.workers), fleet.last_words()


@pytest.mark.long
def test_read_only_redis_is_waited_for_and_loses_nothing(fleet: Rig) -> None:
    fleet.begin(120)
    fleet.reach(40)
    fleet.server.ask("REPLICAOF", "127.0.0.1", str(faults.free_port()))
    time.sleep(3.0)
    fleet.server.ask("REPLICAOF", "NO", "ONE")
    fleet.judge(trouble=True)
    assert all("read-only" in fleet.said(worker) for worker in fleet.workers), fleet.last_words()


OTHERS = [pytest.param(key, marks=pytest.mark.long) for key in ("leases", "starts", "tickets", "jobs")]


@pytest.mark.parametrize("key", ["gate", "queue", *OTHERS])
def test_key_of_another_type_is_mended_while_the_fleet_runs(fleet: Rig, key: str) -> None:
    name = KEYS.queue(faults.TARGET) if key == "queue" else getattr(KEYS, key)
    fleet.begin(60, s=0.05)
    fleet.reach(10)
    with fleet.site.client() as client:
        if key in ("queue", "jobs"):  # its members are jobs: what it held is gone, the fleet goes on
            until(lambda: not fleet.site.waiting(faults.TARGET), "the batch is done")
        client.delete(name)
        client.set(name, "of another type")
        if key != "jobs":  # which nobody looks at while nothing runs
            until(lambda: client.type(name) != b"string", f"somebody mends it: {fleet.last_words()}")
        if key in ("queue", "jobs"):
            fleet.begin(20, s=0.05)
        fleet.judge()
        assert client.type(name) != b"string"


@pytest.mark.long
@pytest.mark.parametrize("delay_s", [0.1])
def test_slow_and_lossy_way_to_redis_breaks_no_limit(fleet: Rig, delay_s: float) -> None:
    fleet.door.delay_s, fleet.door.loss = delay_s, 0.05
    try:
        fleet.begin(60)
        fleet.judge()
    finally:
        fleet.door.delay_s = fleet.door.loss = 0.0
