"""The same batch id again: what it holds already is compared with the new input, in flat memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

from producer.errors import ParamsError, SpoolError
from producer.facts import Facts
from producer.spool import BLOCK, Spool
from producer.spool_writer import SpoolGrowth, SpoolWriter

Item = tuple[bytes, str]
"""Encoded params, and the item's key where the batch has one."""


async def continued(spool: Spool, items: AsyncIterator[Item]) -> None:
    """Make sure that `items` are the spool's; those behind its last one are appended, all or none.

    With a key an item is found by that, wherever it stands now, and the new ones are appended.

    Raises:
        SpoolError: names the first item that differs or is missing.
    """
    if spool.key:
        await _continued_by_key(spool, items)
    else:
        await _continued_in_order(spool, items)


async def _continued_in_order(spool: Spool, items: AsyncIterator[Item]) -> None:
    stored, growth = spool.items(), None
    index = 0
    try:
        async for encoded, _ in items:
            if growth is None:
                known = next(stored, None)
                if known is not None:
                    if known[1] != encoded:
                        raise _differs(spool.batch, f"other params: item {index} differs")
                    index += 1
                    continue
                growth = SpoolGrowth(spool)
            growth.add(encoded)
        if growth is not None:
            growth.finish()
        elif index < spool.count:
            raise _differs(spool.batch, f"{spool.count} items, and these are only {index}")
    finally:
        stored.close()
        if growth is not None:
            growth.__exit__()


async def _continued_by_key(spool: Spool, items: AsyncIterator[Item]) -> None:
    count, seen = spool.count, bytearray(spool.count)
    with SpoolGrowth(spool) as growth:
        async for encoded, key in items:
            index = growth.find(key)
            if index is None or index >= count:
                growth.add(encoded, key)
            elif seen[index]:
                raise ParamsError(
                    f"two items have the same {spool.key} ({key!r:.80}), which --key says is one item's alone: "
                    "remove one. Nothing was enqueued.",
                    index=index,
                )
            elif spool.encoded(index) != encoded:
                raise _differs(spool.batch, f"other params: item {index} ({spool.key} {key!r:.80}) differs")
            else:
                seen[index] = 1
        gone = seen.find(0)
        if gone >= 0:
            text = spool.params(gone).get(spool.key)
            raise _differs(spool.batch, f"an item that is missing now: {spool.key} {text!r:.80}, item {gone}")
        if growth.count > count:
            growth.finish()


def same_as_announced(facts: Facts, writer: SpoolWriter) -> None:
    """Compare what is being written here with a batch that another host enqueued, by its digests.

    Raises:
        SpoolError: names the thousand items among which one differs.
    """
    if writer.count < facts.count:
        raise _differs(facts.batch, f"{facts.count} items, and these are only {writer.count}")
    for number, known in enumerate(facts.digests):
        if writer.digest_of_block(number) != known:
            first = number * BLOCK
            last = min(facts.count, first + BLOCK) - 1
            raise _differs(facts.batch, f"other params: one of the items {first} to {last} differs")


def _differs(batch: str, how: str) -> SpoolError:
    return SpoolError(
        f"batch '{batch}' was enqueued with {how}; use another --batch for other input. Nothing was enqueued.",
        batch=batch,
    )
