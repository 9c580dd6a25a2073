"""The flow's own part of a batch, and which of it raised: `prep_async` before it, `post_async` after it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from limiter.errors import LimiterError
from producer.batch import as_async
from producer.errors import ProducerError
from worker.errors import WorkerError

if TYPE_CHECKING:
    from producer.flows import ThrottledAsyncParallelBatchFlow


class UsersPart:
    """Calls the flow's own methods; `raised` names the one that raised, else ''."""

    def __init__(self, flow: ThrottledAsyncParallelBatchFlow, shared: Any) -> None:
        self.raised = ""
        self._flow = flow
        self._shared = shared

    async def prep(self) -> tuple[Any, AsyncIterator[Any]]:
        """What `prep_async` returned if it is a list, and the items."""
        with self._watched("prep_async"):
            prepared: Any = self._flow.prep_async(self._shared)
            if hasattr(prepared, "__await__"):
                prepared = await prepared
        return (prepared if isinstance(prepared, list) else None), self._items(prepared)

    async def _items(self, prepared: Any) -> AsyncIterator[Any]:
        with self._watched("prep_async"):
            async for each in as_async(prepared, "prep_async"):
                yield each

    async def post(self, prepared: Any, results: list[Any]) -> Any:
        """What `post_async` returns."""
        with self._watched("post_async"):
            return await self._flow.post_async(self._shared, prepared, results)

    @contextlib.contextmanager
    def _watched(self, part: str) -> Iterator[None]:
        """Remember that it was the flow's own code that raised; what it raised goes on unchanged."""
        try:
            yield
        except (LimiterError, ProducerError, WorkerError, RedisError):
            raise
        except Exception:
            self.raised = part
            raise
