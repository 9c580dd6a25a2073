"""A batch: from a caller's store and params to a spool on disk, and from there into the queue."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis

from limiter.keys import BATCHES, GateKeys
from limiter.script import script
from producer.errors import ProducerError, SpoolError
from producer.inputs import checked_params
from producer.spool import Spool, SpoolWriter
from worker import codec
from worker.codec import CannotTravel, travels
from worker.registry import ServedFlow

ENQUEUE = Path(__file__).with_name("enqueue.lua")
CHUNK = 500
IN_FLIGHT = 4
SPACING = 1000
"""Places between two items of a batch of weight 1."""


class StoreError(ProducerError, ValueError):
    """An entry of the caller's shared store cannot travel. Carries `path`."""

    def __init__(self, fault: CannotTravel) -> None:
        key = fault.path.split("[")[0] or "it"
        super().__init__(
            f"shared store: {fault}; leave it out with local_keys = [{key}]. Nothing was enqueued."
            if fault.path
            else f"shared store {fault}. Nothing was enqueued."
        )
        self.path = fault.path


def new_batch_id(flow_name: str) -> str:
    """Flow, time and a random part, such as `users-flow-20261122-101500-3fa9`."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", flow_name)[:80]
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def encoded_base(shared: Any, local_keys: Iterable[str]) -> bytes:
    """The caller's store without its local keys, encoded; b'' if nothing is left.

    Raises:
        StoreError: names the entry that cannot travel.
    """
    if not isinstance(shared, dict):
        raise StoreError(CannotTravel("", f"is a {type(shared).__name__}; on a fleet it must be a dict"))
    local = set(local_keys)
    base = {key: value for key, value in shared.items() if key not in local}
    if not base:
        return b""
    try:
        return travels(base)
    except CannotTravel as fault:
        raise StoreError(fault) from None


async def as_async(items: Any, where: str) -> AsyncIterator[Any]:
    """Any iterable or async iterable of param dicts, one by one."""
    if items is None:
        return
    if isinstance(items, (dict, str, bytes)):
        raise ProducerError(
            f"{where} returned a {type(items).__name__}; return a list of dicts. Nothing was enqueued."
        )
    if hasattr(items, "__aiter__"):
        async for each in items:
            yield each
    elif hasattr(items, "__iter__"):
        for number, each in enumerate(items):
            if number % 1000 == 999:
                await asyncio.sleep(0)
            yield each
    else:
        raise ProducerError(
            f"{where} returned a {type(items).__name__}; return a list of dicts. Nothing was enqueued."
        )


async def write_spool(
    data_dir: Path,
    batch: str,
    served: ServedFlow,
    items: AsyncIterator[Any],
    base: Callable[[], bytes],
    *,
    max_bytes: int,
    where: str,
    first: int | None = None,
) -> Spool:
    """Write a batch's params to disk, or compare them with what the same id holds already.

    Everything is checked here: an item that cannot travel, or a generator that raises, leaves nothing.

    Raises:
        ParamsError: names the item, the entry and the mend.
        SpoolError: the id is taken by a batch with other params; names the first that differs.
    """
    if Spool.exists(data_dir, batch):
        known = [encoded async for encoded in _encoded(items, max_bytes, where, first)]
        return _continued(Spool.open(data_dir, batch), known, served)
    with SpoolWriter(data_dir, batch, served.name, served.limits.name) as writer:
        async for encoded in _encoded(items, max_bytes, where, first):
            writer.add(encoded)
        return writer.finish(base())


async def _encoded(
    items: AsyncIterator[Any], max_bytes: int, where: str, first: int | None
) -> AsyncIterator[bytes]:
    index = 0
    if first is not None and first <= 0:
        return
    async for params in items:
        yield checked_params(index, params, max_bytes, where)
        index += 1
        if index == first:
            return


def _continued(spool: Spool, encoded: list[bytes], served: ServedFlow) -> Spool:
    if spool.flow != served.name:
        raise SpoolError(
            f"batch '{spool.batch}' belongs to flow {spool.flow}, not to {served.name}; use another --batch",
            batch=spool.batch,
        )
    compared = spool.compare(encoded)
    if compared.verdict == "differs":
        shorter = compared.index == len(encoded)
        differs = (
            f"{spool.count} items, and these are only {len(encoded)}"
            if shorter
            else f"other params: item {compared.index} differs"
        )
        raise SpoolError(
            f"batch '{spool.batch}' was enqueued with {differs}; use another --batch for other input. "
            "Nothing was enqueued.",
            batch=spool.batch,
        )
    if compared.verdict == "appended":
        spool.grow(encoded[spool.count :])
    return spool


async def announce(client: Redis, spool: Spool) -> None:
    """Tell Redis of a batch before its first job: where it belongs, how many items, its store."""
    keys = GateKeys(spool.limit)
    facts: dict[str, Any] = {"flow": spool.flow, "count": spool.count, "created": spool.created}
    facts |= {f"digest:{number}": value for number, value in enumerate(spool.digests)}
    base = spool.base()
    async with client.pipeline(transaction=False) as pipe:
        pipe.hset(
            BATCHES, spool.batch, msgspec.json.encode({"limit": spool.limit, "flow": spool.flow}).decode()
        )
        pipe.hset(keys.batch(spool.batch), mapping=facts)
        if base:
            pipe.set(keys.base(spool.batch), base)
        await pipe.execute()


async def enqueue(
    client: Redis, spool: Spool, told: Callable[[int], None] = lambda sent: None
) -> tuple[int, int]:
    """Put a spool's items into the queue, those that are not there yet. Safe to repeat.

    Args:
        client: one that may repeat a call; the script adds only what is missing.
        told: hears after each chunk how many items have been sent.

    Returns:
        (added, done before).
    """
    await announce(client, spool)
    send = script(client, ENQUEUE)
    keys = GateKeys(spool.limit).all
    added = done = sent = 0
    flying: set[asyncio.Task[Any]] = set()
    for chunk in _chunks(spool):
        args = ["", "", spool.batch, spool.flow, SPACING, *chunk]
        flying.add(asyncio.ensure_future(send(keys=keys, args=args)))
        if len(flying) < IN_FLIGHT:
            await asyncio.sleep(0)
            continue
        finished, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
        for task in finished:
            added, done = added + task.result()[0], done + task.result()[1]
        sent = min(spool.count, sent + CHUNK * len(finished))
        told(sent)
    for reply in await asyncio.gather(*flying):
        added, done = added + reply[0], done + reply[1]
    told(spool.count)
    return added, done


def _chunks(spool: Spool) -> Iterable[list[Any]]:
    """`index, payload, index, payload, ...` of up to `CHUNK` items."""
    head, tail = _frame(spool.flow)
    chunk: list[Any] = []
    for index, params in spool.items():
        chunk += (index, head + params + tail)
        if len(chunk) == 2 * CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _frame(flow: str) -> tuple[bytes, bytes]:
    """What stands around the encoded params in a job's payload (`worker.contract.encode_job`).

    >>> head, tail = _frame("users")
    >>> codec.decode(head + codec.encode({"a": 1}) + tail)["a"]
    [{'a': 1}]
    """
    mark = b"PARAMS-STAND-HERE"
    record: dict[str, Any] = {
        "t": None,
        "f": flow,
        "a": (msgspec.Raw(mark),),
        "k": {},
        "et": round(time.time() * 1000),
    }
    head, _, tail = codec.encode(record).partition(mark)
    return head, tail


async def find_batch(client: Redis, batch: str) -> tuple[str, str]:
    """Limit and flow of a batch.

    Raises:
        SpoolError: nobody knows it.
    """
    found = await client.hget(BATCHES, batch)  # type: ignore[misc]
    if found is None:
        known = [name.decode() for name in await client.hkeys(BATCHES)]  # type: ignore[misc]
        latest = f" (known: {', '.join(sorted(known)[-5:])})" if known else ""
        raise SpoolError(f"batch '{batch}' is not known here{latest}", batch=batch)
    facts = msgspec.json.decode(found)
    return facts["limit"], facts["flow"]
