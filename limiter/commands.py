"""`pocketfleet limits`: look at the limits of the fleet, and change them while it runs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limiter.errors import LimitsError
from limiter.table import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from limiter.control import Change
    from limiter.events import Event
    from limiter.holders import Holder
    from limiter.view import GateView

limits = typer.Typer(
    help="The limits of the fleet: look, and change them while it runs.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a limit, or of a flow that has its own")]
By = Annotated[str | None, typer.Option("--by", help="Who asks; user@host if left out")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


@limits.callback()
def _group() -> None:
    """The limits of the fleet: look, and change them while it runs."""


@limits.command()
def show(
    name: Annotated[str | None, typer.Argument(help="Name of a limit; all if left out")] = None,
    as_json: AsJson = False,
) -> None:
    """Show limits: level, slots in use, starts in the window, and what holds the next run back."""
    from limiter.operate import limits as live

    async def look() -> tuple[list[GateView], list[list[Event]]]:
        views = await live.show(name)
        return views, [await live.events(view.name, 5) for view in views]

    views, events = asyncio.run(look())
    if as_json:
        _print_json(
            [{**_plain(view), "events": _plain(trail)} for view, trail in zip(views, events, strict=True)]
        )
    elif views:
        _print_views(views, events if name else [])
    else:
        typer.echo("no limit is known yet; one appears with its first run")


@limits.command("set")
def set_(
    name: Name,
    max_concurrent: Annotated[
        str | None, typer.Option(metavar="N", help="Runs at a time, whole fleet")
    ] = None,
    max_per_minute: Annotated[str | None, typer.Option(metavar="M", help="Starts a minute, or none")] = None,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Put other values over a limit's own until `clear`; in force everywhere at once."""
    from limiter.operate import limits as live

    values: dict[str, Any] = {}
    if max_concurrent is not None:
        values["max_concurrent"] = _count(max_concurrent)
    if max_per_minute is not None:
        values["max_per_minute"] = None if max_per_minute == "none" else _count(max_per_minute)

    async def act() -> tuple[Change, GateView, str]:
        change = await live.set(name, **values, by=by)
        return change, (await live.show(name))[0], await _meant(name, change)

    change, view, meant = asyncio.run(act())
    lines = [f"{view.name}: {_values(change)}, until: pocketfleet limits clear {view.name}"]
    if change.alive and view.in_use > change.max_concurrent:
        lines.append(
            f"{view.in_use} are in use: nothing starts until enough have ended; nothing is interrupted"
        )
    _say(change, lines, as_json, meant)


@limits.command()
def clear(name: Name, by: By = None, as_json: AsJson = False) -> None:
    """End the override of `set`: the limit's own values again."""
    from limiter.operate import limits as live

    change = asyncio.run(live.clear(name, by=by))
    _say(change, [f"{_shown(name)}: {_values(change)}, the limit's own"], as_json)


@limits.command()
def pause(
    name: Name,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="30s, 5m, 2h; until resumed if left out")
    ] = None,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Start nothing for a while, or until `resume`. What runs goes on."""
    from limiter.operate import limits as live

    for_s = None if duration is None else _seconds(duration)

    async def act() -> tuple[Change, GateView, str]:
        change = await live.pause(name, for_s, by=by)
        return change, (await live.show(name))[0], await _meant(name, change)

    change, view, meant = asyncio.run(act())
    _say(change, [f"{view.name}: {view.holds_back()}; {view.in_use} in use go on"], as_json, meant)


@limits.command()
def resume(name: Name, by: By = None, as_json: AsJson = False) -> None:
    """End a pause, also one that the provider asked for."""
    from limiter.operate import limits as live

    change = asyncio.run(live.resume(name, by=by))
    was = "" if change.paused_until_before > change.now else " (it was not paused)"
    _say(change, [f"{_shown(name)}: admits again{was}"], as_json)


@limits.command()
def reset(name: Name, by: By = None, as_json: AsJson = False) -> None:
    """Bring the adaptive level back to its initial value; no slot and no start is forgotten."""
    from limiter.operate import limits as live

    async def act() -> tuple[Change, GateView]:
        change = await live.reset(name, by=by)
        return change, (await live.show(name))[0]

    change, view = asyncio.run(act())
    _say(change, [f"{view.name}: level {view.level:.4g} (was {change.level_before:.4g})"], as_json)


@limits.command()
def holders(name: Name, as_json: AsJson = False) -> None:
    """List the processes of a limit: what each holds, for how long, and how long its lease lasts."""
    from limiter.operate import limits as live

    found = asyncio.run(live.holders(name))
    if as_json:
        _print_json(_plain(found))
    elif found:
        print_table(_holders_table(found))
    else:
        typer.echo(f"no process uses {_shown(name)} now")


@limits.command()
def doctor(name: Name, as_json: AsJson = False) -> None:
    """Say what holds the fleet back at a limit, with the facts of the last minutes."""
    from limiter.doctor import shown
    from limiter.operate import limits as live

    found = asyncio.run(live.doctor(name))
    if as_json:
        _print_json({**_plain(found), "per_minute": found.pace.per_minute})
    else:
        typer.echo("\n".join(shown(found)))


# what is typed ---------------------------------------------------------------------------------


def _shown(name: str) -> str:
    return name.replace(":", ".")


def _count(text: str) -> int | str:
    """The number typed, or the text for the check that names it."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text or " "


def _seconds(text: str) -> float:
    """
    >>> _seconds("1.5m")
    90.0
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd]?)", text.strip())
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]] if found else 0.0
    if not 0 < seconds <= 366 * 86_400:
        raise LimitsError(
            f"--for={text!r} cannot hold: use a time such as 30s, 5m or 2h, at most 366d",
            key="for",
            value=text,
        )
    return seconds


# what is shown ---------------------------------------------------------------------------------


def _values(change: Change) -> str:
    rate = f"{change.max_per_window} starts a minute" if change.max_per_window else "no limit per minute"
    was = f"{change.rate_before}" if change.rate_before else "none"
    if not change.alive and not change.max_concurrent:
        return rate
    before = str(change.max_before) if change.max_before else "not known"
    return f"{change.max_concurrent} at a time (was {before}), {rate} (was {was})"


async def _meant(name: str, change: Change) -> str:
    """The limit in use that a name nobody uses looks like, as a question."""
    from limiter.operate import did_you_mean
    from limiter.operate import limits as live

    if change.alive:
        return ""
    return did_you_mean(_shown(name), [view.name for view in await live.show() if view.alive])


def _say(change: Change, lines: list[str], as_json: bool, meant: str = "") -> None:
    if not change.alive:
        lines.append(f"no process uses it now; it is kept and holds when one comes{meant}")
    if as_json:
        _print_json(_plain(change))
    else:
        typer.echo("\n".join(lines))


def _plain(value: Any) -> Any:
    """Dataclasses as JSON knows them; a time without end is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_views(views: list[GateView], events: list[list[Event]]) -> None:
    from limiter.doctor import override_line

    print_table(_table(views))
    for view in views:
        if view.override:
            typer.echo(f"override of {view.name}: {override_line(view)}")
    for trail in events:
        for event in trail:
            typer.echo(f"{event.clock()}  {event.sentence()}")


def _holders_table(found: list[Holder]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("host", "pid", "held", "unchanged", "lease left", "process", box=None, header_style="bold")
    for each in found:
        left = f"{each.lease_left_s:.1f} s" if each.lease_left_s >= 0 else "over"
        unchanged = f"{each.since_s:.0f} s" if each.held else "-"
        table.add_row(escape(each.host), str(each.pid), str(each.held), unchanged, left, escape(each.process))
    return table


def _table(views: list[GateView]) -> Table:
    from rich.markup import escape
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
            escape(view.holds_back()) or "-",
        )
    return table
