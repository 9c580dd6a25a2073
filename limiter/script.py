"""Lua files as scripts: each is read beside its module, with `gate.lua` put in front of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.commands.core import AsyncScript, Script

GATE = Path(__file__).with_name("gate.lua")


@cache
def source(path: Path) -> str:
    """The text of a script: the shared rules, then the file itself."""
    return GATE.read_text() + "\n" + path.read_text()


def script(client: AsyncRedis, path: Path) -> AsyncScript:
    """A callable script on `client`; it loads itself again after SCRIPT FLUSH or a restart."""
    return client.register_script(source(path))


def sync_script(client: Redis, path: Path) -> Script:
    """The same for a blocking client (the renewal thread)."""
    return client.register_script(source(path))
