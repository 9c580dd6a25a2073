"""`pocketfleet batch`: what became of the items of one enqueue, and what is to become of them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from producer.settings import ProducerSettings

batches = typer.Typer(help="Batches: what became of the items of one enqueue.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the batch")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON")]
T = TypeVar("T")


@batches.callback()
def _group() -> None:
    """Batches: what became of the items of one enqueue."""


def _settings() -> ProducerSettings:
    from limiter.settings import load
    from producer.settings import ProducerSettings

    return load(ProducerSettings)


def _waited(work: Coroutine[Any, Any, T], stopped: str = "stopped") -> T:
    """Run it; Ctrl-C ends the command with 130 and one sentence."""
    try:
        return asyncio.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(stopped, err=True)
        raise typer.Exit(130) from None


def _print(as_json: bool, value: Any, sentence: str) -> None:
    typer.echo(json.dumps(value, indent=2) if as_json else sentence)


@batches.command("list")
def list_(as_json: Json = False) -> None:
    """List batches, oldest first: how far they are, how many bytes they take in Redis and on this disk."""
    from limiter.table import print_table
    from producer.batch_views import listed, table_of

    rows = asyncio.run(listed(_settings()))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        print_table(table_of(rows))
    else:
        typer.echo("no batch is known; one appears with its enqueue")


@batches.command()
def status(batch: Id, as_json: Json = False) -> None:
    """Show how far a batch is, and name items that Redis has lost. Exit code 1 if it is over and some failed."""
    from producer.batch_views import sentence_of, status_of

    told = asyncio.run(status_of(_settings(), batch))
    _print(as_json, told, sentence_of(told))
    raise typer.Exit(_code(told))


def _code(told: dict[str, Any]) -> int:
    bad = told["failed_items"] or told["missing"] or told["state"] in ("cancelled", "lost")
    return 1 if bad and told["state"] != "running" else 0


@batches.command()
def wait(
    batch: Id,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append a line per item as it ends, .jsonl or .csv"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Wait until a batch is over. Exit code 1 if some items failed, were lost or did not run."""
    from producer.batch_views import sentence_of
    from producer.waiting import wait_for

    told = _waited(
        wait_for(_settings(), batch, output),
        f"stopped waiting; the batch goes on. Wait again: pocketfleet batch wait {batch}",
    )
    _print(as_json, told, sentence_of(told))
    raise typer.Exit(_code(told))


@batches.command()
def results(
    batch: Id,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only items that have not completed, as they ended last")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what each attempt gave, so far; with --json one line of JSON each, as --output has it."""
    from producer.batch_views import short_line
    from producer.lines import json_line
    from producer.waiting import records

    async def go() -> None:
        async with aclosing(records(_settings(), batch, failed=failed)) as found:
            async for record in found:
                line = json_line(record).decode() if as_json else short_line(record) + "\n"
                sys.stdout.write(line)

    _waited(go())


@batches.command()
def retry(
    batch: Id,
    failed: Annotated[bool, typer.Option("--failed", help="Every item that did not complete")] = False,
    as_json: Json = False,
) -> None:
    """Enqueue items again that ended without completing; what they gave before stays in the history."""
    from producer.actions import retry_failed
    from producer.errors import InputError

    if not failed:
        raise InputError("say which items to retry: pocketfleet batch retry ID --failed")
    done = asyncio.run(retry_failed(_settings(), batch))
    there = f" ({done.there} by an earlier retry)" if done.there else ""
    rest = f"; {done.unrun} never ran: run or enqueue it again with --batch {batch}" if done.unrun else ""
    follow = f"; follow them: pocketfleet batch wait {batch}" if done.count else ""
    _print(
        as_json,
        {
            "batch": batch,
            "retried": done.count - done.there,
            "retried_before": done.there,
            "never_ran": done.unrun,
        },
        f"{_items(done.count)} enqueued again{there}{rest}{follow}",
    )
    if done.unserved and done.count:
        typer.echo(done.unserved, err=True)


@batches.command()
def cancel(batch: Id, as_json: Json = False) -> None:
    """End a batch: waiting items leave the queue at once, runs end at their next await."""
    from producer.actions import cancel_batch

    done = asyncio.run(cancel_batch(_settings(), batch))
    did = f"{batch}: {_items(done.waiting)} taken off the queue, {_runs(done.running)} told to stop"
    _print(
        as_json,
        {"batch": batch, "waiting": done.waiting, "running": done.running},
        f"batch {batch} is over: there is nothing to cancel" if done.over else did,
    )


@batches.command()
def lost(
    batch: Id,
    resubmit: Annotated[
        bool,
        typer.Option(
            "--resubmit", help="Enqueue again every item that has no outcome and is not in the queue"
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Name the items that Redis has lost. Exit code 1 if there are some and they stay lost."""
    from producer.actions import resubmit_lost
    from producer.batch_views import lost_sentence, status_of

    if resubmit:
        count, unserved = asyncio.run(resubmit_lost(_settings(), batch))
        _print(as_json, {"batch": batch, "resubmitted": count}, f"{_items(count)} enqueued again")
        if unserved and count:
            typer.echo(unserved, err=True)
        return
    told = asyncio.run(status_of(_settings(), batch))
    _print(as_json, {"batch": batch, "lost": told["lost"]}, lost_sentence(told))
    raise typer.Exit(1 if told["lost_items"] or told["lost"] is None else 0)


@batches.command()
def prune(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Batches to delete now, if they are over")
    ] = None,
    as_json: Json = False,
) -> None:
    """Delete what is kept of batches that ended longer ago than POCKETFLEET_KEEP_S, or of those named."""
    from producer.prune import prune_batches

    gone = asyncio.run(prune_batches(_settings(), ids or []))
    total = sum(each["bytes_on_disk"] for each in gone)
    words = ", ".join(each["batch"] for each in gone)
    _print(
        as_json,
        gone,
        f"deleted {words}: {total:,} bytes on disk" if gone else "nothing to delete",
    )


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
