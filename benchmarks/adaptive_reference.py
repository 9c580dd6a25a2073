"""The reference's own adaptive class against the same API: one process, its own settings.

`python -m benchmarks.adaptive_reference COUNT` prints one line of JSON. The environment variable
BENCH_REFERENCE names the folder that holds the `pocketflow_throttled` package; nothing of it is ours.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from time import perf_counter
from typing import Any

import httpx
from pocketflow import AsyncNode

from benchmarks.adaptive_flows import API, CEILING, INITIAL

FOLDER = "BENCH_REFERENCE"


async def run(count: int) -> dict[str, Any]:
    sys.path.insert(0, os.environ[FOLDER])
    reference: Any = importlib.import_module("pocketflow_throttled")
    client = httpx.AsyncClient(base_url=os.environ[API], timeout=60.0)

    class Ask(AsyncNode):  # type: ignore[type-arg]
        async def exec_async(self, prep_res: Any) -> None:
            number: Any = self.params["i"]
            response = await client.get(f"/users/{number}/orders")
            if response.status_code == 429:
                raise reference.RateLimitHit("refused")
            response.raise_for_status()

    class Flow(reference.AdaptiveThrottledBatchFlow):  # type: ignore[misc, name-defined]
        initial_concurrent_flows, max_concurrent_flows = INITIAL, CEILING

        async def prep_async(self, shared: Any) -> list[dict[str, int]]:
            return [{"i": number} for number in range(count)]

    flow = Flow(start=Ask())
    (await client.post("/begin")).raise_for_status()
    began = perf_counter()
    await flow.run_async({})
    seconds = perf_counter() - began
    await client.aclose()
    stats = flow.stats
    return {"seconds": seconds, "completed": stats["completed_flows"], "failed": stats["failed_flows"]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(int(sys.argv[1])))))
