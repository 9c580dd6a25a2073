"""The two steps of the pipeline: each asks the API for one thing and keeps it under the user's id."""

from __future__ import annotations

import logging
import os
from typing import Any

import httpx
from pocketflow import AsyncNode

_client: httpx.AsyncClient | None = None


def open_client() -> None:
    """One client per process, with connections that are kept; a second call does nothing."""
    global _client
    if _client is None:
        url = os.environ.get("USERS_API_URL")
        if not url:
            raise RuntimeError("USERS_API_URL is not set: give it the URL that examples.api.server prints")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        _client = httpx.AsyncClient(base_url=url, timeout=30.0, limits=httpx.Limits(max_connections=100))


async def close_client() -> None:
    """Close what `open_client` opened, if anything is open."""
    global _client
    client, _client = _client, None
    if client is not None:
        await client.aclose()


async def get(path: str) -> Any:
    """The JSON at `path`. Raises httpx.HTTPStatusError on 4xx and 5xx, 429 included."""
    if _client is None:
        raise RuntimeError("no client is open: call open_client() first, as on_worker_start does")
    answer = await _client.get(path)
    answer.raise_for_status()
    return answer.json()


class FetchProfile(AsyncNode):  # type: ignore[type-arg]  # generic in its stubs only
    async def exec_async(self, prep_res: Any) -> Any:
        return await get(f"/users/{self.params['user_id']}/profile")

    async def post_async(self, shared: dict[str, Any], prep_res: Any, exec_res: Any) -> str:
        shared.setdefault("profiles", {})[self.params["user_id"]] = exec_res
        return "fetch_orders"


class FetchOrders(AsyncNode):  # type: ignore[type-arg]  # generic in its stubs only
    async def exec_async(self, prep_res: Any) -> Any:
        return await get(f"/users/{self.params['user_id']}/orders")

    async def post_async(self, shared: dict[str, Any], prep_res: Any, exec_res: Any) -> str:
        shared.setdefault("orders", {})[self.params["user_id"]] = exec_res
        return "default"
