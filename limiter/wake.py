"""Wake-ups: one subscription per event loop. A lost message costs time only: a hint is asked for again, and
a grant goes back with the next call, whose `held` is absolute."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from limiter.keys import wake_channel
from limiter.sync import Grant, read_wake

log = logging.getLogger("pocketfleet.limiter")

PING_AFTER_S = 4.0
DEAD_AFTER_S = 7.0


class WakeCalls:
    """Listens on the process' channel and passes each message to `ring`: the limit, and when to call or a grant.

    A half-open connection shows as silence: after 4 silent seconds it is pinged, after 7 it is opened
    anew. `on_new_connection` runs after each reconnection, since messages may have been missed.
    """

    def __init__(
        self,
        client: Redis,
        process: str,
        ring: Callable[[str, float | Grant], None],
        on_new_connection: Callable[[], None],
    ) -> None:
        self._client = client
        self._channel = wake_channel(process)
        self._ring = ring
        self._on_new_connection = on_new_connection
        self.ready = asyncio.Event()

    async def listen(self) -> None:
        """Until cancelled."""
        pause_s = 0.1
        while True:
            pubsub = self._client.pubsub(ignore_subscribe_messages=False)
            try:
                await pubsub.subscribe(self._channel)
                await self._hear(pubsub)
            except (RedisError, OSError) as error:
                log.debug("wake.lost error=%s", type(error).__name__)
            finally:
                await _close(pubsub)
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 2)

    async def _hear(self, pubsub: PubSub) -> None:
        heard_at, pinged = monotonic(), False
        while True:
            message = await pubsub.get_message(timeout=1.0)
            now = monotonic()
            if message is None:
                if now - heard_at > DEAD_AFTER_S:
                    return
                if now - heard_at > PING_AFTER_S and not pinged:
                    pinged = True
                    await pubsub.ping()
                continue
            heard_at, pinged = now, False
            if message["type"] == "subscribe":
                self.ready.set()
                self._on_new_connection()
            elif message["type"] == "message":
                self._ring(*read_wake(message["data"]))


async def _close(pubsub: PubSub) -> None:
    try:
        await pubsub.aclose()  # type: ignore[no-untyped-call]
    except (RedisError, OSError):
        pass
