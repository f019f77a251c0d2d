"""What a screened run settled by prediction, and the certificate that it carries.

Pairs (unit, image) that were settled by prediction keep the intact network's class without having
been computed. A random sample of them was, drawn by a hash of unit, image and seed: what it finds
bounds how many of the others are wrong. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
from scipy import stats

GUARANTEES = ("exact", "screened", "estimated")

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sampled:
    """Pairs settled by prediction, and a random sample of them that was computed all the same.

    Attributes
    ----------
    pairs : int
        All of them.
    sampled : int
        Those computed, each drawn with the same chance.
    wrong : int
        Those of the sample whose class was another; they were corrected.

    Examples
    --------
    >>> from pyablate.results.screening import Sampled
    >>> Sampled(100_000, 1_000, 0).missed(0.01, 0.95)  # as log(20) / 0.01, about
    298.0
    """

    pairs: int = 0
    sampled: int = 0
    wrong: int = 0

    def __add__(self, other: Sampled) -> Sampled:
        """Pairs of both."""
        return Sampled(
            self.pairs + other.pairs, self.sampled + other.sampled, self.wrong + other.wrong
        )

    def missed(self, chance: float, confidence: float) -> float:
        """Upper bound of the number of wrong ones outside the sample; see ``most_wrong``."""
        return min(most_wrong(self.wrong, chance, confidence) - self.wrong, self.unseen)

    @property
    def unseen(self) -> int:
        """Pairs that were not computed."""
        return self.pairs - self.sampled


@dataclass(frozen=True)
class LayerScreening:
    """What screening did in a layer.

    Attributes
    ----------
    pairs : int
        All pairs of the layer.
    silent : int
        Those that the ablation does not change at all: known without a prediction.
    computed : int
        Those decided exactly: open ones, the sample, and audited ones.
    near, far : Sampled
        Pairs settled at first, with scores up to twice the threshold and beyond. Those opened
        again when the threshold was raised stay counted: what the sample says is about all.
    by_stage : dict of str to int
        Pairs settled at first by the gradient at the unit (an empty name), and by that at each
        narrow place of the network to which their change was carried.
    threshold : float
        Score above which the gradient at the unit settles a pair, in the end.
    raised : int
        How often the sample made it larger.

    Examples
    --------
    >>> found = pa.ablate(model, data, "features.0", guarantee="screened")
    >>> for name, layer in found.screening.layers.items():
    ...     assert layer.silent + layer.computed + layer.settled == layer.pairs
    """

    pairs: int = 0
    silent: int = 0
    computed: int = 0
    near: Sampled = field(default_factory=Sampled)
    far: Sampled = field(default_factory=Sampled)
    by_stage: dict[str, int] = field(default_factory=dict)
    threshold: float = 0.0
    raised: int = 0

    def __add__(self, other: LayerScreening) -> LayerScreening:
        """Pairs of both."""
        return LayerScreening(
            self.pairs + other.pairs,
            self.silent + other.silent,
            self.computed + other.computed,
            self.near + other.near,
            self.far + other.far,
            dict(Counter(self.by_stage) + Counter(other.by_stage)),
            max(self.threshold, other.threshold),
            max(self.raised, other.raised),
        )

    @property
    def settled(self) -> int:
        """Pairs that keep the intact network's class by prediction alone."""
        return self.pairs - self.silent - self.computed

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> LayerScreening:
        """Undo what ``Screening.to_json`` makes of it."""
        parts = {name: Sampled(**known[name]) for name in ("near", "far")}
        return cls(**{**known, **parts, "threshold": float(known["threshold"])})


@dataclass(frozen=True)
class Screening:
    """What a screened run settled by prediction, and how wrong that can be.

    Attributes
    ----------
    risk : float
        Share of wrong predictions that was asked for.
    near_chance, far_chance : float
        Chance of a settled pair to be in the sample, near its layer's threshold and beyond.
    competitors, random : int
        Directions over the classes along which changes were predicted: to the nearest other
        classes, and random ones. Chosen before the first block; of runs that were joined, the most.
    layers : dict of str to LayerScreening
        By layer; those that were computed exactly as a whole are not in it.

    Examples
    --------
    >>> found = pa.ablate(model, data, "features.0", guarantee="screened")
    >>> found.screening.wrong <= found.screening.sampled <= found.screening.pairs
    True
    """

    risk: float
    near_chance: float
    far_chance: float
    competitors: int
    random: int
    layers: dict[str, LayerScreening] = field(default_factory=dict)

    def __add__(self, other: Screening) -> Screening:
        """Join what two parts of a run found, or two runs.

        The chances of both are the smaller ones: none of its pairs was drawn with less.
        """
        names = dict.fromkeys([*self.layers, *other.layers])
        none = LayerScreening()
        layers = {n: self.layers.get(n, none) + other.layers.get(n, none) for n in names}
        return replace(
            self,
            near_chance=min(self.near_chance, other.near_chance),
            far_chance=min(self.far_chance, other.far_chance),
            competitors=max(self.competitors, other.competitors),
            random=max(self.random, other.random),
            layers=layers,
        )

    def updated(self, again: Screening, layers: Collection[str]) -> Screening:
        """Take these layers as they were done once more on the same images, screened or not."""
        found = {**self.layers, **again.layers}
        left = {n: one for n, one in found.items() if n in again.layers or n not in layers}
        return replace(self, layers=left)

    @property
    def total(self) -> LayerScreening:
        """All layers together; the threshold is the largest."""
        return sum(self.layers.values(), LayerScreening())

    @property
    def pairs(self) -> int:
        """Pairs of the screened layers."""
        return self.total.pairs

    @property
    def settled(self) -> int:
        """Pairs that keep the intact network's class by prediction alone."""
        return self.total.settled

    @property
    def computed(self) -> int:
        """Pairs decided exactly."""
        return self.total.computed

    @property
    def sampled(self) -> int:
        """Pairs that were settled and computed all the same."""
        return self.total.near.sampled + self.total.far.sampled

    @property
    def wrong(self) -> int:
        """Those of the sample that were wrong; they were corrected."""
        return self.total.near.wrong + self.total.far.wrong

    @property
    def missed_bound(self) -> float:
        """95 % upper bound of the number of flips that are missing from the result."""
        return self.missed(self.total)

    @property
    def upper_bound(self) -> float:
        """95 % upper bound of the share of wrong predictions among all pairs of the layers."""
        return self.missed_bound / max(1, self.pairs)

    def missed(self, layer: LayerScreening) -> float:
        """Bound the wrong ones of a layer, near the threshold and beyond at half the risk each."""
        confidence = 1 - (1 - CONFIDENCE) / 2
        return layer.near.missed(self.near_chance, confidence) + layer.far.missed(
            self.far_chance, confidence
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: pairs, how they were decided, and the bounds.

        ``settled_later`` are those of the settled pairs that a narrow place settled, not the unit;
        ``raised`` is how often the sample made the threshold larger.
        """
        rows = [
            {
                "layer": name,
                "pairs": layer.pairs,
                "silent": layer.silent,
                "settled": layer.settled,
                "settled_later": sum(layer.by_stage.values()) - layer.by_stage.get("", 0),
                "computed": layer.computed,
                "sampled": layer.near.sampled + layer.far.sampled,
                "wrong": layer.near.wrong + layer.far.wrong,
                "threshold": layer.threshold,
                "raised": layer.raised,
                "missed_bound": self.missed(layer),
                "upper_bound": self.missed(layer) / max(1, layer.pairs),
            }
            for name, layer in self.layers.items()
        ]
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON, which knows no infinity: that is written as text."""
        known = asdict(self)
        for layer in known["layers"].values():
            layer["threshold"] = _number(layer["threshold"])
        return known

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Screening:
        """Undo ``to_json``."""
        layers = {name: LayerScreening.of(layer) for name, layer in known["layers"].items()}
        return cls(**{**known, "layers": layers})

    def __str__(self) -> str:
        """Say in one line what was done, and what it can have missed."""
        total = self.total
        if not total.pairs:
            return "no layer was screened"
        return (
            f"{total.pairs:,} pairs: {total.silent:,} silent, {total.computed:,} computed, "
            f"{total.settled:,} predicted not to change; {self.wrong:,} of {self.sampled:,} of "
            "these, computed as a check, were wrong; 95 % upper bound "
            f"{self.upper_bound:.2g} of all predictions"
        )


def most_wrong(found: int, chance: float, confidence: float) -> float:
    """Largest number of wrong pairs of which so few would plausibly have been found.

    Each wrong pair is in the sample with the same ``chance``, so that the number found is binomial;
    the bound is the largest number of trials which gives ``found`` or fewer with a probability of
    ``1 - confidence``. Of 0 found it is about ``log(1 / (1 - confidence)) / chance``.

    Parameters
    ----------
    found : int
        Wrong pairs in the sample.
    chance : float
        Of a pair to be in it; 1 if all were computed.
    confidence : float
        Between 0 and 1.

    Returns
    -------
    float
        A whole number, ``found`` or more.
    """
    if chance >= 1:
        return float(found)
    low, high = found, found + 1
    while stats.binom.cdf(found, high, chance) >= 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        plausible = stats.binom.cdf(found, middle, chance) >= 1 - confidence
        low, high = (middle, high) if plausible else (low, middle)
    return float(low)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
