"""Every document is analyzed, summarized if it is long, and stored; ten documents at a time."""

import nodes

from pocketfleet import ThrottledAsyncParallelBatchFlow

analyze, summarize, store = nodes.Analyze(), nodes.Summarize(), nodes.Store()
analyze - "summarize" >> summarize
analyze - "store" >> store
summarize - "store" >> store


class DocumentFlow(ThrottledAsyncParallelBatchFlow):
    name = "documents"
    max_concurrent_flows = 10

    async def on_worker_start(self):
        nodes.open_client()

    async def on_worker_stop(self):
        await nodes.client.aclose()

    async def prep_async(self, shared):
        """Used from Python; on the command line `--params documents.jsonl` brings the documents."""
        return [{"doc_id": doc["doc_id"], "content": doc["content"]} for doc in shared["documents"]]

    async def post_async(self, shared, prep_res, results):
        return f"{results.count('stored')} of {len(results)} documents stored"


flow = DocumentFlow(start=analyze)
