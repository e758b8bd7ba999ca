"""Tables of figures: drawn by rich on a terminal that is wide enough, and columns of text elsewhere.

Table    title, heads of columns, rows of text; the first column is of names, the others are of figures
words    seconds, bytes, shares and factors, as a reader wants them
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable

WIDTH_MAX = 10_000  # of a terminal


class Table(NamedTuple):
    """``notes``: sentences below it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """In columns, with two spaces in between."""
        lines = [self.heads, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.heads))]
        drawn = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        ]
        return "\n".join([self.title, *(f"  {line}" for line in drawn), *self.notes])


def show(table: Table) -> None:
    """Print ``table`` and an empty line. Where standard output is a terminal that has room for it, rich draws it."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
        drawn = _drawn(table)
        is_wide = console.measure(drawn, options=console.options.update(width=WIDTH_MAX)).maximum > console.width
        console.print(str(table._replace(notes=())) if is_wide else drawn, soft_wrap=is_wide)
        for note in table.notes:
            console.print(note)
        console.print()
    else:
        print(table, end="\n\n", flush=True)


def _drawn(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left", title_style="bold")
    drawn.add_column(table.heads[0], no_wrap=True)
    for head in table.heads[1:]:
        drawn.add_column(head, justify="right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def rate(figure: float) -> str:
    """Such as 12,345, 87.3, 0.25."""
    return f"{figure:,.0f}" if figure >= 999.5 else f"{figure:.3g}"  # which :.3g writes as 1e+03


def duration(seconds: float) -> str:
    """Such as 12.3 us, 4.5 ms, 1.25 s."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds < 1000 / factor * 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{rate(seconds)} s"


def mib(n_bytes: float) -> str:
    """Such as 32.5 MiB; a dash where it is not known."""
    if not n_bytes:
        return "-"
    return f"{rate(n_bytes / (1 << 20))} MiB"


def percent(share: float) -> str:
    """Such as 97 %."""
    return f"{share:.0%}".replace("%", " %")


def factor(figure: float) -> str:
    """Such as 1.94x, 12.5x, 0.034x."""
    digits = 0 if figure >= 100 else 1 if figure >= 10 else 2 if figure >= 0.1 else 3
    return f"{figure:,.{digits}f}x"
