"""What ``torch.export`` gave, remembered for networks of the same structure, without their weights.

Nothing here refers to a network: a weight is remembered by its name.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, nn

from pyablate.network.any_batch import Parts
from pyablate.network.hooks import Site
from pyablate.network.structure import structure

MOST = 8
"""Exports that are remembered, the latest; a few MB each."""

LARGEST = 16 << 20
"""Bytes of constants, weights left out, up to which an export is remembered."""

_exports: OrderedDict[Hashable, Parts] = OrderedDict()


def key_of(model: nn.Module, images: Tensor, sites: Sequence[Site]) -> Hashable | None:
    """Tell all that an export depends on; None where something in the network cannot be told."""
    told = structure(model)
    where = images.shape[1:], images.dtype, images.device
    return None if told is None else (told, tuple(sites), where)


def recall(key: Hashable | None, model: nn.Module) -> Parts | None:
    """Return a remembered export with the weights of a network; None where there is none."""
    if key not in _exports:
        return None
    _exports.move_to_end(key)
    return _copied(_exports[key], dict(_weights(model).values()))


def remember(key: Hashable | None, parts: Parts, model: nn.Module) -> None:
    """Keep a copy of an export, with names in place of weights."""
    named = _weights(model)
    constants = {
        node: named[_place(value)][0]
        if isinstance(value, Tensor) and _place(value) in named
        else value
        for node, value in parts.constants.items()
    }
    if key is None or sum(v.nbytes for v in constants.values() if isinstance(v, Tensor)) > LARGEST:
        return
    _exports[key] = _copied(Parts(parts.graph, parts.images, parts.logits, constants), {})
    while len(_exports) > MOST:
        _exports.popitem(last=False)


def forget(key: Hashable | None = None) -> None:
    """Forget an export, or all of them."""
    if key is None:
        _exports.clear()
    _exports.pop(key, None)


def _weights(model: nn.Module) -> dict[Hashable, tuple[str, Tensor]]:
    """Names and values of parameters and buffers, by where they lie."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {_place(value): (name, value.detach()) for name, value in named if value.numel()}


def _place(value: Tensor) -> Hashable:
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _copied(parts: Parts, weights: Mapping[str, Tensor]) -> Parts:
    """Copy an export, whose graph its reader changes, with these weights in place of names."""
    graph = copy.deepcopy(parts.graph)
    node = dict(zip(parts.graph.nodes, graph.nodes, strict=True))
    for old, new in node.items():
        new.name = old.name  # a copy avoids Python's own names, such as input
    constants = {
        node[old]: weights.get(value, value) if isinstance(value, str) else value
        for old, value in parts.constants.items()
    }
    return Parts(graph, node[parts.images], node[parts.logits], constants)
