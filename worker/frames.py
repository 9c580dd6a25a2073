"""Messages between a worker and the process in which one of its runs is alone: msgpack lists."""

from __future__ import annotations

import asyncio
from typing import Any

from worker.codec import decode, encode


class Frames:
    """One end of the connection. Messages are sent whole and in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *message: Any) -> None:
        """Put a message on its way; lost if the other end is gone, which `receive` then says."""
        data = encode(message)
        self._writer.write(len(data).to_bytes(4, "big") + data)

    async def receive(self) -> list[Any] | None:
        """The next message; None once the other end is gone."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            message: list[Any] = decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            return None
        return message

    def close(self) -> None:
        self._writer.close()
