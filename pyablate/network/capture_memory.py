"""Graphs of networks captured before in this process: a second call need not export them again.

Exporting takes seconds, whatever is done with the graph. A network is known again by all that it
holds: its classes, its weights, and every attribute, hook and function of its modules. What lies
outside of it (a global variable that it reads) is not seen here; whoever takes a remembered graph
compares it with the network on some images.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
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

_known: OrderedDict[Hashable, Graph] = OrderedDict()
_lock = threading.Lock()


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
        Equal for equal networks, copies among them. None where something cannot be compared, or
        lies on another device than the CPU, whose memory is not ours to hold.
    """
    try:
        state = _Description(model).told
    except (_Unknown, RecursionError):
        return None
    return state, further, torch.get_default_dtype()


def find(key: Hashable | None) -> Graph | None:
    """Return the graph that was kept under a key."""
    with _lock:
        if key is None or key not in _known:
            return None
        _known.move_to_end(key)
        return _known[key]


def keep(key: Hashable | None, graph: Graph) -> None:
    """Keep a graph, and forget those used longest ago where there are too many."""
    if key is None:
        return
    with _lock:
        _known[key] = graph
        _known.move_to_end(key)
        while sum(map(_bytes, _known.values())) > MOST_BYTES:
            _known.popitem(last=False)


def forget() -> None:
    """Forget all graphs."""
    with _lock:
        _known.clear()


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
