"""`pocketfleet worker` and `pocketfleet workers`."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from worker.presence import WorkerInfo
    from worker.settings import WorkerSettings


def worker(
    flows: Annotated[
        list[str] | None, typer.Argument(metavar="[TARGET]...", help="Flows to serve, such as users:flow")
    ] = None,
    max_jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Most runs at a time in this process", min=1, max=10_000)
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="End when nothing waits or runs anywhere")] = False,
) -> None:
    """Run one worker process on this host. Start as many as you like, anywhere."""
    from arq.worker import run_worker

    from limiter.settings import load
    from worker import output
    from worker.main import settings_class, targets
    from worker.registry import check_shadows, serve
    from worker.settings import WorkerSettings

    check_shadows("pocketfleet worker")
    if flows:
        os.environ["POCKETFLEET_FLOWS"] = ",".join(flows)
    if max_jobs is not None:
        os.environ["POCKETFLEET_MAX_JOBS"] = str(max_jobs)
    if burst:
        os.environ["POCKETFLEET_BURST"] = "true"
    settings = load(WorkerSettings)
    output.prefix_streams()
    serve(targets(settings), settings.lease_s)  # refuse a wrong target before anything is opened
    run_worker(settings_class())
    leave_the_rest()


def leave_the_rest() -> None:
    """End the process now if user code left threads or processes (a pool's) behind, which Python would wait for
    without end."""
    from multiprocessing import active_children

    children = active_children()
    threads = [each for each in threading.enumerate() if each is not threading.main_thread()]
    if not children and all(each.daemon for each in threads):
        return
    for child in children:
        child.terminate()
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def workers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 0 only if a worker of this host lives")
    ] = False,
) -> None:
    """List the living workers of the fleet."""
    import msgspec

    from limiter.errors import LimiterError
    from limiter.settings import load
    from limiter.table import print_table
    from worker.settings import WorkerSettings

    try:
        found = asyncio.run(_living(load(WorkerSettings)))
    except LimiterError as error:
        if not check:
            raise
        typer.echo(f"pocketfleet: {error}", err=True)
        raise typer.Exit(1) from None
    if check:
        here = [info for info in found if info.host == socket.gethostname()]
        typer.echo(
            f"{len(here) or 'no'} worker{'s' if len(here) > 1 else ''} of this host live{'s' * (len(here) < 2)}"
        )
        raise typer.Exit(0 if here else 1)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    elif found:
        print_table(_table(found))
    else:
        typer.echo("no worker lives; start one with: pocketfleet worker users:flow")


async def _living(settings: WorkerSettings) -> list[WorkerInfo]:
    from limiter.check import checked_connection
    from limiter.client import open_retrying_client
    from limiter.connect import find_redis
    from worker.presence import living_workers

    place = find_redis(settings, start=False)
    client = open_retrying_client(place.url, retries=1)
    try:
        await checked_connection(client, place.shown)
        return await living_workers(client)
    finally:
        await client.aclose()
        place.close()


def _table(found: list[WorkerInfo]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from limiter.printable import printable

    def shown(text: str) -> str:
        return escape(printable(text))

    table = Table("host", "pid", "flows", "running", "version", "up", box=None, header_style="bold")
    for info in found:
        up_s = max(0.0, time.time() - info.started)
        table.add_row(
            *(shown(info.host), str(info.pid), shown(", ".join(info.flows)), str(info.running)),
            *(shown(info.version), f"{up_s:.0f} s"),
        )
    return table
