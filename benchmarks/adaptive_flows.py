"""The flows of the adaptive benchmark, and their producer.

`python -m benchmarks.adaptive_flows FLOW COUNT` starts the API's clock, runs COUNT items on the fleet and
prints how long that took and how the items ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from time import perf_counter
from typing import Any

import httpx
from pocketflow import AsyncNode

from pocketfleet import AdaptiveThrottledBatchFlow, FlowPresets

API = "BENCH_API"
"""Where the API is."""

INITIAL, CEILING = 20, 64

clients: list[httpx.AsyncClient] = []


class Ask(AsyncNode):  # type: ignore[type-arg]
    """One call to the API; it raises httpx's own error when refused."""

    async def exec_async(self, prep_res: Any) -> None:
        number: Any = self.params["i"]
        (await clients[0].get(f"/users/{number}/orders")).raise_for_status()


class Asking(AdaptiveThrottledBatchFlow):
    """Opens its client in each worker."""

    initial_concurrent_flows = INITIAL
    max_concurrent_flows = CEILING

    async def on_worker_start(self) -> None:
        clients.append(httpx.AsyncClient(base_url=os.environ[API], timeout=60.0))

    async def on_worker_stop(self) -> None:
        await clients.pop().aclose()


def _calls(count: int) -> Ask:
    first = last = Ask()
    for _ in range(count - 1):
        last = last >> Ask()
    return first


ADDITIVE = {"recovery": "additive", "backoff_factor": 0.7}

threshold = Asking(start=_calls(1), name="threshold")
additive = Asking(start=_calls(1), name="additive", **ADDITIVE)
gentle = Asking(start=_calls(1), name="gentle", **FlowPresets.ADAPTIVE_GENTLE)
long_threshold = Asking(start=_calls(10), name="long_threshold")
long_additive = Asking(start=_calls(10), name="long_additive", **ADDITIVE)


async def produce(flow: str, count: int) -> dict[str, Any]:
    from benchmarks.put import items
    from producer.fleet_run import FleetRun
    from worker.registry import find_flow

    target = f"benchmarks.adaptive_flows:{flow}"
    found: Any = find_flow(target)
    run = FleetRun(found, {}, params=items(count, {}), target=target, live=False)
    async with httpx.AsyncClient() as client:
        (await client.post(f"{os.environ[API]}/begin")).raise_for_status()
    began = perf_counter()
    await run.go()
    return {"seconds": perf_counter() - began, "completed": run.completed, "failed": run.failed}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(produce(sys.argv[1], int(sys.argv[2])))))
