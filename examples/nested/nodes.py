"""Five calls for each user, in parallel, under one limit for all users; then one report."""

import logging
import os

import httpx
from pocketflow import AsyncNode, AsyncParallelBatchNode

from pocketfleet import limit

PARTS = ("profile", "orders", "invoices", "tickets", "visits")

client: httpx.AsyncClient | None = None


def open_client():
    global client
    logging.getLogger("httpx").setLevel(logging.WARNING)
    client = httpx.AsyncClient(base_url=os.environ["SERVICES_URL"], timeout=30)


async def ask(step, user_id, body):
    answer = await client.post(f"/nested/{step}/{user_id}", json=body)
    return answer.raise_for_status().json()


class FetchParts(AsyncParallelBatchNode):
    async def prep_async(self, shared):
        return PARTS

    async def exec_async(self, part):
        # Everyone who names this limit shares it: every user, every process, every host.
        async with limit("crm", max_concurrent=6):
            return (await ask("part", self.params["user_id"], {"part": part}))["value"]

    async def post_async(self, shared, parts, values):
        shared.setdefault("parts", {})[self.params["user_id"]] = dict(zip(parts, values, strict=True))
        return "report"


class Report(AsyncNode):
    async def prep_async(self, shared):
        return shared["parts"][self.params["user_id"]]

    async def exec_async(self, parts):
        async with limit("reports", max_concurrent=2):
            return await ask("report", self.params["user_id"], {"total": sum(parts.values())})

    async def post_async(self, shared, prep_res, exec_res):
        return "reported"
