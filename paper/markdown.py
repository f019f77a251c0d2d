"""Figures and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; every line as long as the head."""
    rows = [list(map(str, line)) for line in lines]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"lines: expected {len(head)} cells as in the head, got {row}")
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *rows]
    )


def number(value: float, digits: int = 2) -> str:
    """Return a figure with a sign that reads well; a dash for NaN."""
    if math.isnan(value):
        return "\N{EN DASH}"
    written = f"{value:.{digits}f}"
    if float(written) == 0:
        written = written.lstrip("-")
    return written.replace("-", "\N{MINUS SIGN}")


def points(share: float, digits: int = 1) -> str:
    """Return a share or a drop in hundredths."""
    return number(100 * share, digits)


def spread(mean: float, least: float, most: float, *, digits: int = 2, scale: float = 1) -> str:
    """Return a mean with the least and the most of single networks, where these differ."""
    values = [number(scale * value, digits) for value in (mean, least, most)]
    return values[0] if values[1] == values[2] else f"{values[0]} ({values[1]} to {values[2]})"


def interval(middle: float, low: float, high: float, *, digits: int = 2) -> str:
    """Return a figure with its interval; where there is none, the figure alone."""
    if math.isnan(low) and math.isnan(high):
        return number(middle, digits)
    return f"{number(middle, digits)} [{number(low, digits)}, {number(high, digits)}]"


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does; "none" if there are none."""
    if not words:
        return "none"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
