"""An outcome on its way to the gate: small ones ride on the call, large ones are stored beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from arq.jobs import serialize_result
from redis.exceptions import RedisError

from limiter.keys import GateKeys
from limiter.sync import Entry
from limiter.trouble import Trouble
from worker import codec
from worker.codec import CannotTravel, travels
from worker.contract import Job, Outcome, encode_outcome, queue_key
from worker.difference import spelled
from worker.registry import ServedFlow

if TYPE_CHECKING:
    from worker.run import Run

LARGE = 64 * 1024
"""An outcome or checkpoint above that many bytes is stored beside the call and only named in it."""
MOST_BYTES = 500 * 1024 * 1024
"""A larger outcome is cut: Redis takes no value above 512 MiB, however often it is asked."""
BLOB_MS = 7 * 24 * 3600 * 1000


async def record(run: Run, outcome: Outcome, served: ServedFlow, job: Job) -> None:
    """Hand an outcome to the pump, which records it once if the attempt is still ours."""
    result = _arq_result(run, outcome, served, job) if served.flow.keep_result_s > 0 else None
    data = fitted(outcome)
    if len(data) <= LARGE:
        settle(run, outcome.status, data, result)
        return
    await store_beside(run, GateKeys(run.pump.name).blob(run.batch, run.index, run.claimed.attempt), data)
    settle(run, "blob:" + outcome.status, b"", result)


def fitted(outcome: Outcome, most: int = MOST_BYTES) -> bytes:
    """The outcome encoded. Of one that is too large the largest entries are left behind, and named."""
    data = encode_outcome(outcome)
    if len(data) <= most:
        return data
    kept = {section: dict(entries) for section, entries in outcome.difference.items()}
    sizes = [
        (len(codec.encode(value)), section, key) for section in kept for key, value in kept[section].items()
    ]
    too_much = len(data) - most
    for size, section, key in sorted(sizes, key=itemgetter(0), reverse=True):
        if too_much <= 0:
            break
        del kept[section][key]
        too_much -= size
        outcome.left_behind.append(spelled((key,)))
    outcome.difference = {section: entries for section, entries in kept.items() if entries}
    return encode_outcome(outcome)


async def save_entry(run: Run, data: bytes) -> Entry:
    """The entry that keeps a checkpoint, which is stored first if it is too large for a call."""
    if len(data) <= LARGE:
        return Entry(run.claimed.id, run.claimed.attempt, run.flow_number, "save", data)
    key = GateKeys(run.pump.name).kept(run.batch, run.index) + f":{run.claimed.attempt}"
    await store_beside(run, key, data)
    return Entry(run.claimed.id, run.claimed.attempt, run.flow_number, "save-beside", key)


def settle(run: Run, what: str, arg: bytes | int = b"", first: Entry | None = None) -> None:
    """The run is over for this process; `first` is an entry the gate must hear before."""
    entry = Entry(run.claimed.id, run.claimed.attempt, run.flow_number, what, arg)
    if first is None:
        run.pump.settle(entry)
    else:
        run.pump.settle(entry, first)


async def store_beside(run: Run, key: str, data: bytes) -> None:
    """Write `data` under `key` for a week, however long Redis takes. A run that is handed back meanwhile says
    what it has done before it leaves; one that is stopped leaves nothing there, since no call will name it."""
    client = run.crew.client
    storing = asyncio.ensure_future(_until_answered(key, lambda: client.set(key, data, px=BLOB_MS)))
    try:
        await asyncio.shield(storing)
    except asyncio.CancelledError:
        await storing  # what is on its way would arrive after it was taken away
        if run.ending != "hand":
            await take_away(run, key)
            raise


async def take_away(run: Run, key: str) -> None:
    """Have nothing stand under `key`, however long Redis takes."""
    await _until_answered(key, lambda: run.crew.client.unlink(key))


async def fetch(run: Run, key: str) -> bytes:
    """What stands under `key`, b'' if nothing does."""
    return await _until_answered(key, lambda: run.crew.client.get(key)) or b""


async def _until_answered(key: str, ask: Callable[[], Awaitable[Any]]) -> Any:
    pause_s, trouble = 0.05, Trouble(key)
    while True:
        try:
            answer = await ask()
            trouble.over()
            return answer
        except (RedisError, OSError) as error:
            trouble.met(error)
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 2)


def _arq_result(run: Run, outcome: Outcome, served: ServedFlow, job: Job) -> Entry | None:
    """arq's own result record, for `Job.result()`: the last action, or the failure as text."""
    failure = outcome.failure
    data = serialize_result(
        function=served.name,
        args=(job.params,),
        kwargs={},
        job_try=1,
        enqueue_time_ms=job.enqueue_ms,
        success=failure is None,
        result=outcome.action if failure is None else f"{failure.type}: {failure.message}",
        start_ms=round(outcome.started * 1000),
        finished_ms=round(outcome.ended * 1000),
        ref=run.claimed.id,
        queue_name=queue_key(run.pump.name, served.name),
        job_id=run.claimed.id,
        serializer=codec.encode,
    )
    how = f"result:{round(served.flow.keep_result_s * 1000)}"
    return Entry(run.claimed.id, run.claimed.attempt, 1, how, data) if data else None


def travelling(action: Any) -> Any:
    """The last action if it can travel: actions are mostly text or None."""
    if action is None or type(action) is str:
        return action
    try:
        travels(action)
    except CannotTravel:
        return None
    return action
