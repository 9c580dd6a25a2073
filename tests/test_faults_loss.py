"""Redis loses its data: processes stay alive, the limits re-form from what they remember, and the bound is measured.

What processes hold and every start of theirs younger than the window is said again, and a gate whose callers
remember an older one admits nothing for a lease and a window. A process that never saw the old gate and comes
before everybody else is not held: it may be admitted a limit's worth beside what runs. So the bound is twice
the limit, in that one lease and window, and the limit itself where nobody new comes.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from tests import faults
from tests.faults import Rig, Server
from tests.fleet import until
from tests.stalls import slack_s

HOW = ("flushed", pytest.param("restarted without a file", marks=pytest.mark.long))


def lose(fleet: Rig, how: str) -> None:
    if how == "flushed":
        fleet.server.ask("FLUSHALL")
    else:
        fleet.server.kill()
        time.sleep(0.5)
        fleet.server.restart()


@pytest.mark.parametrize("how", HOW)
def test_limits_hold_through_a_loss_and_what_is_missing_runs_when_it_is_enqueued_again(how: str) -> None:
    with faults.rig(keeps=False, starts=30, concurrent=5) as fleet:
        fleet.begin(70, s=0.4)
        fleet.reach(10)
        until(lambda: len(fleet.notes.running()) == 5, "the limit binds")
        lose(fleet, how)
        lost_at, running = time.monotonic(), fleet.notes.running()
        fleet.enqueue_again()  # the same batch: what is still known to be done stays done
        ended = fleet.ended()
        assert {each.index for each in ended} == set(range(70))
        assert {each.outcome.status for each in ended} == {"completed"}
        # what ran went on, and was not started beside itself
        assert fleet.notes.peak() <= 5
        assert fleet.notes.busiest(fleet.window_s - faults.JITTER_S) <= 30
        opened = min(each.at for each in fleet.notes.notes("start") if each.at > lost_at + 0.5)
        assert opened - lost_at > 0.9 * min(fleet.lease_s, fleet.window_s), "admissions hold"
        assert opened - lost_at < max(fleet.lease_s, fleet.window_s) + 3 + slack_s(lost_at), "and open again"
        for item in running:
            runs = [each.at for each in fleet.notes.notes("start") if each.item == item]
            ends = [each.at for each in fleet.notes.notes("end") if each.item == item]
            assert all(start >= ends[0] for start in runs[1:]), f"{item} ran beside itself"
        until(lambda: fleet.state()["in_use"] == 0)
        fleet.all_live()
        assert all("Traceback" not in fleet.said(worker) for worker in fleet.workers), fleet.last_words()


@pytest.mark.long
def test_a_process_that_comes_first_to_an_emptied_redis_is_the_bound_of_twice_the_limit() -> None:
    with faults.rig(workers=2, keeps=False, starts=20, concurrent=4) as fleet:
        fleet.begin(80, s=lambda n: 7.0 if n < 4 else 0.3)
        until(lambda: len(fleet.notes.running()) == 4, "the limit binds")
        old = list(fleet.workers)
        fleet.door.close_door()  # they run on, and nobody hears them
        fleet.server.ask("FLUSHALL")
        lost_at = time.monotonic()
        (new,) = fleet.hire(1, POCKETFLEET_REDIS_URL=fleet.server.url)
        fleet.enqueue_again()
        until(lambda: fleet.notes.running(new.pid), "it was admitted at once")
        fleet.door.open_door()
        fleet.ended()
        peak = fleet.notes.peak()
        starts = fleet.notes.busiest(fleet.window_s - faults.JITTER_S)
        print(f"measured: {peak} of 4 at a time, {starts} of 20 starts in {fleet.window_s:g} s")
        assert 4 < peak <= 2 * 4, "the worst case was met, and it is within the bound"
        assert starts <= 2 * 20
        # and it is over with that lease and window
        later = faults.Since(fleet.site.ledger, lost_at + 2 * fleet.lease_s + fleet.window_s)
        assert later.count("start") and later.peak() <= 4
        assert all(worker.lives() for worker in [*old, new])


@pytest.mark.long
def test_a_replica_promoted_behind_the_same_address_is_taken_up() -> None:
    """Replication is not awaited, so what the primary had not passed on is lost: at most the last moment."""
    port = faults.free_port()
    with tempfile.TemporaryDirectory(prefix="pf") as name, faults.rig(options=("--port", str(port))) as fleet:
        replica = Server(Path(name), "--replicaof", "127.0.0.1", str(port))
        try:
            until(lambda: replica.ask("INFO", "replication")["master_link_status"] == "up", "it follows")
            fleet.begin(100)
            fleet.reach(40)
            fleet.server.kill()
            replica.ask("REPLICAOF", "NO", "ONE")
            fleet.door.target = replica.socket
            fleet.door.cut()
            fleet.server, fleet.site.url = replica, replica.url
            fleet.judge(again=fleet.concurrent)  # over before it is news
        finally:
            replica.stop()


def test_a_primary_that_was_demoted_is_left_for_the_new_one() -> None:
    """Connections to the old primary stay open and only its answers say that it is none any more."""
    port = faults.free_port()
    with tempfile.TemporaryDirectory(prefix="pf") as name, faults.rig(options=("--port", str(port))) as fleet:
        replica = Server(Path(name), "--replicaof", "127.0.0.1", str(port))
        try:
            until(lambda: replica.ask("INFO", "replication")["master_link_status"] == "up", "it follows")
            fleet.begin(100)
            fleet.reach(40)
            old = fleet.server
            fleet.door.target = replica.socket  # who connects anew meets the new primary
            old.ask("REPLICAOF", "127.0.0.1", str(faults.free_port()))
            replica.ask("REPLICAOF", "NO", "ONE")
            fleet.server, fleet.site.url = replica, replica.url
            fleet.judge(trouble=True, again=fleet.concurrent)
            assert all("read-only" in fleet.said(worker) for worker in fleet.workers)
            names = old.ask("CLIENT", "LIST").decode()
            until(lambda: "sub=1" not in old.ask("CLIENT", "LIST").decode(), f"nobody listens there: {names}")
            old.stop()
        finally:
            replica.stop()
