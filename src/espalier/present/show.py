"""Rich tables and the progress of a run. Decides how things look, computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from espalier.graph.summary import Summary, as_text, tables, totals_line


def show_summary(summary: Summary, console: Console) -> None:
    """The tables of ``graph.summary()``: in a terminal fitted to its width, in a pipe as they are."""
    if not console.is_terminal:
        console.print(as_text(summary), markup=False, soft_wrap=True)
        return
    console.print(totals_line(summary.totals), markup=False)
    for title, head, rows in tables(summary):
        console.print()
        console.print(rich_table(title, head, rows))


def rich_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Numbers (head begins with ``>``) to the right; neither they nor the first column are ever broken."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, name in enumerate(head):
        number = name.startswith(">")
        table.add_column(
            name.removeprefix(">"), justify="right" if number else "left", no_wrap=number or place == 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def show_markdown(text: str, console: Console) -> None:
    """Laid out in a terminal, as it is in a pipe."""
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        console.print(text, markup=False, soft_wrap=True)
