"""What a flow opens and closes in a worker: one that misbehaves is named, and keeps neither worker nor flows."""

from __future__ import annotations

import signal
import time

import pytest

from tests import fleet
from tests.fleet import until

HOOKS = """
import asyncio
from ledger import note
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

async def cancelled():
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task

class Flow(ThrottledAsyncParallelBatchFlow):
    async def on_worker_start(self):
        note("begun")
    async def on_worker_stop(self):
        note("closed")

class Broken(Flow):
    async def on_worker_start(self):
        raise ValueError("no database")

class CancelsItsStart(Flow):
    async def on_worker_start(self):
        await cancelled()

class CancelsItsStop(Flow):
    async def on_worker_stop(self):
        await cancelled()

class Hangs(Flow):
    async def on_worker_stop(self):
        note("hangs")
        await asyncio.Event().wait()

well, broken = Flow(start=AsyncNode()), Broken(start=AsyncNode())
cancels_start, cancels_stop = CancelsItsStart(start=AsyncNode()), CancelsItsStop(start=AsyncNode())
hangs = Hangs(start=AsyncNode())
"""


@pytest.mark.parametrize(
    ("flow", "why"),
    [
        ("broken", "ValueError: no database (hooks.py, line "),
        ("cancels_start", "RuntimeError: what it awaited was cancelled"),
    ],
)
def test_the_flow_that_could_not_start_is_the_one_that_is_named(flow: str, why: str) -> None:
    with fleet.site({"hooks.py": HOOKS}) as site:
        worker = site.pocketfleet("worker", "hooks:well", f"hooks:{flow}")
        assert worker.code() == 2
        assert f"hooks:{flow}: on_worker_start failed: {why}" in worker.output()
        assert "Traceback" not in worker.output()


def test_a_flow_whose_stop_is_cancelled_does_not_keep_the_others_from_closing() -> None:
    with fleet.site({"hooks.py": HOOKS}) as site:
        worker = site.pocketfleet("worker", "hooks:cancels_stop", "hooks:well")
        until(lambda: site.ledger.count("begun") == 2)
        worker.tell(signal.SIGTERM)
        assert worker.code() == 0
        assert "worker.stop_hook_failed flow=hooks:cancels_stop" in worker.output()
        assert site.ledger.count("closed") == 1


def test_a_second_signal_ends_a_worker_whose_flow_does_not_close() -> None:
    with fleet.site({"hooks.py": HOOKS}) as site:
        worker = site.pocketfleet("worker", "hooks:hangs", "hooks:well")
        until(lambda: site.ledger.count("begun") == 2)
        worker.tell(signal.SIGTERM)
        until(lambda: site.ledger.count("hangs") == 1)
        time.sleep(0.2)
        assert worker.lives()
        worker.tell(signal.SIGTERM)
        assert worker.code(30) == 0, worker.output()
        assert "worker.stop_hook_failed flow=hooks:hangs" in worker.output()
        assert site.ledger.count("closed") == 1
