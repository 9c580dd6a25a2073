"""The ACL line of the README is enough for everything, and for nothing else."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import redis
from gate_model import T0

from limiter.client import open_pubsub_client
from limiter.keys import GateKeys
from limiter.limits import Limits
from limiter.script import sync_script
from limiter.sync import SYNC, Call, read_answer
from limiter.wake import WakeCalls
from tests import fleet, servers

README = Path(__file__).resolve().parent.parent / "README.md"

FLOW = """
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Work(AsyncNode):
    async def exec_async(self, _):
        return self.params["i"]

class Flow(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{"i": i} for i in range(5)]

flow = Flow(start=Work())
"""


def test_a_user_with_the_readmes_rights_runs_a_fleet() -> None:
    found = re.search(r"^ACL SETUSER pocketfleet (.*)$", README.read_text(), re.MULTILINE)
    assert found is not None
    rules = found[1].replace(">PASSWORD", ">secret").split()
    with fleet.site({"users.py": FLOW}) as site:
        with site.client() as client:
            client.execute_command("ACL", "SETUSER", "pocketfleet", *rules)  # type: ignore[no-untyped-call]
        path = site.url.removeprefix("unix://")
        as_user = f"unix://pocketfleet:secret@{path}"
        run = site.pocketfleet("run", "users:flow", "--workers", "1", POCKETFLEET_REDIS_URL=as_user)
        assert run.code() == 0, run.output()
        operator = [["limits", act, "users:flow"] for act in ("pause", "resume", "holders", "doctor")]
        for words in (["limits", "show"], ["workers"], *operator):
            shown = site.pocketfleet(*words, POCKETFLEET_REDIS_URL=as_user)
            assert shown.code() == 0, shown.output()
        arq = site.arq("users:flow", "--burst", POCKETFLEET_REDIS_URL=as_user)
        assert arq.code() == 0, arq.output()
        user = redis.Redis.from_url(as_user)
        keys = GateKeys("users.flow")
        assert user.exists(keys.events, keys.samples) == 2, "the trail and the samples were written too"
        for command in (
            ["FLUSHALL"],
            ["KEYS", "*"],
            ["CONFIG", "GET", "*"],
            ["GET", "other"],
            ["PUBLISH", "x", "y"],
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*command)  # type: ignore[no-untyped-call]
        user.close()


@pytest.mark.parametrize("kind", servers.REAL)
def test_a_call_that_may_wake_nobody_is_made_as_a_whole(kind: str) -> None:
    """The right to publish is taken away while processes live: a claim half made would belong to nobody."""
    keys = GateKeys("L")
    with servers.running(kind) as url, redis.Redis.from_url(url) as admin:
        admin.acl_setuser("user", enabled=True, nopass=True, keys=["*"], channels=[], categories=["+@all"])
        user = redis.Redis.from_url(url, username="user", password="any")
        sync = sync_script(user, SYNC)

        def ask(after_s: int, process: str, seq: int, **news: int) -> list[str]:
            call = Call(process, seq, jobs=1, limits=Limits("L", 5).as_argument(), flows=("f",), **news)
            return [
                job.id for job in read_answer(sync(keys=keys.all, args=call.argv(T0 + after_s * 10**6))).jobs
            ]

        for job in ("{L}:b:0", "{L}:b:1"):
            admin.zadd(keys.queue("f"), {job: 1})
            admin.set(f"arq:job:{job}", b"payload")
        for process in ("A", "B"):
            assert ask(0, process, 1, refused=1, pause_us=10**6) == [], (
                "the fleet pauses, and both stand in line"
            )
        assert ask(2, "A", 2) == ["{L}:b:0"], "B is first to be told"
        assert ask(3, "B", 2) == ["{L}:b:1"]
        user.close()


def test_a_user_that_may_not_be_woken_is_told_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    async def go(url: str) -> None:
        client = open_pubsub_client(url.replace("unix://", "unix://user:any@"))
        listening = asyncio.create_task(WakeCalls(client, "A", lambda *_: None, lambda: None).listen())
        async with asyncio.timeout(20):
            while not caplog.messages:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        listening.cancel()
        await client.aclose()

    with servers.running("valkey") as url, redis.Redis.from_url(url) as admin:
        admin.acl_setuser("user", enabled=True, nopass=True, keys=["*"], channels=[], categories=["+@all"])
        asyncio.run(go(url))
    assert "wake.refused" in caplog.messages[0] and "rights that the README lists" in caplog.messages[0]
