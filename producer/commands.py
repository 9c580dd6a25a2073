"""`pocketfleet run`, `enqueue` and `batch`."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from limiter.client import checked_connection, open_retrying_client
from limiter.connect import find_redis
from limiter.settings import load
from producer.batch import find_batch
from producer.fleet_run import FleetRun, cores
from producer.follow import batch_counts
from producer.inputs import merged_shared, parse_set, read_params, read_shared
from producer.settings import ProducerSettings
from worker.contract import checked_batch
from worker.registry import check_shadows, find_flow

Target = Annotated[str, typer.Argument(help="Where the flow is, such as users:flow")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=JSON of the shared store; may repeat")]
Shared = Annotated[str | None, typer.Option("--shared", help="JSON file with the shared store; - is stdin")]
Params = Annotated[
    str | None, typer.Option("--params", help="JSONL or CSV of param dicts; - is stdin (JSONL)")
]
Batch = Annotated[str | None, typer.Option("--batch", help="Id of the batch; the same id goes on with it")]
First = Annotated[int | None, typer.Option("--first", help="Take only the first N items", min=1)]


def run(
    target: Target,
    set_: Set = None,
    shared: Shared = None,
    params: Params = None,
    batch: Batch = None,
    first: First = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes to start; 0: in this process; default: one per core")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines file, one line per item")] = None,
) -> None:
    """Run a flow over many items: enqueue, start workers, follow, merge."""
    fleet_run = _fleet_run(
        target, set_, shared, params, batch, first, cores() if workers is None else workers, output
    )
    if fleet_run.output is None:
        fleet_run.output = fleet_run.settings.data_dir / "output" / f"{fleet_run.batch}.jsonl"
    typer.echo(_names(fleet_run), err=True)
    try:
        result = asyncio.run(fleet_run.go())
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(f"stopped; go on with: {_again(fleet_run.batch)}", err=True)
        raise typer.Exit(130) from None
    _report(fleet_run, result)
    raise typer.Exit(1 if fleet_run.failed else 0)


def enqueue(
    target: Target,
    set_: Set = None,
    shared: Shared = None,
    params: Params = None,
    batch: Batch = None,
    first: First = None,
) -> None:
    """Put a flow's items into the queue for the workers that serve it; prints the batch id."""
    fleet_run = _fleet_run(target, set_, shared, params, batch, first, None, None)
    typer.echo(_names(fleet_run), err=True)
    spool = asyncio.run(fleet_run.enqueue_only())
    typer.echo(fleet_run.batch)
    before = f", {spool.count - fleet_run.added} were there already" if fleet_run.added < spool.count else ""
    typer.echo(f"{fleet_run.added} of {spool.count} items enqueued{before}", err=True)
    if not fleet_run.serving:
        name = fleet_run.served.name
        typer.echo(f"no worker serves {name}; start one: pocketfleet worker {target}", err=True)


def _fleet_run(
    target: str,
    set_: list[str] | None,
    shared: str | None,
    params: str | None,
    batch: str | None,
    first: int | None,
    workers: int | None,
    output: Path | None,
) -> FleetRun:
    check_shadows(target)
    store: dict[str, Any] = merged_shared(parse_set(set_ or []), read_shared(shared) if shared else {})
    flow: Any = find_flow(target)
    return FleetRun(
        flow,
        store,
        batch=batch,
        workers=workers,
        output=output,
        target=target,
        params=read_params(params) if params else None,
        params_from=params or "",
        first=first,
    )


def _names(fleet_run: FleetRun) -> str:
    limits = fleet_run.served.limits
    rate = f", {limits.max_per_window} per minute" if limits.max_per_window else ""
    return (
        f"flow {fleet_run.served.name} under limit {limits.name} "
        f"({limits.max_concurrent} at a time{rate}), batch {fleet_run.batch}"
    )


def _again(batch: str) -> str:
    """The command that continues this batch: the same one with its id."""
    words = [word for word in sys.argv[1:]]
    if "--batch" not in words and not any(word.startswith("--batch=") for word in words):
        words += ["--batch", batch]
    return shlex.join(["pocketfleet", *words])


def _report(fleet_run: FleetRun, result: Any) -> None:
    counts = f"{fleet_run.completed} completed"
    if fleet_run.failed:
        counts += f", {fleet_run.failed} failed"
    typer.echo(f"{counts} in {fleet_run.seconds:.1f} s; one line per item in {fleet_run.output}", err=True)
    if result is not None:
        typer.echo(f"result: {result!r:.500}", err=True)


batches = typer.Typer(help="Batches: what became of the items of one enqueue.", no_args_is_help=True)


@batches.callback()
def _group() -> None:
    """Batches: what became of the items of one enqueue."""


@batches.command()
def status(
    batch: Annotated[str, typer.Argument(help="Id of the batch")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show how far a batch is. Exit code 1 if it is over and some items failed."""
    checked_batch(batch)
    counts = asyncio.run(_status(load(ProducerSettings), batch))
    if as_json:
        typer.echo(json.dumps(counts, indent=2))
    else:
        shown = ", ".join(
            f"{counts[key]} {key}"
            for key in ("completed", "failed", "aborted", "quarantined", "lost")
            if counts.get(key)
        )
        typer.echo(f"{batch}: {counts['left']} of {counts['count']} left{', ' if shown else ''}{shown}")
    failed = sum(counts.get(key, 0) for key in ("failed", "aborted", "quarantined", "lost"))
    raise typer.Exit(1 if failed and counts["left"] <= 0 else 0)


async def _status(settings: ProducerSettings, batch: str) -> dict[str, Any]:
    place = find_redis(settings, start=False)
    client = open_retrying_client(place.url, retries=1)
    try:
        await checked_connection(client, place.shown)
        limit, _ = await find_batch(client, batch)
        counts = await batch_counts(client, limit, batch)
        return {"batch": batch, "limit": limit, "left": 0, "count": 0, **counts}
    finally:
        await client.aclose()
        place.close()
