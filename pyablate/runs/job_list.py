"""Layers and groups as jobs, their rows numbered in the order of the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyablate.engine.job import Job
from pyablate.interventions import Intervention
from pyablate.network.sites import Site, parse_label, select


def plan_jobs(
    found: Sequence[Site],
    layers: str | Sequence[str] | None,
    groups: Sequence[Sequence[str]] | None,
    intervention: Intervention,
) -> list[Job]:
    """Turn layers and groups into jobs; rows are numbered in the order of the result.

    Raises
    ------
    ValueError, TypeError
        Unknown layers or units, an empty group, a group given twice.
    """
    jobs: list[Job] = []
    row = 0

    def add(
        at: Sequence[Site], members: Sequence[tuple[tuple[str, int], ...]], *, grouped: bool
    ) -> None:
        nonlocal row
        rows = range(row, row + len(members))
        jobs.append(Job(tuple(at), rows, tuple(members), intervention, grouped))
        row += len(members)

    if layers is not None or groups is None:
        for site, units in _units_by_site(found, layers, intervention):
            add([site], [((site.name, unit),) for unit in units], grouped=False)
    for at, members in _groups_by_sites(found, [] if groups is None else groups, intervention):
        add(at, members, grouped=True)
    if intervention.kind == "constant":
        for site in dict.fromkeys(site for job in jobs for site in job.sites):
            intervention.constants(site.name, site.features)  # that they fit
    if not jobs:
        raise ValueError("groups: expected at least one group of units, got none")
    return jobs


def _units_by_site(
    found: Sequence[Site], layers: str | Sequence[str] | None, intervention: Intervention
) -> Iterator[tuple[Site, list[int]]]:
    """Sites in execution order with their chosen units, ascending."""
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    single = [p for p in patterns if isinstance(p, str) and ":" in p]
    whole = [p for p in patterns if p not in single]
    chosen: dict[str, set[int]] = {}
    if whole or not patterns:
        for site in select(found, whole):
            chosen[site.name] = set(range(_count_units(site, intervention)))
    for label in single:
        site, unit = parse_label(found, label, lambda at: _count_units(at, intervention))
        chosen.setdefault(site.name, set()).add(unit)
    for site in found:
        if site.name in chosen:
            yield site, sorted(chosen[site.name])


def _count_units(site: Site, intervention: Intervention) -> int:
    if intervention.kind != "direction":
        return site.channels
    return intervention.matrix(site.name, site.features).shape[1]


def _groups_by_sites(
    found: Sequence[Site], groups: Sequence[Sequence[str]], intervention: Intervention
) -> Iterator[tuple[list[Site], list[tuple[tuple[str, int], ...]]]]:
    """Yield runs of consecutive groups that act at the same sites: rows keep the caller's order."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups: expected lists of unit labels, got {type(groups).__name__}")
    if groups and intervention.kind == "direction":
        raise ValueError("groups: directions are ablated one at a time, not in groups")
    seen: dict[frozenset[tuple[str, int]], int] = {}
    run: tuple[list[Site], list[tuple[tuple[str, int], ...]]] = ([], [])
    for number, group in enumerate(groups):
        members, at = _group(found, group, number)
        if frozenset(members) in seen:
            first = seen[frozenset(members)]
            raise ValueError(f"groups: group {number} is the same as group {first}: {list(group)}")
        seen[frozenset(members)] = number
        if at != run[0]:
            if run[1]:
                yield run
            run = (at, [])
        run[1].append(members)
    if run[1]:
        yield run


def _group(
    found: Sequence[Site], group: Sequence[str], number: int
) -> tuple[tuple[tuple[str, int], ...], list[Site]]:
    if isinstance(group, str) or not isinstance(group, Sequence):
        raise TypeError(
            f'groups: group {number}: expected a list of "layer:unit" labels, got {group!r}'
        )
    if len(group) == 0:
        raise ValueError(f"groups: group {number} is empty")
    parsed = [parse_label(found, label) for label in group]
    members = tuple((site.name, unit) for site, unit in parsed)
    if len(set(members)) < len(members):
        raise ValueError(f"groups: group {number} names a unit twice: {list(group)}")
    names = {site.name for site, _ in parsed}
    return members, [site for site in found if site.name in names]
