"""Rankings: orders in which the units of a network are removed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from pyablate._validation import check_choice, check_exact, check_fraction, check_seed, nearest
from pyablate.analysis.statistics import mcnemar, sampling_variance
from pyablate.analysis.targets import unit_targets
from pyablate.analysis.unit_table import attribute_columns, table_frame
from pyablate.compression.coupling import Coupled, Coupling
from pyablate.result import AblationResult
from pyablate.results.arrays import Floats
from pyablate.results.screening import Screening

if TYPE_CHECKING:
    import xarray as xr

logger = logging.getLogger("pyablate")

UNRESOLVED = 0.05
"""Above this p value of McNemar's test the 95 % interval of an accuracy drop holds 0."""
SCOPES = ("global", "layer")
COMBINATIONS: dict[str, Callable[[list[float]], float]] = {
    "max": np.max,
    "mean": np.mean,
    "sum": np.sum,
}


def rank(
    model: nn.Module,
    sample: Any,
    scores: str | AblationResult | xr.Dataset | pd.DataFrame | Mapping[str, float],
    *,
    column: str | None = None,
    layers: str | Sequence[str] | None = None,
    scope: str = "global",
    combine: str = "max",
    highest_first: bool = False,
    name: str | None = None,
    seed: int = 0,
    guarantee: str = "exact",
) -> Ranking:
    """Put the units of a network in an order of removal, those that hang together as one.

    Parameters
    ----------
    model : nn.Module
        The network; it stays as it is.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``; one image is enough.
    scores : "random", AblationResult, xarray.Dataset, pandas.DataFrame or mapping
        What to rank by: chance; the measured drops of an ablation; attributes over unit labels
        (variables over the coordinate ``unit``, or columns with labels as index); or your own
        scores by label, as a mapping or ``pandas.Series``.
    column : str, optional
        Which drop or attribute: of a result any target of :func:`pyablate.correlate` that needs no
        preferred class, such as ``"accuracy_drop"`` (the default), ``"shrunken_drop"``,
        ``"max_class_drop"`` or ``"split_half_drop"``; of a table any of its attributes, needless if
        there is only one. Where most accuracy drops cannot be told from 0 (McNemar's test at 5 %),
        the default is ``"shrunken_drop"``, but of an estimated run, and ranking by accuracy drops
        warns in the log.
    layers : str or sequence of str, optional
        Rank only these (names or globs) and what hangs together with them.
    scope : {"global", "layer"}
        ``"global"`` compares scores of all layers; ``"layer"`` only within the layers, so that
        each loses about the same share.
    combine : {"max", "mean", "sum"}
        Makes one score of those of units that hang together. A row of an ablation result
        in which exactly these were ablated together goes before.
    highest_first : bool
        Remove the highest scores first instead of the lowest.
    name : str, optional
        Of the ranking; by default the column, or ``"random"``.
    seed : int
        Of a random ranking.
    guarantee : {"exact"}
        Nothing else: nothing is ablated here. Scores of a screened result may be ranked by, and the
        ranking keeps its certificate.

    Returns
    -------
    Ranking
        Units without a score, or with only some of theirs scored, come last and are marked: that
        they were not tested does not make them harmless. So do units that cannot be removed.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments, scores for units that the network does not have, or none at all, or a
        result in which the units of a layer lie along another axis, given by ``axis=``.

    Notes
    -----
    Which channels hang together is taken from Torch-Pruning [1]_.

    .. [1] Fang, Ma, Song, Mi, Wang, *DepGraph: Towards Any Structural Pruning*, CVPR 2023.

    Examples
    --------
    >>> ranking = pa.rank(model, images[:2], result, column="max_class_drop", layers="features.16")
    >>> ranking.name, len(ranking.order)
    ('max_class_drop', 128)
    """
    check_exact(
        guarantee,
        'nothing is ablated here; rank by a result of pa.ablate(..., guarantee="screened")',
    )
    check_choice("scope", scope, SCOPES)
    check_choice("combine", combine, COMBINATIONS)
    coupling = Coupling(model, sample)
    chosen = coupling.selected(layers)
    if isinstance(scores, str):
        check_choice("scores", scores, ("random",))
        values = _random(chosen, seed)
        notes = [one.obstacle for one in chosen]
        title = name or f"random:{seed}"
    else:
        _check_axes(coupling, scores)
        title, by_label = _by_label(scores, column)
        values, notes = _of_classes(coupling, chosen, by_label, combine)
        title = name or title
    usable = np.array([not note for note in notes], dtype=bool)
    if not usable.any():
        raise ValueError(
            f"scores: no unit that could be ranked; of the first, {chosen[0].label!r}: {notes[0]}"
        )
    sizes = {layer: coupling.layer_size(layer) for one in chosen for layer in one.layers}
    order = _order(chosen, -values if highest_first else values, usable, scope)
    return Ranking(
        name=title,
        order=tuple(chosen[i] for i in order),
        scores=values[order],
        notes=tuple(notes[i] for i in order),
        layer_sizes=sizes,
        scope=scope,
        screening=scores.screening if isinstance(scores, AblationResult) else None,
        guarantee=scores.guarantee if isinstance(scores, AblationResult) else "exact",
    )


@dataclass(frozen=True, eq=False)
class Ranking:
    """Units in the order in which they go.

    Attributes
    ----------
    name : str
        What they are ranked by.
    order : tuple of Coupled
        Units that go together, first to go first; what cannot go, or was not tested, is last.
    scores : float64 [order]
        NaN where there is none.
    notes : tuple of str
        Why a place of the order is never removed; empty if it may be.
    layer_sizes : dict of str to int
        Units of each layer.
    scope : {"global", "layer"}
        What the scores were compared within.
    screening : Screening or None
        Certificate of the screened run whose drops these scores are; None of any others.
    guarantee : {"exact", "screened", "estimated"}
        Of the run whose drops these scores are.

    Examples
    --------
    >>> chance = pa.rank(model, images[:2], "random", scope="layer", seed=0)
    >>> chance.scope, chance.layer_sizes["features.16"]
    ('layer', 128)
    """

    name: str
    order: tuple[Coupled, ...]
    scores: Floats
    notes: tuple[str, ...]
    layer_sizes: dict[str, int]
    scope: str = "global"
    screening: Screening | None = None
    guarantee: str = "exact"

    def __repr__(self) -> str:
        """Name and counts in one line."""
        may = sum(not note for note in self.notes)
        article = "an" if self.guarantee == "estimated" else "a"
        by = "" if self.guarantee == "exact" else f", by {article} {self.guarantee} run"
        return f"Ranking({self.name}: {len(self.order)} in order, {may} may be removed{by})"

    @cached_property
    def removable(self) -> int:
        """Number of places that could be removed, tested or not."""
        return sum(not one.obstacle for one in self.order)

    @cached_property
    def sequence(self) -> tuple[Coupled, ...]:
        """What is removed one after the other; the last unit of a layer always stays."""
        left = dict(self.layer_sizes)
        going = []
        for one, note in zip(self.order, self.notes, strict=True):
            lost = {layer: 0 for layer in one.layers}
            for unit in one.units:
                lost[unit.rpartition(":")[0]] += 1
            if note or any(left[layer] <= count for layer, count in lost.items()):
                continue
            for layer, count in lost.items():
                left[layer] -= count
            going.append(one)
        return tuple(going)

    def first(self, fraction: float) -> tuple[Coupled, ...]:
        """Return what goes when a share of all removable places is to go.

        Parameters
        ----------
        fraction : float
            From 0 to 1. Fewer go where the ranking has no more that may.

        Raises
        ------
        ValueError
            The fraction is outside 0 to 1.
        """
        check_fraction("fraction", fraction)
        return self.sequence[: round(fraction * self.removable)]

    def units(self, fraction: float) -> tuple[str, ...]:
        """Labels of all units that go, see :meth:`first`."""
        return tuple(unit for one in self.first(fraction) for unit in one.units)

    def within(self, layers: tuple[str, ...]) -> Ranking:
        """Return the ranking of those places only whose units lie in exactly these layers."""
        kept = [i for i, one in enumerate(self.order) if one.layers == layers]
        if not kept:
            hint = nearest("+".join(layers), ("+".join(one.layers) for one in self.order), 1)
            raise ValueError(f"layers: the ranking has none in {layers!r}{hint}")
        return replace(
            self,
            order=tuple(self.order[i] for i in kept),
            scores=self.scores[kept],
            notes=tuple(self.notes[i] for i in kept),
        )

    def shuffled(self, seed: int) -> Ranking:
        """Return the same places in random order, a baseline; what never goes stays last."""
        chance = _random(self.order, seed)
        usable = np.array([not note for note in self.notes], dtype=bool)
        order = _order(self.order, chance, usable, self.scope)
        return replace(
            self,
            name=f"random:{seed}",
            order=tuple(self.order[i] for i in order),
            scores=chance[order],
            notes=tuple(self.notes[i] for i in order),
            screening=None,
            guarantee="exact",
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per place: ``label``, ``layer``, ``units``, ``score``, ``removed``, ``note``."""
        going = {id(one) for one in self.sequence}
        return pd.DataFrame(
            {
                "label": [one.label for one in self.order],
                "layer": ["+".join(one.layers) for one in self.order],
                "units": [len(one.units) for one in self.order],
                "score": self.scores,
                "removed": [id(one) in going for one in self.order],
                "note": self.notes,
            }
        )


def _random(chosen: Sequence[Coupled], seed: int) -> Floats:
    check_seed(seed)
    drawn: Floats = np.random.default_rng(seed).random(len(chosen))
    drawn[[bool(one.obstacle) for one in chosen]] = np.nan
    return drawn


def _check_axes(coupling: Coupling, scores: Any) -> None:
    """Refuse units that no channels are."""
    given = scores.given_axes if isinstance(scores, AblationResult) else {}
    for site in coupling.sites:
        axis = given.get(site.name, site.axis)
        if axis != site.axis:
            raise ValueError(
                f"scores: the units of {site.name!r} lie along axis {axis}, given by axis=, and "
                f"channels can be removed along axis {site.axis} only; leave the layer out of the "
                "run, or give no axis for it"
            )


def _by_label(scores: Any, column: str | None) -> tuple[str, dict[str, float]]:
    """Name of the score and its value for each label."""
    if isinstance(scores, AblationResult):
        name = _column_of(scores, column)
        values = unit_targets(scores, name)[name]
        return name, dict(zip(scores.units["label"].astype(str), values.tolist(), strict=True))
    if isinstance(scores, (Mapping, pd.Series)) and not hasattr(scores, "data_vars"):
        own = {str(label): float(value) for label, value in scores.items()}
        return column or "scores", own
    frame = table_frame(scores)
    columns = attribute_columns(frame, column)
    if len(columns) > 1:
        raise ValueError(f"column: expected one of {', '.join(columns)} to be named, got None")
    name, values = next(iter(columns.items()))
    labels = frame.index.astype(str)
    if labels.has_duplicates:
        twice = labels[labels.duplicated()][0]
        raise ValueError(f"scores: unit {twice!r} is there more than once")
    return name, dict(zip(labels, values.tolist(), strict=True))


def _column_of(result: AblationResult, column: str | None) -> str:
    """Choose the drop to rank by, and say where accuracy is too coarse for it."""
    if column not in (None, "accuracy_drop"):
        return str(column)
    p = mcnemar(
        result.lost.sum(axis=1),
        result.gained.sum(axis=1),
        sampling_variance(result, "accuracy_drop"),
    )
    unresolved = int((p > UNRESOLVED).sum())
    if 2 * unresolved <= len(p):
        return "accuracy_drop"
    told = (
        f"the accuracy drops of {unresolved} of {len(p)} units cannot be told from 0 on "
        f"{len(result.labels)} images (McNemar, p > {UNRESOLVED:g})"
    )
    if column is None and result.estimate is None:
        logger.info("rank: %s; ranked by shrunken_drop", told)
        return "shrunken_drop"
    advice = "rank by shrunken_drop, or take more images"
    logger.warning("rank: %s: their order is mostly chance; %s", told, advice)
    return "accuracy_drop"


def _of_classes(
    coupling: Coupling, chosen: Sequence[Coupled], by_label: Mapping[str, float], combine: str
) -> tuple[Floats, list[str]]:
    """Score of each class, NaN for none, and why it is not ranked."""
    together: dict[frozenset[str], float] = {}
    single: dict[int, dict[str, float]] = {}
    for label, value in by_label.items():
        if "+" in label:
            together[frozenset(label.split("+"))] = value
        else:
            single.setdefault(id(coupling.find(label)), {})[label] = value
    values, notes = np.full(len(chosen), np.nan), []
    for i, one in enumerate(chosen):
        known = single.get(id(one), {})
        # A channel may be scored under another name, such as that of its convolution.
        mine = [known.get(unit, np.nan) for unit in one.units]
        if not any(unit in known for unit in one.units):
            mine = list(known.values())
        if frozenset(one.units) in together:
            mine = [together[frozenset(one.units)]]
        if mine:
            values[i] = COMBINATIONS[combine](mine)  # NaN if one of them is
        notes.append(one.obstacle or ("" if np.isfinite(values[i]) else _untested(one, known)))
    return values, notes


def _untested(one: Coupled, known: Mapping[str, float]) -> str:
    missing = [unit for unit in one.units if not np.isfinite(known.get(unit, np.nan))]
    return f"not tested: no score of {missing[0]}" if missing else "not tested: no finite score"


def _order(chosen: Sequence[Coupled], values: Floats, usable: np.ndarray, scope: str) -> np.ndarray:
    """Places by value; what must not go is last, equals stay in the order of the network."""
    keys = values.copy()
    if scope == "layer":
        layers = np.unique(["+".join(one.layers) for one in chosen], return_inverse=True)[1]
        for layer in range(layers.max() + 1):
            rows = np.flatnonzero((layers == layer) & usable)
            place = np.empty(len(rows))
            place[np.argsort(values[rows], kind="stable")] = np.arange(len(rows))
            keys[rows] = (place + 0.5) / max(1, len(rows))
    keys[~usable] = np.inf
    return np.argsort(keys, kind="stable")
