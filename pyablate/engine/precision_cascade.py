"""Exact answers at low-precision cost: the cheapest arithmetic first, doubtful pairs again.

A delta's rounding error is relative to the *change*, not to the activation, so a low-precision
suffix settles nearly every prediction. How far its logits can be off is measured on pairs of the
run itself; a pair whose new margin lies within several times that is decided again one tier up, and
what full precision leaves open in float64.

The error is taken for a share of the spread of the logits' change, plus, in 8 bits, for a multiple
of the steps to which the pair's deltas were rounded. The spread alone would not do: next to one
large number all others of a pair are rounded to nothing, and where the network makes nothing of the
large one the logits seem not to change at all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from pyablate import ops
from pyablate.engine.care import Care
from pyablate.engine.loss_margin import Record
from pyablate.network import near_tie
from pyablate.runtime import out_of_memory
from pyablate.runtime.host_to_device import sent

logger = logging.getLogger("pyablate")

FULL = 1e-4
"""Share of a logit change's spread that rounding in float32 may reach, with much to spare."""

FEW = 8
"""Pairs of each batch on which full precision itself is measured."""

SAFETY_OF_FEW = 8.0
"""How many times the largest error seen on those is doubted."""

SAMPLE = 256
"""Pairs on which a job's low-precision error is measured, at most."""

LEAST_SAMPLE = 64
"""The same, at least; fewer pairs than that left open go to full precision at once."""

SHARE = 128
"""Of so many pairs one is measured: in full precision it costs several times the others."""

AGAIN = 512
"""The same once :data:`SAMPLE` pairs have been: images of another kind may follow."""

LEAST_AGAIN = 16
"""Pairs of every batch that are measured at least."""

WATCHED = 4
"""One measured pair of so many lies on the images watched: see ``outlying`` in rounding.py."""

SAFETY = 4.0
"""How many times the largest error seen on :data:`SAMPLE` pairs is still doubted."""

FLOOR = {torch.int8: 0.05, torch.bfloat16: 0.02}
"""Least share of the spread that is doubted, however small the errors seen. In 8 bits it stays at
that: what goes beyond is put down to the steps."""

USELESS = 0.5
"""Share of open pairs above which a tier is left out: most work would be done twice."""


@dataclass(frozen=True, eq=False)
class Changed:
    """Logit changes of some pairs.

    Attributes
    ----------
    logits : Tensor
        ``[P, K]``.
    steps : Tensor or None
        float32 ``[L, P]``: the step to which the delta was rounded before each convolution in 8
        bits, largest magnitude / 127; None where there were none.
    lost : Tensor or None
        Bool ``[P]``: pairs of which nothing is known, since an operator without a bounded slope
        read what had all but cancelled; None where there is no such operator.
    """

    logits: Tensor
    steps: Tensor | None = None
    lost: Tensor | None = None

    def first(self, count: int) -> Changed:
        """Leave out the pairs from ``count`` on."""
        steps = None if self.steps is None else self.steps[:, :count]
        return Changed(self.logits[:count], steps, None if self.lost is None else self.lost[:count])


Change = Callable[[Tensor, Tensor, torch.dtype], Changed | None]
"""``change(row, image, dtype)``: the logit changes of some pairs; None if there are none."""

Truth = Callable[[Tensor, Tensor], Tensor]
"""``truth(row, image)``: the logits of some pairs in float64, ``[P, K]`` on the CPU."""


class Known(Protocol):
    """What is known of the clean run."""

    @property
    def logits(self) -> Tensor:
        """``[N, K]``."""

    @property
    def prediction(self) -> Tensor:
        """int32 ``[N]``."""

    @property
    def tolerance(self) -> Tensor:
        """``[N]``: top-2 margins up to this are not trusted."""


def carried(dtype: torch.dtype) -> torch.dtype:
    """Floating-point dtype in which deltas are held between the convolutions of a tier."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


@dataclass(eq=False)
class Ladder:
    """Precisions of one job, from cheap to full.

    Attributes
    ----------
    tiers : list of torch.dtype
        Of the dense suffix, cheapest first; the last is the model's own, to which no doubt applies
        but :data:`FULL`. ``int8`` means convolutions in 8-bit integers, the rest in bfloat16.
    doubts : dict
        Share of the change's spread within which a tier is not trusted, once it has been measured
        on :data:`SAMPLE` pairs; see :meth:`doubt` for fewer.
    typical : list of float
        Steps of the 8-bit convolutions, in order: the median of the first pairs measured.
    gain : float
        What is doubted besides in 8 bits, in logits, where the largest step is as typical.
    strategy : str
        How the pairs were settled: "delta", or "closed form" where that was all it took.
    settled : dict
        Pairs decided by each tier so far.
    measured : int
        Pairs on which the doubts rest; with too few, full precision does all the work.
    most : int
        Pairs at a time for which memory has been seen to suffice.
    care : Care
        With which the job is done from now on.
    """

    tiers: list[torch.dtype]
    doubts: dict[torch.dtype, float] = field(default_factory=dict)
    typical: list[float] = field(default_factory=list)
    gain: float = 0.0
    strategy: str = "delta"
    settled: dict[torch.dtype, int] = field(default_factory=dict)
    measured: int = 0
    most: int = 1 << 30
    care: Care = Care.USUAL

    @property
    def full(self) -> torch.dtype:
        """The model's own precision."""
        return self.tiers[-1]

    def doubt(self, tier: torch.dtype) -> float:
        """Share of a change's spread within which a tier is not trusted at present.

        The largest of few errors says less than that of many. It grows no faster than the root of
        their number where errors of more than s times a typical one are no more frequent than
        1 / s^2; by that root the doubt is wider while fewer than :data:`SAMPLE` have been measured.
        """
        if tier == self.full:
            return self.doubts.get(tier, FULL)
        return self.doubts[tier] * self._widening

    @property
    def _widening(self) -> float:
        return math.sqrt(max(1.0, SAMPLE / max(self.measured, 1)))

    def settle(
        self,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Known,
        size: Callable[[torch.dtype], int],
        record: Record | None = None,
        truth: Truth | None = None,
        watched: Tensor | None = None,
    ) -> Tensor:
        """Class of each pair, -1 where full precision leaves it open.

        Parameters
        ----------
        change : callable
            Gives logit changes.
        row, image : Tensor
            int64 ``[P]``, on the CPU: the pairs.
        clean : Clean
            The clean run.
        size : callable
            Pairs to work on at a time, by precision.
        record : callable, optional
            Told the logit changes of every tier; of a pair's, the last are the most precise.
        truth : callable, optional
            Measures full precision on some pairs.
        watched : Tensor, optional
            int64, on the CPU: images of which more pairs are measured than of others, and on which
            the truth is known.

        Returns
        -------
        Tensor
            int32 ``[P]``, on the CPU. One wait for the device per tier that had anything to do.
        """
        if watched is None:
            watched = image[:0]
        self._calibrate(change, row, image, clean, size(self.full), watched)
        if truth is not None and len(row):
            self._measure_full(change, row, image, clean, truth, watched)
        prediction = torch.full((len(row),), -1, dtype=torch.int32)
        open_ = torch.arange(len(row))
        for tier in self.tiers if self.measured >= LEAST_SAMPLE else [self.full]:
            if tier not in (self.tiers[0], self.full) and len(open_) < LEAST_SAMPLE:
                continue
            device = clean.logits.device
            rows, images = sent(row[open_], device), sent(image[open_], device)
            found = clean.prediction[images]
            for some, changed in self._slices(change, rows, images, tier, size(tier)):
                if changed is not None:
                    found[some] = self._classify(changed, images[some], clean, tier)
                    if record is not None:
                        record(rows[some], images[some], changed.logits)
            prediction[open_] = found.cpu()
            left = open_[prediction[open_] < 0]
            self.settled[tier] = self.settled.get(tier, 0) + len(open_) - len(left)
            open_ = left
            if not len(open_):
                break
        return prediction

    def _slices(
        self, change: Change, row: Tensor, image: Tensor, tier: torch.dtype, size: int
    ) -> Iterator[tuple[slice, Changed | None]]:
        """Logit changes of some pairs at a time, of fewer from where memory does not suffice."""
        start = 0
        while start < len(row):
            some = slice(start, min(len(row), start + min(size, self.most)))
            pairs = some.stop - start
            try:
                changed = change(row[some], image[some], tier)
            except out_of_memory.ERRORS as error:
                if pairs == 1 or not out_of_memory.is_shortage(error):
                    raise
                self.most = pairs // 2
                logger.warning("out of memory: going on with %d pairs at a time", self.most)
                continue
            yield some, changed
            start = some.stop

    def _classify(self, changed: Changed, image: Tensor, clean: Known, tier: torch.dtype) -> Tensor:
        short, doubt = image.to(torch.int32), self.doubt(tier)
        logits, tolerance = clean.logits, clean.tolerance
        if changed.steps is not None:
            slack = self.gain * self._widening * self._coarseness(changed.steps)
            logits, tolerance = logits[image], tolerance[image] + slack.nan_to_num(torch.inf)
            short = torch.arange(len(image), dtype=torch.int32, device=image.device)
        found = ops.classify(logits, changed.logits, short, tolerance, relative=doubt)
        return found if changed.lost is None else found.masked_fill(changed.lost, -1)

    def _coarseness(self, steps: Tensor) -> Tensor:
        """Largest of a pair's steps, each in units of the typical one, ``[P]``."""
        typical = torch.tensor(self.typical, dtype=steps.dtype, device=steps.device)
        share = steps / typical.unsqueeze(1)
        return torch.where(steps == 0, torch.zeros_like(share), share).amax(dim=0)

    def _calibrate(
        self,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Known,
        at_a_time: int,
        watched: Tensor,
    ) -> None:
        """Measure the low tiers' errors on a spread of pairs; leave out those of no use.

        Every batch is measured, since its images may be of another kind than those before; bounds
        only grow. Few pairs will do while the bounds hold.
        """
        if len(self.tiers) == 1 or not len(row):
            return
        known = self.measured >= SAMPLE
        least, share = (LEAST_AGAIN, AGAIN) if known else (LEAST_SAMPLE, SHARE)
        size = min(len(row), SAMPLE, max(least, len(row) // share))
        before = self._bounds
        useless = self._measure(change, row, image, clean, size, at_a_time, watched)
        more = min(len(row), SAMPLE)
        surprised = known and self._bounds != before
        if (useless or surprised) and more > size:  # not on the word of a few
            self.measured -= size
            useless = self._measure(change, row, image, clean, more, at_a_time, watched)
        for tier in useless if self.measured >= LEAST_SAMPLE else []:
            logger.info("%s is too coarse here (doubt %.2g)", tier, self.doubts.get(tier, 1.0))
            self.tiers.remove(tier)

    @property
    def _bounds(self) -> tuple[float, ...]:
        return *(self.doubts.get(tier, 0.0) for tier in self.tiers[:-1]), self.gain

    def _measure(
        self,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Known,
        size: int,
        at_a_time: int,
        watched: Tensor,
    ) -> list[torch.dtype]:
        """Measure the low tiers' errors on some of the pairs; return the tiers of no use."""
        chosen = sample(row, size, torch.isin(image, watched))
        row, image = (sent(pairs[chosen], clean.logits.device) for pairs in (row, image))

        def changes(tier: torch.dtype) -> Changed | None:
            found = [
                # What a recording gives stands until its next call.
                Changed(part.logits.clone(), part.steps, part.lost)
                for _, part in self._slices(change, row, image, tier, at_a_time)
                if part is not None
            ]
            return joined(found) if found else None

        exact = changes(self.full)
        if exact is None:
            return []
        self.measured = min(SAMPLE, self.measured + size)
        useless = []
        for tier in self.tiers[:-1]:
            try:
                rough = changes(tier)
            except RuntimeError as error:
                if out_of_memory.is_shortage(error):
                    raise
                logger.info("%s is left out: %s", tier, str(error).splitlines()[0])
                useless.append(tier)
                continue
            assert rough is not None
            self._learn(tier, rough, exact.logits, clean.tolerance[image])
            open_ = float((self._classify(rough, image, clean, tier) < 0).float().mean())
            if self.doubt(tier) >= 1.0 or open_ > USELESS:
                useless.append(tier)
        return useless

    def _measure_full(
        self,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Known,
        truth: Truth,
        watched: Tensor,
    ) -> None:
        """Measure full precision itself: it may be far from its best where large numbers cancel."""
        there = torch.isin(image, watched).nonzero().squeeze(1)
        if not len(there):
            if self.full in self.doubts:
                return
            there = torch.arange(len(row))
        chosen = there[sample(row[there], min(len(there), FEW))]
        row, image = row[chosen], image[chosen]
        exact, device = truth(row, image), clean.logits.device
        rows, images, exact = (sent(each, device) for each in (row, image, exact))
        slices = self._slices(change, rows, images, self.full, FEW)
        parts = [
            Changed(part.logits.clone(), lost=part.lost) for _, part in slices if part is not None
        ]
        worst = 0.0
        if parts:
            rough = joined(parts)
            delta = rough.logits.double()
            found = clean.logits[images].double() + delta
            found = torch.where(near_tie.competing(exact), found, exact)
            error, _ = _errors(replace(rough, logits=found), exact, clean.tolerance[images])
            worst = _largest_share(error, _spread(delta))
        self.doubts[self.full] = max(self.doubt(self.full), SAFETY_OF_FEW * worst)

    def _learn(self, tier: torch.dtype, rough: Changed, exact: Tensor, tolerance: Tensor) -> None:
        """Doubt a tier by the largest of its errors, none less than before."""
        known = self.doubts.get(tier, FLOOR[tier])
        error, spread = _errors(rough, exact, tolerance)
        if rough.steps is None:
            self.doubts[tier] = max(known, SAFETY * _largest_share(error, spread))
            return
        self.doubts[tier] = known
        medians = [float(some.median()) if len(some) else 0.0 for some in _positive(rough.steps)]
        before = self.typical or medians
        self.typical = [old or new for old, new in zip(before, medians, strict=True)]
        beyond = error - known / SAFETY * spread
        worst = _largest_share(beyond.clamp(min=0.0), self._coarseness(rough.steps))
        self.gain = max(self.gain, SAFETY * worst)


def sample(row: Tensor, size: int, preferred: Tensor | None = None) -> Tensor:
    """Choose ``size`` of the pairs of these rows, int64: a random one of each equal share by row.

    So that every unit has its turn, and not always with the same images. The same each time. Some
    of those that are ``preferred``, bool ``[P]``, are among them in any case.
    """
    if preferred is not None and bool(preferred.any()) and not bool(preferred.all()):
        first, rest = preferred.nonzero().squeeze(1), (~preferred).nonzero().squeeze(1)
        few = min(len(first), max(size // WATCHED, size - len(rest)))
        chosen = first[sample(row[first], few)], rest[sample(row[rest], size - few)]
        return torch.cat(chosen)
    order = row.argsort(stable=True)
    draw = torch.Generator().manual_seed(len(row))
    place = torch.arange(size) + torch.rand(size, generator=draw, dtype=torch.float64)
    return order[(place * (len(row) / size)).long().clamp(max=len(row) - 1)]


def joined(parts: Sequence[Changed]) -> Changed:
    """Put the pairs of several slices together."""
    steps = [part.steps for part in parts if part.steps is not None]
    logits = torch.cat([part.logits for part in parts])
    lost = [part.lost for part in parts if part.lost is not None]
    return Changed(
        logits, torch.cat(steps, dim=1) if steps else None, torch.cat(lost) if lost else None
    )


def _errors(rough: Changed, exact: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of rough logit changes, [P], and the spreads of these; NaN counts as infinite.

    Errors within the tolerance, and of pairs that are lost, are doubted anyway. Changes that are
    not finite in full precision say nothing about the rough one.
    """
    logits = rough.logits.to(exact.dtype)
    error, spread = _spread(logits - exact), _spread(logits)
    counts = ~(error <= tolerance) & torch.isfinite(exact).all(dim=1)
    if rough.lost is not None:
        counts &= ~rough.lost
    return torch.where(counts, error.nan_to_num(torch.inf), torch.zeros_like(error)), spread


def _largest_share(part: Tensor, whole: Tensor) -> float:
    """Largest share of one number in another; of nothing, anything is infinite."""
    share = (part / whole).nan_to_num(torch.inf)
    return float(torch.where(part > 0, share, torch.zeros_like(share)).amax())


def _positive(steps: Tensor) -> list[Tensor]:
    """Finite steps above 0 of each convolution."""
    return [some[(some > 0) & torch.isfinite(some)] for some in steps]


def _spread(change: Tensor) -> Tensor:
    """Largest difference that a change makes between two classes, [P]."""
    return change.amax(dim=1) - change.amin(dim=1)
