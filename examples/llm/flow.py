"""Reviews through a language model, as many at a time as the provider allows."""

from collections import Counter

import nodes

from pocketfleet import AdaptiveThrottledBatchFlow


class ReviewFlow(AdaptiveThrottledBatchFlow):
    name = "reviews"
    initial_concurrent_flows = 8
    min_concurrent_flows = 2
    max_concurrent_flows = 20

    async def on_worker_start(self):
        nodes.open_client()

    async def on_worker_stop(self):
        await nodes.client.close()

    async def prep_async(self, shared):
        """Used from Python; on the command line `--params reviews.csv` brings the reviews."""
        return shared["reviews"]

    async def post_async(self, shared, prep_res, results):
        feelings = Counter(word for word in results if isinstance(word, str))
        return {"feelings": dict(feelings), "tokens": sum(shared.get("tokens", {}).values())}


flow = ReviewFlow(start=nodes.Classify())
