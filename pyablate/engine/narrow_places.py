"""Narrow places of a network: tensors that everything behind a unit passes.

There the change of a pair can be looked at as a whole, pairs can leave, and the rest can go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from torch import Tensor, fx

from pyablate.engine.suffix import Suffix, multiply_adds
from pyablate.network.graph import MARKER, Graph
from pyablate.network.layout import BatchLayout

MOST = 7
"""Places of a network at most: about every eighth of its arithmetic."""


def passed_by_all(suffix: Suffix) -> list[fx.Node]:
    """Nodes behind the last site of a suffix, behind which nothing before them is read."""
    sites = {site.name for site in suffix.job.sites}
    number = {node: place for place, node in enumerate(suffix.nodes)}
    own = [number[node] for node in number if node.target is MARKER and node.args[1] in sites]
    found, furthest = [], max(own, default=0)
    for place, node in enumerate(suffix.nodes):
        if place >= furthest:
            found.append(node)
        furthest = max([furthest, *(number[user] for user in node.users if user in number)])
    return found


def narrow_places(graph: Graph, suffixes: Iterable[Suffix], elements: int) -> list[fx.Node]:
    """Choose places where changes are looked at, in order.

    Parameters
    ----------
    graph : Graph
        The network.
    suffixes : iterable of Suffix
        What lies behind the units.
    elements : int
        That all places may have together, per image.
    """
    cost = {node: multiply_adds(graph, node) for node in graph.graph.nodes}
    order = list(cost)
    back = order[::-1]
    behind = dict(zip(back, accumulate((cost[node] for node in back), initial=0.0), strict=False))
    whole = sum(cost.values())
    passed = {node for suffix in suffixes for node in passed_by_all(suffix)}
    # The last first: of places alike, a gradient behind the activation tells more.
    able = [node for node in back if node in passed and _holds_rows(graph, node)]
    able = [node for node in able if 0 < behind[node] < whole]
    chosen: set[fx.Node] = set()
    for part in range(MOST, 0, -1):
        wanted = whole * part / (MOST + 1)
        near = sorted(able, key=lambda node: (abs(behind[node] - wanted), graph.elements(node)))
        chosen.update(near[:1])
    found = [node for node in order if node in chosen]
    while sum(graph.elements(node) for node in found) > elements:
        found.remove(max(found, key=graph.elements))
    return found


def shares(suffix: Suffix, places: Sequence[fx.Node]) -> list[float]:
    """Share of a suffix's arithmetic that is done when each of the places is reached."""
    cost = [multiply_adds(suffix.graph, node) for node in suffix.nodes]
    done = dict(zip(suffix.nodes, accumulate(cost), strict=True))
    return [done[place] / max(1.0, sum(cost)) for place in places]


def _holds_rows(graph: Graph, node: fx.Node) -> bool:
    """Whether a node gives one tensor of floating-point numbers with one row per image."""
    value, layout = node.meta.get("val"), graph.layout.get(node)
    plain = isinstance(layout, BatchLayout) and layout.plain
    return plain and isinstance(value, Tensor) and value.is_floating_point()
