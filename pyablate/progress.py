"""How far a long run has come: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def reporting(progress: bool | Report | None = None) -> Iterator[Report]:
    """Give a function to report progress to.

    Parameters
    ----------
    progress : bool or callable, optional
        None draws a bar on standard error if that is a terminal, and logs a line every ten
        seconds otherwise. True draws the bar wherever standard error goes, False is silent. A
        callable is called itself, with (done, total, layer).

    Yields
    ------
    callable
        ``report(done, total, layer)``.
    """
    if callable(progress):
        yield progress
    elif progress is False:
        yield _silent
    elif progress or sys.stderr.isatty():
        with _bar(force=bool(progress)) as report:
            yield report
    else:
        yield _LogLines()


@contextmanager
def _bar(*, force: bool) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, force_terminal=force or None)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(done: int, total: int, layer: str) -> None:
            bar.update(task, completed=done, total=total, description=layer)

        yield report


class _LogLines:
    """One line every ten seconds, so that a log file stays short."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int, layer: str) -> None:
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES and done < total:
            return
        self.last = now
        left = (now - self.start) * (total - done) / max(done, 1)
        _log.info("%s: %.0f %% done, about %.0f s left", layer, 100 * done / max(total, 1), left)


def _silent(done: int, total: int, layer: str) -> None:
    """Report nothing."""
