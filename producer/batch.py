"""A batch: from a caller's store and params to a spool on disk."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from producer.errors import ProducerError, SpoolError
from producer.facts import Facts
from producer.item_keys import key_of
from producer.manifest import Item, continued, same_as_announced
from producer.params import checked_params
from producer.spool import Spool
from producer.spool_writer import SpoolWriter
from worker import codec
from worker.codec import CannotTravel, travels
from worker.difference import equal
from worker.registry import ServedFlow

SHOWN_ENTRIES = 10
TURN_S = 0.05


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


def other_store(batch: str, shared: Any, local_keys: Iterable[str], base: bytes) -> str:
    """A sentence that names what the caller's store has other than the one that a known batch has; '' if nothing.

    A batch has one store, as it was enqueued: what differs now is no fault, and reaches no item.
    """
    if not isinstance(shared, dict):
        return ""
    known, local = codec.decode(base) if base else {}, set(local_keys)
    now = {key: value for key, value in shared.items() if key not in local}
    apart = [key for key in {**now, **known} if not equal(now.get(key, ...), known.get(key, ...))]
    if not apart:
        return ""
    shown = ", ".join(f"{key!r:.80}" for key in apart[:SHOWN_ENTRIES])
    more = ", ..." if len(apart) > SHOWN_ENTRIES else ""
    return (
        f"batch {batch} goes on with the shared store it was enqueued with, where {shown}{more} "
        f"{'is' if len(apart) == 1 else 'are'} other than now; to have items run with this one use another batch id"
    )


async def as_async(items: Any, where: str) -> AsyncIterator[Any]:
    """Any iterable or async iterable of param dicts, one by one; the event loop has its turn every 50 ms.

    Raises:
        ProducerError: it is None or something else that holds no items.
    """
    if items is None:
        raise ProducerError(f"{where} returned None: return the list of param dicts. Nothing was enqueued.")
    if isinstance(items, (dict, str, bytes)):
        raise ProducerError(
            f"{where} returned a {type(items).__name__}; return a list of dicts. Nothing was enqueued."
        )
    turn_at = monotonic() + TURN_S
    if hasattr(items, "__aiter__"):
        async for each in items:
            if monotonic() >= turn_at:
                await asyncio.sleep(0)
                turn_at = monotonic() + TURN_S
            yield each
    elif hasattr(items, "__iter__"):
        for each in items:
            if monotonic() >= turn_at:
                await asyncio.sleep(0)
                turn_at = monotonic() + TURN_S
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
    key: str = "",
    weight: float = 1.0,
    facts: Facts | None = None,
) -> Spool:
    """Write a batch's params to disk, or compare them with what the same id holds already.

    Everything is checked here: an item that cannot travel, or a generator that raises, leaves nothing.

    Args:
        key: the params' entry that identifies an item across runs; '' = its position.
        base: the caller's store; a batch that is known keeps the one it was enqueued with.
        facts: what Redis knows of the batch; with digests for a host that has no spool of it.

    Raises:
        ParamsError: names the item, the entry and the mend.
        SpoolError: the id is taken by a batch of another flow or limit, or with other params; names the first
            that differs.
    """
    if facts is not None and facts.flow:
        _checked_owner(batch, facts.flow, facts.limit, served)
    if Spool.exists(data_dir, batch):
        spool = Spool.open(data_dir, batch)
        _checked_owner(batch, spool.flow, spool.limit, served)
        if key and key != spool.key:
            raise SpoolError(
                f"batch '{batch}' was enqueued {f'with --key {spool.key}' if spool.key else 'without --key'}; "
                "go on with it in the same way",
                batch=batch,
            )
        await continued(spool, _encoded(items, max_bytes, where, first, spool.key))
        return spool
    with SpoolWriter(data_dir, batch, served.name, served.limits.name, key, weight) as writer:
        if facts is not None and facts.flow:
            writer.watch(facts.count)
        async for encoded, item_key in _encoded(items, max_bytes, where, first, key):
            writer.add(encoded, item_key)
        if facts is not None:
            same_as_announced(facts, writer)
        return writer.finish(base() if facts is None or facts.base is None else facts.base)


def _checked_owner(batch: str, flow: str, limit: str, served: ServedFlow) -> None:
    if flow != served.name:
        raise SpoolError(
            f"batch '{batch}' belongs to flow {flow}, not to {served.name}; use another --batch", batch=batch
        )
    if limit != served.limits.name:
        raise SpoolError(
            f"batch '{batch}' was enqueued under limit {limit}, and {flow} is under {served.limits.name} now, where "
            f"no worker looks for its items: give the flow limit={limit!r} again, or use another --batch",
            batch=batch,
        )


async def _encoded(
    items: AsyncIterator[Any], max_bytes: int, where: str, first: int | None, key: str = ""
) -> AsyncIterator[Item]:
    index = 0
    if first is not None and first <= 0:
        return
    async for params in items:
        encoded = checked_params(index, params, max_bytes, where)
        yield encoded, key_of(params, key, index, where) if key else ""
        index += 1
        if index == first:
            return


async def checked_items(
    items: AsyncIterator[Any], max_bytes: int, where: str, first: int | None = None
) -> tuple[int, int]:
    """How many items there are and how many bytes their params take, after checking each; keeps none."""
    count = size = 0
    async for encoded, _ in _encoded(items, max_bytes, where, first):
        count, size = count + 1, size + len(encoded)
    return count, size
