"""Retention: what is kept of a batch goes when it ended longer ago than the one lifetime setting says."""

from __future__ import annotations

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
        for batch in ids:
            await _delete_from_redis(client, settings, batch)
        homes = [settings.data_dir / "batches" / batch for batch in ids] or _homes(settings)
        gone = []
        for home in homes:
            if ids or await _is_due(client, settings, home):
                gone.append({"batch": home.name, "bytes_on_disk": _delete_here(settings, home)})
    return gone


async def sweep(client: Redis, settings: ProducerSettings) -> None:
    """What every enqueue does first: manifests whose lifetime is over leave the disk."""
    for home in _homes(settings):
        if await _is_due(client, settings, home):
            _delete_here(settings, home)


def _homes(settings: ProducerSettings) -> list[Path]:
    found = sorted((settings.data_dir / "batches").glob("*/meta.json"))
    return [meta.parent for meta in found if "+" not in meta.parent.name]


async def _is_due(client: Redis, settings: ProducerSettings, home: Path) -> bool:
    """Whether every item has ended, the last one long ago; a batch with items left is never due."""
    try:
        if time.time() - _last_written(home) <= settings.keep_s:
            return False
        spool = Spool(home)
        with (
            BatchLock(settings.data_dir, home.name),
            Journal(home, home.name, spool.count) as journal,
        ):
            facts = await catch_up(client, spool.limit, home.name, journal)
            return not journal.pending and (facts is None or facts.over)
    except (InOtherHands, SpoolError):
        return False


def _last_written(home: Path) -> float:
    return max(path.stat().st_mtime for path in (home / "meta.json", home / "journal") if path.exists())


def _delete_here(settings: ProducerSettings, home: Path) -> int:
    """Manifest, logs and lock; returns their bytes. What a kill leaves of it is no batch any more."""
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


async def _delete_from_redis(client: Redis, settings: ProducerSettings, batch: str) -> None:
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
