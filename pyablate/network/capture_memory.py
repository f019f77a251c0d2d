"""Captured networks that are kept while one network is ablated several times.

Exporting takes seconds, whatever is done with the graph. What an export depends on cannot all be
told (attributes of classes, closures, globals of other files), and comparing logits does not show
it either: a threshold may be reached by ablated units alone. So nothing is kept from call to call
of a user, but only inside of functions that ablate one and the same model several times, with no
code of others in between.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from pyablate.network.graph import Graph

MOST = 4
"""Graphs that are kept: those used last."""

_Kept = OrderedDict[Hashable, tuple[nn.Module, "Graph"]]

_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def same_network() -> Iterator[None]:
    """Export a model once for each choice of sites while this is in force.

    For functions in which nobody changes the models that they are given.
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set(OrderedDict())
    try:
        yield
    finally:
        _kept.reset(token)


def find(model: nn.Module, how: Hashable) -> Graph | None:
    """Return the graph of a model, the very object, captured like that before."""
    known, key = _kept.get(), (id(model), how)
    if known is None or key not in known:
        return None
    known.move_to_end(key)
    return known[key][1]


def keep(model: nn.Module, how: Hashable, graph: Graph) -> None:
    """Keep a graph, and let that go which was used longest ago where there are many."""
    known = _kept.get()
    if known is None:
        return
    known[id(model), how] = model, graph  # held, so that no other model gets its id
    while len(known) > MOST:
        known.popitem(last=False)
