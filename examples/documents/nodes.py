"""Analyze, summarize, store: three steps, of which a short document skips the second."""

import logging
import os

import httpx
from pocketflow import AsyncNode

SHORT_WORDS = 25

client: httpx.AsyncClient | None = None


def open_client():
    global client
    logging.getLogger("httpx").setLevel(logging.WARNING)
    client = httpx.AsyncClient(base_url=os.environ["SERVICES_URL"], timeout=30)


async def ask(step, doc_id, body):
    """The service's answer. A 429 leaves the node as httpx's own error, which PocketFleet recognises."""
    answer = await client.post(f"/documents/{step}/{doc_id}", json=body)
    return answer.raise_for_status().json()


class Analyze(AsyncNode):
    async def exec_async(self, prep_res):
        return await ask("analyze", self.params["doc_id"], {"content": self.params["content"]})

    async def post_async(self, shared, prep_res, exec_res):
        # A key per document: no two runs ever write the same entry.
        shared.setdefault("analyses", {})[self.params["doc_id"]] = exec_res
        return "store" if exec_res["words"] < SHORT_WORDS else "summarize"


class Summarize(AsyncNode):
    async def prep_async(self, shared):
        return shared["analyses"][self.params["doc_id"]]["keywords"]

    async def exec_async(self, keywords):
        body = {"content": self.params["content"], "keywords": keywords}
        return (await ask("summarize", self.params["doc_id"], body))["summary"]

    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("summaries", {})[self.params["doc_id"]] = exec_res
        return "store"


class Store(AsyncNode):
    """Keeps the result under the document's id, so that storing it twice (after a crash) is harmless."""

    async def prep_async(self, shared):
        doc_id = self.params["doc_id"]
        summary = shared.get("summaries", {}).get(doc_id, self.params["content"])
        return {"summary": summary, "keywords": shared["analyses"][doc_id]["keywords"]}

    async def exec_async(self, record):
        return await ask("store", self.params["doc_id"], record)

    async def post_async(self, shared, prep_res, exec_res):
        return "stored"
