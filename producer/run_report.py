"""What `pocketfleet run` and `enqueue` tell people about a batch, and how to go on with it."""

from __future__ import annotations

import shlex
import sys
import traceback
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from producer.fleet_run import FleetRun


def names(fleet_run: FleetRun) -> str:
    limits = fleet_run.served.limits
    rate = f", {limits.max_per_window} per minute" if limits.max_per_window else ""
    return (
        f"flow {fleet_run.served.name} under limit {limits.name} "
        f"({limits.max_concurrent} at a time{rate}), batch {fleet_run.batch}"
    )


def stopped(fleet_run: FleetRun) -> str:
    """How to go on: the same command with the batch's id, once there is a batch."""
    if fleet_run.spool is None:
        return "stopped; nothing was enqueued"
    done = fleet_run.completed + fleet_run.failed
    far = f" at {done} of {fleet_run.spool.count}" if done else ""
    return f"stopped{far}; go on with: {_again(fleet_run)}"


def explain(fleet_run: FleetRun, error: Exception) -> None:
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
        report(fleet_run, None)
        raise UsersFault(f"{sentence}; what the items gave is kept", 1) from None
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    missing = isinstance(key, str) and not fleet_run.knows(key)
    mend = f"; give it with --set {shlex.quote(f'{key}=VALUE')}" if missing else ""
    raise UsersFault(f"{sentence}{mend}. Nothing was enqueued.", 2) from None


def report(fleet_run: FleetRun, result: Any) -> None:
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
