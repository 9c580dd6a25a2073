"""The promises with the default lease of 15 s: every cell of the README's table at least once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests import faults
from tests.faults import Rig
from tests.proxy import Every
from tests.stalls import slack_s

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def fleet() -> Iterator[Rig]:
    with faults.rig(workers=4, lease_s=15.0) as here:
        yield here


def test_normal_work_crash_deploy_dropped_connections_and_lost_replies(fleet: Rig) -> None:
    fleet.begin(600, s=0.4)
    fleet.reach(20)
    doomed = fleet.busiest()
    fleet.kill(doomed)
    dead_at, lost = fleet.killed[doomed.pid], fleet.notes.running(doomed.pid)
    fleet.hire(1)
    fleet.dismiss(fleet.workers[0])
    fleet.hire(1)
    faults.during(lambda: fleet.server.ask("CLIENT", "KILL", "TYPE", "normal"), 3.0, 0.2)
    faults.during(lambda: fleet.server.ask("SCRIPT", "FLUSH"), 2.0, 0.01)
    fleet.door.half_open()
    fleet.door.rule = Every(fates=("reply", "request"), share=0.1, seed=faults.seed())
    time.sleep(5.0)
    fleet.door.rule = None
    fleet.judge(again=len(lost))
    for item in lost:
        runs = [each.at for each in fleet.notes.notes("start") if each.item == item]
        promised = 15 + 1 + 1 + slack_s(dead_at)
        assert len(runs) == 2 and runs[-1] - dead_at < promised, "a lease and a second, and a turn to start"


def test_redis_frozen_for_longer_than_a_lease(fleet: Rig) -> None:
    fleet.begin(200, s=0.4)
    fleet.reach(20)
    fleet.server.freeze(20.0)
    fleet.judge(trouble=True)


def test_worker_frozen_for_longer_than_a_lease(fleet: Rig) -> None:
    fleet.begin(300, s=0.4)
    fleet.reach(20)
    frozen = fleet.busiest()
    frozen.tell(signal.SIGSTOP)
    held = len(fleet.notes.running(frozen.pid))
    time.sleep(20.0)
    frozen.tell(signal.SIGCONT)
    fleet.judge(again=held, over=held)


def test_redis_loses_its_data() -> None:
    with faults.rig(workers=3, lease_s=15.0, keeps=False, starts=30) as fleet:
        fleet.begin(100, s=0.4)
        fleet.reach(20)
        fleet.server.ask("FLUSHALL")
        lost_at = time.monotonic()
        fleet.enqueue_again()
        ended = fleet.ended()
        assert {each.index for each in ended} == set(range(100))
        assert fleet.notes.peak() <= fleet.concurrent
        assert fleet.notes.busiest(fleet.window_s - faults.JITTER_S) <= 30
        opened = min(each.at for each in fleet.notes.notes("start") if each.at > lost_at + 0.5)
        assert 13 < opened - lost_at < 20 + slack_s(lost_at), "admissions hold for a lease"
        fleet.all_live()
