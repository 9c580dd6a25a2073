"""Lua files as scripts: each is read beside its module, with what it builds on put in front of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.commands.core import AsyncScript, Script

STEPS = (
    *("gate.lua", "override.lua", "heal.lua"),
    *("call.lua", "reap.lua", "meet.lua", "trail.lua", "level.lua", "settle.lua"),
    *("claim.lua", "window.lua", "admit.lua", "wake.lua"),
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
        body = _nested([Path(__file__).with_name(each) for each in inner])
        return f"local function {name}(KEYS, ARGV)\n{body}\nend\n{path.read_text()}"
    return _nested([*(Path(__file__).with_name(each) for each in PARTS.get(path.name, SHARED)), path])


def _nested(parts: list[Path]) -> str:
    """Each part in a function inside the one before it.

    Every call of a script makes its functions anew, and Lua finds a local of the same function by walking
    through all that were captured so far: side by side, this took a fifth of the time of a short call.
    """
    return "\nreturn (function()\n".join(part.read_text() for part in parts) + "\nend)()" * (len(parts) - 1)


def script(client: AsyncRedis, path: Path) -> AsyncScript:
    """A callable script on `client`; it loads itself again after SCRIPT FLUSH or a restart."""
    return client.register_script(source(path))


def sync_script(client: Redis, path: Path) -> Script:
    """The same for a blocking client (the renewal thread)."""
    return client.register_script(source(path))
