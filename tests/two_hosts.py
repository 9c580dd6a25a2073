"""Two hosts of one fleet on this machine, and a Redis that both reach over a network.

With root and iproute2: two network namespaces with a veth pair between them, Redis in the first. Else
each host reaches Redis on loopback through a TCP proxy of its own. Redis has a password either way.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import redis

from tests import servers

NAMESPACES = Path("/var/run/netns")
PORT = 6390


@dataclass
class Hosts:
    """What a test needs to put a process on host "a" or "b"."""

    kind: str
    prefix: dict[str, list[str]] = field(default_factory=lambda: {"a": [], "b": []})
    """Words in front of a command that make it run there."""
    address: dict[str, str] = field(default_factory=lambda: {"a": "127.0.0.1", "b": "127.0.0.1"})
    redis_url: dict[str, str] = field(default_factory=dict)
    own_url: str = ""
    """How the test itself reaches Redis."""


@contextlib.contextmanager
def two_hosts(directory: Path, *, namespaces: bool) -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        if namespaces:
            hosts = stack.enter_context(_joined_namespaces())
            ports = {"a": PORT, "b": PORT}
        else:
            hosts = Hosts("two proxies")
            ports = {}
        password = secrets.token_urlsafe(16)
        port = PORT if namespaces else _free_port()
        stack.enter_context(_server(hosts, directory, port, password))
        for host in "ab":
            at = hosts.address["a"]
            if not namespaces:
                ports[host] = stack.enter_context(_proxy(port))
            hosts.redis_url[host] = f"redis://:{password}@{at}:{ports[host]}/0"
        hosts.own_url = f"unix://:{password}@{directory}/s"
        yield hosts


def namespaces_possible() -> bool:
    """Whether this process may make network namespaces and join them."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with _joined_namespaces():
            return True
    except (OSError, subprocess.SubprocessError):
        return False


@contextlib.contextmanager
def _joined_namespaces() -> Iterator[Hosts]:
    _clear_left_over()
    names = {host: f"pf-{os.getpid()}-{host}" for host in "ab"}
    address = {"a": "10.231.77.1", "b": "10.231.77.2"}
    try:
        for name in names.values():
            _ip("netns", "add", name)
        _ip("link", "add", "pf-a", "netns", names["a"], "type", "veth", "peer", "pf-b", "netns", names["b"])
        for host, name in names.items():
            _ip("-n", name, "address", "add", f"{address[host]}/24", "dev", f"pf-{host}")
            for device in ("lo", f"pf-{host}"):
                _ip("-n", name, "link", "set", device, "up")
        prefix = {host: ["ip", "netns", "exec", name] for host, name in names.items()}
        yield Hosts("two network namespaces", prefix, address)
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _clear_left_over() -> None:
    """Namespaces of test runs that were killed."""
    for each in NAMESPACES.glob("pf-*-[ab]"):
        pid = each.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", each.name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def _server(hosts: Hosts, directory: Path, port: int, password: str) -> Iterator[None]:
    """Redis on host a."""
    words = ["--port", str(port), "--bind", hosts.address["a"], "--requirepass", password]
    words += [
        "--unixsocket",
        str(directory / "s"),
        "--dir",
        str(directory),
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    command = [*hosts.prefix["a"], servers.binary("valkey"), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with redis.Redis(unix_socket_path=str(directory / "s"), password=password) as client:
            _until_it_answers(client)
        yield
    finally:
        process.terminate()
        process.wait(10)


def _until_it_answers(client: redis.Redis, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _proxy(port: int) -> Iterator[int]:
    """A TCP proxy to a port of loopback; its own port."""
    listener = socket.create_server(("127.0.0.1", 0))
    joined: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                joined.extend((client, server))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        for each in (listener, *joined):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        thread.join(5)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
