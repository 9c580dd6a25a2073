"""A connection of a pump's own, for one script: no pool, no lock, nothing between the call and the wire."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from limiter.script import source


class Line:
    """Calls one script, one call at a time. It connects by itself, again after every error."""

    def __init__(self, client: Redis, path: Path) -> None:
        self._connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        self._text = source(path)
        self._sha = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()

    async def call(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """The script's reply. Raises redis' own errors or OSError; the call may then have been made."""
        try:
            return await self._send("EVALSHA", self._sha, len(keys), *keys, *args)
        except NoScriptError:
            await self._send("SCRIPT LOAD", self._text)
            return await self._send("EVALSHA", self._sha, len(keys), *keys, *args)

    async def _send(self, *words: Any) -> Any:
        connection = self._connection
        try:
            await connection.connect()
            await connection.send_command(*words)
            return await connection.read_response()
        except RedisError as error:
            if not _is_answer(error) or isinstance(error, ReadOnlyError):  # a primary that is none any more
                await self.close()
            raise
        except BaseException:  # cancelled or broken in the middle: what follows would read the old answer
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of the connection; the next call opens it again."""
        with contextlib.suppress(RedisError, OSError):
            await self._connection.disconnect(nowait=True)


def _is_answer(error: RedisError) -> bool:
    """Whether the server itself said no, so that the connection is in order."""
    return isinstance(error, ResponseError) and not isinstance(error, RedisConnectionError)
