"""The settings class that arq's own command starts: `arq worker.main.WorkerSettings`.

arq's `Worker` is only the host: command line, signals, shutdown. Its own loop looks at a control queue
on which no job ever stands, so it can run nothing past the limit; `on_startup` runs our loop instead.
`pocketfleet worker` takes the same path.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from functools import partial
from typing import Any, NoReturn

import click
from redis.exceptions import RedisError

from limiter.check import checked_connection
from limiter.client import open_retrying_client
from limiter.connect import Place, find_redis
from limiter.errors import LimiterError, RedisRefused
from limiter.keys import ROOT, wake_channel
from limiter.loops import adopt
from limiter.process import Process, open_process
from limiter.settings import load
from worker import output
from worker.client import arq_settings
from worker.errors import TargetError, WorkerError
from worker.fleet_worker import FleetWorker, see_through
from worker.forked import let_go_in_forks
from worker.hangup import on_hangup
from worker.lifeline import watch_lifeline
from worker.presence import health_key
from worker.registry import ServedFlow, check_shadows, said, serve
from worker.settings import WorkerSettings as Settings

CONTROL_QUEUE = ROOT + "control"


def settings_class() -> type:
    """What arq reads: built when it is asked for, since arq sees only a class's own attributes.

    Ends the process with one sentence if the settings do not hold or Redis refuses us.
    """
    settings, place = settings_and_place()
    try:
        asyncio.run(_probe(place))
    except RedisRefused as error:
        end(error)

    async def take_over(ctx: dict[Any, Any]) -> None:
        await _take_over(ctx, settings, place)

    return type(
        "WorkerSettings",
        (),
        {
            "functions": [refuse_ungated],
            "queue_name": CONTROL_QUEUE,
            "health_check_key": health_key(),
            "redis_settings": arq_settings(place.url),
            "on_startup": take_over,
            "on_shutdown": wait_drained,
        },
    )


def settings_and_place() -> tuple[Settings, Place]:
    """The settings and the Redis they lead to, or the end of the process with one sentence."""
    try:
        check_shadows("worker.main")
        settings = load(Settings)
        return settings, find_redis(settings, start=False)
    except (LimiterError, WorkerError) as error:
        end(error)


def __getattr__(name: str) -> Any:
    if name == "WorkerSettings":
        return settings_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


async def _probe(place: Place) -> None:
    """Ask what a worker and its host will ask: they would go on trying, or end in a traceback."""
    client = open_retrying_client(place.url, retries=1)
    try:
        await checked_connection(client, place.shown)
        await client.info("clients")
        async with client.pubsub() as calls:
            await calls.subscribe(wake_channel("probe"))
            await calls.get_message(timeout=5.0)
    except RedisError as error:
        raise RedisRefused(
            f"Redis at {place.shown} does not let this user work ({error!s:.160}): "
            "give it the rights that the README lists"
        ) from None
    finally:
        await client.aclose()


async def refuse_ungated(ctx: dict[Any, Any]) -> None:
    """The one function arq knows; nothing ever calls it."""
    raise RuntimeError("PocketFleet's runs are admitted by its own loop, never by arq's")


async def wait_drained(ctx: dict[Any, Any]) -> None:
    """`--watch` closes the worker without waiting for its main task: wait for the drain here."""
    worker = ctx.get("worker")
    if worker is not None:
        await worker.stopped.wait()


async def _take_over(ctx: dict[Any, Any], settings: Settings, place: Place) -> None:
    """Run our loop until a signal, the lifeline or, in burst, the end of the work."""
    output.prefix_streams()
    try:
        served = serve(targets(settings), settings.lease_s)
        process = await open_checked(settings, place)
    except (LimiterError, WorkerError) as error:
        end(error)
    adopt(process)
    output.prefix_items(settings.log_level)
    let_go_in_forks()
    worker = FleetWorker(
        process,
        served,
        max_jobs=settings.max_jobs,
        drain_s=settings.drain_s,
        burst=settings.burst or _asked_for_burst(),
    )
    watch_lifeline(worker)
    on_hangup(partial(signal.raise_signal, signal.SIGTERM))
    print(greeting(served, place), flush=True)
    _collect_less()
    ctx["worker"] = worker  # from here on `wait_drained` has an end to wait for
    try:
        await worker.run()
    except Exception as error:
        if worker.starting is None:
            raise
        end(TargetError(worker.starting.target, f"on_worker_start failed: {said(error)}"))
    finally:
        # the place is left at exit only: arq has still to say its own farewell, or (--watch) goes on
        await see_through(process.close())
    if not ctx.get("burst"):
        raise asyncio.CancelledError  # ends arq's main task as a signal would


def _collect_less() -> None:
    """Keep what was imported out of every garbage collection, and collect less often: runs come and go by
    the thousand. Only in a process that is ours."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def greeting(served: list[ServedFlow], place: Place) -> str:
    names = "; ".join(
        f"flow {each.name} under limit {each.limits.name} (max_concurrent={each.limits.max_concurrent}, "
        f"per minute={each.limits.max_per_window or 'no limit'})"
        for each in served
    )
    return f"worker serves {names} at {place.shown}"


def targets(settings: Settings) -> list[str]:
    found = [
        target.strip() for target in (settings.flows or "").replace(" ", ",").split(",") if target.strip()
    ]
    if not found:
        raise TargetError(
            "worker", "no flow is named; write pocketfleet worker users:flow, or set POCKETFLEET_FLOWS"
        )
    return found


async def open_checked(settings: Settings, place: Place) -> Process:
    """A process at a Redis that answered."""
    process = await open_process(place.url, lease_s=settings.lease_s, stall_limit_s=settings.stall_limit_s)
    try:
        warning = await checked_connection(process.client, place.shown)
    except (RedisRefused, RedisError, OSError):
        await process.close()
        raise
    if warning:
        print(warning, file=sys.stderr)
    return process


def _asked_for_burst() -> bool:
    """Whether arq's command was called with --burst: the context arq hands over does not say."""
    context = click.get_current_context(silent=True)
    return bool(context and context.params.get("burst"))


def end(error: Exception) -> NoReturn:
    """End the process with a sentence: 3 where Redis refused us, else 2."""
    print(error, file=sys.stderr)
    raise SystemExit(3 if isinstance(error, RedisRefused) else 2)
