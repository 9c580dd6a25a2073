"""What the `batch` commands show: a batch's status, the list of all, an item in a line."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limiter.printable import printable
from producer.errors import SpoolError
from producer.facts import known_batches
from producer.follower import mend, named, ranges
from producer.journal import Journal
from producer.known import Known, bytes_in_redis, known_batch, redis_at, state_of
from producer.settings import ProducerSettings
from producer.spool import Spool
from producer.texts import size_text
from producer.who_runs import unserved_batch
from worker.contract import LOST, STATUSES

if TYPE_CHECKING:
    from rich.table import Table


async def status_of(settings: ProducerSettings, batch: str) -> dict[str, Any]:
    """A batch in figures: count, left, missing, one per status, and the items that Redis has lost.

    `lost` is a list of ranges such as '3-7', None where items are lost and nobody here can name them;
    `lost_items` counts them and those whose recorded outcome is that they were lost. `unserved` says that items
    wait and no worker takes them, and what helps; else it is empty.
    """
    async with known_batch(settings, batch) as known:
        told = await status_of_known(known)
        waits = told["state"] == "running" and told["left"] > 0
        return {**told, "unserved": await unserved_batch(known) if waits else ""}


async def status_of_known(known: Known) -> dict[str, Any]:
    """The same of a batch that was found, from the facts it has now."""
    facts = known.facts
    lost = await known.lost()
    journal = known.read_journal()
    statuses = journal.counts() if journal is not None and (lost or facts is None) else {}
    if facts is not None and not lost:
        statuses = facts.statuses
    missing = facts.missing if facts is not None else known.count - sum(statuses.values())
    if facts is not None and not facts.epoch and lost is not None:
        missing = len(lost)
    return {
        "batch": known.batch,
        "limit": known.limit,
        "flow": known.flow,
        "state": state_of(facts, lost, empty=known.empty),
        "count": known.count,
        "left": facts.left if facts else 0,
        "missing": missing,
        "failed_items": sum(statuses.get(status, 0) for status in STATUSES[1:]),
        "created": facts.created
        if facts and facts.created
        else (known.spool.created if known.spool else 0.0),
        **statuses,
        "lost": None if lost is None else list(ranges(lost)),
        "lost_items": len(lost or ()) + statuses.get(LOST, 0),
    }


def sentence_of(told: dict[str, Any]) -> str:
    """Such as `b: 7 of 9 done: 6 completed, 1 failed`, and what is to be done."""
    batch, done = told["batch"], told["count"] - told["left"] - told["missing"]
    counts = {**told, LOST: told["lost_items"]}
    shown = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts.get(status))
    sentence = f"{batch}: {done} of {told['count']} done{': ' if shown else ''}{shown}"
    if told["state"] == "lost":
        return f"{sentence}\n{lost_sentence(told)}"
    if told["state"] == "cancelled":
        return f"{sentence}; it was cancelled, and {told['missing']} did not run"
    if told["missing"]:
        return f"{sentence}; {told['missing']} are not in the queue: run or enqueue it again with --batch {batch}"
    if told["state"] == "over" and told["failed_items"]:
        return f"{sentence}; retry what failed: pocketfleet batch retry {batch} --failed"
    return f"{sentence}; {told['unserved']}" if told.get("unserved") else sentence


def lost_sentence(told: dict[str, Any]) -> str:
    batch = told["batch"]
    if told["lost"] is None:
        return (
            f"Redis has lost batch {batch} or a part of it; its items can be named, and enqueued again, only where "
            "its spool is: in the data directory of the host that enqueued it"
        )
    if not told["lost"]:
        ended = (
            f"{told['lost_items']} ended as lost; retry what failed: pocketfleet batch retry {batch} --failed"
        )
        return f"{batch}: {ended if told['lost_items'] else 'no item is lost'}"
    items = [n for each in told["lost"] for n in _indexes(each)]
    return (
        f"Redis has lost {named(items)} of batch {batch} (those that run may still say so within a lease); "
        f"{mend(batch)}"
    )


def _indexes(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


async def listed(settings: ProducerSettings) -> list[dict[str, Any]]:
    """Every batch that Redis or this data directory knows, oldest first."""
    async with redis_at(settings) as (client, _):
        rows = [
            {
                "batch": facts.batch,
                "flow": facts.flow,
                "state": state_of(facts, [] if facts.epoch else None),
                "count": facts.count,
                "left": facts.left,
                **facts.statuses,
                "bytes_in_redis": await bytes_in_redis(client, facts),
                "bytes_on_disk": bytes_of(settings.data_dir / "batches" / facts.batch),
                "created": facts.created,
            }
            for facts in await known_batches(client)
        ]
    return sorted(
        [*rows, *_only_here(settings, {row["batch"] for row in rows})], key=lambda row: row["created"]
    )


def _only_here(settings: ProducerSettings, others: set[Any]) -> list[dict[str, Any]]:
    homes = [meta.parent for meta in sorted((settings.data_dir / "batches").glob("*/meta.json"))]
    return [_row_of(home) for home in homes if "+" not in home.name and home.name not in others]


def _row_of(home: Path) -> dict[str, Any]:
    """A batch that Redis does not know; a folder that holds no whole spool hides no other one."""
    row = {"batch": home.name, "flow": "", "state": "damaged", "count": 0, "created": 0.0}
    with contextlib.suppress(SpoolError), Spool(home) as spool:
        row |= {"flow": spool.flow, "state": "only on disk", "count": spool.count, "created": spool.created}
        row |= Journal(home, home.name, spool.count, write=False).counts()
    return {**row, "left": 0, "bytes_in_redis": 0, "bytes_on_disk": bytes_of(home)}


def bytes_of(directory: Path) -> int:
    """Bytes of the files of a directory, of those that can be seen."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                size += os.path.getsize(os.path.join(folder, name))
    return size


def table_of(rows: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("batch", "flow", "state", "done", "failed", "in Redis", "on disk", "enqueued"):
        table.add_column(
            title, justify="right" if title in ("done", "failed", "in Redis", "on disk") else "left"
        )
    for row in rows:
        ended = sum(row.get(status, 0) for status in STATUSES)
        table.add_row(
            escape(printable(row["batch"])),
            row["flow"],
            row["state"],
            f"{ended}/{row['count']}",
            str(ended - row.get(STATUSES[0], 0)),
            size_text(row["bytes_in_redis"]),
            size_text(row["bytes_on_disk"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"])) if row["created"] else "-",
        )
    return table


def short_line(record: dict[str, Any]) -> str:
    """An item in one line of a terminal."""
    error = record["error"]
    again = f" (retry {record['retry']})" if record["retry"] else ""
    what = f"{error.type}: {error.message}" if error else repr(record["action"])
    text = f"{record['index']} {record['status']}{again} {what}"
    return "".join(char if char.isprintable() else " " for char in text)[:200]
