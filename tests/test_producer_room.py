"""A producer waits for memory in Redis while workers drain it, and says so where nobody does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from producer.progress import Progress
from tests.fleet import Child, Site, site, until

MB = 1_000_000
PAGES = """
from ledger import noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow


class Read(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["n"]):
            pass


flow = ThrottledAsyncParallelBatchFlow(start=Read(), max_concurrent_flows=50)
"""
COUNT = 4_000


@pytest.fixture
def place() -> Iterator[Site]:
    with site({"pages.py": PAGES}) as place:
        text = "x" * 6_000
        rows = (json.dumps({"n": number, "text": text}) for number in range(COUNT))
        place.write("p.jsonl", "\n".join(rows))
        yield place


def limited(place: Site, limit: int) -> None:
    with place.client() as client:
        client.config_set("maxmemory", limit)
        client.config_resetstat()


def memory(place: Site) -> dict[str, Any]:
    with place.client() as client:
        found: dict[str, Any] = client.info("memory")  # type: ignore[assignment]
        return found


def enqueue(place: Site, **env: Any) -> Child:
    words = ("enqueue", "pages:flow", "--params", "p.jsonl", "--batch", "b")
    return place.pocketfleet(*words, **env)


def test_a_batch_larger_than_redis_goes_through_it_beneath_its_memory_limit(place: Site) -> None:
    limited(place, 12 * MB)
    producer = enqueue(place)
    until(lambda: "waits for memory in Redis: " in producer.output(), producer.output())
    workers = [place.pocketfleet("worker", "pages:flow") for _ in range(2)]
    assert producer.code() == 0, producer.output()
    until(lambda: place.waiting("pages:flow") == 0, "all ran")
    assert set(place.ledger.items("end").values()) == {1} and place.ledger.count("end") == COUNT
    assert memory(place)["used_memory_peak"] < 12 * MB
    assert all("maxmemory" not in worker.output() for worker in workers), "no worker met a full Redis"


def test_nobody_drains_so_it_says_so_gives_up_and_the_same_id_goes_on(place: Site) -> None:
    limited(place, 12 * MB)
    producer = enqueue(place, POCKETFLEET_MEMORY_PATIENCE_S=12)
    assert producer.code() == 3, producer.output()
    words, *_, last = producer.output().splitlines()[-2:]
    assert "and nothing has made room for" in words and "no worker serves pages:flow" in words
    assert last.startswith("pocketfleet: Redis is full (") and "raise its maxmemory" in last
    waiting = place.waiting("pages:flow")
    assert 1_000 < waiting < COUNT and f"{waiting:,} items of batch b are in the queue" in last
    limited(place, 0)
    again = enqueue(place)
    assert again.code() == 0, again.output()
    assert f"{COUNT - waiting} of {COUNT} items enqueued, {waiting} were there already" in again.output()


def test_refused_for_want_of_memory_it_waits_and_goes_on_by_itself(place: Site) -> None:
    limited(place, 1)
    producer = enqueue(place)
    until(lambda: "nothing has made room" in producer.output(), producer.output())
    assert place.waiting("pages:flow") == 0
    limited(place, 100 * MB)
    assert producer.code() == 0, producer.output()
    assert place.waiting("pages:flow") == COUNT


def test_a_run_larger_than_redis_gives_lines_while_it_enqueues(place: Site) -> None:
    """Its workers come late, so what came before them has to leave before the rest can enter."""
    limited(place, 12 * MB)
    run = place.pocketfleet(
        "run", "pages:flow", "--params", "p.jsonl", "--batch", "b", "--workers", "1", "--output", "o.jsonl"
    )
    assert run.code() == 0, run.output()
    assert f"{COUNT} completed" in run.output()
    indexes = [json.loads(line)["index"] for line in (place.directory / "o.jsonl").read_text().splitlines()]
    assert sorted(indexes) == list(range(COUNT))
    assert memory(place)["used_memory_peak"] < 12 * MB


def test_a_full_redis_lets_a_batch_be_cancelled(place: Site) -> None:
    assert enqueue(place).code() == 0
    limited(place, 2 * MB)
    cancelled = place.pocketfleet("batch", "cancel", "b")
    assert cancelled.code() == 0, cancelled.output()
    assert place.waiting("pages:flow") == 0
    assert memory(place)["used_memory"] < 2 * MB


def test_the_progress_line_says_how_full_redis_is() -> None:
    progress = Progress("pages:flow", "pages.flow", 100)
    progress.workers = 2
    progress.wait_for("waits for memory in Redis: 94 % of 100.0 MB used")
    assert progress.held_back() == "waits for memory in Redis: 94 % of 100.0 MB used"
    progress.workers = 0
    assert progress.held_back().startswith("no worker serves pages:flow; waits for memory")
