"""Optimal ablation: the constant of each unit that leaves the loss as low as a constant can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyablate._validation import check_count, check_exact
from pyablate.experiments.split import split
from pyablate.experiments.units import opened
from pyablate.interventions import Intervention
from pyablate.network.capture_memory import same_network
from pyablate.network.sites import check_channels, select
from pyablate.result import AblationResult
from pyablate.results.arrays import Floats
from pyablate.results.notebook import page
from pyablate.runs._ablate import ablate
from pyablate.runs.unit_statistics import measure_units
from pyablate.runtime.determinism import undisturbed
from pyablate.runtime.distributed import Ranks

BATCH = 64
"""Images at a time of the pass that measures units, unless told otherwise."""

REACH = 4.0
"""Steps of the search that a parabola may lead away at once."""

ByLayer = dict[str, Tensor]


@same_network()
def optimal_constants(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    rounds: int = 4,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> OptimalConstants:
    """Find the constant that replaces each unit at the least loss, and what the loss is then.

    Zero and mean are unusual values for many units, so that part of what their ablation costs is
    due to the value and not to what the unit says about the image. Of all constants, the optimal
    one costs least: what is left is what no constant can stand in for. Each unit by itself, with
    all others intact; the mean cross-entropy is minimised on one half of the images and judged on
    the other. The halves are drawn class by class.

    Parameters
    ----------
    model, data
        As for :func:`pyablate.ablate`, with labels; the images are held in memory.
    layers : str or sequence of str
        Names or globs, of layers whose units are single channels.
    rounds : int
        Of the search, three ablations of all units each.
    seed : int
        Of the split, and as for :func:`pyablate.ablate`.
    class_names, **options
        As for :func:`pyablate.ablate`; every ablation records the loss.

    Raises
    ------
    ValueError, TypeError
        Unknown layers, attention heads, fewer than two images, rounds below 1, and whatever
        :func:`pyablate.ablate` raises.

    Notes
    -----
    Optimal ablation: Li and Janson 2024, "Optimal ablation for interpretability",
    arXiv:2409.09951. There by gradient descent; here each unit has one number, and an
    ablation gives the exact loss of all units at their numbers, so a search along the line does.
    From the unit's mean, or from zero where that is better, it looks a step to either side, at
    first one standard deviation, and at the lowest point of the parabola through the three (a
    Newton step whose gradient and curvature are finite differences), keeps the best, and halves the
    step where it stayed. So on the half where they are found the constants are never worse than
    zero or the mean. The loss need not be convex in a constant: a value far away may be better
    still.

    Examples
    --------
    >>> found = pa.optimal_constants(model, data, "features.16", rounds=1)
    >>> sum(found.table["optimal_chosen"]) < sum(found.table["mean_chosen"])
    True
    >>> pa.ablate(model, data, "features.16", intervention=found.intervention).intervention
    'constant:given'
    """
    check_count("rounds", rounds)
    check_exact(options.get("guarantee", "exact"), "the loss needs the logits of every pair")
    halves = split(data, seed=seed)
    common: dict[str, Any] = {"seed": seed, "class_names": class_names, **options}
    mean, std = _moments(model, halves.choosing, layers, common)

    def ablated(images: Any, constants: Floats, **other: Any) -> AblationResult:
        given = Intervention("constant", values=_by_layer(constants, mean))
        chosen = {**common, **other, "measures": ["loss"]}
        return ablate(model, images, list(mean), intervention=given, **chosen)

    def loss(constants: Floats) -> Floats:
        return ablated(halves.choosing, constants, audit=0).loss_change

    start, scale = (np.concatenate([one.numpy() for one in some.values()]) for some in (mean, std))
    known = {"zero": np.zeros_like(start), "mean": start}
    chosen = {how: loss(constants) for how, constants in known.items()}
    better = chosen["mean"] < chosen["zero"]
    best = np.where(better, start, 0.0)
    known["optimal"], chosen["optimal"] = _searched(
        loss, best, np.fmin(chosen["mean"], chosen["zero"]), scale, rounds
    )
    results = {how: ablated(halves.measuring, constants) for how, constants in known.items()}
    table = results["optimal"].units[["label", "layer", "unit"]].copy()
    table["constant"], table["mean_activation"] = known["optimal"], start
    for how, result in results.items():
        table[how] = result.loss_change
    for how, change in chosen.items():
        table[f"{how}_chosen"] = change
    return OptimalConstants(table, _by_layer(known["optimal"], mean), results)


@dataclass(frozen=True, eq=False)
class OptimalConstants:
    """The constant of each unit that costs least, and what it costs on other images.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per unit: ``label``, ``layer``, ``unit``; ``constant``, the optimal one;
        ``mean_activation``, over the images and positions of the half on which it was chosen;
        ``zero``, ``mean``, ``optimal``: the increase of the mean loss in nats when that replaces
        the unit, on the half of the images on which nothing was chosen; ``zero_chosen``,
        ``mean_chosen``, ``optimal_chosen``: the same on the half on which the constant was.
    values : dict of str to Tensor
        Float64 ``[units]`` by layer.
    results : dict of str to AblationResult
        The ablations that judged, ``"zero"``, ``"mean"`` and ``"optimal"``, with all else that
        there is to ask of them.

    Examples
    --------
    >>> found = pa.optimal_constants(model, data, "features.16", rounds=1)
    >>> found.values["features.16"].shape, found.results["optimal"].intervention
    (torch.Size([128]), 'constant:given')
    """

    table: pd.DataFrame
    values: ByLayer
    results: dict[str, AblationResult] = field(repr=False)

    @property
    def intervention(self) -> Intervention:
        """For :func:`pyablate.ablate`."""
        return Intervention("constant", values=self.values)

    def __repr__(self) -> str:
        """Size in one line."""
        return f"OptimalConstants({len(self.table)} units of {', '.join(self.values)})"

    def _repr_html_(self) -> str:
        """Show the table."""
        return page(repr(self), self.table)


def _searched(
    loss: Callable[[Floats], Floats], best: Floats, least: Floats, step: Floats, rounds: int
) -> tuple[Floats, Floats]:
    """Minimise a loss ``[units]`` along each unit's number by itself: where, and how low."""
    for _ in range(rounds):
        down, up = best - step, best + step
        below, above = loss(down), loss(up)
        curvature, slope = below + above - 2 * least, (above - below) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            jump = np.where(curvature > 0, -slope / curvature, -np.sign(slope) * REACH)
        lowest = best + np.nan_to_num(np.clip(jump, -REACH, REACH)) * step
        before = best
        for there, found in ((down, below), (up, above), (lowest, loss(lowest))):
            better = found < least  # never where it is NaN
            best, least = np.where(better, there, best), np.where(better, found, least)
        step = np.where(np.abs(best - before) < step, step / 2, step)
    return best, least


def _moments(
    model: nn.Module, data: Any, layers: str | Sequence[str], options: dict[str, Any]
) -> tuple[ByLayer, ByLayer]:
    """Mean and standard deviation of each unit, over images, positions and calls, by layer."""
    device = options.get("device")
    with undisturbed(model, device), torch.inference_mode(False), torch.no_grad():
        ready = opened(model, data, options)
        found = select(ready.sites, layers)
        check_channels(found)
        known = measure_units(
            ready.model,
            ready.data,
            found,
            ready.classes,
            batch_size=options.get("batch_size") or BATCH,
            dtype=ready.data.dtype,
            ranks=Ranks(),
        )
    mean, std = ByLayer(), ByLayer()
    for site in found:
        calls = [each for (name, _), each in known.items() if name == site.name]
        mean[site.name] = torch.stack([each.mean for each in calls]).mean(0).cpu()
        std[site.name] = torch.stack([each.std for each in calls]).amax(0).cpu()
        usual = std[site.name].mean().item() or 1.0  # for units that are constant
        std[site.name] = torch.where(std[site.name] > 0, std[site.name], usual)
    return mean, std


def _by_layer(constants: Floats, like: ByLayer) -> ByLayer:
    parts = torch.from_numpy(constants).split([len(each) for each in like.values()])
    return dict(zip(like, parts, strict=True))
