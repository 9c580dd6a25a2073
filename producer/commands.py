"""`pocketfleet run` and `enqueue`."""

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
    from producer.local_workers import cores

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
    raise typer.Exit(1 if fleet_run.unfinished else 0)


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
    key: Key = "",
    weight: Weight = 1.0,
) -> None:
    """Put a flow's items into the queue for the workers that serve it; prints the batch id."""
    fleet_run = _fleet_run(target, set_, shared, params, first, batch=batch, key=key, weight=weight)
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
    try:
        planned = asyncio.run(fleet_run.plan(seconds))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(130) from None
    except Exception as error:
        _explain(fleet_run, error)
        raise
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
    from producer.inputs import merged_shared, parse_set, read_params, read_shared
    from worker.registry import check_shadows, find_flow

    check_shadows(target)
    store: dict[str, Any] = merged_shared(parse_set(set_ or []), read_shared(shared) if shared else {})
    flow: Any = find_flow(target)
    return FleetRun(
        flow,
        store,
        target=target,
        params=read_params(params) if params else None,
        params_from=params or "",
        first=first,
        forecast=True,
        **more,
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
    done = fleet_run.completed + fleet_run.failed
    far = f" at {done} of {fleet_run.spool.count}" if done else ""
    return f"stopped{far}; go on with: {_again(fleet_run)}"


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
        lost = f", {len(fleet_run.lost)} lost" if fleet_run.lost else ""
        unrun = f", {fleet_run.unrun} did not run: the batch was cancelled" if fleet_run.unrun else ""
        counts = f"{fleet_run.completed} completed{failed}{lost}{unrun}"
        ran = "; the batch was over, nothing ran" if fleet_run.was_over else f" in {fleet_run.seconds:.1f} s"
        typer.echo(counts + ran, err=True)
        if fleet_run.conflicts > 1:
            typer.echo(f"{fleet_run.conflicts} entries in conflict", err=True)
        typer.echo(f"one line per item: {fleet_run.output}", err=True)
    if fleet_run.failed:
        typer.echo(f"retry what failed: {_retry(fleet_run)}", err=True)
    if fleet_run.lost:
        from producer.follower import mend

        typer.echo(mend(fleet_run.batch), err=True)
    if fleet_run.failed and fleet_run.workers:
        typer.echo(f"what the workers printed: {fleet_run.logs}/worker-*.log", err=True)
    if result is not None and result is not fleet_run.results:
        typer.echo(f"result: {result!r:.500}", err=True)


def _retry(fleet_run: FleetRun) -> str:
    """The commands that run the failures again."""
    return f"pocketfleet batch retry {fleet_run.batch} --failed && {_again(fleet_run)}"


def _again(fleet_run: FleetRun) -> str:
    """This very command, with the batch's id."""
    words = sys.argv[1:]
    if not any(word == "--batch" or word.startswith("--batch=") for word in words):
        words = [*words, "--batch", fleet_run.batch]
    return shlex.join(["pocketfleet", *words])
