"""Tables for people: as wide as what they hold, so that nothing in them is cut or wrapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

ANY_WIDTH = 100_000


def print_table(table: Table) -> None:
    """One line per row, wherever it goes; a terminal that is too narrow wraps it by itself."""
    from rich.console import Console

    for column in table.columns:
        column.no_wrap = True
    wide = Console(width=ANY_WIDTH)
    Console(width=max(1, wide.measure(table).maximum)).print(table)
