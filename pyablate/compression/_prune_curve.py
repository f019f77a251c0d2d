"""Pruning curves: accuracy against the share of units removed, by ranking and at random."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pyablate._validation import check_exact
from pyablate.comparison.evaluation import Evaluation, evaluate, prepared
from pyablate.compression._rank import Ranking
from pyablate.compression._remove import AGREEMENT, Size, silenced, silencing, without
from pyablate.compression.coupling import Coupled, Coupling
from pyablate.data.dataset import Data
from pyablate.network import near_tie
from pyablate.network.batch_norm import fold_norms, norms_to_fold
from pyablate.network.classifier import giving_logits, inputs_of
from pyablate.network.forward import check_logits, device_of
from pyablate.network.model_checks import class_names_of, fit_inputs
from pyablate.runtime.determinism import undisturbed
from pyablate.runtime.progress import Report, reporting

logger = logging.getLogger("pyablate")

FRACTIONS = tuple(round(0.1 * step, 1) for step in range(1, 10))
RANDOM = "random"


def prune_curve(
    model: nn.Module,
    data: Any,
    rankings: Ranking | Sequence[Ranking] | Mapping[str, Ranking],
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = 3,
    guarantee: str = "exact",
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | Report | None = None,
) -> pd.DataFrame:
    """Evaluate a network with more and more of its units gone.

    Each point is the network without its units: really without their channels, which computes what
    the network computes with these units at zero, and costs less the more of them are gone. Where
    both differ on the first images (something turns zero into another number), units are held
    at zero instead.

    Parameters
    ----------
    model : nn.Module
        Trained classifier; it stays as it is.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        As for :func:`pyablate.ablate`.
    rankings : Ranking, sequence of Ranking or mapping of str to Ranking
        From :func:`pyablate.rank`; a mapping names them.
    fractions : sequence of float
        Shares of all removable places, each from 0 to 1; 0 is always there.
    seeds : int
        Random orders to compare with, of the same places and scope as the first ranking of each
        scope; 0 for none.
    guarantee : {"exact"}
        Nothing else: each point is one pass of a network over the images, which screening could
        not shorten, and the loss needs all of its logits.
    class_names : sequence of str, optional
        One per class; by default as for :func:`pyablate.ablate`.
    device : str or torch.device, optional
        Where to work; by default where the model is.
    batch_size : int, optional
        Images per forward pass; by default 64 on a CPU, 256 elsewhere.
    progress : bool or callable, optional
        As for :func:`pyablate.ablate`.

    Returns
    -------
    pandas.DataFrame
        One row per ranking, seed and fraction: ``ranking``; ``seed`` (-1 where there is none);
        ``fraction``; ``places`` and ``units``, how many went; ``accuracy``,
        ``worst_class_accuracy`` with its ``worst_class``, ``mean_class_accuracy`` and ``loss``
        (mean cross entropy); ``chance``, the accuracy of guessing, 1 / classes;
        ``parameters`` and ``flops`` (of one image) of the network without them.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments or data, rankings of another network.

    Notes
    -----
    Predictions equal those of a float64 forward pass with the units at zero, near ties apart.

    Examples
    --------
    >>> norms = pa.compression.filter_ranking(model, images[:2], "l1")
    >>> curves = pa.prune_curve(model, data, {"l1": norms}, fractions=[0.1, 0.5], seeds=1)
    >>> curves["ranking"].unique().tolist()
    ['l1', 'random']
    """
    shares = _fractions(fractions)
    check_exact(guarantee, "each point of a curve is one pass of a network over all images")
    named = _named(rankings)
    with undisturbed(model, device):
        work, dtype = prepared(model, device)
        images = Data(data, dtype=dtype, device=device_of(work))
        points = _Points(work, images, batch_size, class_names)
        orders = [(name, -1, ranking) for name, ranking in named.items()]
        orders += [
            (name, seed, ranking.shuffled(seed))
            for name, ranking in _baselines(named.values()).items()
            for seed in range(seeds)
        ]
        rows = []
        with reporting(progress) as report:
            for done, (name, seed, ranking) in enumerate(orders):
                report(done * len(shares), len(orders) * len(shares), name)
                for share in shares:
                    gone = ranking.first(share)
                    head = {"ranking": name, "seed": seed, "fraction": share}
                    rows.append(head | points.row(gone))
            report(len(rows), len(rows), name)
    return pd.DataFrame(rows)


class _Points:
    """Evaluates the network without some units, each set once."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        batch_size: int | None,
        class_names: Sequence[str] | None,
    ) -> None:
        self.data, self.batch_size = data, batch_size
        sample = data.first(2).images
        with giving_logits(model):
            classes = check_logits(fit_inputs(model, data, sample), 2).shape[1]
            inputs = inputs_of(model)
            self.norms = norms_to_fold(model, sample)
        self.names = class_names_of(model, class_names, classes)
        self.chance = 1 / classes
        self.coupling = Coupling(model, sample if inputs is None else inputs.as_given(sample))
        self.double = model.double()
        self._known: dict[frozenset[str], tuple[Evaluation, Size]] = {}

    def row(self, gone: Sequence[Coupled]) -> dict[str, Any]:
        units = frozenset(unit for one in gone for unit in one.units)
        if units not in self._known:
            self._known[units] = self._evaluate(units)
        found, sized = self._known[units]
        worst = int(np.nanargmin(found.class_accuracy))
        return {
            "places": len(gone),
            "units": len(units),
            "accuracy": found.accuracy,
            "worst_class_accuracy": float(found.class_accuracy[worst]),
            "worst_class": self.names[worst],
            "mean_class_accuracy": float(np.nanmean(found.class_accuracy)),
            "loss": found.loss,
            "chance": self.chance,
            "parameters": sized.parameters,
            "flops": sized.flops,
        }

    def _evaluate(self, units: frozenset[str]) -> tuple[Evaluation, Size]:
        coupling, double = self.coupling, self.double
        smaller, sized, logits = without(coupling, units)
        with ExitStack() as held:
            if near_tie.disagreement(logits, silenced(coupling, units)) > AGREEMENT:
                logger.info("prune_curve: %d units are held at zero instead of removed", len(units))
                smaller = coupling.model
                held.enter_context(silencing(smaller, coupling.sites, units))
            else:
                fold_norms(smaller, self.norms)
            held.enter_context(silencing(double, coupling.sites, units))
            return evaluate(smaller, self.data, self.batch_size, exact=double), sized


def _fractions(fractions: Sequence[float]) -> list[float]:
    shares = sorted({0.0, *(float(share) for share in fractions)})
    if shares[0] < 0 or shares[-1] > 1:
        raise ValueError(f"fractions: expected numbers from 0 to 1, got {list(fractions)}")
    return shares


def _named(rankings: Any) -> dict[str, Ranking]:
    if isinstance(rankings, Ranking):
        rankings = [rankings]
    if isinstance(rankings, Mapping):
        named = {str(name): ranking for name, ranking in rankings.items()}
    elif isinstance(rankings, Sequence):
        named = {}
        for ranking in rankings:
            if isinstance(ranking, Ranking) and ranking.name in named:
                raise ValueError(
                    f"rankings: two are called {ranking.name!r}; name them with a mapping"
                )
            named[getattr(ranking, "name", "")] = ranking
    else:
        raise TypeError(f"rankings: expected rankings of pa.rank, got {type(rankings).__name__}")
    for ranking in named.values():
        if not isinstance(ranking, Ranking):
            got = type(ranking).__name__
            raise TypeError(f"rankings: expected rankings of pa.rank, got {got}")
    if not named:
        raise ValueError("rankings: expected at least one ranking, got none")
    return named


def _baselines(rankings: Iterable[Ranking]) -> dict[str, Ranking]:
    """Give a ranking to shuffle for each scope."""
    by_scope: dict[str, Ranking] = {}
    for ranking in rankings:
        by_scope.setdefault(ranking.scope, ranking)
    if len(by_scope) == 1:
        return {RANDOM: next(iter(by_scope.values()))}
    return {f"{RANDOM} ({scope})": ranking for scope, ranking in by_scope.items()}
