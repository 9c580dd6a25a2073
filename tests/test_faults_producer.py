"""A backlog and a batch under faults: nothing expires, and a run's own command follows through an outage."""

from __future__ import annotations

import json
import time

import pytest
from arq.constants import job_key_prefix

from limiter.keys import GateKeys
from tests import faults
from tests.faults import LIMIT, TARGET
from tests.fleet import until
from worker.contract import job_id


def test_a_waiting_job_never_expires_and_is_run_with_its_params() -> None:
    with faults.rig(workers=0) as fleet:
        fleet.begin(3, s=0.0)
        keys = GateKeys(LIMIT)
        with fleet.site.client() as client:
            for index in range(3):
                assert client.ttl(job_key_prefix + job_id(LIMIT, fleet.batch, index)) == -1
            assert client.ttl(keys.queue(TARGET)) == -1
            # a backlog of weeks: everything that may expire before its turn has expired
            for key in client.scan_iter():
                if client.ttl(key) != -1:  # type: ignore[operator]
                    client.delete(key)
        fleet.hire(1)
        fleet.judge()


def test_a_run_follows_its_batch_through_a_restart_and_a_freeze() -> None:
    with faults.rig(workers=2) as fleet:
        items = [{"item": f"r.{n}", "s": 0.2} for n in range(80)]
        fleet.site.write("p.jsonl", "".join(json.dumps(each) + "\n" for each in items))
        words = (
            "run",
            TARGET,
            "--params",
            "p.jsonl",
            "--batch",
            "r",
            "--workers",
            "1",
            "--output",
            "o.jsonl",
        )
        run = fleet.site.pocketfleet(*words, POCKETFLEET_REDIS_URL=fleet.door.url)
        until(lambda: fleet.site.ledger.count("end") > 10, run.output())
        fleet.server.kill()
        time.sleep(1.5)
        fleet.server.restart()
        until(lambda: fleet.site.ledger.count("end") > 40, run.output())
        fleet.server.freeze(4.0)
        fleet.door.cut()
        assert run.code() == 0, run.output()
        assert "80 completed" in run.output() and "Traceback" not in run.output()
        lines = [json.loads(line) for line in (fleet.site.directory / "o.jsonl").read_text().splitlines()]
        assert sorted(line["index"] for line in lines) == list(range(80))
        assert set(fleet.site.ledger.items("start").values()) == {1}
        fleet.all_live()


FLAKY = """
import asyncio, os, random
from ledger import note, noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

dice = random.Random(int(os.environ["FAULT_SEED"]) + os.getpid())

class Call(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["item"]):
            await asyncio.sleep(2.0 if dice.random() < 0.05 else 0.03)
            lot = dice.random()
            if lot < 0.3:
                raise RuntimeError("500")
            if lot < 0.4:
                raise ConnectionResetError("dropped before it was served")
            note("served", self.params["item"])
            if lot < 0.5:
                raise ConnectionResetError("dropped after it was served")

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 5

flow = Flow(start=Call(max_retries=20))
"""


@pytest.mark.long
def test_an_api_that_fails_is_slow_and_drops_answers_is_asked_again_by_the_nodes_own_retries() -> None:
    with faults.rig(workers=0) as fleet:
        fleet.site.write("faulty.py", FLAKY)
        fleet.site.env["FAULT_SEED"] = str(faults.seed())
        fleet.hire(3)
        fleet.starts = None  # every try of a node is a start in this ledger
        fleet.begin(120)
        fleet.judge(again=10_000)
        assert fleet.notes.items("served").keys() == {f"{fleet.batch}.{n}" for n in range(120)}


@pytest.mark.long
def test_producer_killed_half_way_and_started_again_queues_the_union_once() -> None:
    with faults.rig(workers=0, concurrent=50, starts=None) as fleet:
        site, count = fleet.site, 8_000
        site.write("p.jsonl", "".join(f'{{"item": "i{n}", "s": 0}}\n' for n in range(count)))
        words = ("enqueue", TARGET, "--params", "p.jsonl", "--batch", "half")
        fleet.door.delay_s = 0.05
        producer = site.pocketfleet(*words, POCKETFLEET_REDIS_URL=fleet.door.url)
        until(lambda: site.waiting(TARGET) >= 2000, producer.output())
        producer.kill()
        half = site.waiting(TARGET)
        assert half < count
        fleet.door.delay_s = 0
        fleet.hire(1)
        again = site.pocketfleet(*words)
        assert again.code() == 0, again.output()
        ended = site.ended(TARGET, count, "half")
        assert sorted(each.index for each in ended) == list(range(count))
        assert set(site.ledger.items("start").values()) == {1}


def test_enqueue_to_a_full_redis_says_so_and_the_same_command_goes_on() -> None:
    with faults.rig(workers=0) as fleet:
        fleet.site.write("p.jsonl", "".join(f'{{"item": "f.{n}", "s": 0}}\n' for n in range(50)))
        words = ("enqueue", TARGET, "--params", "p.jsonl", "--batch", "f")
        fleet.server.ask("CONFIG", "SET", "maxmemory", "1mb", "maxmemory-policy", "noeviction")
        full = fleet.site.pocketfleet(*words, POCKETFLEET_MEMORY_PATIENCE_S=2)
        assert full.code() == 3, full.output()
        last = full.output().splitlines()[-1]
        assert last.startswith("pocketfleet: Redis is full (") and "or raise its maxmemory" in last
        assert "enqueueing it again under its id adds what is missing" in last
        fleet.server.ask("CONFIG", "SET", "maxmemory", "0")
        again = fleet.site.pocketfleet(*words)
        assert again.code() == 0, again.output()
        assert fleet.site.waiting(TARGET) == 50
