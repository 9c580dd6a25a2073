"""What must not be said is said nowhere, and what comes from elsewhere cannot speak for us."""

from __future__ import annotations

import json
import pickle
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from limiter.keys import BATCHES, WORKERS, GateKeys, worker_key
from tests import faults, proxy
from tests.fleet import site, until
from worker.contract import decode_job, decode_outcome, encode_job

CANARY, PASSWORD, TYPED = "canary-7f3a", "s3cr3t/p@ss", "s3cr3t%2Fp%40ss"

FLOW = """
import asyncio
from ledger import noted
from pocketflow import AsyncNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Ask(AsyncNode):
    async def exec_async(self, _):
        with noted(self.params["i"]):
            await asyncio.sleep(0.05)
        return self.params["secret"] + "-result"

    async def post_async(self, shared, prep_res, exec_res):
        shared[str(self.params["i"])] = exec_res
        return "next"

class Fail(Node):
    def exec(self, _):
        if self.params["i"] % 7 == 3:
            raise ValueError(self.params["secret"] + " in an error")
        return self.params["secret"]

    def post(self, shared, prep_res, exec_res):
        return exec_res

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 4
    keep_result_s = 60
    async def prep_async(self, shared):
        return [{"i": i, "secret": shared["secret"]} for i in range(200)]

ask, fail = Ask(), Fail()
ask - "next" >> fail
flow = Flow(start=ask)
"""


def test_no_secret_is_in_a_log_a_command_line_or_an_error_at_any_level() -> None:
    with faults.rig(workers=0) as fleet, proxy.before(fleet.server.socket) as door:
        here = fleet.site
        here.starts_anew = True  # the words of a fork are on no command line
        fleet.server.ask("CONFIG", "SET", "requirepass", PASSWORD)
        fleet.server.ask = lambda *words: _ask(fleet, *words)  # type: ignore[method-assign]
        here.write("secretive.py", FLOW)
        url = f"redis://:{TYPED}@127.0.0.1:{door.port}/0"
        here.env |= {
            "POCKETFLEET_REDIS_URL": url,
            "POCKETFLEET_LOG_LEVEL": "DEBUG",
            "PYTHONASYNCIODEBUG": "1",
        }
        workers = [here.pocketfleet("worker", "secretive:flow"), here.arq("secretive:flow")]
        until(lambda: all("worker serves" in each.output() for each in workers), "both serve")
        here.write("shared.json", json.dumps({"secret": CANARY}))
        words = ("enqueue", "secretive:flow", "--shared", "shared.json", "--batch", "b")
        sent = here.pocketfleet(*words)
        assert sent.code() == 0, sent.output()
        until(lambda: here.ledger.count("end") > 15, "some have ended")
        fleet.server.ask("CONFIG", "SET", "maxmemory", "1mb")  # met at a finish: arq's own would log its args
        time.sleep(1.5)
        fleet.server.ask("CONFIG", "SET", "maxmemory", "0")
        fleet.server.ask("REPLICAOF", "127.0.0.1", str(faults.free_port()))
        time.sleep(1.5)
        fleet.server.ask("REPLICAOF", "NO", "ONE")
        door.rule = proxy.Every(fates=("reply",), share=0.2, seed=faults.seed())
        time.sleep(1.0)
        door.rule = None
        door.cut(reset=True)
        until(lambda: here.ledger.count("end") == 200, "all have ended")
        listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=False)
        status = here.pocketfleet("batch", "status", "b")
        assert status.code() == 1, status.output()  # some have failed, as they should
        fleet.server.ask("CONFIG", "SET", "requirepass", "changed")
        door.cut()
        until(lambda: all("password" in each.output() for each in workers), workers[0].output()[-500:])
        refused = here.pocketfleet("batch", "status", "b")
        assert refused.code() == 3
        said = {
            "ps": listed.stdout,
            "status": status.output(),
            "enqueue": sent.output(),
            "refused": refused.output(),
        }
        said |= {f"worker {each.pid}": each.output() for each in workers}
        for where, text in said.items():
            for secret in (CANARY, PASSWORD, TYPED, url):
                assert secret not in text, (
                    f"{secret} in {where}: {text[max(0, text.find(secret) - 300) :][:400]}"
                )
        assert all(each.lives() and "redis.trouble" in each.output() for each in workers)
        for each in workers:
            assert "Traceback" not in each.output(), each.output()[each.output().find("Traceback") - 500 :][
                :3000
            ]


def _ask(fleet: faults.Rig, *words: object) -> object:
    with redis.Redis(unix_socket_path=str(fleet.server.socket), password=PASSWORD) as client:
        return client.execute_command(*words)  # type: ignore[no-untyped-call]


EVIL = "evil\x1b[2J\nCRITICAL forged [red]line[/red] \x07\u202e"


def test_names_and_texts_planted_in_redis_are_shown_escaped_and_break_no_command() -> None:
    with site({"faulty.py": faults.FLOW % {"concurrent": 2, "starts": None, "window_s": 2.0}}) as here:
        worker = here.pocketfleet("worker", "faulty:flow")
        until(lambda: "worker serves" in worker.output(), "it serves")
        keys = GateKeys(faults.LIMIT)
        with here.client() as client:
            until(lambda: client.exists(keys.gate), "its gate is there")
            planted = {"process": EVIL, "host": EVIL, "pid": 1, "flows": [EVIL], "limits": [EVIL]}
            planted |= {"running": 0, "version": EVIL, "started": 0.0}
            for name, data in (("a", msgspec.json.encode(planted)), ("b", b"\x80not json"), ("c", b"{}")):
                client.set(worker_key(name), data)
                client.zadd(WORKERS, {name: 1})
            client.zadd(WORKERS, {b"\xff": 1})
            client.xadd(
                keys.events, {"at": 1, "what": EVIL, "why": EVIL, "from": EVIL, "to": EVIL, "who": EVIL}
            )
            client.hset(keys.gate, f"p:{EVIL}", "1 0 1 0 - 0 0 9999999999999999 0 1")
            client.set("pocketfleet:{" + EVIL + "}:gate", "x")
            client.hset(BATCHES, EVIL, "{}")
            for name, flow in (("odd", EVIL), ("plain", "faulty:flow")):
                client.hset(BATCHES, name, json.dumps({"limit": faults.LIMIT, "flow": flow}))
                client.hset(keys.batch(name), mapping={"flow": EVIL, "key": EVIL, "epoch": EVIL, "count": 1})
        commands = (["workers"], ["limits", "show"], ["limits", "show", faults.LIMIT])
        commands += (["batch", "list"],)
        commands += (["limits", "holders", faults.LIMIT], ["limits", "doctor", faults.LIMIT])
        for words in commands:
            shown = here.pocketfleet(*words)
            assert shown.code() == 0, shown.output()
            _is_clean(shown.output())
        workers = here.pocketfleet("workers", COLUMNS=400)
        assert workers.code() == 0 and "[red]" in workers.output(), "nothing is taken for markup"
        assert worker.lives() and "Traceback" not in worker.output()


def _is_clean(text: str) -> None:
    assert "\nCRITICAL" not in text
    assert not any(sign in text for sign in ("\x1b[2J", "\x07", "\u202e")), repr(text)


FORGER = """
import logging
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Forge(AsyncNode):
    async def exec_async(self, _):
        raise ValueError("no\\x1b[2J\\nCRITICAL forged \\x07")

class Flow(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{}]

flow = Flow(start=Forge())
"""


def test_an_errors_text_cannot_forge_a_line() -> None:
    with site({"forger.py": FORGER}, embedded=True) as here:
        run = here.pocketfleet("run", "forger:flow", "--workers", "1", "--output", "out.jsonl")
        assert run.code() == 1, run.output()
        _is_clean(run.output())
        assert r"no\x1b[2J\nCRITICAL forged \x07" in run.output()
        line = json.loads((here.directory / "out.jsonl").read_text())
        assert line["error"]["message"] == "no\x1b[2J\nCRITICAL forged \x07", "what is stored is as it was"


@pytest.mark.parametrize("by", ["a\nb", "x" * 101])
def test_an_operators_name_is_one_printable_line(by: str) -> None:
    with site({}) as here:
        said = here.pocketfleet("limits", "pause", "users", "--by", by)
        assert said.code() == 2 and "by=" in said.output()
        _is_clean(said.output())


def test_what_is_decoded_is_capped_in_depth() -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    payload = encode_job("f", {"a": 1}, 0).replace(b"\xa1a\x01", b"\xa1a" + deep)
    with pytest.raises(msgspec.DecodeError):
        decode_job(payload)


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_planted_outcome_is_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for bad in (pickle.dumps(Planted(mark)), b"\x91" * 100_000 + b"\xc0", b"", b"\xc1"):
        with pytest.raises((msgspec.DecodeError, RecursionError)):
            decode_outcome(bad)
    assert not mark.exists()
