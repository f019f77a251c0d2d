"""Progress inside a job: what is told while its pairs on a batch are done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pyablate.engine.job import Job

SECONDS = 0.5
"""Time between two words of progress inside a job."""


@dataclass(eq=False)
class Steps:
    """Progress of one job on one batch: no more than all its pairs, whatever is done twice.

    Told twice a second at most, so that many small slices cost nothing.

    Attributes
    ----------
    job : Job
        The job at work.
    left : int
        Pairs that are not told yet.
    tell : callable
        ``tell(pairs, job)``: takes those done since it was last called.
    done : int
        How many these are so far.
    """

    job: Job
    left: int
    tell: Callable[[int, Job], None]
    done: int = 0  # and not told yet
    told: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tell(0, self.job)

    def __call__(self, pairs: int) -> None:
        """Take note of pairs that were done just now."""
        self.done = min(self.left, self.done + pairs)
        if time.monotonic() - self.told > SECONDS:
            self._tell()

    def finish(self) -> None:
        """Tell the rest, if any."""
        self.done = self.left
        if self.left:
            self._tell()

    def _tell(self) -> None:
        done, self.done = self.done, 0
        self.left, self.told = self.left - done, time.monotonic()
        self.tell(done, self.job)
