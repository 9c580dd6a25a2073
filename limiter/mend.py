"""What a call does when its script met keys that it cannot read."""

from __future__ import annotations

import logging

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter.control import repair
from limiter.sync import Call

log = logging.getLogger("pocketfleet.limiter")


async def mend(client: Redis, limit: str, call: Call) -> bool:
    """Have what the call met mended, and say so once; whether that was possible."""
    batches = {entry.job.rpartition(":")[0].partition("}:")[2] for entry in call.entries}
    try:
        change = await repair(client, limit, call.process, call.flows, batches)
    except (RedisError, OSError) as fault:
        log.debug("gate.not_repaired limit=%s error=%s", limit, fault)
        return False
    if change.repaired:
        log.warning("gate.repaired limit=%s what=%s", limit, change.repaired)
    return bool(change.repaired)
