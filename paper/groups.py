"""The networks of a family together, and families against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

import pyablate as pa
from paper import analysis
from paper.measure import SEED, Measured, areas
from paper.networks import Family

TWINS = {"dropout": "alexnet_dropout", "batch norm": "alexnet_bn"}
"""What each family has that ``alexnet`` has not."""


@dataclass(frozen=True, eq=False)
class Group:
    """The networks of one family, with what the tables take from them."""

    family: Family
    members: list[Measured]

    @cached_property
    def results(self) -> list[pa.AblationResult]:
        """Ablations, one for each seed."""
        return [member.result for member in self.members]

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of the network."""
        return list(dict.fromkeys(self.results[0].units["layer"]))

    @cached_property
    def drops(self) -> list[pd.DataFrame]:
        """`analysis.drops` of each seed."""
        return [analysis.drops(result, seed=SEED) for result in self.results]

    @cached_property
    def reliability(self) -> pd.DataFrame:
        """Agreement of halves, mean over seeds, by layer."""
        tables = [analysis.reliability(result, seed=SEED) for result in self.results]
        return analysis.over_seeds(tables)[0]

    @cached_property
    def predicted(self) -> pd.DataFrame:
        """`analysis.predicted` of all seeds."""
        return analysis.predicted([member.predictions for member in self.members])

    @cached_property
    def cells(self) -> pd.DataFrame:
        """`analysis.joined_cells` of all seeds."""
        return analysis.joined_cells([member.cells for member in self.members])

    @cached_property
    def axes(self) -> list[pd.DataFrame]:
        """`analysis.axes` of each seed."""
        return [analysis.axes(result) for result in self.results]

    @cached_property
    def areas(self) -> pd.DataFrame:
        """Area under the curve, order by seed."""
        return pd.concat([areas(member.curves) for member in self.members], axis=1)

    @cached_property
    def summary(self) -> tuple[pd.Series, pd.Series, pd.Series]:
        """`analysis.summary`: mean, least and most over seeds."""
        each = pd.DataFrame([analysis.summary(table) for table in self.drops])
        return each.mean(), each.min(), each.max()


def concentration(groups: Mapping[str, Group]) -> pd.DataFrame:
    """Compare how concentrated damage is: units with directions, networks with their twins.

    Returns
    -------
    pandas.DataFrame
        One row per network (``kind`` "rotation") or layer (of `TWINS`): ``what`` in words; mean
        Gini coefficient ``first`` and ``second``, their ``difference`` with its interval;
        ``equal_harm``, the same between units that lose as many images, with its interval;
        ``overall_first`` and ``overall_second``, mean overall drops; ``pairs``, how many pairs of
        single networks differ in the same direction.
    """
    lines = [_rotation(group, member) for group in groups.values() for member in group.members]
    if "alexnet" in groups:
        for kind, name in TWINS.items():
            if name in groups:
                lines += _twins(kind, groups["alexnet"], groups[name])
    return pd.DataFrame(lines)


def _rotation(group: Group, member: Measured) -> dict[str, object]:
    table = member.rotation.set_index("figure")
    sides = [
        [member.rotated_axes[member.rotated_axes["side"] == side]] for side in ("units", "rotated")
    ]
    return {
        "kind": "rotation",
        "what": f"units, directions: {group.family.title}, seed {member.network.seed}",
        "layer": group.family.top,
        **_compared(table, sides, "units", "rotated"),
        "pairs": "",
    }


def _twins(kind: str, plain: Group, other: Group) -> list[dict[str, object]]:
    """Layer by layer, the plain network minus the one that has something more."""
    layers = dict(zip(plain.layers, other.layers, strict=True))
    names = ("plain", "twin")
    table = pa.compare_damage(
        plain.results, other.results, names=names, layers=layers, seed=SEED
    ).set_index(["layer", "figure"])
    lines = []
    for number, (layer, of_other) in enumerate(layers.items(), 1):
        sides = [
            [axes[axes["layer"] == name] for axes in group.axes]
            for group, name in ((plain, layer), (other, of_other))
        ]
        lines.append(
            {
                "kind": kind,
                "what": f"plain, {kind}: layer {number}",
                "layer": layer,
                **_compared(table.loc[layer], sides, *names),
                "pairs": analysis.agreeing_pairs(*sides),
            }
        )
    return lines


def _compared(
    table: pd.DataFrame, sides: list[list[pd.DataFrame]], first: str, second: str
) -> dict[str, object]:
    equal, low, high = analysis.at_equal_harm(*sides, resamples=300, seed=SEED)
    gini, overall = table.loc["gini"], table.loc["accuracy_drop"]
    return {
        "first": gini[first],
        "second": gini[second],
        "difference": gini["difference"],
        "difference_low": gini["difference_low"],
        "difference_high": gini["difference_high"],
        "equal_harm": equal,
        "equal_harm_low": low,
        "equal_harm_high": high,
        "overall_first": overall[first],
        "overall_second": overall[second],
    }
