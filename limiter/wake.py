"""Wake-ups: one subscription per event loop. A lost message costs time only: a hint is asked for again, and
a grant goes back with the next call, whose `held` is absolute."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError

from limiter.keys import wake_channel
from limiter.sync import Abort, Grant, read_wake
from limiter.trouble import words
from limiter.wire import wire

log = logging.getLogger("pocketfleet.limiter")

PING_AFTER_S = 4.0
DEAD_AFTER_S = 7.0


class WakeCalls:
    """Listens on the process' channel and passes each message to `ring`: the limit, and when to call, a grant or an abort.

    A half-open connection shows as silence: after 4 silent seconds it is pinged, after 7 it is opened
    anew. `on_new_connection` runs after each reconnection, since messages may have been missed.
    """

    def __init__(
        self,
        client: Redis,
        process: str,
        ring: Callable[[str, float | Grant | Abort], None],
        on_new_connection: Callable[[], None],
    ) -> None:
        self._client = client
        self._channel = wake_channel(process)
        self._ring = ring
        self._on_new_connection = on_new_connection
        self._over: asyncio.Future[Exception] | None = None
        self._heard_at = 0.0
        self.ready = asyncio.Event()

    async def listen(self) -> None:
        """Until cancelled."""
        pause_s, refused = 0.1, False
        while True:
            connection = self._connection()
            try:
                await connection.connect()
                await self._listen(connection)
            except (RedisError, OSError) as error:
                log.debug("wake.lost error=%s", type(error).__name__)
                if isinstance(error, NoPermissionError) and not refused:
                    refused = True
                    log.warning(
                        'wake.refused what="Redis %s"; until then calls are made by the clock', words(error)
                    )
            finally:
                await _close(connection)
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 2)

    def reconnect(self) -> None:
        """Subscribe anew, where another server may answer by now."""
        self.lost(RedisConnectionError("it is no primary any more"))

    def hear(self, message: Any) -> None:
        """One message of the subscription."""
        if isinstance(message, RedisError):
            self.lost(message)
            return
        if message[0] == b"message":
            self._ring(*read_wake(message[2]))
        elif message[0] == b"subscribe":
            self.ready.set()
            self._on_new_connection()
        self._heard_at = monotonic()

    def lost(self, error: Exception) -> None:
        """Nothing more comes over this connection."""
        if self._over is not None and not self._over.done():
            self._over.set_result(error)

    def _connection(self) -> Any:
        """A bare one: no pool and no retries between a message and its pump."""
        pool = self._client.connection_pool
        return pool.connection_class(**pool.connection_kwargs | {"protocol": 2})

    async def _listen(self, connection: Any) -> None:
        """Until the connection is lost, or silent for too long."""
        self._heard_at, self._over = monotonic(), asyncio.get_running_loop().create_future()
        channel = wire(connection, self)
        try:
            channel.send("SUBSCRIBE", self._channel)
            while (silent_s := monotonic() - self._heard_at) < DEAD_AFTER_S:
                if silent_s > PING_AFTER_S:
                    channel.send("PING")
                await asyncio.wait([self._over], timeout=1.0)
                if self._over.done():
                    raise self._over.result()
        finally:
            channel.drop()


async def _close(connection: Any) -> None:
    with contextlib.suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)
