"""A refusal seen on one host stops the other: two workers that share nothing but one Redis.

On host a the API takes five calls and then answers 429 with `Retry-After`; on host b it never refuses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet import Child, Site, until
from tests.stalls import slack_s
from tests.two_hosts import Hosts, namespaces_possible, two_hosts

PAUSE_S = 5.0
STOPS_WITHIN_S = 1.0

FLOW = """
import os
import httpx
from ledger import note
from pocketflow import AsyncNode
from pocketfleet import AdaptiveThrottledBatchFlow

HOST = os.environ["HOST"]

class Ask(AsyncNode):
    async def exec_async(self, _):
        note("asked", HOST)
        answer = await client.get(f"/users/{self.params['i']}/orders")
        if answer.status_code == 429:
            note("refused", HOST)
        answer.raise_for_status()

class Flow(AdaptiveThrottledBatchFlow):
    initial_concurrent_flows = 6
    max_concurrent_flows = 8
    async def on_worker_start(self):
        global client
        client = httpx.AsyncClient(base_url=os.environ["API"])
    async def on_worker_stop(self):
        await client.aclose()

flow = Flow(start=Ask())
"""


@pytest.fixture(params=["namespaces", "proxies"])
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Hosts, Site]]:
    if request.param == "namespaces" and not namespaces_possible():
        pytest.skip("needs root and iproute2; the proxies show it instead")
    with tempfile.TemporaryDirectory(prefix="pf") as name:
        directory = Path(name)
        with two_hosts(directory, namespaces=request.param == "namespaces") as hosts:
            site = Site(directory, hosts.own_url)
            site.write("asked.py", FLOW)
            yield hosts, site


class Processes:
    """Processes on either host; all ended with the block."""

    def __init__(self, hosts: Hosts, site: Site) -> None:
        self.hosts, self.site = hosts, site
        self.started: list[Child] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.started:
            child.end()

    def start(self, host: str, *words: str, **env: str) -> Child:
        command = [*self.hosts.prefix[host], sys.executable, "-m", *words]
        log = self.site.directory / f"on-{host}-{len(self.started)}.log"
        self.started.append(Child.start(command, self.site.directory, self.site.env | env, log))
        return self.started[-1]

    def api(self, host: str, *limits: str) -> str:
        words = ["examples.api.server", "--host", self.hosts.address[host], "--delay", "0.1", "--quiet"]
        child = self.start(host, *words, *limits)
        until(lambda: "http://" in child.output(), "the API answers")
        return child.output().strip()

    def worker(self, host: str, api: str) -> Child:
        env = {"HOST": host, "API": api, "POCKETFLEET_REDIS_URL": self.hosts.redis_url[host]}
        words = ("pocketfleet", "worker", "asked:flow", "--max-jobs", "3")
        return self.start(host, *words, POCKETFLEET_ALLOW_PLAINTEXT="1", **env)


def asked_on_b(site: Site) -> list[float]:
    return [each.at for each in site.ledger.notes("asked") if each.item == "b"]


def test_a_429_with_retry_after_on_one_host_stops_the_other_within_a_second(
    hosts: tuple[Hosts, Site], capsys: pytest.CaptureFixture[str]
) -> None:
    place, site = hosts
    with Processes(place, site) as processes:
        limited = processes.api("a", "--per-minute", "5", "--window", str(PAUSE_S))
        free = processes.api("b")
        site.enqueue("asked:flow", [{"i": i} for i in range(400)])
        processes.worker("b", free)
        until(lambda: site.ledger.count("asked") > 10, "host b works")
        processes.worker("a", limited)
        until(lambda: site.ledger.count("refused"), "host a is refused")
        refused = site.ledger.notes("refused")[0]
        after = refused.at + PAUSE_S - 1.5
        until(lambda: any(at > after for at in asked_on_b(site)), "host b goes on after the pause")
        on_b = asked_on_b(site)
    assert {each.item for each in site.ledger.notes("refused")} == {"a"}, "host b was refused too"
    assert any(refused.at - 0.5 - slack_s(refused.at - 0.5) < at < refused.at for at in on_b), (
        "host b was not at work"
    )
    stopped_s = max(at for at in on_b if at < after) - refused.at
    assert stopped_s < STOPS_WITHIN_S + slack_s(refused.at), (
        f"host b asked {stopped_s:.2f} s after host a was told to wait"
    )
    assert site.waiting("asked:flow") > 0, "there was nothing left to stop"
    with capsys.disabled():
        print(f" [{place.kind}: the last call on host b {stopped_s * 1000:+.0f} ms after the 429]", end="")


def test_no_namespace_is_left_behind() -> None:
    if not namespaces_possible():
        pytest.skip("needs root and iproute2")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"pf-{os.getpid()}-" not in listed
