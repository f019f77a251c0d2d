"""Structured pruning: units removed from a network, and how much smaller it is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyablate._validation import first_line
from pyablate.comparison._latency import latency as timed
from pyablate.comparison.evaluation import evaluate, prepared
from pyablate.compression._rank import Ranking
from pyablate.compression._target import Measure, Target, search
from pyablate.compression.coupling import Coupling
from pyablate.data.dataset import Data
from pyablate.data.inputs import Inputs, packed
from pyablate.network import near_tie
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import check_logits, device_of, forward, own_dtype
from pyablate.network.sites import Site, evaluation, hooked
from pyablate.runtime.determinism import undisturbed

logger = logging.getLogger("pyablate")

AGREEMENT = 1e-3
"""Share of the largest logit by which masked and removed network may differ by rounding."""

_REPEATS = 10  # passes that a latency is measured by


@dataclass(frozen=True)
class Size:
    """How large a network is.

    Attributes
    ----------
    parameters : int
        Numbers in its parameters.
    flops : int
        Floating point operations of one image, a multiplication with its addition being two:
        convolutions, matrix products and attention, as ``torch.utils.flop_counter`` counts them.

    Examples
    --------
    >>> size = pa.compression.size(model, images[:1])
    >>> size.parameters, size.flops > 10**7
    (278890, True)
    """

    parameters: int
    flops: int


@dataclass(frozen=True, eq=False)
class Removal:
    """A smaller network and what was taken out.

    Attributes
    ----------
    model : nn.Module
        The smaller network, of ordinary modules, in the mode in which the original was.
    units : tuple of str
        Labels of all units that went, those that hang together with the named ones included, in
        the order in which they went.
    before, after : Size
        Of the original and of the smaller network.
    difference : float
        Largest difference on the sample between the logits of the smaller network and of the
        original with the same units at zero, as a share of the largest of these logits. Rounding
        only, about 1e-6, unless something behind a unit turns zero into another number.
    reached : bool
        Whether the smaller network is as asked for.
    steps : pandas.DataFrame or None
        Of a target, one row per number of places tried: ``places``, the share of ``flops`` and of
        ``latency`` left and ``accuracy``, as far as they were measured, and ``chosen``.

    Examples
    --------
    >>> removal = pa.remove(model, ["features.16:3"], images[:2])
    >>> removal.after.parameters < removal.before.parameters
    True
    """

    model: nn.Module
    units: tuple[str, ...]
    before: Size
    after: Size
    difference: float
    reached: bool = True
    steps: pd.DataFrame | None = None

    def __repr__(self) -> str:
        """Sizes in one line."""
        return (
            f"Removal({len(self.units)} units; parameters {self.before.parameters:,} -> "
            f"{self.after.parameters:,}; FLOPs {self.before.flops:,} -> {self.after.flops:,})"
        )


def remove(
    model: nn.Module,
    units: Ranking | Sequence[str],
    sample: Any,
    *,
    fraction: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    accuracy: float | None = None,
    data: Any = None,
) -> Removal:
    """Take units out of a network for good.

    A unit is ablated behind batch norm and activation, where it speaks; to take it out is to remove
    its channel from everything that makes it, normalises it, adds to it and reads it. Both give the
    same network function, which is checked on the sample.

    Parameters
    ----------
    model : nn.Module
        The network; it stays as it is.
    units : Ranking or sequence of str
        Labels ``"layer:unit"`` (or joined by ``+``); what hangs together with them goes too. Or a
        ranking, of which ``fraction`` goes, or as much as a target asks for, in its order.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``; a few images are enough, but for ``latency``, which is
        timed on this batch.
    fraction : float, optional
        With a ranking: share of its removable places that goes.
    flops, latency : float, optional
        With a ranking: share of the FLOPs, or of the time of a pass, that may be left; as few
        places go as meet that. Several numbers of places are tried, by bisection.
    accuracy : float, optional
        With a ranking: lowest accuracy allowed on ``data``, a share. Without the two above as many
        places go as it allows; with them no more than it allows, even if they are not met then
        (``reached`` is False, and a warning says so).
    data : pair of arrays, DataLoader or iterable of (images, labels), optional
        For ``accuracy``.

    Returns
    -------
    Removal
        The smaller network, the sizes of both and how well they agree.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Unknown units, units that cannot be removed, nothing left of a layer, a network that
        cannot run with fewer channels or is less accurate than asked for as it is, targets without
        a ranking or beside a fraction.

    Examples
    --------
    >>> removal = pa.remove(model, ["features.16:3", "features.16:7"], images[:2])
    >>> removal.units, removal.model.classifier.in_features
    (('features.16:3', 'features.16:7'), 126)
    >>> norms = pa.compression.filter_ranking(model, images[:2], "l1")
    >>> half = pa.remove(model, norms, images[:2], flops=0.5)
    >>> half.after.flops <= 0.5 * half.before.flops
    True
    """
    target = Target(flops, latency, accuracy)
    if (accuracy is None) != (data is None):
        raise ValueError("accuracy: expected together with the data on which it is measured")
    if not target.wanted:
        return _removed(Coupling(model, sample), labels_of(units, fraction))
    if not isinstance(units, Ranking) or fraction is not None:
        raise ValueError(
            f"{' and '.join(target.wanted)}: expected a ranking as units, and no fraction, got "
            f"{type(units).__name__} and {fraction!r}"
        )
    coupling = Coupling(model, sample)
    measures = _measures(coupling, units, model, sample, data)
    count, steps = search(target, len(units.sequence), measures)
    labels = [unit for one in units.sequence[:count] for unit in one.units]
    chosen = steps[steps["chosen"]].iloc[0]
    costs = {name: share for name, share in target.wanted.items() if name != "accuracy"}
    missed = [
        f"{chosen[name]:.1%} of the {name} left instead of {share:.1%}"
        for name, share in costs.items()
        if not chosen[name] <= share
    ]
    if missed:
        logger.warning("remove: target not reached: %s", ", ".join(missed))
    return replace(_removed(coupling, labels), reached=not missed, steps=steps)


def _measures(
    coupling: Coupling, ranking: Ranking, model: nn.Module, sample: Any, data: Any
) -> dict[str, Measure]:
    """Figures of the network without the first places of a ranking."""
    before, _ = _sized(coupling.model, coupling.sample, coupling.inputs)
    images = None
    if data is not None:
        images = Data(data, dtype=own_dtype(model), device=device_of(model))
        images.hold_if_read_once()

    @lru_cache(maxsize=1)
    def smaller(places: int) -> tuple[nn.Module, Size]:
        gone = [unit for one in ranking.sequence[:places] for unit in one.units]
        network, size_, _ = without(coupling, gone)
        return network, size_

    def time(places: int) -> float:
        networks = {"before": model, "after": smaller(places)[0]}
        return float(1 / timed(networks, sample, repeats=_REPEATS)["speedup"].iloc[1])

    def accuracy(places: int) -> float:
        assert images is not None  # checked before
        with undisturbed(model, None):
            return evaluate(prepared(smaller(places)[0], None)[0], images).accuracy

    return {
        "flops": lambda places: smaller(places)[1].flops / before.flops,
        "latency": time,
        "accuracy": accuracy,
    }


def _removed(coupling: Coupling, labels: Sequence[str]) -> Removal:
    """Take units out, with what hangs together with them, and compare with the masked network."""
    gone = _all_coupled(coupling, labels)
    masked = silenced(coupling, gone)
    before, _ = _sized(coupling.model, coupling.sample, coupling.inputs)
    smaller, after, logits = without(coupling, gone)
    difference = near_tie.disagreement(logits, masked)
    if not difference <= AGREEMENT:
        logger.warning(
            "remove: the smaller network differs from the masked one by %.2g of the largest logit: "
            "something behind a removed unit turns its zero into another number",
            difference,
        )
    return Removal(smaller, gone, before, after, difference)


def without(coupling: Coupling, units: Iterable[str]) -> tuple[nn.Module, Size, Tensor]:
    """Return a network without some units, its size and its logits on the sample."""
    try:
        smaller = coupling.without(units)
        return smaller, *_sized(smaller, coupling.sample, coupling.inputs)
    except (RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(
            "model: the network does not run with fewer channels, sizes may be written into its "
            f"code: {first_line(error)}"
        ) from error


def size(model: nn.Module, sample: Any) -> Size:
    """Count parameters, and FLOPs per image.

    Parameters
    ----------
    model : nn.Module
        It is run once, in evaluation mode.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``.

    Examples
    --------
    >>> pa.compression.size(model, images[:1]).parameters
    278890
    """
    return _sized(model, *packed(sample, own_dtype(model)))[0]


def _sized(model: nn.Module, sample: Tensor, inputs: Inputs | None) -> tuple[Size, Tensor]:
    """Size of a network, and the logits from which it was counted."""
    with (
        torch.no_grad(),
        evaluation(model),
        giving_logits(model, inputs=inputs),
        FlopCounterMode(display=False) as counter,
    ):
        logits: Tensor = forward(model, sample)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, counter.get_total_flops() // max(2, len(sample))), logits


def silenced(coupling: Coupling, units: Iterable[str]) -> Tensor:
    """Logits ``[N, classes]`` of the sample, with some units at zero, all together."""
    model, images = coupling.model, coupling.sample
    with (
        torch.no_grad(),
        evaluation(model),
        giving_logits(model, inputs=coupling.inputs),
        silencing(model, coupling.sites, units),
    ):
        return check_logits(forward(model, images), len(images))


def silencing(
    model: nn.Module, found: Sequence[Site], units: Iterable[str]
) -> AbstractContextManager[None]:
    """Hold some units ``"layer:unit"`` of a network at zero for a while."""
    by_site: dict[str, list[int]] = {}
    for label in units:
        name, _, unit = label.rpartition(":")
        by_site.setdefault(name, []).append(int(unit))

    def zero(site: Site, _call: int, output: Tensor) -> Tensor:
        index = torch.tensor(by_site[site.name], device=output.device)
        return output.index_fill(site.axis, index, 0)

    return hooked(model, [site for site in found if site.name in by_site], zero)


def labels_of(units: Ranking | Sequence[str], fraction: float | None) -> list[str]:
    """Labels of single units, of a list or of what a ranking removes."""
    if isinstance(units, Ranking):
        if fraction is None:
            raise ValueError("fraction: expected a number from 0 to 1 beside a ranking, got None")
        return list(units.units(fraction))
    if fraction is not None:
        raise ValueError(f"fraction: expected None beside units given by label, got {fraction!r}")
    if isinstance(units, str) or not isinstance(units, Sequence):
        raise TypeError(f'units: expected labels "layer:unit", got {type(units).__name__}')
    for label in units:
        if not isinstance(label, str):
            raise TypeError(f'units: expected labels "layer:unit", got {type(label).__name__}')
    return [one for label in units for one in label.split("+")]


def _all_coupled(coupling: Coupling, labels: Sequence[str]) -> tuple[str, ...]:
    """All that has to go with these units, each once."""
    gone: dict[str, None] = {}
    for label in labels:
        one = coupling.find(label)
        if one.obstacle:
            raise ValueError(f"units: {label!r} cannot be removed: {one.obstacle}")
        gone.update(dict.fromkeys(one.units))
    more = len(gone) - len(set(labels))
    if more > 0:
        logger.info("remove: %d more units go because they hang together with these", more)
    return tuple(gone)
