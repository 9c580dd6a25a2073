"""How full Redis is, as it says itself."""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import ResponseError

FULL = 0.9
"""Share of Redis' memory limit up to which a producer fills it: the rest is for what workers write."""


@dataclass(frozen=True)
class Memory:
    """Bytes that Redis uses, and its limit (`maxmemory`; 0: none, or it may not be asked)."""

    used: int
    limit: int

    @property
    def share(self) -> float:
        """Of the limit; 0 without one."""
        return self.used / self.limit if self.limit else 0.0

    @property
    def room(self) -> float:
        """Bytes that a producer may still fill; infinite without a limit.

        >>> Memory(80, 100).room, Memory(95, 100).room, Memory(95, 0).room
        (10.0, -5.0, inf)
        """
        return FULL * self.limit - self.used if self.limit else float("inf")


async def read_memory(client: Redis) -> Memory:
    """Where the user may not ask (INFO is refused), it looks as if there were no limit."""
    try:
        told = await client.info("memory")
    except ResponseError:
        return Memory(0, 0)
    counted = int(told.get("used_memory", 0)) - int(told.get("mem_not_counted_for_evict", 0))
    return Memory(max(0, counted), int(told.get("maxmemory", 0)))
