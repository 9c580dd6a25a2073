"""`pocketfleet run`, `enqueue` and `plan`."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from producer.run_report import explain, names, report, stopped

if TYPE_CHECKING:
    from producer.fleet_run import FleetRun

T = TypeVar("T")

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
Key = Annotated[
    str,
    typer.Option(
        "--key",
        metavar="ENTRY",
        help="Entry of the params that identifies an item when the batch is run again",
    ),
]
Weight = Annotated[
    float,
    typer.Option(
        metavar="X", help="Share of the limit among batches: 2 gets twice as much as 1", show_default=False
    ),
]


def run(
    target: Target,
    set_: Set = None,
    shared: Shared = None,
    params: Params = None,
    batch: Batch = None,
    first: First = None,
    key: Key = "",
    weight: Weight = 1.0,
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
        Path | None, typer.Option(metavar="FILE", help="Gets one line per item as it ends: .jsonl or .csv")
    ] = None,
) -> None:
    """Run a flow over many items: enqueue, start workers, follow, merge."""
    from producer.line_file import own_output
    from producer.local_workers import cores
    from worker.output import prefix_items, prefix_streams

    if workers == 0:
        prefix_streams()
    fleet_run = _fleet_run(
        target,
        set_,
        shared,
        params,
        first,
        batch=batch,
        workers=cores() if workers is None else workers,
        output=output,
        key=key,
        weight=weight,
    )
    if fleet_run.output is None:
        fleet_run.output = own_output(fleet_run.settings.data_dir, fleet_run.batch)
    if workers == 0:
        prefix_items(fleet_run.settings.log_level, fleet_run.batch)
    typer.echo(names(fleet_run), err=True)
    result = _waited(fleet_run, _go(fleet_run))
    report(fleet_run, result)
    raise typer.Exit(1 if fleet_run.unfinished else 0)


def enqueue(
    target: Target,
    set_: Set = None,
    shared: Shared = None,
    params: Params = None,
    batch: Batch = None,
    first: First = None,
    key: Key = "",
    weight: Weight = 1.0,
) -> None:
    """Put a flow's items into the queue for the workers that serve it; prints the batch id."""
    fleet_run = _fleet_run(target, set_, shared, params, first, batch=batch, key=key, weight=weight)
    typer.echo(names(fleet_run), err=True)
    spool = _waited(fleet_run, fleet_run.enqueue_only())
    typer.echo(fleet_run.batch)
    before = f", {spool.count - fleet_run.added} were there already" if fleet_run.added < spool.count else ""
    typer.echo(f"{fleet_run.added} of {spool.count} items enqueued{before}", err=True)


def plan(
    target: Target,
    set_: Set = None,
    shared: Shared = None,
    params: Params = None,
    first: First = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="How long one run takes; default: as in the latest batch of the flow", min=0
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Say how long a batch would take, which limit binds and what it costs in Redis; enqueues nothing."""
    fleet_run = _fleet_run(target, set_, shared, params, first)
    planned = _waited(fleet_run, fleet_run.plan(seconds), says_stopped=False)
    typer.echo(json.dumps(planned.as_dict(), indent=2) if as_json else "\n".join(planned.sentences()))


def _fleet_run(
    target: str,
    set_: list[str] | None,
    shared: str | None,
    params: str | None,
    first: int | None,
    **more: Any,
) -> FleetRun:
    from producer.fleet_run import FleetRun
    from producer.inputs import merged_shared, parse_set, read_shared
    from worker.registry import check_shadows, find_flow

    check_shadows(target)
    store: dict[str, Any] = merged_shared(parse_set(set_ or []), read_shared(shared) if shared else {})
    flow: Any = find_flow(target)
    return FleetRun(
        flow,
        store,
        target=target,
        params=_items_of(params) if params else None,
        params_from=params or "",
        first=first,
        forecast=True,
        **more,
    )


def _items_of(params: str) -> Any:
    from producer.inputs import may_block, read_params
    from producer.read_beside import read_beside

    items = read_params(params)
    return read_beside(items) if may_block(params) else items


def _waited(fleet_run: FleetRun, work: Coroutine[Any, Any, T], *, says_stopped: bool = True) -> T:
    """Run it; Ctrl-C ends the command with 130, and what the flow's own code raised is explained."""
    try:
        return asyncio.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        if says_stopped:
            typer.echo(stopped(fleet_run), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        explain(fleet_run, error)
        raise


async def _go(fleet_run: FleetRun) -> Any:
    """`go`, which SIGTERM and a closed terminal stop as Ctrl-C does."""
    from worker.forked import let_go_in_forks
    from worker.hangup import on_hangup

    task = asyncio.current_task()
    assert task is not None
    let_go_in_forks()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    on_hangup(task.cancel)
    return await fleet_run.go()
