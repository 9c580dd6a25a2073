"""Who holds slots of a limit just now."""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from limiter.keys import GateKeys
from limiter.printable import printable
from limiter.view import read_state


@dataclass(frozen=True)
class Holder:
    """One process that the gate knows.

    Attributes:
        held: slots it holds, permits and runs.
        since_s: for how long what it holds has not changed, seconds.
        lease_left_s: until its lease ends; below 0 it is gone and the next caller reaps it.
        waits: it stands in line for the gate.
    """

    process: str
    host: str
    pid: int
    held: int
    since_s: float
    lease_left_s: float
    waits: bool


async def read_holders(client: Redis, limit: str) -> list[Holder]:
    """Every process of the gate, those that hold most first."""
    async with client.pipeline(transaction=False) as pipe:
        pipe.hgetall(GateKeys(limit).gate)
        pipe.time()
        values, (seconds, micros) = await pipe.execute()
    now = max(seconds * 10**6 + micros, int(read_state(values.get(b"state"))["last"]))
    found = [
        _holder(printable(name[2:].decode(errors="replace")), value.decode(errors="replace").split(" "), now)
        for name, value in values.items()
        if name.startswith(b"p:")
    ]
    return sorted((each for each in found if each), key=lambda each: (-each.held, each.process))


def _holder(process: str, words: list[str], now: int) -> Holder | None:
    """`words` as `write_record` in `gate.lua` writes them."""
    try:
        _, held, _, _, kind, _, _, ends, _, since = words[:10]
        host, pid, _ = process.rsplit(":", 2) if process.count(":") >= 2 else (process, "0", "")
        return Holder(
            process=process,
            host=host,
            pid=int(pid) if pid.isdigit() else 0,
            held=int(held),
            since_s=max(0.0, (now - int(since)) / 1e6),
            lease_left_s=(int(ends) - now) / 1e6,
            waits=kind != "-",
        )
    except ValueError:
        return None
