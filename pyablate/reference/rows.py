"""Rows of the hook loop: single units of the chosen layers, then the groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyablate.interventions import Intervention
from pyablate.network.sites import Site, parse_label, select


@dataclass(frozen=True)
class Row:
    """One ablation.

    Attributes
    ----------
    label, layer : str
        As in ``AblationResult.units``.
    unit : int
        Number of the unit in its layer, -1 for a group.
    targets : mapping of Site to list of int
        The entries along the axis of the units that are replaced together, or the directions.
    """

    label: str
    layer: str
    unit: int
    targets: Mapping[Site, list[int]]


def rows_of(
    found: Sequence[Site],
    layers: str | Sequence[str] | None,
    groups: Sequence[Sequence[str]] | None,
    intervention: Intervention,
) -> list[Row]:
    """List the ablations of a run.

    Raises
    ------
    TypeError, ValueError
        Names that are unknown, malformed, out of range or given twice.
    """
    rows = _unit_rows(found, layers, intervention) if layers is not None or groups is None else []
    return rows + ([] if groups is None else _group_rows(found, groups, intervention))


def _unit_rows(
    found: Sequence[Site], layers: str | Sequence[str] | None, intervention: Intervention
) -> list[Row]:
    """One row per unit of the chosen layers, in the order of ``found``."""
    asked = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    units: dict[str, set[int]] = {}
    for label in asked:
        if _is_label(found, label):
            site, unit = _unit(found, label, intervention)
            units.setdefault(site.name, set()).add(unit)
    names = [name for name in asked if not _is_label(found, name)]
    for site in select(found, names) if names or not asked else []:
        units[site.name] = set(range(_count(site, intervention)))
    return [
        Row(site.label(unit), site.name, unit, {site: _entries(site, unit, intervention)})
        for site in found
        for unit in sorted(units.get(site.name, ()))
    ]


def _group_rows(
    found: Sequence[Site], groups: Sequence[Sequence[str]], intervention: Intervention
) -> list[Row]:
    """One row per group, in the order given."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups: expected lists of unit labels, got {type(groups).__name__}")
    if not groups:
        raise ValueError("groups: expected at least one group, got none")
    seen: dict[frozenset[tuple[str, int]], int] = {}
    rows = []
    for number, group in enumerate(groups):
        if isinstance(group, str) or not isinstance(group, Sequence):
            raise TypeError(
                f'groups: group {number}: expected a list of labels "layer:unit", got {group!r}'
            )
        members = [_unit(found, label, intervention) for label in group]
        key = frozenset((site.name, unit) for site, unit in members)
        if not members or len(key) < len(members):
            what = "names a unit twice" if members else "is empty"
            raise ValueError(f"groups: group {number} {what}: {list(group)}")
        if key in seen:
            raise ValueError(f"groups: group {number} was given before, as group {seen[key]}")
        seen[key] = number
        targets: dict[Site, list[int]] = {}
        for site, unit in members:
            targets.setdefault(site, []).extend(_entries(site, unit, intervention))
        rows.append(
            Row(
                label="+".join(site.label(unit) for site, unit in members),
                layer="+".join(site.name for site in targets),
                unit=-1,
                targets=targets,
            )
        )
    return rows


def _is_label(found: Sequence[Site], name: object) -> bool:
    return isinstance(name, str) and ":" in name and name not in {site.name for site in found}


def _unit(found: Sequence[Site], label: str, intervention: Intervention) -> tuple[Site, int]:
    site, unit = parse_label(found, label)
    if unit >= _count(site, intervention):
        raise ValueError(
            f"unit {unit} of layer {site.name!r} is out of range: "
            f"{_count(site, intervention)} directions were given"
        )
    return site, unit


def _entries(site: Site, unit: int, intervention: Intervention) -> list[int]:
    return [unit] if intervention.kind == "direction" else list(site.entries(unit))


def _count(site: Site, intervention: Intervention) -> int:
    """Count the units of a site; under ``direction`` a unit is a direction."""
    if intervention.kind == "direction":
        return intervention.matrix(site.name, site.features).shape[1]
    return site.channels
