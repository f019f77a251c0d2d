"""What a notebook shows of an object: a line, and tables of which the first rows are shown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

import pandas as pd

ROWS = 10
"""Rows of a table that are shown."""


def page(line: str, *tables: pd.DataFrame, notes: Iterable[str] = ()) -> str:
    """Lay out a line, tables and further lines as HTML; what is left out is said."""
    parts = [_paragraph(line)]
    for table in tables:
        # Without pandas' style sheet, which would be repeated in every output.
        parts.append(
            _written(table.head(ROWS)).to_html(
                index=False, border=0, justify="left", na_rep="-", float_format=_figure
            )
        )
        if len(table) > ROWS:
            parts.append(_paragraph(f"{ROWS} of {len(table):,} rows"))
    below = list(notes)
    return "\n".join([*parts, *([_paragraph(*below)] if below else [])])


def _written(table: pd.DataFrame) -> pd.DataFrame:
    whole = table.select_dtypes("integer")
    return table.assign(**{str(name): whole[name].map("{:,}".format) for name in whole})


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _paragraph(*lines: str) -> str:
    """Escape lines; those that begin with spaces stay set in."""
    set_in = [re.sub("^ +", "&emsp;", html.escape(line)) for line in lines]
    return f"<p>{'<br>'.join(set_in)}</p>"
