"""Sets of units by network dissection's protocol: the best n removed, or nothing but these kept.

Bau, Zhu, Strobelt, Lapedriza, Zhou, Torralba 2020, *Understanding the role of individual units in a
deep neural network*, doi:10.1073/pnas.1907375117.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import nn

from pyablate._validation import check_count
from pyablate.experiments._minimal_sets import targets_of
from pyablate.experiments.accuracies import balanced_accuracy, baseline_balanced_accuracy
from pyablate.experiments.split import split
from pyablate.experiments.units import best_first, labels_of, opened
from pyablate.interventions import Intervention
from pyablate.network.capture_memory import same_network
from pyablate.network.sites import select
from pyablate.runs._ablate import ablate

SIZES = (1, 2, 3, 4, 5, 20, 64, 128, 256)


@same_network()
def unit_sets(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    sizes: Sequence[int] | None = None,
    classes: str | int | Sequence[str | int] | None = None,
    seed: int = 0,
    intervention: str | Intervention = "zero",
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Remove the units that matter most for a class, and all but these, by sets of several sizes.

    Units are ranked by how much the balanced accuracy of the class against the rest falls without
    each of them alone, on one half of the images; the sets are measured on the other. The halves
    are drawn class by class.

    Parameters
    ----------
    model, data
        As for :func:`pyablate.ablate`; the images are held in memory.
    layers : str or sequence of str
        Names or globs; sets may take units from all of them.
    sizes : sequence of int, optional
        Units in a set, fewer than there are: by default those of 1 to 5, 20, 64, 128 and
        256 that are.
    classes : str, int, or sequence of these, optional
        Names or numbers; by default all classes with images.
    seed : int
        Of the split, and as for :func:`pyablate.ablate`.
    intervention, class_names, **options
        As for :func:`pyablate.ablate`; directions cannot be removed together.

    Returns
    -------
    pandas.DataFrame
        One row per class and size: ``class``, ``size``, ``units`` (tuple of labels, the most
        important first), and balanced accuracies of the class (0.5 is chance): ``baseline`` of the
        network, ``removed`` without the units, ``kept`` without all others of the layers. Its
        ``attrs`` tell ``intervention``, ``audit``, ``guarantee`` and, of a screened run,
        ``screening``: what both of its ablations settled, and how much that can have missed.

    Raises
    ------
    ValueError, TypeError
        Unknown layers or classes, sizes out of range, and whatever :func:`pyablate.ablate` raises.

    Examples
    --------
    >>> table = pa.unit_sets(model, data, "features.16", sizes=[2, 20], classes=[8])
    >>> table[["class", "size"]].values.tolist()
    [['8', 2], ['8', 20]]
    """
    halves = split(data, seed=seed)
    ready = opened(model, halves.choosing, options)
    units = labels_of(select(ready.sites, layers))
    wanted = _sizes(sizes, len(units))
    common = {"intervention": intervention, "class_names": class_names, "seed": seed, **options}
    single = ablate(model, halves.choosing, layers, **common)
    drop = baseline_balanced_accuracy(single) - balanced_accuracy(single)[single.rows(units)]
    groups: dict[frozenset[int], int] = {}
    lines = []
    for target in targets_of(single, classes):
        order = best_first(drop[:, target]).tolist()
        for size in wanted:
            removed, kept = (
                groups.setdefault(frozenset(part), len(groups))
                for part in (order[:size], order[size:])
            )
            best = tuple(units[unit] for unit in order[:size])
            lines.append((target, size, best, removed, kept))
    named = [[units[unit] for unit in sorted(group)] for group in groups]
    result = ablate(model, halves.measuring, groups=named, **common)
    accuracy, baseline = balanced_accuracy(result), baseline_balanced_accuracy(result)
    rows = [
        {
            "class": result.class_names[target],
            "size": size,
            "units": best,
            "baseline": baseline[target],
            "removed": accuracy[removed, target],
            "kept": accuracy[kept, target],
        }
        for target, size, best, removed, kept in lines
    ]
    table = pd.DataFrame(rows)
    table.attrs = {
        "intervention": result.intervention,
        "audit": str(single.audit + result.audit),
        "guarantee": result.guarantee,
    }
    if single.screening is not None and result.screening is not None:
        table.attrs["screening"] = str(single.screening + result.screening)
    return table


def _sizes(given: Sequence[int] | None, units: int) -> list[int]:
    if given is None:
        found = [size for size in SIZES if size < units]
        if not found:
            raise ValueError(f"layers: sets need a layer of two units at least, got {units}")
        return found
    for size in given:
        check_count("sizes", size)
        if size >= units:
            raise ValueError(f"sizes: expected fewer than the {units} units, got {size}")
    if not len(given):
        raise ValueError("sizes: expected at least one, got none")
    return sorted(set(given))
