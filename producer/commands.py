"""`pocketfleet run`, `enqueue` and `batch`."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from producer.fleet_run import FleetRun
    from producer.settings import ProducerSettings

Target = Annotated[str, typer.Argument(metavar="TARGET", help="Where the flow is, such as users:flow")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=JSON", help="An entry of the shared store; may repeat"),
]
Shared = Annotated[
    str | None, typer.Option("--shared", metavar="FILE", help="JSON file with the shared store; - is stdin")
]
Params = Annotated[
    str | None,
    typer.Option(
        "--params", metavar="FILE", help="Param dicts as .jsonl or .csv (cells are text); - is JSONL on stdin"
    ),
]
Batch = Annotated[
    str | None, typer.Option("--batch", metavar="ID", help="Id of the batch; the same id goes on with it")
]
First = Annotated[int | None, typer.Option("--first", metavar="N", help="Take only the first N items", min=1)]


def run(
    target: Target,
    set_: Set = None,
    shared: Shared = None,
    params: Params = None,
    batch: Batch = None,
    first: First = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Worker processes to start; 0: in this process, with a debugger; default: one per core",
            min=0,
            max=1000,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines file that gets one line per item")
    ] = None,
) -> None:
    """Run a flow over many items: enqueue, start workers, follow, merge."""
    from producer.local_workers import cores

    fleet_run = _fleet_run(
        target, set_, shared, params, batch, first, cores() if workers is None else workers, output
    )
    if fleet_run.output is None:
        fleet_run.output = fleet_run.settings.data_dir / "output" / f"{fleet_run.batch}.jsonl"
    if workers == 0:
        from worker.output import prefix_items

        prefix_items(fleet_run.settings.log_level, fleet_run.batch)
    typer.echo(_names(fleet_run), err=True)
    try:
        result = asyncio.run(_go(fleet_run))
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(_stopped(fleet_run), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        _explain(fleet_run, error)
        raise
    _report(fleet_run, result)
    raise typer.Exit(1 if fleet_run.failed else 0)


async def _go(fleet_run: FleetRun) -> Any:
    """`go`, which SIGTERM stops as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await fleet_run.go()


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
    try:
        spool = asyncio.run(fleet_run.enqueue_only())
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(_stopped(fleet_run), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        _explain(fleet_run, error)
        raise
    typer.echo(fleet_run.batch)
    before = f", {spool.count - fleet_run.added} were there already" if fleet_run.added < spool.count else ""
    typer.echo(f"{fleet_run.added} of {spool.count} items enqueued{before}", err=True)


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
    from producer.fleet_run import FleetRun
    from producer.inputs import merged_shared, parse_set, read_params, read_shared
    from worker.registry import check_shadows, find_flow

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


def _stopped(fleet_run: FleetRun) -> str:
    """How to go on: the same command with the batch's id, once there is a batch."""
    if fleet_run.spool is None:
        return "stopped; nothing was enqueued"
    words = sys.argv[1:]
    if not any(word == "--batch" or word.startswith("--batch=") for word in words):
        words = [*words, "--batch", fleet_run.batch]
    done = fleet_run.completed + fleet_run.failed
    far = f" at {done} of {fleet_run.spool.count}" if done else ""
    return f"stopped{far}; go on with: {shlex.join(['pocketfleet', *words])}"


def _explain(fleet_run: FleetRun, error: Exception) -> None:
    """Turn what the flow's own prep_async or post_async raised into a sentence.

    Raises:
        UsersFault: with the line it came from; the whole trace is printed for `--workers 0`.
    """
    from producer.errors import UsersFault
    from worker.registry import said

    part = fleet_run.users_part
    if not part:
        return
    if fleet_run.workers == 0:
        traceback.print_exception(error)
    sentence = f"{fleet_run.served.target}: {part} raised {said(error)}"
    if part == "post_async":
        _report(fleet_run, None)
        raise UsersFault(f"{sentence}; what the items gave is kept", 1) from None
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    missing = isinstance(key, str) and not fleet_run.knows(key)
    mend = f"; give it with --set {shlex.quote(f'{key}=VALUE')}" if missing else ""
    raise UsersFault(f"{sentence}{mend}. Nothing was enqueued.", 2) from None


def _report(fleet_run: FleetRun, result: Any) -> None:
    if fleet_run.spool is not None and not fleet_run.spool.count:
        typer.echo("there were no items, so nothing ran", err=True)
    else:
        failed = f", {fleet_run.failed} failed" if fleet_run.failed else ""
        typer.echo(f"{fleet_run.completed} completed{failed} in {fleet_run.seconds:.1f} s", err=True)
        typer.echo(f"one line per item: {fleet_run.output}", err=True)
    if fleet_run.failed and fleet_run.workers:
        typer.echo(f"what the workers printed: {fleet_run.logs}/worker-*.log", err=True)
    if result is not None and result is not fleet_run.results:
        typer.echo(f"result: {result!r:.500}", err=True)


batches = typer.Typer(help="Batches: what became of the items of one enqueue.", no_args_is_help=True)


@batches.callback()
def _group() -> None:
    """Batches: what became of the items of one enqueue."""


@batches.command()
def status(
    batch: Annotated[str, typer.Argument(metavar="ID", help="Id of the batch")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show how far a batch is. Exit code 1 if it is over and some items failed."""
    from limiter.settings import load
    from producer.settings import ProducerSettings
    from worker.contract import STATUSES, checked_batch

    checked_batch(batch)
    counts = asyncio.run(_status(load(ProducerSettings), batch))
    if as_json:
        typer.echo(json.dumps(counts, indent=2))
    else:
        done = counts["count"] - counts["left"]
        shown = ", ".join(f"{counts[key]} {key}" for key in STATUSES if counts.get(key))
        typer.echo(f"{batch}: {done} of {counts['count']} done{': ' if shown else ''}{shown}")
    failed = sum(counts.get(key, 0) for key in STATUSES[1:])
    raise typer.Exit(1 if failed and counts["left"] <= 0 else 0)


async def _status(settings: ProducerSettings, batch: str) -> dict[str, Any]:
    from limiter.client import checked_connection, open_retrying_client
    from limiter.connect import find_redis
    from producer.batch import find_batch
    from producer.follow import batch_counts

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
