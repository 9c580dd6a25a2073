"""`run_async`: the flows in the calling process, under the fleet-wide limit."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from pocketflow import AsyncFlow

from limiter.held import hold, let_go
from limiter.permit import Permit, acquire
from limiter.pump import Pump
from limiter.refusal import RateLimitHit, recognised
from worker.guard import guard
from worker.refused import Refused
from worker.walk import NodeStep, walk

if TYPE_CHECKING:
    from producer.flows import ThrottledAsyncParallelBatchFlow

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0


class LocalRun:
    """Runs one batch of `flow`; all runs share the caller's store, as in the reference.

    Attributes:
        completed, failed, refused: runs by how they ended; a refused one that ends counts as failed too.
        successes: runs completed since the last refusal.
    """

    def __init__(self, flow: ThrottledAsyncParallelBatchFlow, pump: Pump, shared: Any) -> None:
        self.completed = self.failed = self.refused = self.successes = 0
        self._flow = flow
        self._pump = pump
        self._shared = shared
        self._recognise = partial(recognised, overloaded=flow.overloaded, hook=flow.is_refusal)

    async def go(self, prepared: list[dict[str, Any]]) -> list[Any]:
        """Results in input order: a run's last action, or its exception."""
        return list(await asyncio.gather(*(self._run(params) for params in prepared), return_exceptions=True))

    async def _run(self, params: dict[str, Any]) -> Any:
        tries = 0
        while True:
            try:
                return await self._admitted(params)
            except RateLimitHit as hit:
                self.refused += 1
                self.successes = 0
                if not self._flow.retry_refused:
                    self.failed += 1
                    raise
                await asyncio.sleep(
                    hit.retry_after or min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(tries, 10))
                )
                tries += 1
            except BaseException:  # a CancelledError of the node's own is a result too
                self.failed += 1
                raise

    async def _admitted(self, params: dict[str, Any]) -> Any:
        async with self._pump.process.circles.watched((self._pump.name,)):
            permit = await acquire(self._pump)
        holding = hold((self._pump.name,), self)
        try:
            action = await self._walked(permit, params)
        except (Refused, Exception) as error:
            hit = error.hit if isinstance(error, Refused) else self._recognise(error)
            if hit is None:
                raise
            if not hit.fed:  # else a gate inside the run has learnt of it
                self._pump.refuse(permit.attempt, hit.retry_after or 0.0)
            raise hit from None
        finally:
            let_go(holding)
            permit.release()
        self.completed += 1
        self.successes += 1
        self._pump.succeed(permit.attempt)
        return action

    async def _walked(self, permit: Permit, params: dict[str, Any]) -> Any:
        """The graph, node by node with each guarded, unless the flow has an `_orch_async` of its own."""
        flow = self._flow
        if type(flow)._orch_async is not AsyncFlow._orch_async:
            return await flow._orch_async(self._shared, {**flow.params, **params})
        begun = False

        async def before_node(step: NodeStep) -> None:
            nonlocal begun
            if begun:
                self._pump.succeed(permit.attempt)
            begun = True
            if step.part == "node":
                guard(step.node, recognise=self._recognise)

        return await walk(flow, params, self._shared, before_node=before_node, sync_runner=None, timings=[])
