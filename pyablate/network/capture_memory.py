"""Captured networks that are kept while somebody says that they stay the same.

Exporting takes seconds, whatever is done with the graph. A network is known again by all that it
holds: its classes, its weights, and every attribute, hook and function of its modules. What lies
outside of it cannot be seen from here (a global variable, an attribute of a class), and
comparing logits does not show it either: a threshold may be reached by ablated units alone. So
nothing is kept unless :func:`keep_captures` is in force.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pyablate.network.graph import Graph

MOST_BYTES = 512 << 20
"""Of the weights of all graphs that are remembered: those used last stay."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_ITSELF = (type, FunctionType, BuiltinFunctionType)
"""Known by being the same object; the key holds them, so that no other takes their place."""

_kept: ContextVar[OrderedDict[Hashable, Graph] | None] = ContextVar("kept", default=None)


@contextmanager
def keep_captures() -> Iterator[None]:
    """Export each network once while this is in force, however often it is ablated.

    Exporting takes a second to half a minute, as a rule longer than the ablation of a few units.
    What changes in a network is noticed: weights, attributes, hooks, modules and functions put on
    it. What is not noticed are changes outside of it: do not change, within, global variables that
    its code reads, functions that it calls, or attributes of its classes. Kept are up to 512 MB of
    weights, on the CPU, until the block ends; in the same thread.

    Examples
    --------
    >>> with pa.keep_captures():
    ...     by_mean = pa.ablate(model, (images, labels), "features.13", intervention="mean")
    ...     by_zero = pa.ablate(model, (images, labels), "features.13")
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set(OrderedDict())
    try:
        yield
    finally:
        _kept.reset(token)


class _Unknown(Exception):
    """An object that cannot be told from another."""


def key_of(model: nn.Module, *further: Hashable) -> Hashable | None:
    """Describe a network by all that its graph follows from, and what further it depends on.

    Parameters
    ----------
    model : nn.Module
        The network.
    further : hashable
        How it is captured.

    Returns
    -------
    hashable or None
        Equal for equal networks, copies among them. None where nothing is kept, something cannot be
        compared, or lies on another device than the CPU, whose memory is not ours to hold.
    """
    if _kept.get() is None:
        return None
    try:
        state = _Description(model).told
    except (_Unknown, RecursionError):
        return None
    return state, further, torch.get_default_dtype()


def find(key: Hashable | None) -> Graph | None:
    """Return the graph that was kept under a key."""
    known = _kept.get()
    if key is None or known is None or key not in known:
        return None
    known.move_to_end(key)
    return known[key]


def keep(key: Hashable | None, graph: Graph) -> None:
    """Keep a graph, and forget those used longest ago where there are too many."""
    known = _kept.get()
    if key is None or known is None:
        return
    known[key] = graph
    known.move_to_end(key)
    while sum(map(_bytes, known.values())) > MOST_BYTES:
        known.popitem(last=False)


def _bytes(graph: Graph) -> int:
    held = [*graph.constants.values(), *graph.unrounded.values()]
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))


class _Description:
    """All that a network holds, as nested tuples."""

    def __init__(self, model: nn.Module) -> None:
        self._numbers: dict[int, int] = {}  # of objects met before, by id
        self._alive: list[Any] = []
        self.told = self._tell(model)

    def _tell(self, value: Any) -> Hashable:
        kind = type(value)
        if isinstance(value, _ITSELF):
            return kind, value
        if kind in _PLAIN:
            return kind, repr(value)  # 1 and True are equal, -0.0 and 0.0 too
        if id(value) in self._numbers:
            return "met before", self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)  # so that no other object gets its id
        return kind, self._parts(value)

    def _parts(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return value.shape, value.dtype.str, _digest(value)
        if isinstance(value, MethodType):
            return self._tell(value.__func__), self._tell(value.__self__)
        if isinstance(value, Mapping):
            return tuple((self._tell(k), self._tell(v)) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return tuple(map(self._tell, value))
        if isinstance(value, (set, frozenset)) and all(type(item) in _PLAIN for item in value):
            return tuple(sorted(map(repr, value)))
        if isinstance(value, nn.Module):
            return type(value).forward, self._tell(vars(value))
        if isinstance(value, Enum):
            return value.name
        if _is_its_attributes(value):
            return self._tell(vars(value))
        raise _Unknown


def _is_its_attributes(value: object) -> bool:
    """Whether an object holds nothing but its attributes: it is pickled like that."""
    kind = type(value)
    slots = any("__slots__" in vars(base) for base in kind.__mro__[:-1])
    return hasattr(value, "__dict__") and not slots and kind.__reduce_ex__ is object.__reduce_ex__


def _tensor(value: Tensor) -> Hashable:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    if not plain or value.device.type != "cpu" or value.is_quantized:
        raise _Unknown
    raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return tuple(value.shape), value.dtype, value.requires_grad, _digest(raw)


def _digest(values: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=32).digest()
