"""What a measurement hands back, and the table it is shown in."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = "shown, not judged"
HEADINGS = ("measurement", "peer", "ours", "ratio", "goal", "verdict")


@dataclass(frozen=True)
class Sample:
    """One figure over all repetitions; printed as `median [least-most] unit`.

    >>> str(Sample((50_500.0, 48_900.0, 52_300.0), "/s"))
    '50.5 k [48.9 k-52.3 k] /s'
    """

    values: tuple[float, ...]
    unit: str = ""

    @property
    def middle(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        least, most = short(min(self.values)), short(max(self.values))
        spread = f" [{least}-{most}]" if least != most else ""
        return f"{short(self.middle)}{spread} {self.unit}".rstrip()


def short(value: float) -> str:
    """Three figures, thousands as k.

    >>> [short(value) for value in (0.01234, 1.0049, 14.62, 611.0, 20_345.0, 2_600_000.0, 0.0)]
    ['0.0123', '1.005', '14.6', '611', '20.3 k', '2.6 M', '0']
    """
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g} M"
    if abs(value) >= 1000:
        return f"{value / 1000:.3g} k"
    if 1 <= value < 1.1 and value != 1:
        return f"{value:.4g}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Goal:
    """What has to hold for a number: `Goal(">=", 8)`."""

    sign: str
    bound: float

    def met(self, value: float) -> bool:
        compare: Callable[[float, float], bool] = operator.ge if self.sign == ">=" else operator.le
        return compare(value, self.bound)

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line. Its goal is for the ratio of ours to the peer's; without a peer, for ours.

    Attributes:
        peer: None with a name says that the peer is not there to be measured.
        goal: None for a figure that is shown and not judged.
        by_ratio: False holds the goal against ours although a peer is shown beside it.
    """

    what: str
    ours: Sample
    peer: Sample | None = None
    peer_name: str = ""
    goal: Goal | None = None
    by_ratio: bool = True

    @property
    def ratio(self) -> float | None:
        if self.peer is None or not self.peer.middle:
            return None
        return self.ours.middle / self.peer.middle

    @property
    def verdict(self) -> str:
        if self.goal is None or (self.by_ratio and self.peer_name and self.ratio is None):
            return SHOWN
        value = self.ours.middle if self.ratio is None or not self.by_ratio else self.ratio
        return "met" if self.goal.met(value) else "not met"

    def cells(self) -> tuple[str, ...]:
        peer = f"{self.peer_name}: {self.peer}" if self.peer else self.peer_name
        unit = " x" if self.by_ratio and self.peer_name else ""
        goal = "" if self.goal is None else f"{self.goal}{unit}"
        ratio = "" if self.ratio is None else f"{short(self.ratio)} x"
        return (self.what, peer, str(self.ours), ratio, goal, self.verdict)


@dataclass(frozen=True)
class Chart:
    """What a plot shows: per name a line of points, or, for "spread", all the values.

    Attributes:
        kind: "line" (x and y of each point), "trace" (the same, each value holding until the next; a series
            that is 0 throughout is one of events), "spread" (how the values are spread, sorted) or "bar".
    """

    title: str
    kind: str
    x: str
    y: str
    series: dict[str, Sequence[Any]]
    log_y: bool = False


@dataclass
class Result:
    """What one measurement found."""

    name: str
    rows: list[Row] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False


def show(results: Iterable[Result], console: Console) -> None:
    """Print the table, and the notes under it."""
    table = Table(*HEADINGS, header_style="bold", show_lines=False)
    colours = {"met": "green", "not met": "red"}
    notes: list[str] = []
    for result in results:
        for row in result.rows:
            *cells, verdict = row.cells()
            table.add_row(*cells, f"[{colours.get(verdict, 'dim')}]{verdict}[/]")
        table.add_section()
        notes += result.notes
    console.print(table)
    for note in notes:
        console.print(f"- {note}", soft_wrap=True, markup=False, highlight=False)


def markdown(results: Iterable[Result], header: str) -> str:
    """The same as a table for a README."""
    lines = [header, "", _line(HEADINGS), _line(["---"] * len(HEADINGS))]
    notes: list[str] = []
    for result in results:
        lines += [_line(row.cells()) for row in result.rows]
        notes += [f"- {note}" for note in result.notes]
    return "\n".join([*lines, "", *notes, ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
