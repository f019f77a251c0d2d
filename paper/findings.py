"""The paper's findings, one by one: does it hold here, and which figures say so."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from paper.analysis import OF_CELLS, OF_THE_PAPER, TARGETS
from paper.groups import TWINS, Group
from paper.markdown import number, points, spread, table

Groups = Mapping[str, Group]
# Where the words change is a choice, made once for all networks.
SOMEWHAT, WELL = 0.2, 0.5
MOST, BADLY = 0.95, 0.05


def in_short(groups: Groups, compared: pd.DataFrame) -> list[str]:
    """Hold the paper's findings against the figures."""
    lines = [
        (
            "No single unit matters for overall accuracy, some classes are hurt badly",
            *_hurt(groups),
        ),
        ("Selectivity predicts the overall drop poorly", *_poorly(groups)),
        (
            "Selectivity, L1 norm and class correlation predict the largest class drop well",
            *_well(groups),
        ),
        ("They predict it better than the overall drop", *_better(groups)),
        (
            "Selectivity and class correlation tell well which classes a unit's loss damages",
            *_tell(groups, "within_unit"),
        ),
        (
            "They tell well which units a class needs",
            *_tell(groups, "within_class"),
        ),
    ]
    names = {
        "rotation": "The damage of units differs in concentration from that of random directions",
        **{kind: f"Damage in networks with {kind} differs in concentration" for kind in TWINS},
    }
    for kind, claim in names.items():
        rows = compared[compared["kind"] == kind]
        if len(rows):
            lines.append((claim, *_differs(rows)))
    return ["## In short", table(["the paper's finding", "here", "figures"], lines), _rules()]


def _rules() -> str:
    return (
        f"How the words are chosen: a mean rank correlation from {WELL} is *well*, one below "
        f"{SOMEWHAT} (or negative) *poorly*. A unit matters overall if it costs a point or more; "
        f"the first finding holds if {points(MOST, 0)} % of the units in the upper half of the "
        f"layers do not and one of them costs a class {points(BADLY, 0)} points, the class being "
        "chosen on other images. *Agrees* means in all families (or rows), *partly* in some, "
        "*does not agree* in none. Where two sides are compared, a row counts if its interval "
        "leaves out 0; to agree, all must differ in one direction; *not seen* means that no "
        "interval leaves it out."
    )


def _verdict(holding: int, every: int, against: int | None = None) -> str:
    """Word for a finding that holds in some of several cases; `against`: the opposite holds."""
    if holding == every:
        return "agrees"
    if against == 0 and not holding:
        return "not seen"
    return "partly" if holding else "does not agree"


def _hurt(groups: Groups) -> tuple[str, str]:
    holding, parts = [], []
    for group in groups.values():
        mean = group.summary[0]
        if mean["harmless_upper"] >= MOST and mean["split_half_largest_upper"] >= BADLY:
            holding.append(group.family.title)
        parts.append(
            f"{group.family.title}: {points(mean['harmless_upper'])} % below one point, a class "
            f"loses up to {spread_of('split_half_largest_upper', group, 1)}"
        )
    return _verdict(len(holding), len(groups)), "; ".join(parts)


def spread_of(name: str, group: Group, digits: int) -> str:
    """Write a figure of the summary in points, with its spread over seeds."""
    mean, least, most = (each[name] for each in group.summary)
    return spread(mean, least, most, digits=digits, scale=100)


def correlation_of(group: Group, attribute: str, target: str) -> str:
    """Return the mean rank correlation of an attribute with a target, and its spread."""
    row = group.predicted.loc[attribute]
    return spread(row[target], row[f"{target}_least"], row[f"{target}_most"])


def _poorly(groups: Groups) -> tuple[str, str]:
    name = "class_selectivity"
    holding = [
        group.family.title
        for group in groups.values()
        if group.predicted.loc[name, TARGETS[0]] < SOMEWHAT
    ]
    parts = [
        f"{group.family.title}: {correlation_of(group, name, TARGETS[0])}"
        for group in groups.values()
    ]
    return _verdict(len(holding), len(groups)), "rank correlation, " + "; ".join(parts)


def _well(groups: Groups) -> tuple[str, str]:
    cells = [
        (group.family.title, name, group.predicted.loc[name, TARGETS[1]])
        for group in groups.values()
        for name in OF_THE_PAPER
    ]
    well = [f"{name} in {title}" for title, name, value in cells if value >= WELL]
    best = max(cells, key=lambda cell: cell[2])
    worst = min(cells, key=lambda cell: cell[2])
    return _verdict(len(well), len(cells)), (
        f"well in {len(well)} of {len(cells)} pairs of attribute and family; from "
        f"{number(worst[2])} (`{worst[1]}`, {worst[0]}) to "
        f"{number(best[2])} (`{best[1]}`, {best[0]})"
    )


def _better(groups: Groups) -> tuple[str, str]:
    better, worse, parts = [], [], []
    for group in groups.values():
        for name in OF_THE_PAPER:
            row = group.predicted.loc[name]
            if row["difference_low"] > 0:
                better.append(name)
            elif row["difference_high"] < 0:
                worse.append(name)
    every = len(groups) * 3
    for name in OF_THE_PAPER:
        values = [group.predicted.loc[name, "difference"] for group in groups.values()]
        parts.append(f"`{name}` {number(min(values))} to {number(max(values))}")
    return _verdict(len(better), every, len(worse)), (
        f"better in {len(better)}, worse in {len(worse)}, undecided in "
        f"{every - len(better) - len(worse)} of {every} pairs; difference of the "
        "correlations: " + ", ".join(parts)
    )


def _tell(groups: Groups, figure: str) -> tuple[str, str]:
    """Cells of unit and class: how well, and in how many layers at all."""
    found = [
        (group.family.title, name, group.cells.loc[(name, figure)])
        for group in groups.values()
        for name in OF_CELLS[:2]
    ]
    cells = [cell for cell in found if not np.isnan(cell[2]["value"])]
    if not cells:
        return "not seen", "no layer has a correlation"
    well = sum(cell[2]["value"] >= WELL for cell in cells)
    worst_title, worst_name, worst = min(cells, key=lambda cell: cell[2]["value"])
    best_title, best_name, best = max(cells, key=lambda cell: cell[2]["value"])
    told, layers = (int(sum(cell[2][name] for cell in cells)) for name in ("told", "layers"))
    return _verdict(well, len(cells)), (
        f"well in {well} of {len(cells)} pairs of attribute and family; from "
        f"{number(worst['value'])} (`{worst_name}`, {worst_title}, ceiling "
        f"{number(worst['ceiling'])}) to {number(best['value'])} (`{best_name}`, {best_title}, "
        f"ceiling {number(best['ceiling'])}); more than the shuffles in {told} of {layers} layers"
    )


def _signs(rows: pd.DataFrame, name: str) -> tuple[int, int, int]:
    """Rows whose interval is above 0, below 0, and the others that have one."""
    above = int((rows[f"{name}_low"] > 0).sum())
    below = int((rows[f"{name}_high"] < 0).sum())
    return above, below, int(rows[f"{name}_low"].notna().sum()) - above - below


def _differs(rows: pd.DataFrame) -> tuple[str, str]:
    above, below, undecided = signs = _signs(rows, "difference")
    equal = _signs(rows, "equal_harm")
    unit = "networks" if rows["kind"].iloc[0] == "rotation" else "layers"
    first = "units" if unit == "networks" else "the plain network"
    left = len(rows) - sum(signs)
    untold = f" (in {left} too few units lose ten images)" if left else ""
    return _verdict(max(above, below), sum(signs), min(above, below)), (
        f"damage of {first} more concentrated in {above}, less in {below}, undecided in "
        f"{undecided} of {len(rows)} {unit}{untold}; between units that lose as many images: "
        f"{equal[0]}, {equal[1]}, {equal[2]}"
    )
