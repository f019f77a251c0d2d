"""What is predicted of pairs (unit, image), and whether that settles their class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from pyablate.engine.job import Job
from pyablate.runtime.host_to_device import sent

FEW_CLASSES = 32
"""Classes up to which every other class is a direction: no more passes than :data:`COMPETITORS`
and :data:`RANDOM` together, and nothing is left to estimate."""

COMPETITORS = 8
RANDOM = 16

FEWER = ((4, 16), (8, 8), (4, 8), (2, 8))
"""Competitors and random directions that may do as well; see :meth:`DirectionCount.choices`."""

FLOOR = 0.1
"""Share of a layer's typical change below which a change counts as that; see :meth:`Scale.of`."""


@dataclass(frozen=True)
class DirectionCount:
    """How many directions over the classes there are.

    Attributes
    ----------
    nearest : int
        To other classes, nearest first.
    random : int
        Random ones.
    """

    nearest: int
    random: int

    @classmethod
    def most(cls, classes: int) -> DirectionCount:
        """Count those that a network with so many classes may have."""
        return cls(classes - 1, 0) if classes <= FEW_CLASSES else cls(COMPETITORS, RANDOM)

    @classmethod
    def choices(cls, classes: int) -> tuple[DirectionCount, ...]:
        """List what a run chooses from, most first: each is a part of the first.

        Of few classes a half and a quarter of the others may do.
        """
        most = cls.most(classes)
        if most.random:
            return most, *(cls(*count) for count in FEWER)
        return most, *(cls(most.nearest // part, 0) for part in (2, 4) if most.nearest >= 2 * part)

    @property
    def total(self) -> int:
        """All of them, a backward pass each."""
        return self.nearest + self.random

    def __str__(self) -> str:
        random = f" and {self.random} random directions" if self.random else ""
        return f"the {self.nearest} nearest other classes{random}"


@dataclass(frozen=True)
class Scale:
    """How errors of predictions grow with what is known of a pair.

    To second order an error is quadratic in the change of the tensor at which the gradient was
    taken; where nonlinear parts act on few of its numbers it grows more slowly. The powers are
    chosen by a run's own pairs (:mod:`pyablate.runs.thresholds`).

    Attributes
    ----------
    size, norm : float
        Typical :attr:`Score.size` and :attr:`Score.norm`.
    size_power, norm_power : float
        Powers of these in an error.
    """

    size: float
    norm: float
    size_power: float = 1.0
    norm_power: float = 0.0

    def of(self, score: Score) -> Tensor:
        """How large errors of some pairs are, in logits up to a factor that they share.

        Where a gradient vanishes, a prediction of no change is worth no more than one of a
        :data:`FLOOR` of the typical change.
        """
        size = (score.size / self.size).square() + FLOOR**2
        norm = (score.norm / self.norm).square() + FLOOR**2
        return self.size * size ** (self.size_power / 2) * norm ** (self.norm_power / 2)


@dataclass(frozen=True, eq=False)
class Score:
    """What is predicted of some pairs.

    Attributes
    ----------
    lowest : Tensor
        Lead of the intact network's class over the best other one, once the unit is ablated.
    size : Tensor
        Of the change of the logits: largest difference that it makes between two classes where
        classes are few, else an estimate of the root of the sum of its squares.
    norm : Tensor
        Of the change of the tensor at which the gradient was taken: root of the sum of squares.
    rival : Tensor or None
        int32: that other class; none where nobody asks.
    """

    lowest: Tensor
    size: Tensor
    norm: Tensor
    rival: Tensor | None = None

    def relative(self, scale: Scale) -> Tensor:
        """``lowest`` in units of how large errors are."""
        return self.lowest / scale.of(self)

    def of(self, row: Tensor, image: Tensor) -> Score:
        """Take those of some pairs, from what is known of all of them ``[N, row]``."""
        rival = None if self.rival is None else self.rival[image, row]
        return Score(self.lowest[image, row], self.size[image, row], self.norm[image, row], rival)

    def only(self, pairs: Tensor) -> Score:
        """Take those of some pairs, of a list of them."""
        return Score(self.lowest[pairs], self.size[pairs], self.norm[pairs])

    def put(self, pairs: Tensor, known: Score) -> None:
        """Write in what is known of some pairs of a list."""
        self.lowest[pairs], self.size[pairs], self.norm[pairs] = (
            known.lowest,
            known.size,
            known.norm,
        )

    def on_cpu(self) -> Score:
        """Copy to the CPU, as float32."""
        return Score(self.lowest.float().cpu(), self.size.float().cpu(), self.norm.float().cpu())


def joined(parts: Sequence[Score]) -> Score:
    """Put the scores of parts of a batch together, on the CPU."""
    lowest, size, norm = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("lowest", "size", "norm")
    )
    rivals = [part.rival for part in parts if part.rival is not None]
    found = Score(lowest, size, norm).on_cpu()
    return replace(found, rival=torch.cat(rivals).cpu()) if rivals else found


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions over the classes, for some images.

    Attributes
    ----------
    prediction : Tensor
        int64 ``[N]``: the intact network's classes.
    competitors : Tensor
        int64 ``[N, M]``: other classes, nearest first.
    margins : Tensor
        ``[N, M]``: lead of the prediction over each of them, in logits.
    rest : Tensor
        ``[N]``: lead over the nearest class that is none of them; infinite where there is none.
    signs : Tensor
        ``[R, K]``: random signs less their mean; none where the competitors are all classes.
    """

    prediction: Tensor
    competitors: Tensor
    margins: Tensor
    rest: Tensor
    signs: Tensor

    @classmethod
    def of(cls, logits: Tensor, prediction: Tensor, wanted: DirectionCount) -> Directions:
        """Choose so many for images with these logits ``[N, K]`` and predictions ``[N]``."""
        images, classes = logits.shape
        count, chosen = wanted.nearest, prediction.long()
        others = logits.scatter(1, chosen.unsqueeze(1), -torch.inf)
        best = others.topk(min(count + 1, classes), dim=1)
        own = logits.gather(1, chosen.unsqueeze(1))
        margins = own - best.values
        beyond = count < classes - 1
        rest = margins[:, count] if beyond else logits.new_full((images,), torch.inf)
        signs = _signs(classes, logits)[: wanted.random]
        return cls(chosen, best.indices[:, :count], margins[:, :count], rest, signs)

    @property
    def count(self) -> DirectionCount:
        """How many there are."""
        return DirectionCount(self.competitors.shape[1], len(self.signs))

    def vectors(self) -> Iterable[Tensor]:
        """Give one ``[N, K]`` after the other."""
        images, classes = len(self.prediction), self.signs.shape[1]
        zeros = self.margins.new_zeros(images, classes)
        own = zeros.scatter(1, self.prediction.unsqueeze(1), 1.0)
        for number in range(self.competitors.shape[1]):
            yield own.scatter(1, self.competitors[:, number : number + 1], -1.0)
        for sign in self.signs:
            yield sign.expand(images, -1)

    def take(self, image: Tensor) -> Directions:
        """Take those of some images, int64."""
        prediction, competitors = self.prediction[image], self.competitors[image]
        return Directions(
            prediction, competitors, self.margins[image], self.rest[image], self.signs
        )

    def only(self, count: DirectionCount) -> Directions:
        """Take fewer of them: the nearest, and the first of the random ones."""
        near = count.nearest
        rest = self.margins[:, near] if near < self.count.nearest else self.rest
        competitors, margins = self.competitors[:, :near], self.margins[:, :near]
        return Directions(self.prediction, competitors, margins, rest, self.signs[: count.random])

    def rivals(self, changes: Tensor) -> Tensor:
        """Other class that changes ``[N, row, D]`` bring nearest, int32 ``[N, row]``.

        The first of the competitors where it is none of them.
        """
        count = self.competitors.shape[1]
        nearest = (self.margins.unsqueeze(1) + changes[..., :count]).argmin(dim=-1)
        return self.competitors.gather(1, nearest).to(torch.int32)

    def scores(
        self,
        changes: Tensor,
        norm: Tensor,
        choices: Iterable[DirectionCount],
        image: Tensor | None = None,
    ) -> list[Score]:
        """Score by each of some choices of them; see :meth:`score`."""
        return [
            self.only(count).score(self._part(changes, count), norm, image) for count in choices
        ]

    def _part(self, changes: Tensor, count: DirectionCount) -> Tensor:
        """Take changes ``[..., D]`` along those of :meth:`only`."""
        if count == self.count:
            return changes
        if not count.random:
            return changes[..., : count.nearest]
        near, random = changes.split([self.count.nearest, self.count.random], dim=-1)
        return torch.cat([near[..., : count.nearest], random[..., : count.random]], dim=-1)

    def score(self, changes: Tensor, norm: Tensor, image: Tensor | None = None) -> Score:
        """Lowest margin that changes leave, and their size.

        Parameters
        ----------
        changes : Tensor
            ``[N, ..., D]``, or ``[P, D]`` with ``image``.
        norm : Tensor
            See :class:`Score`.
        image : Tensor, optional
            int64 ``[P]``: which image each row belongs to.
        """
        margins, rest = self.margins, self.rest
        if image is not None:
            margins, rest = margins[image], rest[image]
        between = [1] * (changes.ndim - 2)
        margins = margins.reshape(len(margins), *between, -1)
        count = margins.shape[-1]
        lowest = (margins + changes[..., :count]).amin(dim=-1)
        lowest = torch.minimum(lowest, rest.reshape(len(rest), *between))
        if len(self.signs):
            return Score(lowest, changes[..., count:].square().mean(dim=-1).sqrt(), norm)
        high, low = changes.amax(dim=-1).clamp(min=0), changes.amin(dim=-1).clamp(max=0)
        return Score(lowest, high - low, norm)


def _signs(classes: int, like: Tensor) -> Tensor:
    """Random signs ``[R, K]``: as many as there may be, so that fewer are the first of them."""
    draw = torch.Generator().manual_seed(classes)
    signs = torch.randint(0, 2, (RANDOM, classes), generator=draw).to(like) * 2 - 1
    return signs - signs.mean(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What gradients say of a batch.

    Attributes
    ----------
    choices : sequence of DirectionCount
        Of the directions: scores are lists, of one score for each.
    scores : dict
        Of all pairs of each job, ``[N, row]`` on the CPU, by the gradient at the units.
    directions : Directions
        Along which changes are predicted.
    gradients : dict
        ``[N, D, elements]`` at each narrow place.
    """

    choices: Sequence[DirectionCount]
    scores: dict[Job, list[Score]]
    directions: Directions
    gradients: dict[fx.Node, Tensor]

    def at(self, place: fx.Node, image: Tensor, change: Tensor | None) -> list[Score]:
        """Score pairs, image by image, by their exact change at a place, ``[P, ...]`` or none."""
        directions, gradient = self.directions, self.gradients[place]
        along = gradient.new_zeros(len(image), directions.count.total)
        norm = gradient.new_zeros(len(image))
        if change is not None:
            flat = change.flatten(1).to(gradient.dtype)
            norm = flat.norm(dim=1)
            images, counts = image.unique_consecutive(return_counts=True)
            start = 0
            for one, count in zip(images.tolist(), counts.tolist(), strict=True):
                stop = start + count
                along[start:stop] = flat[start:stop] @ gradient[one].t()
                start = stop
        found = directions.scores(along, norm, self.choices, sent(image, along.device))
        return [score.on_cpu() for score in found]
