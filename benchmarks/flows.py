"""The flows our workers serve in the benchmarks, each with a name and a limit of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from pocketflow import AsyncNode

from benchmarks.line import stand_ready
from benchmarks.open_loop import note_start
from pocketfleet import ThrottledAsyncParallelBatchFlow


class Nothing(AsyncNode):  # type: ignore[type-arg]
    async def exec_async(self, prep_res: Any) -> None:
        return None


class Sleep(AsyncNode):  # type: ignore[type-arg]
    """Takes the time of a call to an API: half a second, or what the params say."""

    async def exec_async(self, prep_res: Any) -> None:
        seconds: Any = self.params.get("seconds", 0.5)
        await asyncio.sleep(seconds)


class Note(AsyncNode):  # type: ignore[type-arg]
    """Notes when it started."""

    async def exec_async(self, prep_res: Any) -> None:
        number: Any = self.params["i"]
        note_start(number)


class Lined(ThrottledAsyncParallelBatchFlow):
    """Its workers stand at the starting line first, if there is one."""

    async def on_worker_start(self) -> None:
        await stand_ready()


def _two_nothings() -> Nothing:
    first = Nothing()
    first >> Nothing()
    return first


def _two_sleeps() -> Sleep:
    first = Sleep()
    first >> Sleep()
    return first


OUT_OF_THE_WAY = {"max_concurrent_flows": 100_000, "max_flows_per_minute": 1_000_000}

noop = Lined(start=Nothing(), name="noop", **OUT_OF_THE_WAY)
saved = Lined(start=_two_nothings(), name="saved", **OUT_OF_THE_WAY)
unsaved = Lined(start=_two_nothings(), name="unsaved", checkpoint=False, **OUT_OF_THE_WAY)
level5 = Lined(start=Nothing(), name="level5", max_concurrent_flows=5, max_flows_per_minute=1_000_000)
seed5 = Lined(start=_two_sleeps(), name="seed5", max_concurrent_flows=5)
seed10 = Lined(start=_two_sleeps(), name="seed10", max_concurrent_flows=10)
dispatch = Lined(start=Note(), name="dispatch", **OUT_OF_THE_WAY)
one_place = Lined(start=Sleep(), name="one_place", max_concurrent_flows=1)
five_a_minute = Lined(start=Nothing(), name="five_a_minute", max_concurrent_flows=5, max_flows_per_minute=5)
