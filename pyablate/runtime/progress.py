"""Progress of a run: a bar, log lines, JSON lines, or a callback."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[int, int, str], None]
"""Called with what is done, what there is in all (any unit of work) and the current layer."""

_log = logging.getLogger("pyablate")
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_RECORDS = 1.0


@contextmanager
def reporting(progress: bool | Report | None = None, *, unit: str = "") -> Iterator[Report]:
    """Give a function to report progress to.

    Parameters
    ----------
    progress : bool or callable, optional
        None draws a bar on standard error if that is a terminal, and logs a line every ten
        seconds otherwise. True draws the bar wherever standard error goes, False is silent. A
        callable is called itself, with (done, total, layer).
    unit : str
        What is counted, to be shown per second; nothing is shown for "".

    Yields
    ------
    callable
        ``report(done, total, layer)``.

    Examples
    --------
    >>> from pyablate.runtime.progress import reporting
    >>> with reporting(lambda done, total, layer: print(done, total, layer)) as report:
    ...     report(5, 10, "features.2")
    5 10 features.2
    """
    if callable(progress):
        yield progress
    elif progress is False:
        yield _silent
    elif progress or sys.stderr.isatty():
        with _bar(unit, force=bool(progress)) as report:
            yield report
    else:
        yield _LogLines(unit)


class Pace:
    """Work per second since the first report: what an earlier process did does not count."""

    def __init__(self) -> None:
        self.begin: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> tuple[float, float | None]:
        """Work per second so far, and seconds left; None where nothing is known yet."""
        now = time.monotonic()
        if self.begin is None:
            self.begin = now, done
        start, before = self.begin
        rate = (done - before) / (now - start) if now > start else 0.0
        left = (total - done) / rate if rate > 0 else 0.0 if done >= total else None
        return rate, left


class JsonLines:
    """One JSON object a second at most, and one for the end.

    ``{"event": "progress", "done": ..., "total": ..., "layer": ..., "per_second": ...,
    "seconds_left": ...}``; ``seconds_left`` is null as long as it is not known.

    Parameters
    ----------
    stream : text file, optional
        Where to; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.pace = Pace()
        self.last = -_SECONDS_BETWEEN_RECORDS

    def __call__(self, done: int, total: int, layer: str) -> None:
        """Write a record, if it is time for one."""
        rate, left = self.pace(done, total)
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_RECORDS and done < total:
            return
        self.last = now
        self.event(
            "progress",
            done=done,
            total=total,
            layer=layer,
            per_second=round(rate, 1),
            seconds_left=None if left is None else round(left, 1),
        )

    def event(self, name: str, **values: object) -> None:
        """Write any record."""
        self.stream.write(json.dumps({"event": name, **values}) + "\n")
        self.stream.flush()


@contextmanager
def _bar(unit: str, *, force: bool) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, force_terminal=force or None)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, speed="")
        pace = Pace()

        def report(done: int, total: int, layer: str) -> None:
            if pace.begin is None:  # what is done already is no speed
                bar.reset(task, total=total, completed=done)
            speed = f"{pace(done, total)[0]:,.0f} {unit}/s" if unit else ""
            bar.update(task, completed=done, total=total, description=layer, speed=speed)

        yield report


class _LogLines:
    """One line every ten seconds, so that a log file stays short."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.pace = Pace()
        self.last = time.monotonic()

    def __call__(self, done: int, total: int, layer: str) -> None:
        rate, left = self.pace(done, total)
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES and done < total:
            return
        self.last = now
        parts = [f"{layer}: {100 * done / max(total, 1):.0f} % done"]
        parts += [f"{rate:,.0f} {self.unit}/s"] if self.unit else []
        parts += [f"about {left:.0f} s left"] if left is not None else []
        _log.info("%s", ", ".join(parts))


def _silent(done: int, total: int, layer: str) -> None:
    """Report nothing."""
