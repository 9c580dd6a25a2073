"""Who would run a batch's jobs, and what they would run first: one sentence each, '' where nothing is amiss."""

from __future__ import annotations

from redis.asyncio import Redis

from limiter.keys import GateKeys
from producer.facts import count_of
from producer.known import Known
from worker.presence import living_workers


async def unserved(client: Redis, flow: str, limit: str, target: str, *, leaving: str = "") -> str:
    """Whether no worker would take the jobs of a flow that workers find under `target`, and what helps.

    Args:
        limit: under which the jobs wait.
        leaving: the batch that a command leaves in the embedded server, which no worker starts.
    """
    workers = await living_workers(client)
    if any(each.serves(flow, limit) for each in workers):
        return ""
    if any(flow in each.flows for each in workers):
        return (
            f"the workers of {flow} serve it under another limit than {limit}, where these items wait: start them "
            f"with limit={limit!r} again, or cancel the batch and run what is left under another id"
        )
    if leaving:
        return (
            f"no worker serves {flow}, and none can by itself, as no POCKETFLEET_REDIS_URL is set: "
            f"run it with pocketfleet run {target} ... --batch {leaving}, or set one and enqueue there"
        )
    return f"no worker serves {flow}; start one: pocketfleet worker {target}"


async def unserved_batch(known: Known) -> str:
    """The same of a batch that was found by its id."""
    leaving = known.batch if known.place.embedded else ""
    return await unserved(known.client, known.flow, known.limit, known.flow, leaving=leaving)


async def others_first(client: Redis, limit: str, flow: str, batch: str) -> str:
    """What earlier batches left in the queue runs first, and may be unexpected."""
    keys = GateKeys(limit)
    async with client.pipeline(transaction=True) as pipe:  # at one moment: runs end meanwhile
        pipe.zcard(keys.queue(flow))
        pipe.hget(keys.batch(batch), "left")
        waiting, own = await pipe.execute()
    others = waiting - count_of(own)
    if others <= 0:
        return ""
    items = "1 item" if others == 1 else f"{others} items"
    return f"{items} of earlier batches wait for {flow}: these workers run them too"
