"""Requests to three regions in one batch: seven at a time, and each region within its own limit."""

from itertools import zip_longest

import nodes

from pocketfleet import ThrottledAsyncParallelBatchFlow


class MultiRegionFlow(ThrottledAsyncParallelBatchFlow):
    name = "regions"
    max_concurrent_flows = sum(nodes.AT_ONCE.values())

    async def on_worker_start(self):
        nodes.open_clients()

    async def on_worker_stop(self):
        await nodes.close_clients()

    async def prep_async(self, shared):
        """The regions take turns: a run that waits for its region holds a place that another could use."""
        lines = [
            [{"region": region, "request_id": request_id} for request_id in requests]
            for region, requests in shared["requests"].items()
        ]
        return [params for turn in zip_longest(*lines) for params in turn if params]

    async def post_async(self, shared, prep_res, results):
        return {region: results.count(region) for region in nodes.AT_ONCE}


flow = MultiRegionFlow(start=nodes.AskRegion())
