"""Retention: what is kept of a batch goes when it ended longer ago than the one lifetime setting says."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from limiter.keys import BATCHES, GateKeys
from producer.batch_lock import BatchLock, InOtherHands
from producer.batch_views import bytes_of
from producer.errors import SpoolError
from producer.facts import find_batch, read_facts
from producer.follower import catch_up
from producer.journal import Journal
from producer.known import redis_at
from producer.settings import ProducerSettings
from producer.spool import Spool


async def prune_batches(settings: ProducerSettings, ids: list[str]) -> list[dict[str, Any]]:
    """Delete the manifests and logs of batches that ended longer ago than `keep_s`; Redis' keys of those go
    by themselves. With ids: those batches, with all they have in Redis too.

    Raises:
        SpoolError: a batch that is named is not over, or nobody knows it.
    """
    async with redis_at(settings) as (client, _):
        gone = []
        for home in [settings.data_dir / "batches" / batch for batch in ids] or _homes(settings):
            size = await (_delete_named if ids else _delete_if_due)(client, settings, home)
            if size is not None:
                gone.append({"batch": home.name, "bytes_on_disk": size})
    return gone


async def sweep(client: Redis, settings: ProducerSettings) -> None:
    """What every enqueue does first: manifests whose lifetime is over leave the disk."""
    for home in _homes(settings):
        await _delete_if_due(client, settings, home)


def _homes(settings: ProducerSettings) -> list[Path]:
    found = sorted((settings.data_dir / "batches").glob("*/meta.json"))
    return [meta.parent for meta in found if "+" not in meta.parent.name]


async def _delete_if_due(client: Redis, settings: ProducerSettings, home: Path) -> int | None:
    """Its bytes, None where it stays: every item has to have ended, the last one long ago."""
    if time.time() - _last_written(home) <= settings.keep_s:
        return None
    try:
        with BatchLock(settings.data_dir, home.name):
            if not home.exists():  # another producer has deleted it meanwhile
                _delete_here(settings, home)
                return None
            spool = Spool(home)
            with Journal(home, home.name, spool.count) as journal:
                facts = await catch_up(client, spool.limit, home.name, journal)
            over = not journal.pending and (facts is None or facts.over)
            return _delete_here(settings, home) if over else None
    except (InOtherHands, SpoolError):
        return None


def _last_written(home: Path) -> float:
    """Seconds since 1970; that of a manifest that is gone has no end."""
    try:
        return max(path.stat().st_mtime for path in (home / "meta.json", home / "journal") if path.exists())
    except (OSError, ValueError):
        return math.inf


def _delete_here(settings: ProducerSettings, home: Path) -> int:
    """Manifest, logs and lock, which the caller holds; returns their bytes. What a kill leaves of it is no batch
    any more."""
    size = bytes_of(home)
    if home.exists():
        dying = home.with_name(f"+writing.gone.{home.name}")
        shutil.rmtree(dying, ignore_errors=True)
        home.rename(dying)
        shutil.rmtree(dying, ignore_errors=True)
    logs = settings.data_dir / "logs" / home.name
    size += bytes_of(logs)
    shutil.rmtree(logs, ignore_errors=True)
    home.with_name(home.name + "+lock").unlink(missing_ok=True)
    return size


async def _delete_named(client: Redis, settings: ProducerSettings, home: Path) -> int:
    batch = home.name
    limit, _ = await find_batch(client, batch, settings.data_dir)
    facts = await read_facts(client, limit, batch)
    if facts is not None and not facts.over:
        raise SpoolError(
            f"batch '{batch}' is not over: {facts.left} items wait or run; end it first: pocketfleet batch cancel {batch}",
            batch=batch,
        )
    with BatchLock(settings.data_dir, batch):
        await client.unlink(*GateKeys(limit).of_batch(batch))
        await client.hdel(BATCHES, batch)  # type: ignore[misc]
        return _delete_here(settings, home)
