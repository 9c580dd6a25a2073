"""Lua files as scripts: each is read beside its module, with what it builds on put in front of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.commands.core import AsyncScript, Script

STEPS = (
    *("gate.lua", "override.lua", "heal.lua"),
    *("call.lua", "trail.lua", "level.lua", "settle.lua", "admit.lua", "wake.lua"),
)
PARTS = {"sync.lua": STEPS, "control.lua": ("gate.lua", "override.lua", "heal.lua")}
SHARED = ("gate.lua",)
WRAPPED = {"together.lua": ("open_gate", (*STEPS, "steps.lua"))}
"""Scripts of several gates: what one gate needs is a function of that name of (KEYS, ARGV)."""


@cache
def source(path: Path) -> str:
    """The text of a script: the rules it shares or is made of, then the file itself."""
    if path.name in WRAPPED:
        name, inner = WRAPPED[path.name]
        body = "\n".join(Path(__file__).with_name(each).read_text() for each in inner)
        return f"local function {name}(KEYS, ARGV)\n{body}\nend\n{path.read_text()}"
    parts = [Path(__file__).with_name(name) for name in PARTS.get(path.name, SHARED)]
    return "\n".join(part.read_text() for part in (*parts, path))


def script(client: AsyncRedis, path: Path) -> AsyncScript:
    """A callable script on `client`; it loads itself again after SCRIPT FLUSH or a restart."""
    return client.register_script(source(path))


def sync_script(client: Redis, path: Path) -> Script:
    """The same for a blocking client (the renewal thread)."""
    return client.register_script(source(path))
