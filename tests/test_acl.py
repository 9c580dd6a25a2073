"""The ACL line of the README is enough for everything, and for nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import redis

from limiter.keys import GateKeys
from tests import fleet

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
