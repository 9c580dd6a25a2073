"""A TCP door in front of a server's unix socket, for faults of the network between it and its clients.

It can cut connections, leave them half-open (both sides stay connected and hear nothing any more), be
closed, be slow, lead to another server, and lose single requests or replies. All of it is decided per
request, since it reads what passes: it speaks the clients' protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import hiredis

Fate = Literal["", "request", "reply", "silence"]
"""What happens to one request: nothing; the connection is cut before the server sees it, or after the server
has answered and before the client hears; or the answer is swallowed and the connection stays open."""

Rule = Callable[[list[bytes]], Fate]


class Proxy:
    """Everything here may be called and set from any thread.

    Attributes:
        target: the unix socket that new connections lead to.
        delay_s: how long each piece waits, in each direction.
        loss: share of pieces that wait `retransmit_s` longer, as lost packets do.
        rule: asked about each request; see `Fate`.
        lost: requests that met a fate, by what it was.
    """

    def __init__(self, target: Path, seed: int = 0) -> None:
        self.target = target
        self.delay_s = 0.0
        self.loss = 0.0
        self.retransmit_s = 0.2
        self.rule: Rule | None = None
        self.lost: dict[str, int] = {}
        self.open = True
        self.port = 0
        self._random = random.Random(seed)
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def cut(self, *, reset: bool = False) -> int:
        """Close every connection; returns how many there were.

        Args:
            reset: so that the clients' system tells them of a reset, as it does on its own where data was on its
                way, and not of an end.
        """
        return self._call(lambda: sum(link.cut(reset=reset) for link in list(self._links)))

    def half_open(self) -> int:
        """Leave every connection as it is, but nothing passes on them any more; new ones work."""
        return self._call(lambda: sum(link.deafen() for link in list(self._links)))

    def close_door(self) -> None:
        """Cut everything, and whoever comes is sent away."""
        self.open = False
        self.cut()

    def open_door(self) -> None:
        self.open = True

    def wait_s(self) -> float:
        """How long the next piece waits."""
        lost = self.loss > 0 and self._random.random() < self.loss
        return self.delay_s + (self.retransmit_s if lost else 0.0)

    def fate(self, words: list[bytes]) -> Fate:
        found = self.rule(words) if self.rule is not None else ""
        if found:
            self.lost[found] = self.lost.get(found, 0) + 1
        return found

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self.close_door()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _call(self, act: Callable[[], int]) -> int:
        async def go() -> int:
            return act()

        return asyncio.run_coroutine_threadsafe(go(), self._loop).result(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._meet, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, writer)
        if not self.open:
            link.cut()
            return
        self._links.add(link)
        try:
            await link.serve(reader)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            link.cut()
            self._links.discard(link)


class _Link:
    """One client's connection and the one it leads to."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._server: asyncio.StreamWriter | None = None
        self._deaf = False
        self._cut_at_reply = False

    async def serve(self, reader: asyncio.StreamReader) -> None:
        answers, self._server = await asyncio.open_unix_connection(str(self._proxy.target))
        replies = asyncio.create_task(self._replies(answers))
        try:
            await self._requests(reader)
        finally:
            replies.cancel()

    async def _requests(self, reader: asyncio.StreamReader) -> None:
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            await self._wait()
            while (words := parser.gets()) is not False:
                fate = self._proxy.fate(words)
                if fate == "request":
                    return
                if fate == "reply":
                    self._cut_at_reply = True
                self._put(self._server, hiredis.pack_command(tuple(words)))
                if fate == "silence":
                    self._deaf = True

    async def _replies(self, answers: asyncio.StreamReader) -> None:
        while data := await answers.read(65536):
            if self._cut_at_reply:
                break
            await self._wait()
            self._put(self._client, data)
        self.cut()

    async def _wait(self) -> None:
        wait_s = self._proxy.wait_s()
        if wait_s:
            await asyncio.sleep(wait_s)

    def _put(self, writer: Any, data: bytes) -> None:
        if not self._deaf and writer is not None:
            writer.write(data)

    def cut(self, *, reset: bool = False) -> int:
        if reset:
            now = struct.pack("ii", 1, 0)
            self._client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        for writer in (self._client, self._server):
            if writer is not None:
                writer.transport.abort()
        return 1

    def deafen(self) -> int:
        self._deaf = True
        return 1


@contextlib.contextmanager
def before(socket: str | Path, seed: int = 0) -> Iterator[Proxy]:
    """A proxy in front of a unix socket (`unix://` may stand in front of its path)."""
    proxy = Proxy(Path(str(socket).removeprefix("unix://")), seed)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


class Every:
    """A rule: every n-th call of a script (by its source) or command meets a fate.

    Args:
        name: the script's text, or a command's name.
        fates: taken in turn.
        share: of the calls that match, by a seeded dice.
    """

    def __init__(self, *names: bytes, fates: tuple[Fate, ...], share: float, seed: int) -> None:
        self._names = {name.lower() for name in names}
        self._fates = fates
        self._share = share
        self._random = random.Random(seed)

    def __call__(self, words: list[bytes]) -> Fate:
        script = words[0].upper() in (b"EVALSHA", b"EVAL")
        name = words[1].lower() if script else words[0].lower()
        if self._names and name not in self._names:
            return ""
        return self._random.choice(self._fates) if self._random.random() < self._share else ""
