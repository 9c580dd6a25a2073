"""`pocketfleet limits`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from limiter.errors import LimitsError

if TYPE_CHECKING:
    from rich.table import Table

    from limiter.settings import FleetSettings
    from limiter.view import GateView

limits = typer.Typer(help="The limits of the fleet.", no_args_is_help=True)


@limits.callback()
def _group() -> None:
    """The limits of the fleet."""


@limits.command()
def show(
    name: Annotated[str | None, typer.Argument(help="Name of a limit; all if left out")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show limits: level, slots in use, starts in the window, and what holds the next run back."""
    from rich.console import Console

    from limiter.limits import checked_name
    from limiter.settings import FleetSettings, load

    if name is not None:
        checked_name(name.replace(":", "."))
    views = asyncio.run(_views(load(FleetSettings), name.replace(":", ".") if name else None))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(view) for view in views], indent=2))
    elif views:
        Console().print(_table(views))
    else:
        typer.echo("no limit is known yet; one appears with its first run")


async def _views(settings: FleetSettings, name: str | None) -> list[GateView]:
    from limiter.client import checked_connection, open_retrying_client
    from limiter.connect import find_redis
    from limiter.view import known_limits, read_gate

    place = find_redis(settings, start=False)
    client = open_retrying_client(place.url, retries=1)
    try:
        await checked_connection(client, place.shown)
        names = [name] if name else await known_limits(client)
        views = [await read_gate(client, each) for each in names]
        if name and views[0] is None:
            known = ", ".join(await known_limits(client)) or "none"
            raise LimitsError(f"limit '{name}' is not known here (known: {known})", key="limit", value=name)
        return [view for view in views if view is not None]
    finally:
        await client.aclose()
        place.close()


def _table(views: list[GateView]) -> Table:
    from rich.table import Table

    table = Table(
        "limit", "in use", "level", "max", "starts", "waiting", "held back by", box=None, header_style="bold"
    )
    for view in views:
        starts = f"{view.used}/{view.max_per_window} in {view.window_s:g} s" if view.max_per_window else "-"
        table.add_row(
            view.name,
            str(view.in_use),
            str(int(view.level)),
            str(view.max_concurrent),
            starts,
            str(sum(view.waiting_jobs.values())),
            view.holds_back() or "-",
        )
    return table
