"""Tasks that user code starts in a run: as asyncio's own, but that SystemExit and KeyboardInterrupt end no loop."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from worker.contained import contained_tasks
from worker.output import item
from worker.run import LeftTask


def in_a_run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        with contained_tasks():
            item.set("b:1")
            return await work()

    return asyncio.run(main())


def test_a_task_that_is_cancelled_before_its_first_step_warns_of_nothing() -> None:
    async def work() -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(60), 0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_a_run(work)
    assert [str(each.message) for each in caught] == []


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("after_s", [None, 0.0])
def test_what_would_end_the_loop_leaves_a_task_as_left_task(
    error: BaseException, after_s: float | None
) -> None:
    async def leave() -> None:
        try:
            if after_s is not None:
                await asyncio.sleep(after_s)
        finally:
            raise error

    async def work() -> None:
        with pytest.raises(LeftTask) as left:
            await asyncio.create_task(leave())
        assert left.value.__cause__ is error
        with pytest.raises(LeftTask):  # raised by how it ends when it is cancelled
            task = asyncio.create_task(leave())
            await asyncio.sleep(0)
            task.cancel()
            await task

    in_a_run(work)


def test_a_task_returns_raises_and_is_shown_as_ever() -> None:
    async def nine() -> int:
        await asyncio.sleep(0)
        return 9

    async def bad() -> None:
        raise ValueError("bad")

    async def work() -> None:
        task = asyncio.create_task(nine())
        assert "nine()" in repr(task)
        assert await task == 9
        assert await asyncio.gather(nine(), nine()) == [9, 9]
        with pytest.raises(ValueError, match="bad"):
            await asyncio.create_task(bad())
        with pytest.raises(TypeError, match="coroutine was expected"):
            await asyncio.create_task(9)  # type: ignore[arg-type]

    in_a_run(work)
