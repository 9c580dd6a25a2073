"""Batches as people use them: killed and resumed, cancelled, retried, lost and found, from commands and Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from arq.constants import job_key_prefix

from limiter.keys import BATCHES, GateKeys
from tests.fleet import Child, Site, site, until
from worker.contract import job_id

USERS = """
import asyncio, os
from ledger import note, noted
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow


class Fetch(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["user_id"]):
            await asyncio.sleep(self.params.get("s", 0))
            if os.path.exists("broken") and self.params["user_id"] % 5 == 0:
                raise ValueError("unlucky")
            return "x" * self.params.get("large", 0)

    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("seen", {})[str(self.params["user_id"])] = len(exec_res)
        if exec_res:
            shared.setdefault("texts", {})[str(self.params["user_id"])] = exec_res
        return "done"


class Users(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        common = {"s": shared.get("s", 0), "large": shared.get("large", 0)}
        return [{"user_id": number, **common} for number in shared["ids"]]

    async def post_async(self, shared, prep_res, results):
        return sorted(map(int, shared.get("seen", {})))


flow = Users(start=Fetch(), max_concurrent_flows=8)
"""


@pytest.fixture
def place() -> Iterator[Site]:
    with site({"users.py": USERS}) as place:
        place.env["POCKETFLEET_LEASE_S"] = "2"
        yield place


def ids(count: int) -> str:
    return "ids=" + json.dumps(list(range(count)), separators=(",", ":"))


def told(child: Child, code: int | None = 0) -> str:
    assert code is None or child.code() == code, child.output()
    child.code()
    return child.output()


def status(place: Site, batch: str = "b") -> dict[str, Any]:
    child = place.pocketfleet("batch", "status", batch, "--json")
    found: dict[str, Any] = json.loads(told(child, None))
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_cancel_stops_what_waits_at_once_and_what_runs_at_its_next_await(place: Site) -> None:
    worker = place.pocketfleet("worker", "users:flow")
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(3_000), "--set", "s=30", "--batch", "b"))
    until(lambda: place.ledger.count("start") == 8, "8 run")
    wait = place.pocketfleet("batch", "wait", "b", "--output", "out.jsonl")
    time.sleep(1.0)
    said = told(place.pocketfleet("batch", "cancel", "b"))
    assert said == "b: 2992 items taken off the queue, 8 runs told to stop\n"
    until(lambda: place.ledger.count("left") == 8, "the runs have stopped", timeout_s=5)
    assert place.waiting("users:flow") == 0
    assert "b: 8 of 3000 done: 8 aborted; it was cancelled, and 2992 did not run" in told(wait, 1)
    assert [line["status"] for line in lines(place.directory / "out.jsonl")] == ["aborted"] * 8
    assert (told(place.pocketfleet("batch", "cancel", "b"))).startswith(
        "b: 0 items taken off the queue, 0 runs"
    )

    place.write("short.jsonl", "")
    again = told(
        place.pocketfleet("enqueue", "users:flow", "--set", ids(3_000), "--set", "s=30", "--batch", "b")
    )
    assert "3000 of 3000 items enqueued" in again
    until(lambda: place.ledger.count("start") == 16, "it goes on")
    assert (status(place)["state"], status(place)["left"]) == ("running", 3000)
    told(place.pocketfleet("batch", "cancel", "b"))
    until(lambda: place.ledger.count("left") == 16)
    worker.end()


def test_the_status_of_a_batch_says_when_nobody_serves_it(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(2), "--set", "s=30", "--batch", "b"))
    said = told(place.pocketfleet("batch", "status", "b"))
    assert said == "b: 0 of 2 done; no worker serves users:flow; start one: pocketfleet worker users:flow\n"
    place.pocketfleet("worker", "users:flow")
    until(lambda: place.ledger.count("start") == 2, "they run")
    assert status(place)["unserved"] == ""


def test_a_retry_after_the_limit_of_its_flow_changed_says_that_nobody_takes_it(place: Site) -> None:
    (place.directory / "broken").touch()
    told(place.pocketfleet("run", "users:flow", "--set", ids(10), "--workers", "1", "--batch", "b"), 1)
    (place.directory / "broken").unlink()
    place.write("users.py", USERS.replace("max_concurrent_flows=8", 'limit="other", max_concurrent_flows=8'))
    place.pocketfleet("worker", "users:flow")
    until(lambda: "users:flow" in told(place.pocketfleet("workers")), "it serves")
    said = told(place.pocketfleet("batch", "retry", "b", "--failed"))
    words = "the workers of users:flow serve it under another limit than users.flow, where these items wait"
    assert "2 items enqueued again" in said and words in said
    assert words in status(place)["unserved"]


def test_a_flow_counts_as_served_only_under_its_own_limit_of_those_that_a_worker_has(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(2), "--batch", "b"))
    place.write("users.py", USERS.replace("max_concurrent_flows=8", 'limit="other", max_concurrent_flows=8'))
    place.write(
        "taken.py", USERS.replace("max_concurrent_flows=8", 'limit="users.flow", max_concurrent_flows=8')
    )
    place.pocketfleet("worker", "users:flow", "taken:flow")
    until(lambda: "taken:flow" in told(place.pocketfleet("workers")), "it serves")
    assert "serve it under another limit than users.flow" in status(place)["unserved"]


def test_a_batch_that_is_over_cannot_be_cancelled_and_stays_as_it_is(place: Site) -> None:
    told(place.pocketfleet("run", "users:flow", "--set", ids(1_200), "--workers", "1", "--batch", "b"))
    before = status(place)
    for _ in range(2):
        assert (
            told(place.pocketfleet("batch", "cancel", "b")) == "batch b is over: there is nothing to cancel\n"
        )
    assert status(place) == before
    assert (before["state"], before["completed"]) == ("over", 1_200)
    told(place.pocketfleet("batch", "status", "b"), 0)


def test_a_retry_after_a_cancel_says_what_never_ran(place: Site) -> None:
    (place.directory / "broken").touch()
    words = ("users:flow", "--set", ids(12), "--batch", "b")
    told(place.pocketfleet("run", *words, "--first", "5", "--workers", "1"), 1)
    told(place.pocketfleet("enqueue", *words))
    assert told(place.pocketfleet("batch", "cancel", "b")).startswith("b: 7 items taken off the queue")
    assert told(place.pocketfleet("batch", "retry", "b", "--failed")).startswith(
        "1 item enqueued again; 7 never ran: run or enqueue it again with --batch b; follow them: "
    )
    (place.directory / "broken").unlink()
    assert "12 completed" in told(place.pocketfleet("run", *words, "--workers", "1"))


def test_a_retry_runs_the_failures_alone_and_keeps_the_history(place: Site) -> None:
    (place.directory / "broken").touch()
    words = ["run", "users:flow", "--set", ids(12), "--workers", "1", "--batch", "b", "--output", "out.jsonl"]
    said = told(place.pocketfleet(*words), 1)
    assert "9 completed, 3 failed" in said
    assert "retry what failed: pocketfleet batch retry b --failed && pocketfleet run users:flow" in said
    assert "9 completed, 3 failed; the batch was over, nothing ran" in told(place.pocketfleet(*words), 1)
    assert place.ledger.count("start") == 12
    listed = told(place.pocketfleet("batch", "results", "b", "--failed")).splitlines()
    assert sorted(listed) == [f"{n} failed ValueError: unlucky" for n in (0, 10, 5)]
    (place.directory / "broken").unlink()

    assert "say which items to retry" in told(place.pocketfleet("batch", "retry", "b"), 2)
    assert "3 items enqueued again" in told(place.pocketfleet("batch", "retry", "b", "--failed"))
    assert "3 items enqueued again" in told(place.pocketfleet("batch", "retry", "b", "--failed")), (
        "asked twice"
    )
    assert "12 completed" in told(place.pocketfleet(*words))
    assert place.ledger.items("start") == Counter({str(n): 2 if n % 5 == 0 else 1 for n in range(12)})
    written = Counter(
        (line["index"], line["retry"], line["status"]) for line in lines(place.directory / "out.jsonl")
    )
    failed = {(n, 0, "failed"): 1 for n in (0, 5, 10)}
    assert written == Counter({(n, int(n % 5 == 0), "completed"): 1 for n in range(12)} | failed)
    assert status(place)["completed"] == 12
    results = told(place.pocketfleet("batch", "results", "b", "--json"))
    assert len(results.splitlines()) == 15
    assert told(place.pocketfleet("batch", "results", "b", "--failed")) == "", "they have completed since"
    nowhere = {"POCKETFLEET_DATA_DIR": str(place.directory / "nowhere")}
    said = told(place.pocketfleet("batch", "results", "b", "--failed", **nowhere))
    assert said == "batch b has no spool here, so params are not shown\n"


def test_a_batch_that_was_retried_on_one_host_is_the_same_on_every_other_one(place: Site) -> None:
    (place.directory / "broken").touch()
    words = ["run", "users:flow", "--set", ids(12), "--workers", "1", "--batch", "b", "--output"]
    third = {"POCKETFLEET_DATA_DIR": str(place.directory / "third")}
    fourth = {"POCKETFLEET_DATA_DIR": str(place.directory / "fourth")}
    assert "9 completed, 3 failed" in told(place.pocketfleet(*words, "1.jsonl"), 1)
    assert "9 completed, 3 failed; the batch was over" in told(
        place.pocketfleet(*words, "3.jsonl", **third), 1
    )
    assert told(place.pocketfleet("batch", "retry", "b", "--failed")).startswith(
        "3 items enqueued again; follow"
    )
    for env in ({}, third):
        again = place.pocketfleet("batch", "retry", "b", "--failed", **env)
        assert "3 items enqueued again (3 by an earlier retry); follow" in told(again)
    (place.directory / "broken").unlink()
    assert "12 completed in" in told(place.pocketfleet(*words, "3.jsonl", **third)), (
        "what the first asked for"
    )
    for name, env in (("1.jsonl", {}), ("3.jsonl", third), ("4.jsonl", fourth)):
        assert "12 completed; the batch was over, nothing ran" in told(place.pocketfleet(*words, name, **env))
        written = [(line["index"], line["retry"]) for line in lines(place.directory / name)]
        assert sorted(written) == sorted([(n, 0) for n in range(12)] + [(n, 1) for n in (0, 5, 10)])
        again = told(place.pocketfleet("batch", "retry", "b", "--failed", **env))
        assert again.startswith("0 items enqueued again")
    assert place.ledger.items("start") == Counter({str(n): 2 if n % 5 == 0 else 1 for n in range(12)})


def test_items_that_redis_lost_are_named_and_only_they_run_again(place: Site) -> None:
    worker = place.pocketfleet("worker", "users:flow")
    words = ["enqueue", "users:flow", "--set", ids(200), "--set", "s=0.2", "--batch", "b"]
    told(place.pocketfleet(*words))
    wait = place.pocketfleet("batch", "wait", "b", "--output", "out.jsonl")
    output = place.directory / "out.jsonl"
    until(lambda: output.exists() and len(lines(output)) >= 8, "8 were written down")
    out = GateKeys("users.flow").out("b")
    with place.client() as client, client.pipeline(transaction=True) as together:
        wait.tell(signal.SIGSTOP)
        read = len(lines(output))
        # the read that was waiting is answered by the first of them, and heard once the follower goes on
        until(lambda: client.xlen(out) >= read + 40, "40 more were recorded, and only some are read")
        together.xrange(out)
        together.flushall()
        recorded = {int(fields[b"i"]) for _, fields in together.execute()[0]}
    wait.tell(signal.SIGCONT)
    lost_at = time.monotonic()
    said = told(wait, 1)
    assert time.monotonic() - lost_at < 60
    written = {line["index"] for line in lines(place.directory / "out.jsonl")}
    named = set(range(200)) - written
    assert 16 <= len(written) < 200
    assert f"Redis has lost {len(named)} items" in said
    assert "pocketfleet batch lost b --resubmit" in said
    ran = place.ledger.items("end")
    unread = recorded - written
    assert unread, "nobody had read the last ones"
    assert set(map(int, ran)) == written | unread, "what ran when Redis lost its data is not lost"

    asked = place.pocketfleet("batch", "lost", "b", "--json")
    shown = json.loads(told(asked, 1))["lost"]
    assert {
        n for each in shown for n in range(int(each.split("-")[0]), int(each.split("-")[-1]) + 1)
    } == named
    assert told(place.pocketfleet("batch", "lost", "b", "--resubmit")).startswith(
        f"{len(named)} items enqueued"
    )
    assert told(place.pocketfleet("batch", "lost", "b", "--resubmit")).startswith("0 items enqueued again")
    assert "b: 200 of 200 done: 200 completed" in told(
        place.pocketfleet("batch", "wait", "b", "--output", "out.jsonl")
    )
    assert Counter(line["index"] for line in lines(place.directory / "out.jsonl")) == Counter(range(200))
    again = {str(n): 2 if n in unread else 1 for n in range(200)}
    assert place.ledger.items("end") == Counter(again), "only what nobody had read is executed again"
    assert status(place)["missing"] == 0
    worker.end()


def test_without_the_spool_a_loss_is_told_of_the_batch_as_a_whole(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(5), "--batch", "b"))
    elsewhere = {"POCKETFLEET_DATA_DIR": str(place.directory / "elsewhere")}
    wait = place.pocketfleet("batch", "wait", "b", **elsewhere)
    time.sleep(3.0)
    with place.client() as client:
        client.delete(*GateKeys("users.flow").of_batch("b"))
    assert (
        "Redis has lost batch b or a part of it; its items can be named, and enqueued again, only where"
        in told(wait, 1)
    )


def test_an_item_that_ended_as_lost_is_counted_and_can_be_retried(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(4), "--batch", "b"))
    with place.client() as client:
        client.delete(job_key_prefix + job_id("users.flow", "b", 3))
    told(place.pocketfleet("worker", "users:flow", "--burst"))
    said = "4 of 4 done: 3 completed, 1 lost; retry what failed: pocketfleet batch retry b --failed\n"
    assert told(place.pocketfleet("batch", "status", "b"), 1) == f"b: {said}"
    shown = status(place)
    assert (shown["lost"], shown["lost_items"], shown["failed_items"]) == ([], 1, 1)
    said = "b: 1 ended as lost; retry what failed: pocketfleet batch retry b --failed\n"
    assert told(place.pocketfleet("batch", "lost", "b"), 1) == said
    assert told(place.pocketfleet("batch", "retry", "b", "--failed")).startswith("1 item enqueued again")


def test_another_host_goes_on_with_a_batch_by_its_digests_alone(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(1_500), "--batch", "b"))
    elsewhere = {"POCKETFLEET_DATA_DIR": str(place.directory / "elsewhere")}
    other = json.dumps([*range(1_200), -1, *range(1_201, 1_500)], separators=(",", ":"))
    refused = place.pocketfleet("enqueue", "users:flow", "--set", f"ids={other}", "--batch", "b", **elsewhere)
    assert "other params: one of the items 1000 to 1499 differs; use another --batch" in told(refused, 2)
    words = [
        "run",
        "users:flow",
        "--set",
        ids(1_600),
        "--workers",
        "2",
        "--batch",
        "b",
        "--output",
        "out.jsonl",
    ]
    assert "1600 completed" in told(place.pocketfleet(*words, **elsewhere))
    assert place.ledger.items("end") == Counter({str(n): 1 for n in range(1_600)})
    assert len(lines(place.directory / "out.jsonl")) == 1_600


def test_results_show_items_that_another_host_has_appended(place: Site) -> None:
    words = ("users:flow", "--set", ids(4), "--batch", "b")
    told(place.pocketfleet("enqueue", *words, "--first", "2"))
    elsewhere = {"POCKETFLEET_DATA_DIR": "elsewhere"}
    assert "4 completed" in told(place.pocketfleet("run", *words, "--workers", "1", **elsewhere))
    shown = [
        json.loads(line) for line in told(place.pocketfleet("batch", "results", "b", "--json")).splitlines()
    ]
    assert sorted((each["index"], each["params"] is not None) for each in shown) == [
        (0, True),
        (1, True),
        (2, False),
        (3, False),
    ]


def test_a_folder_that_is_no_batchs_hides_no_batch_in_the_list(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(3), "--batch", "b"))
    batches = place.directory / ".pocketfleet/batches"
    for name in ("b.bak", "b [red]copy"):
        shutil.copytree(batches / "b", batches / name)
    with place.client() as client:
        client.flushall()
    shown = told(place.pocketfleet("batch", "list"))
    assert [line.split("  ")[0] for line in shown.splitlines()[1:]] == ["b [red]copy", "b.bak", "b"]
    rows = json.loads(told(place.pocketfleet("batch", "list", "--json")))
    assert [row["state"] for row in rows] == ["damaged", "damaged", "only on disk"]


def test_the_list_counts_what_ended_of_a_batch_that_redis_has_forgotten(place: Site) -> None:
    told(place.pocketfleet("run", "users:flow", "--set", ids(3), "--batch", "b", "--workers", "1"))
    with place.client() as client:
        client.flushall()
    (row,) = json.loads(told(place.pocketfleet("batch", "list", "--json")))
    assert (row["state"], row["count"], row.get("completed")) == ("only on disk", 3, 3)


def test_an_id_is_one_batchs_alone_also_where_another_flow_or_limit_has_it(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(3), "--batch", "b"))
    place.write("others.py", USERS)
    place.write("narrow.py", USERS + "flow.name, flow.limit = 'users:flow', 'narrow'\n")
    before = status(place)
    for elsewhere in ({}, {"POCKETFLEET_DATA_DIR": "elsewhere"}):
        for target, said in (
            ("others:flow", "batch 'b' belongs to flow users:flow, not to others:flow; use another --batch"),
            (
                "narrow:flow",
                "batch 'b' was enqueued under limit users.flow, and users:flow is under narrow now",
            ),
        ):
            words = ("enqueue", target, "--set", ids(3), "--batch", "b")
            assert said in told(place.pocketfleet(*words, **elsewhere), 2)
    assert status(place) == before


def test_a_batch_goes_on_with_the_store_it_was_enqueued_with_and_says_so(place: Site) -> None:
    words = ["run", "users:flow", "--workers", "1", "--batch", "b", "--output"]
    old, new = ["--set", ids(3), "--set", "large=3"], ["--set", ids(6), "--set", "large=3"]
    assert "goes on with the shared store" not in told(place.pocketfleet(*words, "1.jsonl", *old))
    said = told(place.pocketfleet(*words, "1.jsonl", *new))
    assert (
        "batch b goes on with the shared store it was enqueued with, where 'ids' is other than now;" in said
    )
    elsewhere = {"POCKETFLEET_DATA_DIR": str(place.directory / "elsewhere")}
    set_since = ["--set", 'seen={"77":1}', "--set", 'model="new"']
    said = told(place.pocketfleet(*words, "2.jsonl", *new, *set_since, **elsewhere))
    assert "where 'ids', 'seen', 'model' are other than now; to have items run with this one use" in said
    assert "the caller's shared['seen'] stays as it is" in said


def test_who_reads_results_may_leave_when_they_have_enough(place: Site) -> None:
    told(
        place.pocketfleet(
            "run", "users:flow", "--set", ids(400), "--set", "large=300", "--workers", "1", "--batch", "b"
        )
    )
    command = [sys.executable, "-m", "pocketfleet", "batch", "results", "b", "--json"]
    child = subprocess.Popen(
        command, cwd=place.directory, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    with child, child.stdout, child.stderr:
        assert child.stdout.read(10) == b'{"index":0'
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == (b"", 1)


def test_a_batch_without_items_is_over(place: Site) -> None:
    assert "there were no items" in told(
        place.pocketfleet("run", "users:flow", "--set", "ids=[]", "--batch", "b")
    )
    assert told(place.pocketfleet("batch", "wait", "b")) == "b: 0 of 0 done\n"
    assert status(place)["state"] == "over"


def test_a_key_finds_items_that_stand_elsewhere_now(place: Site) -> None:
    words = [
        "run",
        "users:flow",
        "--workers",
        "1",
        "--batch",
        "b",
        "--key",
        "user_id",
        "--output",
        "out.jsonl",
    ]
    assert "3 completed" in told(place.pocketfleet(*words, "--set", "ids=[7,8,9]"))
    assert "5 completed" in told(place.pocketfleet(*words, "--set", "ids=[11,9,7,10,8]"))
    assert place.ledger.items("end") == Counter({"7": 1, "8": 1, "9": 1, "10": 1, "11": 1})
    refused = told(place.pocketfleet(*words, "--set", "ids=[7,8,9,9]"), 2)
    assert re.search(r"two items have the same user_id \('9'\)", refused)


def test_a_stopped_run_leaves_nothing_in_the_queue_but_what_began(place: Site) -> None:
    words = ["run", "users:flow", "--set", ids(400), "--set", "s=0.3", "--workers", "1", "--batch", "b"]
    child = place.pocketfleet(*words)
    until(lambda: place.ledger.count("end") >= 8)
    child.tell(2)  # type: ignore[arg-type]
    assert "go on with: pocketfleet run" in told(child, 130)
    assert place.waiting("users:flow") <= 8
    state = status(place)
    assert state["missing"] >= 400 - 8 - place.ledger.count("end")
    assert "not in the queue" in told(place.pocketfleet("batch", "status", "b"), None) or state["left"]
    told(place.pocketfleet("worker", "users:flow", "--burst"))
    # who waits is told as well, once it is sure that nobody goes on
    assert "not in the queue: run or enqueue it again" in told(place.pocketfleet("batch", "wait", "b"), 1)


PROGRAM = """
import asyncio
from users import flow


async def main():
    batch = await flow.enqueue({"ids": list(range(10)), "s": 0.1}, batch="b", weight=2)
    print(batch.id, batch.count)
    seen = []
    async for outcome in batch:
        seen.append(outcome.index)
        assert outcome.completed and outcome.changed == {"seen": {str(outcome.index): 0}}, outcome
    print(sorted(seen), await batch.results())
    long = await flow.enqueue({"ids": list(range(100)), "s": 20}, batch="long")
    try:
        async with asyncio.timeout(2):
            async for outcome in long:
                pass
    except TimeoutError:
        print("timed out")
    await long.cancel()
    results = await long.results()
    print(len(results), {str(each).partition(": ")[2] for each in results})
    shared = {"ids": list(range(10)), "s": 0.1}
    print(await flow.run_on_fleet(shared, batch="b"))


asyncio.run(main())
"""


def test_a_program_follows_a_batch_and_a_cancelled_loop_leaves_it_running(place: Site) -> None:
    place.write("program.py", PROGRAM)
    worker = place.pocketfleet("worker", "users:flow")
    until(lambda: "worker serves" in worker.output())
    said = told(place.python("program.py")).splitlines()
    assert said[:2] == ["b 10", f"{list(range(10))} {['done'] * 10}"]
    assert "batch long goes on without us; follow it: pocketfleet batch wait long" in said
    assert "timed out" in said
    assert any(
        line.startswith("100 {") and "before it ran" in line and "while it ran" in line for line in said
    )
    assert said[-1] == str(list(range(10)))
    assert place.ledger.count("start") == 10 + 8
    worker.end()


def test_every_key_has_a_lifetime_or_an_owner_and_prune_deletes_the_rest(place: Site) -> None:
    place.env["POCKETFLEET_KEEP_S"] = "60"
    (place.directory / "broken").touch()
    common = ["users:flow", "--set", "large=80000", "--batch", "b"]
    told(place.pocketfleet("run", *common, "--set", ids(6), "--workers", "1"), 1)
    told(place.pocketfleet("batch", "retry", "b", "--failed"))
    told(place.pocketfleet("run", *common, "--set", ids(8), "--workers", "1"), 1)
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(9), "--batch", "gone"))
    told(place.pocketfleet("batch", "cancel", "gone"))
    keys = GateKeys("users.flow")
    with place.client() as client:
        assert client.hlen(keys.blobs("b")), "a large outcome stands beside the stream"
        lives = {key.decode(): client.pttl(key) for key in client.keys("*")}
        endless = {key for key, ms in lives.items() if ms == -1}
        assert endless == {BATCHES}, "every other key has a lifetime once nothing waits or runs"
        of_batch = {ms for key, ms in lives.items() if key in keys.of_batch("b")}
        assert of_batch and all(0 < ms <= 60_000 for ms in of_batch), "as long as POCKETFLEET_KEEP_S says"
    table = json.loads(told(place.pocketfleet("batch", "list", "--json")))
    assert {row["batch"]: row["state"] for row in table} == {"b": "over", "gone": "cancelled"}
    assert all(row["bytes_in_redis"] > 0 and row["bytes_on_disk"] > 0 for row in table)

    assert told(place.pocketfleet("batch", "prune")) == "nothing to delete\n"
    assert told(place.pocketfleet("batch", "prune", "b")).startswith("deleted b: ")
    with place.client() as client:
        assert not client.exists(*keys.of_batch("b"))
    assert not (place.directory / ".pocketfleet/batches/b").exists()
    assert "batch 'b' is not known here (known: gone)" in told(place.pocketfleet("batch", "status", "b"), 2)


def test_every_enqueue_deletes_manifests_whose_lifetime_is_over(place: Site) -> None:
    place.env["POCKETFLEET_KEEP_S"] = "60"
    batches = place.directory / ".pocketfleet/batches"
    words = ["run", "users:flow", "--set", "ids=[1]", "--workers", "1", "--batch"]
    for batch in ("old", "young"):
        told(place.pocketfleet(*words, batch))
    told(place.pocketfleet("enqueue", "users:flow", "--set", "ids=[1]", "--batch", "waits"))
    for batch in ("old", "waits"):
        for path in (batches / batch).iterdir():
            os.utime(path, (time.time() - 61, time.time() - 61))
    told(place.pocketfleet("enqueue", "users:flow", "--set", "ids=[1]", "--batch", "new"))
    assert {path.name for path in batches.iterdir() if "+" not in path.name} == {"young", "waits", "new"}


def test_a_producer_killed_while_it_enqueues_goes_on_and_nothing_is_queued_twice(place: Site) -> None:
    count = 60_000
    place.write("p.jsonl", "".join(f'{{"user_id": {n}}}\n' for n in range(count)))
    words = ["enqueue", "users:flow", "--params", "p.jsonl", "--batch", "b"]
    child = place.pocketfleet(*words)
    until(lambda: place.waiting("users:flow") > 2_000, "it enqueues")
    child.kill()
    some = place.waiting("users:flow")
    assert 2_000 < some < count
    assert status(place)["state"] == "running"
    said = told(place.pocketfleet(*words))
    assert f"{count - some} of {count} items enqueued, {some} were there already" in said
    assert (place.waiting("users:flow"), status(place)["left"], status(place)["missing"]) == (count, count, 0)
    assert told(place.pocketfleet("batch", "cancel", "b")).startswith(f"b: {count} items taken off the queue")


ODD = """
import threading
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

cyclic = []
cyclic.append(cyclic)
RESULTS = {"lock": threading.Lock(), "cyclic": cyclic, "large": "x" * 20_000_000, "nan": float("nan"), "plain": 1}


class Odd(AsyncNode):
    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("kept", {})[self.params["what"]] = RESULTS[self.params["what"]]
        return RESULTS[self.params["what"]] if self.params["what"] == "plain" else None


class Flow(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{"what": what} for what in RESULTS]

    async def post_async(self, shared, prep_res, results):
        return sorted((key, len(str(value))) for key, value in shared["kept"].items())


flow = Flow(start=Odd())
"""


def test_what_a_run_made_that_cannot_travel_fails_nothing_and_is_named(place: Site) -> None:
    place.write("odd.py", ODD)
    said = told(place.pocketfleet("run", "odd:flow", "--workers", "1", "--output", "out.jsonl"))
    assert "5 completed" in said
    assert "result: [('large', 20000000), ('plain', 1)]" in said
    written = {line["params"]["what"]: line for line in lines(place.directory / "out.jsonl")}
    left = {what: line["left_behind"] for what, line in written.items() if line["left_behind"]}
    assert set(left) == {"lock", "cyclic", "nan"}
    assert all("'kept'" in path and repr(what) in path for what, (path,) in left.items()), left


def test_a_batch_that_is_not_over_is_not_pruned(place: Site) -> None:
    told(place.pocketfleet("enqueue", "users:flow", "--set", ids(3), "--batch", "b"))
    assert "batch 'b' is not over: 3 items wait or run; end it first: pocketfleet batch cancel b" in told(
        place.pocketfleet("batch", "prune", "b"), 2
    )


def test_waiting_on_one_host_waits_for_what_another_one_retries(place: Site) -> None:
    one, other = ({"POCKETFLEET_DATA_DIR": str(place.directory / name)} for name in ("one", "other"))
    (place.directory / "broken").touch()
    words = ["run", "users:flow", "--workers", "1", "--set", ids(6), "--batch", "b"]
    for host in (one, other):
        told(place.pocketfleet(*words, **host), 1)
    (place.directory / "broken").unlink()
    assert "2 items enqueued again" in told(place.pocketfleet("batch", "retry", "b", "--failed", **other))
    worker = place.pocketfleet("worker", "users:flow")
    assert "6 of 6 done: 6 completed" in told(place.pocketfleet("batch", "wait", "b", **one))
    assert place.ledger.count("end") == 6
    worker.end()
