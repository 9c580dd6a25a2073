"""The user pipeline: for every user fetch the profile, then the orders, five users at a time."""

from __future__ import annotations

from typing import Any

from examples.users.nodes import FetchOrders, FetchProfile, close_client, open_client
from pocketfleet import ThrottledAsyncParallelBatchFlow

profile, orders = FetchProfile(), FetchOrders()
profile - "fetch_orders" >> orders


class UserFlow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 5

    async def on_worker_start(self) -> None:
        open_client()

    async def on_worker_stop(self) -> None:
        await close_client()

    async def prep_async(self, shared: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"user_id": user_id} for user_id in shared["user_ids"]]

    async def post_async(self, shared: dict[str, Any], prep_res: Any, results: list[Any]) -> int:
        """How many users were fetched completely; a failed run stands in `results` as its exception."""
        return sum(not isinstance(result, BaseException) for result in results)


flow = UserFlow(start=profile)
ten = UserFlow(start=profile, max_concurrent_flows=10)
