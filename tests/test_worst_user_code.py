"""User code at its worst: its own run ends with words that say what happened, its neighbours never notice."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from tests import fleet
from tests.fleet import until
from tests.stalls import slack_s

LEASE_S = 2.0
QUICK = {"POCKETFLEET_LEASE_S": LEASE_S}

FLOW = """
import asyncio, threading, time
from ledger import note, noted
from pocketflow import AsyncNode, AsyncParallelBatchNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Hostile(Exception):
    def __init__(self, one, two):
        super().__init__(one, two)
    def __str__(self): raise RuntimeError("no words")
    def __getattr__(self, name): raise ValueError(name)
    def __reduce__(self): raise RuntimeError("no pickle")

def deep():
    found = []
    for _ in range(10_000):
        found = [found]
    return found

class Worst(AsyncNode):
    async def exec_async(self, _):
        how = self.params["how"]
        note("met", how)
        if how == "blocks":
            time.sleep(5)
        if how == "exit": raise SystemExit(7)
        if how == "interrupt": raise KeyboardInterrupt
        if how == "generator": raise GeneratorExit
        if how == "cancelled": raise asyncio.CancelledError
        if how == "stop": raise StopAsyncIteration
        if how == "hostile": raise Hostile(1, 2)
        if how == "group": raise BaseExceptionGroup("both", [SystemExit(1), ValueError("x")])
        if how == "task": await asyncio.create_task(self.leave())
        if how == "gathered": await asyncio.gather(self.leave(), asyncio.sleep(30))
        if how == "loose": self.loose = asyncio.create_task(self.leave())
        if how == "thread": threading.Thread(target=time.sleep, args=(600,)).start()
        if how == "recursion": return deep()
        await asyncio.sleep(0.1)
    async def leave(self):
        raise SystemExit(3)
    async def post_async(self, shared, prep_res, exec_res):
        how = self.params["how"]
        if how == "lambda": shared["made"] = lambda: 1
        if how == "cycle": shared["made"] = [shared]
        if how == "recursion": shared["made"] = exec_res
        if how == "huge": shared["made"] = "x" * 50_000_000
        if how == "action": return object()
        if how == "attributes":
            type(self).hung = [1]
            self.successors.clear()
            self.params.clear()
            flow.params["left"] = object()

class Batch(AsyncParallelBatchNode):
    async def prep_async(self, shared):
        return [1, 2, 3] if self.params["how"] == "parallel" else []
    async def exec_async(self, number):
        await asyncio.sleep(0.05)
        if number == 2: raise KeyboardInterrupt

class Sync(Node):
    def exec(self, _):
        how = self.params["how"]
        if how == "sync-exit": raise SystemExit("bye")
        if how == "sync-stop": raise StopIteration

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 50

worst, batch = Worst(), Batch()
worst >> batch
batch >> Sync()
flow = Flow(start=worst)
plain = Flow(start=Sync())

class Stubborn(AsyncNode):
    async def exec_async(self, _):
        until = time.monotonic() + self.params["s"]
        with noted(self.params["n"]):
            while time.monotonic() < until:
                try:
                    await asyncio.sleep(0.05)
                except asyncio.CancelledError:
                    note("swallowed", self.params["n"])

first, last = Stubborn(), Stubborn()
first >> last
stubborn = Flow(start=first)
"""

FAILS = {
    "exit": ("SystemExit", "7"),
    "interrupt": ("KeyboardInterrupt", ""),
    "generator": ("GeneratorExit", ""),
    "cancelled": ("asyncio.exceptions.CancelledError", ""),
    "stop": ("StopAsyncIteration", ""),
    "hostile": ("worst.Hostile", "its text cannot be made: RuntimeError"),
    "group": ("BaseExceptionGroup", "both"),
    "task": ("SystemExit", "3"),
    "gathered": ("SystemExit", "3"),
    "parallel": ("KeyboardInterrupt", ""),
    "sync-exit": ("SystemExit", "bye"),
    "sync-stop": ("RuntimeError", "StopIteration"),
}
LEAVES = {"lambda", "cycle", "recursion"}
OTHERS = {"blocks", "loose", "thread", "huge", "action", "attributes"}


def test_its_own_run_says_what_happened_and_its_neighbours_complete() -> None:
    hows = [*FAILS, *LEAVES, *OTHERS]
    with fleet.site({"worst.py": FLOW}) as site:
        site.enqueue("worst:flow", [{"how": how} for how in hows] + [{"how": f"fine{n}"} for n in range(30)])
        worker = site.pocketfleet("worker", "worst:flow", **QUICK)
        ended = site.ended("worst:flow", len(hows) + 30)
        met = {hows[each.index]: each.outcome for each in ended if each.index < len(hows)}
        for how, (kind, words) in FAILS.items():
            failure = met[how].failure
            assert failure is not None, f"{how}: {met[how]}"
            assert failure.type == kind and words in failure.message, (how, failure)
        others = {how: met[how].status for how in LEAVES | OTHERS}
        assert others == dict.fromkeys(LEAVES | OTHERS, "completed"), met
        assert all(met[how].left_behind == ["'made'"] for how in LEAVES)
        assert len(met["huge"].difference["="]["made"]) == 50_000_000
        assert met["action"].action is None
        fine = [each.outcome for each in ended if each.index >= len(hows)]
        assert Counter(each.status for each in fine) == {"completed": 30}
        assert all(not each.attempts for each in fine), "nobody lost the lease"
        assert set(site.ledger.items("met").values()) == {1}, worker.output()
        # then: threads that were left behind do not keep the worker
        worker.tell(signal.SIGTERM)
        assert worker.code(20) == 0, worker.output()


def test_a_run_that_swallows_its_cancellation_ends_at_the_next_node_and_is_handed_back() -> None:
    with fleet.site({"worst.py": FLOW}) as site:
        site.enqueue("worst:stubborn", [{"n": 0, "s": 2.0}])
        worker = site.pocketfleet("worker", "worst:stubborn", POCKETFLEET_DRAIN_S=0, **QUICK)
        until(lambda: site.ledger.count("start") == 1, "its first node runs")
        told_at = worker.tell(signal.SIGTERM)
        assert worker.code() == 0
        assert time.monotonic() - told_at < 8 + slack_s(told_at)
        assert site.ledger.count("swallowed") == 1
        assert site.ledger.count("start") == 1, "no second node there"
        site.pocketfleet("worker", "worst:stubborn", **QUICK)
        (ended,) = site.ended("worst:stubborn", 1)
        assert ended.outcome.status == "completed"
        assert ended.outcome.attempts == {"tries": 1, "hand_backs": 1}


FORKS = """
import asyncio, multiprocessing, os, signal, sys, time
from ledger import note, noted
from pocketflow import AsyncNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Pooled(Node):
    def exec(self, _):
        with multiprocessing.Pool(2) as pool:
            return pool.map(abs, [-1, -2])
    def post(self, shared, prep_res, exec_res):
        shared["made"] = exec_res

class Ended(AsyncNode):
    async def exec_async(self, _):
        child = multiprocessing.Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        await asyncio.to_thread(child.join, 30)
        return child.exitcode
    async def post_async(self, shared, prep_res, exec_res):
        shared["made"] = exec_res

class Flow(ThrottledAsyncParallelBatchFlow):
    name = "forks"

class Forks(AsyncNode):
    async def post_async(self, shared, prep_res, exec_res):
        return self.params["how"]

start = Forks()
start - "pool" >> Pooled()
start - "ended" >> Ended()
flow = Flow(start=start)
"""


def test_a_signal_for_a_process_that_a_node_has_forked_does_not_stop_the_worker() -> None:
    hows = ["pool", "ended"] * 3
    with fleet.site({"forks.py": FORKS}) as site:
        site.enqueue("forks", [{"how": how} for how in hows])
        worker = site.pocketfleet("worker", "forks:flow")
        ended = site.ended("forks", len(hows))
        assert all(each.outcome.attempts == {} for each in ended), worker.output()
        made = {each.index: each.outcome.difference["="]["made"] for each in ended}
        assert made == {n: [1, 2] if how == "pool" else -signal.SIGTERM for n, how in enumerate(hows)}
        worker.tell(signal.SIGTERM)
        assert worker.code(20) == 0, worker.output()


LEAVES_BEHIND = """
import asyncio, subprocess
from concurrent.futures import ProcessPoolExecutor
from ledger import note
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

pool = ProcessPoolExecutor(2)

class Left(AsyncNode):
    async def exec_async(self, _):
        note("left", subprocess.Popen(["sleep", "300"]).pid)
        return await asyncio.get_running_loop().run_in_executor(pool, abs, -1)

class Flow(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{}]

flow = Flow(start=Left())
"""


def test_a_run_ends_though_nodes_have_left_processes_and_a_pool_behind() -> None:
    with fleet.site({"leaves.py": LEAVES_BEHIND}) as site:
        run = site.pocketfleet("run", "leaves:flow", "--workers", "1", POCKETFLEET_DRAIN_S=5)
        try:
            assert run.code() == 0
            assert "1 completed" in run.output()
            assert fleet.processes_in(site.directory) == list(site.ledger.items("left")), "the pool has ended"
        finally:
            for pid in site.ledger.items("left"):
                os.kill(int(pid), signal.SIGKILL)


LEAVES_THE_DIRECTORY = """
import asyncio, os
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Leave(AsyncNode):
    async def exec_async(self, _):
        os.chdir("/")

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 1
    async def prep_async(self, shared):
        return [{"n": n} for n in range(3)]

flow = Flow(start=Leave())
"""


def test_a_node_that_goes_to_another_directory_takes_no_line_of_the_output_with_it() -> None:
    with fleet.site({"leaves.py": LEAVES_THE_DIRECTORY}) as site:
        run = site.pocketfleet("run", "leaves:flow", "--workers", "0", "--output", "out.jsonl")
        assert run.code() == 0, run.output()
        assert len((site.directory / "out.jsonl").read_text().splitlines()) == 3


GOES_AT_ONCE = """
import os
from pathlib import Path
from pocketflow import Node
from pocketfleet import ThrottledAsyncParallelBatchFlow, limit

class Ask(Node):
    def exec(self, _):
        with limit("api", max_concurrent=1):
            print("asked")

class Flow(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        os.chdir("elsewhere")
        return [{}]

flow = Flow(start=Ask())
"""


def test_a_flow_that_goes_to_another_directory_has_one_server_and_its_files_in_one_place() -> None:
    with fleet.site({"goes.py": GOES_AT_ONCE}, embedded=True) as site:
        (site.directory / "elsewhere").mkdir()
        run = site.pocketfleet("run", "goes:flow", "--workers", "0", "--batch", "b", "--output", "out.jsonl")
        assert run.code() == 0, run.output()
        assert "asked" in run.output()
        assert not list((site.directory / "elsewhere").iterdir())
        assert (site.directory / "out.jsonl").read_text().count("\n") == 1
        assert (site.directory / ".pocketfleet/batches/b").is_dir()


FROM_NOWHERE = """
import asyncio, os
from leaves import flow

os.mkdir("gone")
os.chdir("gone")
os.rmdir(os.getcwd())
asyncio.run(flow.run_on_fleet({}, workers=0))
print(flow.stats["completed_flows"])
"""


def test_a_program_whose_directory_was_deleted_runs_with_a_data_directory_elsewhere() -> None:
    with fleet.site({"leaves.py": LEAVES_THE_DIRECTORY, "program.py": FROM_NOWHERE}) as site:
        program = site.python("program.py", POCKETFLEET_DATA_DIR=site.directory / "data")
        assert program.code() == 0, program.output()
        assert program.output().splitlines()[-1] == "3"
