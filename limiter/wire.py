"""A connection that redis-py has opened, read by us: what comes is passed on in the step of the loop in which it
came.

redis-py reads through asyncio's streams, which wake a task for every reply, a step of the loop later. On the two
connections where others wait for each message, the pump's and that of the wake-ups, we do without.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError

BUFFER_BYTES = 64 * 1024
NOTHING_YET = object()


class Hearer(Protocol):
    """Who hears what comes."""

    def hear(self, reply: Any) -> None:
        """A reply or a message; an error that the server answers with is the exception itself."""

    def lost(self, error: Exception) -> None:
        """Nothing more will come."""


class Wire(asyncio.BufferedProtocol):
    """Takes over a connected redis-py connection. Ends with `drop`; then nothing more is heard."""

    def __init__(self, connection: Any, hearer: Hearer) -> None:
        self._hearer: Hearer | None = hearer
        self._reader: Any = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=connection._parser.parse_error,
            notEnoughData=NOTHING_YET,
        )
        self._buffer = memoryview(bytearray(BUFFER_BYTES))  # TLS slices it, which must not copy
        self._transport: asyncio.Transport = connection._writer.transport
        self._transport.set_protocol(self)

    def send(self, *words: Any) -> None:
        """Send one command; what the socket does not take at once follows by itself."""
        self._transport.write(hiredis.pack_command(words))

    def drop(self) -> None:
        """Close the connection."""
        self._hearer = None
        self._transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.feed(self._buffer, 0, nbytes)
        try:
            while (reply := self._reader.gets()) is not NOTHING_YET and self._hearer is not None:
                self._hearer.hear(reply)
        except InvalidResponse as error:
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(RedisConnectionError(f"connection lost ({error or 'closed by the server'})"))

    def _end(self, error: Exception) -> None:
        hearer, self._hearer = self._hearer, None
        self._transport.close()
        if hearer is not None:
            hearer.lost(error)


class StreamWire:
    """The same through redis-py's own calls, for a connection without a transport, such as fakeredis'."""

    def __init__(self, connection: Any, hearer: Hearer) -> None:
        self._connection = connection
        self._hearer: Hearer | None = hearer
        self._sends: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self._tasks = [asyncio.create_task(work) for work in (self._send_all(), self._hear_all())]

    def send(self, *words: Any) -> None:
        self._sends.put_nowait(words)

    def drop(self) -> None:
        self._hearer = None
        for task in self._tasks:
            task.cancel()

    async def _send_all(self) -> None:
        while self._hearer is not None:  # redis-py's wait_for may have swallowed the cancel
            try:
                await self._connection.send_command(*await self._sends.get())
            except (RedisError, OSError) as error:
                self._end(error)

    async def _hear_all(self) -> None:
        while self._hearer is not None:
            try:
                reply = await self._connection.read_response(disconnect_on_error=False)
            except RedisConnectionError as error:
                self._end(error)
                return
            except RedisError as error:
                reply = error
            if self._hearer is not None:
                self._hearer.hear(reply)

    def _end(self, error: Exception) -> None:
        hearer = self._hearer
        self.drop()
        if hearer is not None:
            hearer.lost(error)


def wire(connection: Any, hearer: Hearer) -> Wire | StreamWire:
    """Read what comes over a connected connection from now on."""
    plain = isinstance(connection._writer, asyncio.StreamWriter)
    return Wire(connection, hearer) if plain else StreamWire(connection, hearer)
