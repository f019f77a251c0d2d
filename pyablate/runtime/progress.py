"""Progress of a run: a bar, log lines, JSON lines, or a callback."""

from __future__ import annotations

import html
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Report = Callable[[int, int, str], None]
"""Called with what is done, what there is in all (any unit of work) and the current layer."""

_log = logging.getLogger("pyablate")
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_RECORDS = 1.0


class Reporter(Protocol):
    """What progress is reported to; see :func:`reporting`."""

    def __call__(self, done: int, total: int, layer: str, work: float | None = None) -> None:
        """Report; ``work`` is what ``done`` would be if equal parts of it took equal times."""


@contextmanager
def reporting(progress: bool | Report | None = None, *, unit: str = "") -> Iterator[Reporter]:
    """Give a function to report progress to.

    Parameters
    ----------
    progress : bool or callable, optional
        None draws a bar on standard error if that is a terminal, or in the notebook, and logs a
        line every ten seconds otherwise. True draws the bar wherever standard error goes, False is
        silent. A callable is called itself, with (done, total, layer).
    unit : str
        What is counted, to be shown per second; nothing is shown for "".

    Yields
    ------
    callable
        ``report(done, total, layer)``. While it is there, ``stage`` is heard as well.

    Examples
    --------
    >>> from pyablate.runtime.progress import reporting
    >>> with reporting(lambda done, total, layer: print(done, total, layer)) as report:
    ...     report(5, 10, "features.2")
    5 10 features.2
    """
    with _reporter(progress, unit) as shown:
        token = _stage.set(getattr(shown, "stage", None))
        try:
            yield shown
        finally:
            _stage.reset(token)


_stage: ContextVar[Callable[[str], None] | None] = ContextVar("stage", default=None)


def stage(name: str) -> None:
    """Say what is being done while there is nothing to count, to those who show progress."""
    heard = _stage.get()
    if heard is not None:
        heard(name)


@contextmanager
def _reporter(progress: bool | Report | None, unit: str) -> Iterator[Reporter]:
    if isinstance(progress, JsonLines):
        yield progress
    elif callable(progress):
        yield lambda done, total, layer, work=None: progress(done, total, layer)
    elif progress is False:
        yield lambda done, total, layer, work=None: None
    else:
        with _shown(bool(progress), unit) as report:
            yield report


def _shown(forced: bool, unit: str) -> _NotebookBar | _Bar | _LogLines:
    console = Console(stderr=True, force_terminal=forced or None)
    if console.is_jupyter:
        return _NotebookBar(unit)
    return _Bar(unit, console) if forced or sys.stderr.isatty() else _LogLines(unit)


class Pace:
    """Work per second since the first report: what an earlier process did does not count."""

    def __init__(self) -> None:
        self.begin: tuple[float, int, float] | None = None

    def __call__(
        self, done: int, total: int, work: float | None = None
    ) -> tuple[float, float | None]:
        """Things done per second so far, and seconds left; None where nothing is known yet."""
        now, work = time.monotonic(), float(done if work is None else work)
        if self.begin is None:
            self.begin = now, done, work
        start, before, worked = self.begin
        spent = now - start
        rate = (done - before) / spent if spent > 0 else 0.0
        if done >= total:
            return rate, 0.0
        if spent <= 0 or work <= worked:
            return rate, None
        return rate, (total - work) * spent / (work - worked)


class JsonLines:
    """One JSON object a second at most, and one for the end.

    ``{"event": "progress", "done": ..., "total": ..., "layer": ..., "per_second": ...,
    "seconds_left": ...}``; ``seconds_left`` is null as long as it is not known. What is done before
    there is anything to count is told as ``{"event": "preparing", "what": ...}``.

    Parameters
    ----------
    stream : text file, optional
        Where to; standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.pace = Pace()
        self.last = -_SECONDS_BETWEEN_RECORDS

    def __call__(self, done: int, total: int, layer: str, work: float | None = None) -> None:
        """Write a record, if it is time for one."""
        rate, left = self.pace(done, total, work)
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

    def stage(self, name: str) -> None:
        """Write what is done before there is anything to count."""
        if self.pace.begin is None:
            self.event("preparing", what=name)

    def event(self, name: str, **values: object) -> None:
        """Write any record."""
        self.stream.write(json.dumps({"event": name, **values}) + "\n")
        self.stream.flush()


class _Bar:
    """A bar on a terminal."""

    def __init__(self, unit: str, console: Console) -> None:
        self.unit = unit
        self.pace = Pace()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None, speed="", left="")

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def stage(self, name: str) -> None:
        self.bar.update(self.task, description=name)

    def __call__(self, done: int, total: int, layer: str, work: float | None = None) -> None:
        rate, left = self.pace(done, total, work)
        self.bar.update(
            self.task,
            completed=done,
            total=total,
            description=layer,
            speed=f"{rate:,.0f} {self.unit}/s" if self.unit else "",
            left="" if left is None else f", {_clock(left)} left",
        )


class _NotebookBar:
    """A bar in a notebook: one output that is replaced, in the end by a line without a bar."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.pace = Pace()
        self.begin = time.monotonic()
        self.last = -_SECONDS_BETWEEN_RECORDS
        self.done = 0
        self.shown: Any = None

    def __enter__(self) -> _NotebookBar:
        from IPython.display import HTML, display

        self.shown = display(HTML("starting"), display_id=True)  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self.begin
        self._show(f"{self.done:,} {self.unit or 'steps'} in {spent:,.1f} s")

    def stage(self, name: str) -> None:
        if self.pace.begin is None:
            self._show(f"<progress></progress> {html.escape(name)}")

    def __call__(self, done: int, total: int, layer: str, work: float | None = None) -> None:
        rate, left = self.pace(done, total, work)
        now, self.done = time.monotonic(), done
        if now - self.last < _SECONDS_BETWEEN_RECORDS:
            return
        self.last = now
        parts = [f"{layer}: {_share(done, total)}"]
        parts += [f"{rate:,.0f} {self.unit}/s"] if self.unit else []
        parts += [f"{_clock(now - self.begin)} elapsed"]
        parts += [f"{_clock(left)} left"] if left is not None else []
        text = ", ".join(parts)
        self._show(f'<progress value="{done}" max="{total}"></progress> {html.escape(text)}')

    def _show(self, text: str) -> None:
        from IPython.display import HTML

        self.shown.update(HTML(text))  # type: ignore[no-untyped-call]


class _LogLines:
    """One line every ten seconds, so that a log file stays short.

    From a thread of its own too: a capture, or a slice of pairs of a large network, takes longer
    than that.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.pace = Pace()
        self.begin = self.last = time.monotonic()
        self.name, self.rest = "starting", ""
        self.turn = threading.Lock()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True, name="pyablate progress")

    def __enter__(self) -> _LogLines:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def stage(self, name: str) -> None:
        self.name = name
        self._write()

    def __call__(self, done: int, total: int, layer: str, work: float | None = None) -> None:
        rate, left = self.pace(done, total, work)
        rest = f": {_share(done, total)}"
        rest += f", {rate:,.0f} {self.unit}/s" if self.unit else ""
        rest += f", about {left:.0f} s left" if left is not None else ""
        self.name, self.rest = layer, rest
        self._write(last=done >= total)

    def _write(self, *, last: bool = False) -> None:
        with self.turn:
            now = time.monotonic()
            if now - self.last < _SECONDS_BETWEEN_LINES and not last:
                return
            self.last = now
            _log.info("%s%s (%.0f s so far)", self.name, self.rest, now - self.begin)

    def _tick(self) -> None:
        while not self.over.wait(_SECONDS_BETWEEN_LINES / 10):
            self._write()


def _share(done: int, total: int) -> str:
    return f"{100 * done / max(total, 1):.0f} % done"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
