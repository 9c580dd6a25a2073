"""arq's own command as the worker: real processes, real signals, and the ledger of the runs as judge."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests import fleet
from tests.fleet import Site, until
from tests.stalls import slack_s

TARGET = "users:flow"
LEASE_S = 2.0

USERS = """
import asyncio
from ledger import noted, times_started
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Step(AsyncNode):
    async def exec_async(self, _):
        item, seconds = self.params["n"], self.params["s"]
        seconds = 0.05 if times_started(item) else seconds
        with noted(item):
            await asyncio.sleep(seconds)

class Users(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 5

flow = Users(start=Step())
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with fleet.site({"users.py": USERS}) as site:
        yield site


def items(count: int, seconds: float, first: int = 0) -> list[dict[str, object]]:
    return [{"n": n, "s": seconds} for n in range(first, first + count)]


def each_once(site: Site, count: int) -> bool:
    """Whether exactly `count` items ran, each once and to its end."""
    once = {str(n): 1 for n in range(count)}
    return site.ledger.items("start") == once == site.ledger.items("end")


def test_two_arq_workers_keep_the_limit_and_leave_on_sigterm(site: Site) -> None:
    workers = [site.arq(TARGET) for _ in range(2)]
    until(lambda: all("worker serves" in worker.output() for worker in workers), "both workers serve")

    site.enqueue(TARGET, items(40, 0.1))
    ended = site.ended(TARGET, 40)

    assert {each.outcome.status for each in ended} == {"completed"}
    assert each_once(site, 40)
    assert site.ledger.peak() == 5
    assert {each.pid for each in site.ledger.notes()} == {worker.pid for worker in workers}
    for worker in workers:
        worker.tell(signal.SIGTERM)
    assert [worker.code() for worker in workers] == [0, 0]
    assert "Traceback" not in "".join(worker.output() for worker in workers)


def test_sigterm_lets_what_runs_finish_and_leaves_the_rest_in_the_queue(site: Site) -> None:
    site.enqueue(TARGET, items(5, 1.0) + items(15, 0.05, first=5))
    worker = site.arq(TARGET)
    until(lambda: site.ledger.count("start") == 5, "five runs")

    worker.tell(signal.SIGTERM)

    assert worker.code() == 0
    assert each_once(site, 5), "nothing was cut short, and nothing started after the signal"
    assert site.waiting(TARGET) == 15
    assert site.arq(TARGET, "--burst").code() == 0
    assert each_once(site, 20)
    assert all(not each.outcome.attempts for each in site.ended(TARGET, 20)), "no try was burnt"


def test_burst_ends_when_everything_is_done(site: Site) -> None:
    site.enqueue(TARGET, items(30, 0.05))

    worker = site.arq(TARGET, "--burst")

    assert worker.code() == 0
    assert each_once(site, 30)
    assert site.ledger.peak() == 5
    assert site.waiting(TARGET) == 0
    assert "Traceback" not in worker.output()


def test_burst_waits_while_redis_stands_still(site: Site) -> None:
    other = site.arq(TARGET)
    until(lambda: "worker serves" in other.output())
    site.enqueue(TARGET, items(1, 12.0))
    until(lambda: site.ledger.count("start") == 1)
    burst = site.arq(TARGET, "--burst", POCKETFLEET_LEASE_S=LEASE_S)
    with site.client() as client:
        until(lambda: "cmdstat_zcard" in client.info("commandstats"), "it looks what is left")
        client.execute_command("CLIENT", "PAUSE", "3000", "ALL")
        client.ping()  # answered when the pause is over
    assert burst.lives(), burst.output()
    assert burst.code() == 0, burst.output()
    assert each_once(site, 1)


def test_check_tells_whether_a_worker_of_this_host_lives(site: Site) -> None:
    before = site.arq(TARGET, "--check").code()
    worker = site.arq(TARGET)
    until(lambda: "worker serves" in worker.output())
    with site.client() as client:
        until(lambda: list(client.scan_iter("pocketfleet:health:*")), "the worker has said that it lives")
    during = site.arq(TARGET, "--check").code()
    worker.tell(signal.SIGTERM)
    assert worker.code() == 0
    after = site.arq(TARGET, "--check").code()

    assert (before, during, after) == (1, 0, 1)


def test_a_touched_file_under_watch_restarts_the_worker_and_loses_nothing(site: Site) -> None:
    watched = site.directory / "watched"
    watched.mkdir()
    site.enqueue(TARGET, items(5, 1.0) + items(10, 0.05, first=5))
    worker = site.arq(TARGET, "--watch", str(watched))
    until(lambda: site.ledger.count("start") == 5, "five runs")

    (watched / "touched.txt").write_text("1")
    until(lambda: "files changed" in worker.output(), "arq has noticed")
    site.enqueue(TARGET, items(5, 0.05, first=15), batch="later")

    until(lambda: site.ledger.count("end") == 20, "everything is done")
    assert each_once(site, 20)
    assert site.ledger.peak() == 5
    assert worker.output().count("worker serves") == 2
    (watched / "touched.txt").write_text("2")
    until(lambda: worker.output().count("worker serves") == 3, "it restarts while idle, too")
    worker.tell(signal.SIGTERM)
    assert worker.code() == 0
    assert "Traceback" not in worker.output()


def test_runs_of_a_killed_worker_are_run_again_within_a_lease(site: Site) -> None:
    site.enqueue(TARGET, items(5, 60.0))
    doomed = site.arq(TARGET, POCKETFLEET_LEASE_S=LEASE_S)
    until(lambda: site.ledger.count("start") == 5, "five runs")
    other = site.arq(TARGET, POCKETFLEET_LEASE_S=LEASE_S)
    until(lambda: "worker serves" in other.output())

    killed_at = doomed.kill()

    ended = site.ended(TARGET, 5)
    again = [each for each in site.ledger.notes("start") if each.pid == other.pid]
    assert sorted(each.item for each in again) == ["0", "1", "2", "3", "4"]
    assert max(each.at for each in again) - killed_at < LEASE_S + 1.5 + slack_s(killed_at)
    assert site.ledger.peak({doomed.pid: killed_at}) == 5
    assert [each.outcome.attempts for each in ended] == [{"tries": 1, "deaths": 1}] * 5
    assert {each.outcome.status for each in ended} == {"completed"}


def test_a_second_sigterm_hands_back_at_once(site: Site) -> None:
    site.enqueue(TARGET, items(5, 60.0))
    worker = site.arq(TARGET)
    until(lambda: site.ledger.count("start") == 5, "five runs")
    worker.tell(signal.SIGTERM)
    until(lambda: "worker.drains" in worker.output(), "it drains")

    worker.tell(signal.SIGTERM)

    assert worker.code(timeout_s=10) == 0, "long before the runs or the grace would end"
    assert site.ledger.items("left") == {str(n): 1 for n in range(5)}
    assert site.arq(TARGET, "--burst").code() == 0
    assert site.ledger.items("end") == {str(n): 1 for n in range(5)}
    assert [each.outcome.attempts for each in site.ended(TARGET, 5)] == [{"tries": 1, "hand_backs": 1}] * 5
    assert site.ledger.peak() == 5
    assert "Traceback" not in worker.output()


def test_a_worker_whose_starter_is_gone_hands_back_and_leaves(site: Site) -> None:
    reading, writing = os.pipe()
    site.enqueue(TARGET, items(5, 60.0))
    worker = site.arq(TARGET, pass_fds=[reading], POCKETFLEET_LIFELINE=reading)
    os.close(reading)
    until(lambda: site.ledger.count("start") == 5, "five runs")

    os.close(writing)

    assert worker.code(timeout_s=10) == 0
    assert site.ledger.items("left") == {str(n): 1 for n in range(5)}
    with site.client() as client:
        state: Any = client.hget("pocketfleet:{users.flow}:gate", "state")
    assert json.loads(state)["in_use"] == 0
    assert site.waiting(TARGET) == 5


@pytest.mark.parametrize(
    ("flows", "sentence"),
    [
        ("nowhere:flow", "nowhere:flow: there is no module nowhere"),
        ("users:flo", "users:flo: module users has no 'flo'; did you mean users:flow?"),
        (",", "worker: no flow is named; write pocketfleet worker users:flow, or set POCKETFLEET_FLOWS"),
    ],
)
def test_a_wrong_target_ends_in_one_sentence(site: Site, flows: str, sentence: str) -> None:
    worker = site.arq(flows)

    assert worker.code() == 2
    said = [line for line in worker.output().splitlines() if not line[:2].isdigit()]  # without arq's log
    assert len(said) == 1 and said[0].startswith(sentence), worker.output()
