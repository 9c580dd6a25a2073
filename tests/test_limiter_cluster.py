"""On a server with cluster mode, all slots on one node: one name is one slot, several may lie in several."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest
import redis
from redis.crc import key_slot

from limiter.current import current_process
from limiter.errors import LimitsError
from limiter.limit import limit
from tests import servers
from tests.faults import free_port


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    port = free_port()
    options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    with servers.running("valkey", *options, "--port", str(port), "--bind", "127.0.0.1"):
        client = redis.Redis(port=port, decode_responses=True)
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        servers.until_cluster_is_up(client)
        monkeypatch.setenv("POCKETFLEET_REDIS_URL", f"redis://127.0.0.1:{port}")
        yield client
        client.close()


def in_slot_of(name: str) -> str:
    """Another name in the same slot."""
    slot = key_slot(name.encode())
    return next(other for n in count() if key_slot((other := f"n{n}").encode()) == slot)


def test_names_in_different_slots_are_refused_together_and_serve_one_inside_the_other(
    cluster: redis.Redis,
) -> None:
    async def main() -> None:
        a, b = limit("a", max_concurrent=1), limit("b", max_concurrent=1)
        with pytest.raises(
            LimitsError, match=r"limit\('a', 'b'\) cannot be taken together .* different slots"
        ):
            async with limit(a, b, timeout_s=10):
                raise AssertionError("it was admitted")
        async with asyncio.timeout(10):
            async with a, b:
                pumps = (await current_process()).pumps
                assert (pumps["a"].held, pumps["b"].held) == (1, 1)

    asyncio.run(main())


def test_names_that_lie_in_one_slot_are_taken_together(cluster: redis.Redis) -> None:
    async def main() -> None:
        other = in_slot_of("a")
        async with asyncio.timeout(10):
            async with limit(limit("a", max_concurrent=1), limit(other, max_concurrent=1)):
                pumps = (await current_process()).pumps
                assert (pumps["a"].held, pumps[other].held) == (1, 1)

    asyncio.run(main())
