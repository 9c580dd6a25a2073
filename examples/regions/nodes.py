"""One request to one region, under a limit of that region's own."""

import logging
import os

import httpx
from pocketflow import AsyncNode

from pocketfleet import limit

AT_ONCE = {"us": 4, "eu": 2, "asia": 1}
"""Requests each region takes at a time, from all hosts together."""

clients: dict[str, httpx.AsyncClient] = {}


def open_clients():
    """One client per region and process; REGIONS_URL holds {region} where its name goes."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for region in AT_ONCE:
        url = os.environ["REGIONS_URL"].format(region=region)
        clients[region] = httpx.AsyncClient(base_url=url, timeout=30)


async def close_clients():
    for client in clients.values():
        await client.aclose()


class AskRegion(AsyncNode):
    async def exec_async(self, prep_res):
        region, request_id = self.params["region"], self.params["request_id"]
        async with limit(f"region-{region}", max_concurrent=AT_ONCE[region]):
            answer = await clients[region].post(f"/{request_id}", json={})
            return answer.raise_for_status().json()["answer"]

    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("answers", {})[self.params["request_id"]] = exec_res
        return self.params["region"]
