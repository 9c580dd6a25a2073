"""A connection of a pump's own, for one script: no pool, no lock, nothing between the call and the wire."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from limiter.script import source
from limiter.wire import StreamWire, Wire, wire


class Line:
    """Calls one script, one call at a time. It connects by itself, again after every error."""

    def __init__(self, client: Redis, path: Path) -> None:
        self._connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        self._text = source(path)
        self._sha = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()
        self._wire: Wire | StreamWire | None = None
        self._answer: asyncio.Future[Any] | None = None

    async def call(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """The script's reply. Raises redis' own errors or OSError; the call may then have been made."""
        try:
            return await self._ask("EVALSHA", self._sha, len(keys), *keys, *args)
        except NoScriptError:
            await self._ask("SCRIPT", "LOAD", self._text)
            return await self._ask("EVALSHA", self._sha, len(keys), *keys, *args)

    async def _ask(self, *words: Any) -> Any:
        try:
            if self._wire is None:
                await self._connection.disconnect(nowait=True)  # what is left of one that was lost
                await self._connection.connect()
                self._wire = wire(self._connection, self)
            answer = self._answer = asyncio.get_running_loop().create_future()
            self._wire.send(*words)
            async with asyncio.timeout(self._connection.socket_timeout):
                reply = await answer
            if isinstance(reply, RedisError):
                raise reply
            return reply
        except TimeoutError:
            await self.close()
            raise RedisTimeoutError("no answer in time") from None
        except RedisError as error:
            if not _is_answer(error) or isinstance(error, ReadOnlyError):  # a primary that is none any more
                await self.close()
            raise
        except BaseException:  # cancelled or broken in the middle: what follows would read the old answer
            await self.close()
            raise

    def hear(self, reply: Any) -> None:
        """The answer to the call."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(reply)

    def lost(self, error: Exception) -> None:
        """The connection is gone: the next call opens it again."""
        self._wire = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    async def close(self) -> None:
        """Let go of the connection; the next call opens it again."""
        if self._wire is not None:
            self._wire.drop()
            self._wire = None
        with contextlib.suppress(RedisError, OSError):
            await self._connection.disconnect(nowait=True)


def _is_answer(error: RedisError) -> bool:
    """Whether the server itself said no, so that the connection is in order."""
    return isinstance(error, ResponseError) and not isinstance(error, RedisConnectionError)
