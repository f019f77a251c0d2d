"""The precision cascade: the cheapest arithmetic first, pairs within its error bound again.

A delta's rounding error is relative to the *change*, not to the activation, so a low-precision
suffix decides nearly every prediction. How far its logits can be off is measured on pairs of the
run itself; a pair whose new margin lies within several times that is decided again one tier up, and
what the model's own precision leaves open in the last tier, float64.

The error is taken for a share of the spread of the logits' change, plus, in 8 bits, for a multiple
of the steps to which the pair's deltas were rounded. The spread alone would not do: next to one
large number all others of a pair are rounded to nothing, and where the network makes nothing of the
large one the logits seem not to change at all.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pyablate import ops
from pyablate.engine.care import Care
from pyablate.engine.clean import Clean
from pyablate.engine.logit_change import (
    FULL,
    Change,
    Changed,
    Truth,
    errors,
    joined,
    largest_share,
    spread,
)
from pyablate.engine.loss_margin import Record
from pyablate.engine.replay import decision
from pyablate.network import near_tie
from pyablate.runtime import out_of_memory
from pyablate.runtime.host_to_device import sent

logger = logging.getLogger("pyablate")

FEW, LEAST_FEW = 8, 2
"""Pairs of a batch on which full precision itself is measured in float64, and the same of small
jobs, where these took a tenth of the time."""

SAFETY_OF_FEW = 8.0
"""Full precision's bound is so many times the largest error seen on :data:`FEW` pairs."""

SAMPLE = 256
"""Pairs on which a job's low-precision error is measured, at most."""

LEAST_SAMPLE = 64
"""The same, at least; fewer pairs than that left open go to full precision at once."""

WORTHWHILE = 4 * LEAST_SAMPLE
"""Pairs of a job from which on low precision pays: a measured pair takes up to twice as long as in
full precision alone, the others half as long. So many are to be left open by a tier for the next
low one to be tried."""

FIRST_LOOK = 4
"""One of so many of the pairs measured first tells whether a tier is hopeless."""

HOPELESS = 0.75
"""Share of these that it leaves open then: of sixteen a tier that leaves half open, and so is just
of use, leaves more than twelve open in one case of 94."""

SECOND_LOOK = 8 * SAMPLE
"""Pairs of a job from which on tiers that seem of no use are judged by :data:`SAMPLE` pairs; below
that no more than :data:`LEAST_SAMPLE` are measured at once."""

SHARE = 128
"""Of so many pairs one is measured: in full precision it costs several times the others."""

AGAIN = 512
"""The same once enough pairs have been: images of another kind may follow."""

LEAST_AGAIN = 16
"""Pairs of every batch that are measured at least."""

WATCHED = 4
"""One measured pair of so many lies on the images watched: see ``outlying`` in rounding.py."""

SAFETY = 4.0
"""A tier's bound is so many times the largest error seen on :data:`SAMPLE` pairs."""

FLOOR = {torch.int8: 0.05, torch.bfloat16: 0.02, torch.float16: 0.0025, torch.float32: 5e-4}
"""Least bounds, as shares of the spread, however small the errors seen. In 8 bits it stays at that:
what goes beyond is attributed to the steps. In float32 a tile of Winograd's convolution shares the
rounding error of its largest number, which later layers may make nothing of."""

UNDERFLOW = {torch.float16: 2.0**-12}
"""What is added to a tier's bound, in logits: of numbers below its least normal one the error is no
share. In float16 it is 2^-25 at most, which a network may enlarge 8,000 times."""

Advance = Callable[[int], None]
"""Told how many more pairs are done, for those who show progress."""

USELESS = 0.5
"""Share of open pairs above which a tier is left out: most work would be done twice."""


@dataclass(frozen=True, eq=False)
class _Live:
    """The live pairs of one job on one batch.

    Attributes
    ----------
    change : callable
        Gives logit changes.
    row, image : Tensor
        int64 ``[P]``, on the CPU.
    clean : Clean
        The clean run.
    size : callable
        Pairs to work on at a time, by precision.
    advance : callable
        Told how many more are done.
    record : callable or None
        Told logit changes.
    prediction : Tensor
        int32 ``[P]``, on the CPU: what has been decided, -1 while a pair is open.
    """

    change: Change
    row: Tensor
    image: Tensor
    clean: Clean
    size: Callable[[torch.dtype], int]
    advance: Advance
    record: Record | None
    prediction: Tensor

    @property
    def open(self) -> Tensor:
        """int64: the pairs that are open."""
        return (self.prediction < 0).nonzero().squeeze(1)

    @cached_property
    def watched(self) -> Tensor:
        """Bool ``[P]``: pairs on the images that are watched."""
        return torch.isin(self.image, self.clean.watched)

    def sent(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and images of some of the pairs, where the work is done."""
        device = self.clean.logits.device
        return sent(self.row[chosen], device), sent(self.image[chosen], device)


@dataclass(eq=False)
class PrecisionCascade:
    """Precisions of one job, from cheap to full, and float64 behind them.

    Attributes
    ----------
    tiers : list of torch.dtype
        Of the dense suffix, cheapest first; the last is the model's own, bounded by :data:`FLOOR`
        at least (:data:`FULL` in float64). ``int8`` means convolutions in 8-bit integers, the rest
        in bfloat16.
    pairs : int
        Of the job in the whole run, where that is known.
    error_bounds : dict
        Share of the change's spread within which a tier is not trusted, once it has been measured
        on :data:`SAMPLE` pairs; see :meth:`error_bound` for fewer.
    typical : list of float
        Steps of the 8-bit convolutions, in order: the median of the first pairs measured.
    gain : float
        What is added to the bound in 8 bits, in logits, where the largest step is as typical.
    strategy : str
        How the pairs were decided: "delta", or "closed form" where that was all it took.
    classified : dict
        Pairs decided by each precision so far.
    measured : int
        Pairs on which the bounds rest; with too few, full precision does all the work.
    most : int
        Pairs at a time for which memory has been seen to suffice.
    care : Care
        With which the job is done from now on.
    left_open : dict
        Share of the pairs measured last that each low tier left open, by which progress is told.
    """

    tiers: list[torch.dtype]
    pairs: int = sys.maxsize
    error_bounds: dict[torch.dtype, float] = field(default_factory=dict)
    typical: list[float] = field(default_factory=list)
    gain: float = 0.0
    strategy: str = "delta"
    classified: dict[torch.dtype, int] = field(default_factory=dict)
    measured: int = 0
    most: int = 1 << 30
    care: Care = Care.USUAL
    left_open: dict[torch.dtype, float] = field(default_factory=dict)

    @property
    def full(self) -> torch.dtype:
        """The model's own precision."""
        return self.tiers[-1]

    def error_bound(self, tier: torch.dtype) -> float:
        """Share of a change's spread within which a tier is not trusted at present.

        The largest of few errors says less than that of many. It grows no faster than the root of
        their number where errors of more than s times a typical one are no more frequent than
        1 / s^2; by that root the bound is wider while fewer than :data:`SAMPLE` have been measured.
        """
        if tier == self.full:
            return self.error_bounds.get(tier, FLOOR.get(tier, FULL))
        return self.error_bounds[tier] * self._widening

    @property
    def _widening(self) -> float:
        return math.sqrt(max(1.0, SAMPLE / max(self.measured, 1)))

    def classify(
        self,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Clean,
        size: Callable[[torch.dtype], int],
        *,
        record: Record | None = None,
        truth: Truth | None = None,
        advance: Advance = lambda pairs: None,
    ) -> Tensor:
        """Class of each pair, tier after tier.

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
            Told the logit changes of every tier but float64; of a pair's, the last are the most
            precise.
        truth : callable, optional
            Gives logits in float64, which full precision is measured by and the last tier decides
            by. Without it there is no last tier.
        advance : callable, optional
            Told after every slice of pairs how many of them are decided, about: the device is not
            waited for.

        Returns
        -------
        Tensor
            int32 ``[P]``, on the CPU; -1 where full precision leaves it open and nothing follows.
            One wait for the device per tier that had anything to do.
        """
        prediction = torch.full((len(row),), -1, dtype=torch.int32)
        live = _Live(change, row, image, clean, size, advance, record, prediction)
        if truth is not None and self.full != torch.float64:
            self._measure_full(live, truth)
        self._calibrate(live)
        for tier in self.tiers if self.measured >= LEAST_SAMPLE else [self.full]:
            open_ = live.open
            if tier not in (self.tiers[0], self.full) and len(open_) < LEAST_SAMPLE:
                continue
            if len(open_):
                self._note(live, open_, self._decide(live, open_, tier).cpu(), tier)
        return (
            prediction if truth is None else self.classify_in_float64(row, image, prediction, truth)
        )

    def classify_in_float64(
        self, row: Tensor, image: Tensor, prediction: Tensor, truth: Truth
    ) -> Tensor:
        """Decide in float64 what is still -1; all on the CPU."""
        open_ = (prediction < 0).nonzero().squeeze(1)
        if not len(open_):
            return prediction
        decided = decision(truth(row[open_], image[open_])).prediction
        self.count(torch.float64, len(open_))
        return prediction.index_copy(0, open_, decided)

    def count(self, tier: torch.dtype, pairs: int) -> None:
        """Take note of pairs that a precision has decided."""
        if pairs:
            self.classified[tier] = self.classified.get(tier, 0) + pairs

    def _note(self, live: _Live, chosen: Tensor, found: Tensor, tier: torch.dtype) -> int:
        """Write down what a tier has found of some pairs, on the CPU; how many it has decided."""
        known = live.prediction[chosen]
        live.prediction[chosen] = torch.where(known < 0, found, known)
        decided = int(((known < 0) & (found >= 0)).sum())
        self.count(tier, decided)
        return decided

    def _decide(self, live: _Live, open_: Tensor, tier: torch.dtype) -> Tensor:
        """Classes that a tier gives to some of the pairs, -1 where it is not precise enough."""
        row, image = live.sent(open_)
        found = live.clean.prediction[image]
        for some, changed in self._slices(live, row, image, tier, live.size(tier)):
            if changed is not None:
                found[some] = self._trusted(changed, image[some], live.clean, tier)
                if live.record is not None:
                    live.record(row[some], image[some], changed.logits)
            decided = 1.0 - self.left_open.get(tier, 0.0)
            live.advance(round((some.stop - some.start) * decided))
        return found

    def _slices(
        self, live: _Live, row: Tensor, image: Tensor, tier: torch.dtype, size: int
    ) -> Iterator[tuple[slice, Changed | None]]:
        """Logit changes of some pairs at a time, of fewer from where memory does not suffice."""
        start = 0
        while start < len(row):
            some = slice(start, min(len(row), start + min(size, self.most)))
            pairs = some.stop - start
            try:
                changed = live.change(row[some], image[some], tier)
            except out_of_memory.ERRORS as error:
                if pairs == 1 or not out_of_memory.is_shortage(error):
                    raise
                self.most = pairs // 2
                logger.warning("out of memory: going on with %d pairs at a time", self.most)
                continue
            yield some, changed
            start = some.stop

    def _changes(
        self, live: _Live, row: Tensor, image: Tensor, tier: torch.dtype, size: int
    ) -> Changed | None:
        """Logit changes of all of some pairs; None if there are none."""
        found = [
            # What a recording gives stands until its next call.
            replace(
                part, logits=part.logits.clone(), steps=_kept(part.steps), lost=_kept(part.lost)
            )
            for _, part in self._slices(live, row, image, tier, size)
            if part is not None
        ]
        return joined(found) if found else None

    def _trusted(self, changed: Changed, image: Tensor, clean: Clean, tier: torch.dtype) -> Tensor:
        short, relative = image.to(torch.int32), self.error_bound(tier)
        logits, tolerance = clean.logits, tolerance_of(tier, clean)
        if changed.steps is not None:
            slack = self.gain * self._widening * self._coarseness(changed.steps)
            logits, tolerance = logits[image], tolerance[image] + slack.nan_to_num(torch.inf)
            short = torch.arange(len(image), dtype=torch.int32, device=image.device)
        found = ops.classify(logits, changed.logits, short, tolerance, relative=relative)
        return found if changed.lost is None else found.masked_fill(changed.lost, -1)

    def _coarseness(self, steps: Tensor) -> Tensor:
        """Largest of a pair's steps, each in units of the typical one, ``[P]``."""
        typical = torch.tensor(self.typical, dtype=steps.dtype, device=steps.device)
        share = steps / typical.unsqueeze(1)
        return torch.where(steps == 0, torch.zeros_like(share), share).amax(dim=0)

    def _calibrate(self, live: _Live) -> None:
        """Measure the low tiers' errors on a spread of pairs; leave out those of no use.

        Every batch is measured, since its images may be of another kind than those before; bounds
        only grow. Few pairs will do while the bounds hold.
        """
        pairs = len(live.row)
        if self.pairs < WORTHWHILE:
            self.tiers = [self.full]
        if len(self.tiers) == 1 or not pairs:
            return
        known = self.measured >= SAMPLE
        small = self.measured >= LEAST_SAMPLE and self.pairs < SECOND_LOOK
        least, share = (LEAST_AGAIN, AGAIN) if known or small else (LEAST_SAMPLE, SHARE)
        size = min(pairs, SAMPLE, max(least, pairs // share))
        before = self._bounds
        useless = self._measure(live, size)
        more = min(pairs, SAMPLE)
        surprised = known and self._bounds != before
        again = surprised or (useless and self.pairs >= SECOND_LOOK)
        if again and more > size:  # few pairs are not enough to judge by
            self.measured -= size
            useless = self._measure(live, more)
        for tier in useless if self.measured >= LEAST_SAMPLE else []:
            bound = self.error_bounds.get(tier, 1.0)
            logger.debug("%s is too coarse here (error bound %.2g)", tier, bound)
            self.tiers.remove(tier)

    @property
    def _bounds(self) -> tuple[float, ...]:
        return *(self.error_bounds.get(tier, 0.0) for tier in self.tiers[:-1]), self.gain

    def _measure(self, live: _Live, size: int) -> list[torch.dtype]:
        """Measure the low tiers' errors on some of the pairs; return the tiers of no use.

        These pairs are computed in full precision, by which they are decided.
        """
        chosen = sample(live.row, size, live.watched)
        before, look = self.measured, 0
        if not before and size >= LEAST_SAMPLE:
            first = torch.arange(size) % FIRST_LOOK == 0
            chosen, look = torch.cat([chosen[first], chosen[~first]]), int(first.sum())
        row, image = live.sent(chosen)
        exact = self._changes(live, row, image, self.full, live.size(self.full))
        if exact is None:
            return []
        self.measured = min(SAMPLE, before + size)
        if live.record is not None:
            live.record(row, image, exact.logits)
        found = self._trusted(exact, image, live.clean, self.full).cpu()
        live.advance(self._note(live, chosen, found, self.full))
        just_enough = before < LEAST_SAMPLE <= self.measured
        useless, left = [], 1.0  # share that the tiers before leave open
        for tier in self.tiers[:-1]:
            if just_enough and left * self.pairs < WORTHWHILE:
                self.tiers.remove(tier)
                continue
            open_ = self._measure_tier(live, row, image, exact, tier, look)
            self.left_open[tier] = open_
            if open_ > USELESS or self.error_bound(tier) >= 1.0:
                useless.append(tier)
            else:
                left = (open_ * size + 1) / (size + 1)  # none of a few is not none of many
        return useless

    def _measure_tier(
        self,
        live: _Live,
        row: Tensor,
        image: Tensor,
        exact: Changed,
        tier: torch.dtype,
        look: int,
    ) -> float:
        """Bound a low tier's errors by those on some pairs; the share of these it leaves open.

        The first few, if there is a first ``look``, tell whether the others are worth it.
        """
        tolerance = tolerance_of(tier, live.clean)[image]
        parts = [slice(look), slice(look, None)] if look else [slice(None)]
        known: list[Changed] = []
        open_ = 1.0
        for part in parts:
            try:
                rough = self._changes(live, row[part], image[part], tier, live.size(self.full))
            except RuntimeError as error:
                if out_of_memory.is_shortage(error):
                    raise
                logger.debug("%s is left out: %s", tier, str(error).splitlines()[0])
                return 1.0
            assert rough is not None
            known.append(rough)
            some, count = joined(known), sum(len(one.logits) for one in known)
            self._learn(tier, some, exact.logits[:count], tolerance[:count])
            trusted = self._trusted(some, image[:count], live.clean, tier)
            open_ = float((trusted < 0).float().mean())
            if part.stop == look and open_ > HOPELESS:
                break
        return open_

    def _measure_full(self, live: _Live, truth: Truth) -> None:
        """Measure full precision itself: it may be far from its best where large numbers cancel."""
        there = live.watched.nonzero().squeeze(1)
        if not len(there):
            if self.full in self.error_bounds or not len(live.row):
                return
            there = torch.arange(len(live.row))
        few = min(len(there), FEW, max(LEAST_FEW, self.pairs // SHARE))
        chosen = there[sample(live.row[there], few)]
        clean = live.clean
        exact = truth(live.row[chosen], live.image[chosen])
        row, image = live.sent(chosen)
        exact = sent(exact, clean.logits.device)
        rough = self._changes(live, row, image, self.full, few)
        worst = 0.0
        if rough is not None:
            delta = rough.logits.double()
            found = clean.logits[image].double() + delta
            found = torch.where(near_tie.competing(exact), found, exact)
            error, _ = errors(replace(rough, logits=found), exact, clean.tolerance[image])
            worst = largest_share(error, spread(delta))
        bound = SAFETY_OF_FEW * math.sqrt(FEW / few) * worst  # see `error_bound`
        self.error_bounds[self.full] = max(self.error_bound(self.full), bound)

    def _learn(self, tier: torch.dtype, rough: Changed, exact: Tensor, tolerance: Tensor) -> None:
        """Bound a tier's errors by the largest of these, and no less than before."""
        known = self.error_bounds.get(tier, FLOOR[tier])
        error, size = errors(rough, exact, tolerance)
        if rough.steps is None:
            self.error_bounds[tier] = max(known, SAFETY * largest_share(error, size))
            return
        self.error_bounds[tier] = known
        positive = [some[(some > 0) & torch.isfinite(some)] for some in rough.steps]
        medians = [float(some.median()) if len(some) else 0.0 for some in positive]
        before = self.typical or medians
        self.typical = [old or new for old, new in zip(before, medians, strict=True)]
        beyond = error - known / SAFETY * size
        worst = largest_share(beyond.clamp(min=0.0), self._coarseness(rough.steps))
        self.gain = max(self.gain, SAFETY * worst)


def tolerance_of(tier: torch.dtype, clean: Clean) -> Tensor:
    """Return the part of a tier's bound that is no share of the change, in logits, ``[N]``."""
    return clean.tolerance + UNDERFLOW.get(tier, 0.0)


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
    first = torch.arange(size + 1) * len(row) // size
    place = torch.rand(size, generator=draw, dtype=torch.float64) * first.diff()
    return order[first[:-1] + place.long()]


def _kept(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
