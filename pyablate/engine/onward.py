"""Pairs that stay open behind a narrow place go on from there, not from their units again.

All that they change behind it follows from their change at the place, which is known. They come in
slices from which others have left, and wait until they fill one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyablate.engine.logit_change import Changed
from pyablate.engine.pair_slice import Held, change_from
from pyablate.engine.sweep import Sweep

Judge = Callable[[Changed, Tensor], Tensor]
"""``judge(changed, image)``: class of each pair, int32 ``[P]``; -1 where it is not certain."""


@dataclass(eq=False)
class Onward:
    """What goes on of a job's pairs on a batch, in the precision in which it was carried.

    Attributes
    ----------
    sweep : Sweep
        The job on the batch.
    dtype : torch.dtype
        That precision.
    size : int
        Pairs to work on at a time, which is as many as wait.
    judge : callable
        Tells the classes.
    """

    sweep: Sweep
    dtype: torch.dtype
    size: int
    judge: Judge
    _waiting: list[Held] = field(default_factory=list)
    _found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, held: Held) -> None:
        """Let pairs go on, now or later; no more than ``size``."""
        if sum(len(one.pairs) for one in self._waiting) + len(held.pairs) > self.size:
            self._go_on()
        self._waiting.append(held)

    def classes(self) -> tuple[Tensor, Tensor]:
        """Pairs that went on, int64 ``[P]``, and their classes, int32; both on the CPU."""
        if self._waiting:
            self._go_on()
        if not self._found:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
        pairs, classes = zip(*self._found, strict=True)
        return torch.cat(pairs), torch.cat(classes).cpu()

    def _go_on(self) -> None:
        held = Held.joined(self._waiting)
        self._waiting.clear()
        changed = change_from(self.sweep, held, self.dtype)
        if changed is None:  # nothing that the logits read has changed
            self._found.append((held.pairs, self.sweep.clean.prediction[held.image]))
        else:
            self._found.append((held.pairs, self.judge(changed, held.image)))
