"""Retention: what is kept of a batch goes when it ended longer ago than the one lifetime setting says."""

from __future__ import annotations

import os
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
    batches = settings.data_dir / "batches"
    try:
        names = sorted(name for name in os.listdir(batches) if "+" not in name)
    except OSError:
        return []
    return [batches / name for name in names]


async def _delete_if_due(client: Redis, settings: ProducerSettings, home: Path) -> int | None:
    """Its bytes, None where it stays: every item has to have ended, the last one long ago."""
    if _is_young(home, time.time() - settings.keep_s):
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


def _is_young(home: Path, since: float) -> bool:
    """Whether it was written to since then, or is no manifest. Asked of every batch at every enqueue."""
    try:
        if os.stat(f"{home}/meta.json").st_mtime >= since:
            return True
    except OSError:
        return True
    try:
        return os.stat(f"{home}/journal").st_mtime >= since
    except FileNotFoundError:
        return False
    except OSError:
        return True


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
