"""How the shell prints: a console, frames as tables, what was written.

Rich is imported where something is printed, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_PIPED_WIDTH = 120

Column = tuple[str, str, Callable[[Any], str]]
"""Heading, column of the frame, and how to write its values."""

number = "{}".format
count = "{:,}".format
figure = "{:.4f}".format
chance = "{:.2g}".format


def points(share: float) -> str:
    """Write a share in percentage points."""
    return f"{100 * share:.2f}"


def change(share: float) -> str:
    """Write a difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.2f}"


def columns(written: Callable[[Any], str], *names: str) -> Iterator[Column]:
    """Columns that are written alike: ``"heading=column of the frame"``, or one name for both."""
    for each in names:
        heading, _, name = each.partition("=")
        yield heading, name or heading, written


def frame_table(frame: pd.DataFrame, shown: Sequence[Column], *, grouped: int = 0) -> Table:
    """Tabulate columns of a frame: text (format `str`) on the left, figures on the right.

    Text is folded between words; names and figures stay whole, if the table has to be wider than
    the terminal for them.

    Not a number is shown as ``-``. In the first `grouped` columns a value is shown once for the
    rows that share it and those to its left; an empty line follows the rows that share the first.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, _, written in shown:
        if written is str:
            table.add_column(heading, overflow="fold")
        else:  # a heading of one word has nothing to fold, and its figures stay whole
            table.add_column(heading, justify="right", no_wrap=" " not in heading)
    above: list[str] = []
    for values in zip(*(frame[name] for _, name, _ in shown), strict=True):
        cells = [
            "-" if isinstance(value, float) and value != value else written(value)
            for value, (_, _, written) in zip(values, shown, strict=True)
        ]
        pairs = zip(cells[:grouped], above, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if above and grouped and not same:
            table.add_section()
        table.add_row(*map(_cell, [*[""] * same, *cells[same:]]))
        above = cells
    for column in table.columns:
        column.min_width = max(map(_longest_word, [column.header, *column.cells]))
    return table


def facts_table(facts: dict[str, Any]) -> Table:
    """Tabulate names and values."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(_cell(name), _cell(_fact(value)))
    return table


def show(*printed: RenderableType, written: Iterable[Path | None] = ()) -> None:
    """Print lines and tables, then name the files written; None is one that was not asked for."""
    from rich.measure import Measurement
    from rich.table import Table

    out = console()
    for each in printed:
        if isinstance(each, Table):
            least = Measurement.get(out, out.options.update(width=1000), each).minimum
            out.print(each, width=max(out.width, least), crop=False)
        else:
            out.print(each)
    paths = [str(path) for path in written if path is not None]
    if paths:
        out.print(f"Written: {' and '.join(paths)}")


def console() -> Console:
    """Make a console that does not squeeze tables into 80 columns when piped into a file."""
    from pyablate.cli.console import Console

    made = Console(markup=False, highlight=False)
    return made if made.is_terminal else Console(markup=False, highlight=False, width=_PIPED_WIDTH)


def _longest_word(cell: RenderableType) -> int:
    return max((len(word) for word in str(cell).split()), default=0)


def _cell(name: str) -> Text:
    """Show a name as it is, which may hold what rich takes for markup.

    Control characters are shown before the width of the column is measured.
    """
    from rich.text import Text

    return Text(visible(name))


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(inner)}" for name, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)
