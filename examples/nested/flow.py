"""Four users at a time, five calls for each, and still six calls at a time in the whole fleet."""

import nodes

from pocketfleet import ThrottledAsyncParallelBatchFlow

parts, report = nodes.FetchParts(), nodes.Report()
parts - "report" >> report


class UserReports(ThrottledAsyncParallelBatchFlow):
    name = "nested"
    max_concurrent_flows = 4

    async def on_worker_start(self):
        nodes.open_client()

    async def on_worker_stop(self):
        await nodes.client.aclose()

    async def prep_async(self, shared):
        return [{"user_id": user_id} for user_id in shared["user_ids"]]

    async def post_async(self, shared, prep_res, results):
        return f"{results.count('reported')} of {len(results)} users reported"


flow = UserReports(start=parts)
